"""The embedded tiny models and the synthetic world they live in."""

from __future__ import annotations

from pathlib import Path


def mini_folder(name: str) -> Path:
    """Return the folder of an embedded model (`mini`, `mini-rotary`, `mini-additive`), built on the first call."""
    from ditflow.mini import build

    return build.mini_folder(name)
