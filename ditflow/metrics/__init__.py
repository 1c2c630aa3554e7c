"""Metrics of finished videos, one file each. A new one is a new file here with a class that has a `name`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = ["METRICS"]


def _discover() -> dict[str, Any]:
    """Find every class with a `name` and `needs` defined in a module of this package."""
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for item in vars(module).values():
            if isinstance(item, type) and item.__module__ == module.__name__ and {"name", "needs"} <= vars(item).keys():
                found[vars(item)["name"]] = item
    return found


METRICS: dict[str, Any] = _discover()
"""Metric classes by name."""
