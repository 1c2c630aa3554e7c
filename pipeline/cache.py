"""Copies of remote files on this machine: fetched once, checked by their content, the oldest removed when it is full.

References are kept under the hash of their content, model folders under a hash of their listing (names, sizes, ETags).
Local files are used where they are. Several processes may use one cache: a copy is complete before it has its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ditflow.cache import cache_folder, warn_cache_unusable
from pipeline.job import Job
from pipeline.store import Store, StoreMissingError, is_local, local_folder, local_path
from pipeline.waits import counted

_DOWNLOADS_AT_ONCE = 4
_ABANDONED_S = 24 * 3600.0
"""What is unfinished and was not written to for so long is of a process that died."""
_COPY = re.compile("[0-9a-f]{64}(-[0-9]+)?")
"""Names of copies: a hash, and of a folder perhaps its user."""


class CacheError(OSError):
    """The cache cannot be written to, where there is no going on without it."""


@dataclass(frozen=True)
class NodeCache:
    """A folder of copies that holds at most `max_bytes`, but always the copy that was asked for last."""

    folder: Path
    max_bytes: int

    def read(self, uri: str, sha256: str | None, fetch: Callable[[], bytes]) -> bytes:
        """Return the content with this hash: the copy, or what `fetch` returns, of which a copy is kept.

        A copy that is not what it should be is replaced. What is fetched is returned as it is: whether it has the hash
        is for the caller to check; a copy is kept only if it has.
        """
        if is_local(uri) or sha256 is None:
            return fetch()
        file = self.folder / "files" / sha256
        try:
            data = file.read_bytes()
            if _sha256(data) == sha256:
                _mark_used(file)
                return data
        except FileNotFoundError:
            pass
        except OSError as error:
            warn_cache_unusable(self.folder, error.strerror)
        data = fetch()
        if _sha256(data) == sha256:
            try:
                self._write(data, file)
            except OSError as error:
                warn_cache_unusable(self.folder, error.strerror)
        return data

    def _write(self, data: bytes, file: Path) -> None:
        temporary = self._temporary()
        try:
            temporary.write_bytes(data)
            self._keep(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)  # of a copy that failed

    def folder_of(self, store: Store) -> Path:
        """Return a local copy of everything below the store's root.

        Raises StoreMissingError for an empty or missing folder, StoreError from the storage, CacheError for a cache
        that cannot be written to: a model cannot be loaded without a local copy.
        """
        listing = store.fingerprints()
        if not listing:
            raise StoreMissingError(f"there is nothing in {store.uri}: expected a diffusers model folder")
        name = _sha256("\n".join(f"{key} {mark}" for key, mark in sorted(listing.items())).encode())
        # Another user's copy may not be for this one to read.
        copies = [self.folder / "models" / one for one in (name, f"{name}-{os.getuid()}")]
        for copy in copies:
            if copy.is_dir() and _is_readable(copy):
                _mark_used(copy)
                return copy
        copy = next((copy for copy in copies if not copy.is_dir()), copies[-1])
        try:
            temporary = self._temporary()
        except OSError as error:
            raise CacheError(
                f"{store.uri}: a model on object storage needs a copy on this machine, and the cache cannot be written "
                f"to ({error.filename}: {error.strerror}). Set resources.cache.folder or DITFLOW_CACHE to another."
            ) from error
        try:
            with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
                copied = pool.map(lambda key: store.download(key, temporary / key), listing)
                list(counted(copied, f"the files of {store.uri} to be copied to this machine", len(listing)))
            self._keep(temporary, copy)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # of a copy that failed or came second
        return copy

    def _temporary(self) -> Path:
        folder = self.folder / "unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if re.fullmatch("[0-9a-f]{32}", path.name) and time.time() - _last_changed(path) > _ABANDONED_S:
                _remove(path)
        return folder / uuid.uuid4().hex

    def _keep(self, temporary: Path, copy: Path) -> None:
        """Give a complete copy its name, unless another process was faster, and make room."""
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(temporary, copy)
        except OSError:
            if not copy.is_dir():
                raise
        self._make_room(copy)

    def _make_room(self, newest: Path) -> None:
        """Remove the copies that were not used for longest until the rest fits."""
        # The folder may be one that a spec names, with files of the user's own.
        named = [*self.folder.glob("files/*"), *self.folder.glob("models/*")]
        copies = [path for path in named if _COPY.fullmatch(path.name) and not path.is_symlink()]
        by_age = sorted((path for path in copies if path != newest), key=_last_used, reverse=True)
        held = _bytes_of(newest)
        for path in by_age:
            held += _bytes_of(path)
            if held > self.max_bytes:
                _remove(path)


def node_cache(job: Job) -> NodeCache:
    """Return the cache of this machine."""
    settings = job.resources.cache
    folder = cache_folder() / "node" if settings.folder is None else Path(local_folder(settings.folder))
    return NodeCache(folder, settings.max_bytes)


def local_model(job: Job) -> str:
    """Return the job's model as `ditflow.backbones` takes it: its path, or a copy of its folder on object storage."""
    path = job.model.path
    if "://" not in path or is_local(path):
        return local_path(path) if path.startswith(("file:", "local:")) else path
    return str(node_cache(job).folder_of(Store(path, job.storage_options, job.faults.storage_patience_s)))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _mark_used(copy: Path) -> None:
    with suppress(OSError):  # another user's; its age decides only which copy is removed first
        os.utime(copy)


def _is_readable(folder: Path) -> bool:
    """Return whether all of a folder can be read by this user."""
    try:
        return all(
            os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)) for path in [folder, *folder.rglob("*")]
        )
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Remove a copy, if it is this user's to remove; one that stays only takes room."""
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


def _last_changed(path: Path) -> float:
    """Return when anything in a file or folder was written to last; now, if that cannot be told."""
    try:
        return max(file.stat().st_mtime for file in [path, *path.rglob("*")])
    except OSError:
        return time.time()


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process made room
        return 0.0


def _bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    try:
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0
