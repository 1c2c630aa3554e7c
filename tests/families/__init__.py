"""Model families for the contract tests, one file each: a new file here is tested because it is here.

A family's file has `build(**options)`, which returns a tiny random backbone, and `by_diffusers`, which samples latents
by diffusers' own pipeline. `KINDS` names its variants, if it has several.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

MODULES = {found.name: importlib.import_module(f"families.{found.name}") for found in pkgutil.iter_modules(__path__)}
BUILDERS: Mapping[str, Callable[..., Any]] = {
    f"{name}-{kind}" if kind else name: partial(module.build, kind) if kind else module.build
    for name, module in MODULES.items()
    for kind in getattr(module, "KINDS", ("",))
}
