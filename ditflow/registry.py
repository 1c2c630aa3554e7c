"""Discovery of losses, metrics and backbones: one module each, in their package or in a plug-in.

A plug-in is a file in `losses/`, `metrics/` or `backbones/` of a folder named by the environment variable
`DITFLOW_PLUGINS` (separated like `PATH`), or a module that an installed distribution declares as an entry point in the
group `ditflow.losses`, `ditflow.metrics` or `ditflow.backbones`. Plug-ins are code that is run: use only trusted ones.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from ditflow.errors import DitflowError

PLUGINS_VARIABLE = "DITFLOW_PLUGINS"


class PluginError(DitflowError, ImportError):
    """A plug-in cannot be used."""

    default_code = "plugin-broken"


def plugin_folders(package: str) -> list[str]:
    """Return the plug-in folders of a package such as `losses`, to be appended to its `__path__`."""
    roots = filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep))
    return [str(folder) for root in roots if (folder := Path(root).expanduser().resolve() / package).is_dir()]


def modules_of(package: str) -> Iterator[ModuleType]:
    """Import the modules of a package, then those of the entry points in the group of the same name."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        yield importlib.import_module(f"{package}.{found.name}")
    yield from map(_load, entry_points(group=package))


def named_classes(package: str, marker: str) -> dict[str, Any]:
    """Return the classes with a `name` and the attribute `marker` that the modules of a package define, by name."""
    classes: dict[str, Any] = {}
    for module in modules_of(package):
        for item in vars(module).values():
            if not _is_own_class(item, module) or not {"name", marker} <= vars(item).keys():
                continue
            other = classes.setdefault(vars(item)["name"], item)
            if other is not item:
                raise PluginError(
                    f"{item.__module__} and {other.__module__} both define {package} of the name {item.name!r}, "
                    "expected different names. Rename or uninstall one of the two.",
                    code="plugin-name-taken",
                )
    return classes


def _load(entry: EntryPoint) -> ModuleType:
    """Import the module that an entry point names."""
    distribution = entry.dist.name if entry.dist else "an unknown package"
    place = f"{distribution}: the entry point {entry.name!r} in the group {entry.group} ({entry.value})"
    try:
        module = entry.load()
    except Exception as error:
        raise PluginError(
            f"{place} cannot be imported: {type(error).__name__}: {error}. Most likely it was written for another "
            f"release of ditflow or a dependency is missing: upgrade {distribution}, or uninstall it."
        ) from error
    if not isinstance(module, ModuleType):
        raise PluginError(
            f"{place} names a {type(module).__name__}, expected a module. Declare it as `{entry.name} = "
            f'"{entry.module}"` in {distribution}, or uninstall {distribution}.'
        )
    return module


def _is_own_class(item: Any, module: ModuleType) -> bool:
    return isinstance(item, type) and item.__module__ == module.__name__
