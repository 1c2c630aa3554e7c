"""Sources of motion targets, one file each; also in `sources/` of a folder in `DITFLOW_PLUGINS`."""

from __future__ import annotations

from typing import Any

from ditflow.motion.sources.base import MotionSource, VideoSource
from ditflow.registry import named_classes, plugin_folders

__all__ = ["SOURCES", "MotionSource", "VideoSource"]
__path__ += plugin_folders("sources")

SOURCES: dict[str, Any] = named_classes(__name__, marker="uses_model")
"""Motion source classes by name."""
