"""Where losses, metrics and backbones are found: one file each, in their package here or in a folder of your own.

The folders named by the environment variable `DITFLOW_PLUGINS` (separated like `PATH`) may hold `losses/`, `metrics/`
and `backbones/`; the files there count as if they lay in the package of that name. They are code: name only your own.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PLUGINS_VARIABLE = "DITFLOW_PLUGINS"


def plugin_folders(package: str) -> list[str]:
    """Return your own folders for a package such as `losses`: what is to be added to its `__path__`."""
    roots = filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep))
    return [str(folder) for root in roots if (folder := Path(root).expanduser().resolve() / package).is_dir()]


def modules_of(package: str) -> Iterator[ModuleType]:
    """Import the modules of a package, one after the other."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        yield importlib.import_module(f"{package}.{found.name}")


def named_classes(package: str, marker: str) -> dict[str, Any]:
    """Return the classes that a package's modules define with a `name` and with the attribute `marker`, by name."""
    classes = [item for module in modules_of(package) for item in vars(module).values() if _is_own(item, module)]
    return {vars(item)["name"]: item for item in classes if {"name", marker} <= vars(item).keys()}


def _is_own(item: Any, module: ModuleType) -> bool:
    return isinstance(item, type) and item.__module__ == module.__name__
