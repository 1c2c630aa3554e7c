"""Filters of motion targets, one file each; also in `filters/` of a folder in `DITFLOW_PLUGINS`."""

from __future__ import annotations

from typing import Any

from ditflow.motion.filters.base import ClipContext, MotionFilter
from ditflow.registry import named_classes, plugin_folders

__all__ = ["FILTERS", "ClipContext", "MotionFilter"]
__path__ += plugin_folders("filters")

FILTERS: dict[str, Any] = named_classes(__name__, marker="needs_mask")
"""Motion filter classes by name."""
