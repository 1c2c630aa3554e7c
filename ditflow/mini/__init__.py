"""The embedded tiny models and the synthetic world they live in."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def mini_folder(name: str) -> Path:
    """Return the folder of an embedded model: `mini-rotary`, which is also called `mini`, or `mini-additive`."""
    return WEIGHTS / ("mini-rotary" if name == "mini" else name)
