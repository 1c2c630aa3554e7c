"""Metrics of finished videos, one file each; a new one is a file here or a plug-in (`ditflow.registry`)."""

from __future__ import annotations

from typing import Any

from ditflow.registry import named_classes, plugin_folders

__all__ = ["METRICS"]
__path__ += plugin_folders("metrics")

METRICS: dict[str, Any] = named_classes(__name__, marker="needs")
"""Metric classes by name."""
