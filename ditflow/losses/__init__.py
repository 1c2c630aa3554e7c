"""Motion losses, one file each. A new one is a new file here, or in `losses/` of a folder in `DITFLOW_PLUGINS`."""

from __future__ import annotations

from typing import Any

from ditflow.losses.base import DisplacementLoss, MotionLoss, Payload
from ditflow.registry import named_classes, plugin_folders

__all__ = ["MOTION_LOSSES", "DisplacementLoss", "MotionLoss", "Payload"]
__path__ += plugin_folders("losses")

MOTION_LOSSES: dict[str, Any] = named_classes(__name__, marker="captures")
"""Motion loss classes by name."""
