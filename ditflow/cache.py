"""The cache folder of this machine; everything in it can be computed again."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: DITFLOW_CACHE, else ditflow under XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("DITFLOW_CACHE"):
        return Path(os.path.expanduser(own))
    if (shared := os.environ.get("XDG_CACHE_HOME")) and os.path.isabs(
        shared
    ):  # the XDG specification ignores relative paths
        return Path(shared) / "ditflow"
    try:
        return Path.home() / ".cache" / "ditflow"
    except RuntimeError:  # neither HOME nor a passwd entry, as in a container with an arbitrary user id
        return Path(os.devnull) / "ditflow"  # a folder that cannot be created


@cache
def warn_cache_unusable(folder: Path, reason: str | None) -> None:
    """Warn, once per process, that a cache cannot be used. Its contents are computed or read again."""
    logging.getLogger("ditflow").warning(
        "the cache %s cannot be used (%s): continuing without it. Set DITFLOW_CACHE to a writable folder",
        folder,
        reason,
    )
