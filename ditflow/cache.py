"""Where this machine keeps what can be computed again."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: DITFLOW_CACHE, else ditflow under XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("DITFLOW_CACHE"):
        return Path(os.path.expanduser(own))
    if (shared := os.environ.get("XDG_CACHE_HOME")) and os.path.isabs(shared):  # others are invalid, by its standard
        return Path(shared) / "ditflow"
    try:
        return Path.home() / ".cache" / "ditflow"
    except RuntimeError:  # neither HOME nor an entry in passwd, as in a container that runs under any user id
        return Path(os.devnull) / "ditflow"  # a folder that nobody can make


@cache
def go_on_without_cache(folder: Path, reason: str | None) -> None:
    """Warn, once per process, that a cache cannot be used. What it would hold is computed or read again."""
    logging.getLogger("ditflow").warning(
        "the cache %s cannot be used (%s): going on without it. Set DITFLOW_CACHE to a folder that can be written to",
        folder,
        reason,
    )
