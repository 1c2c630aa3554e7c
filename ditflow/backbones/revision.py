"""The identity of a model folder: a hash of everything that changes what it computes."""

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

from ditflow.cache import cache_folder, go_on_without_cache

_WEIGHTS_AND_WORDS = {".json", ".safetensors", ".model", ".txt"}


def folder_revision(folder: Path) -> str:
    """Hash of the folder's configurations, weights and vocabularies: 16 hex digits.

    The same model has the same revision wherever it lies. Hashes of single files are remembered by path, size and
    time of change, so that 20 GB of weights are read once per machine.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in _WEIGHTS_AND_WORDS
        and file.name != "ditflow.json"
        and ".cache" not in file.relative_to(folder).parts
    )
    remembered = _load_remembered()
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda file: _file_hash(file, remembered), files))
    _remember(dict(zip(map(_key, files), hashes, strict=True)))
    digest = hashlib.sha256()
    for file, file_hash in zip(files, hashes, strict=True):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_hash}\n".encode())
    return digest.hexdigest()[:16]


def _key(file: Path) -> str:
    stat = file.stat()
    return f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _file_hash(file: Path, remembered: dict[str, str]) -> str:
    if (known := remembered.get(_key(file))) is not None:
        return known
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _memory_file() -> Path:
    return cache_folder() / "file-hashes.json"


def _load_remembered() -> dict[str, str]:
    try:
        remembered = json.loads(_memory_file().read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        go_on_without_cache(cache_folder(), error.strerror)
        return {}
    except (ValueError, RecursionError):
        remembered = None
    if isinstance(remembered, dict) and all(_is_hash(value) for value in remembered.values()):
        return remembered
    logging.getLogger("ditflow").warning("%s is damaged: the hashes of files are computed anew", _memory_file())
    return {}


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _remember(new: dict[str, str]) -> None:
    """Add to the memory; of two processes at once the last one wins, which costs a hash, not correctness."""
    file = _memory_file()
    # Machines and containers that share the folder share process numbers, too.
    temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_load_remembered() | new))
        temporary.replace(file)
    except OSError as error:
        go_on_without_cache(cache_folder(), error.strerror)
        with suppress(OSError):
            temporary.unlink()
