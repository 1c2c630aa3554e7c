"""The revision of a model folder: a hash of all files that affect its results."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ditflow.cache import cache_folder, warn_cache_unusable

_HASHED_SUFFIXES = {".json", ".safetensors", ".model", ".txt"}


def folder_revision(folder: Path) -> str:
    """Return the hash of the folder's configurations, weights and vocabularies: 16 hex digits.

    It does not depend on the location. Hashes of files are cached by path, size and modification time, so that 20 GB of
    weights are read once per machine.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in _HASHED_SUFFIXES
        and file.name != "ditflow.json"
        and ".cache" not in file.relative_to(folder).parts
    )
    cached = _load_hashes()
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda file: _file_hash(file, cached), files))
    _save_hashes(dict(zip(map(_key, files), hashes, strict=True)))
    digest = hashlib.sha256()
    for file, file_hash in zip(files, hashes, strict=True):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_hash}\n".encode())
    return digest.hexdigest()[:16]


def _key(file: Path) -> str:
    stat = file.stat()
    return f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _file_hash(file: Path, cached: dict[str, str]) -> str:
    if (known := cached.get(_key(file))) is not None:
        return known
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _cache_file() -> Path:
    return cache_folder() / "file-hashes.json"


def _load_hashes() -> dict[str, str]:
    try:
        hashes = json.loads(_cache_file().read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        warn_cache_unusable(cache_folder(), error.strerror)
        return {}
    except (ValueError, RecursionError):
        hashes = None
    if isinstance(hashes, dict) and all(_is_hash(value) for value in hashes.values()):
        return hashes
    logging.getLogger("ditflow").warning("%s is damaged: the hashes of files are computed again", _cache_file())
    return {}


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _save_hashes(new: dict[str, str]) -> None:
    """Add hashes to the cache; of two concurrent processes the last one wins, which costs a hash, not correctness."""
    file = _cache_file()
    # Not the process id: machines and containers that share the folder may have equal ones.
    temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_load_hashes() | new))
        temporary.replace(file)
    except OSError as error:
        warn_cache_unusable(cache_folder(), error.strerror)
        with suppress(OSError):
            temporary.unlink()
