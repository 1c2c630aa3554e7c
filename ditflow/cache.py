"""Where this machine keeps what can be computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: DITFLOW_CACHE, else ditflow under XDG_CACHE_HOME or ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ditflow"
    return Path(os.environ.get("DITFLOW_CACHE", default))
