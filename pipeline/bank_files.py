"""What is done with the files of many motion banks: all of them checked, some of them copied elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from ditflow.artifact import ArtifactError
from ditflow.banks.bank import MotionBank
from pipeline.catalogue import Catalogue, is_bank
from pipeline.manifest import HASH_THREADS, Manifest, output_key
from pipeline.store import Store, StoreCredentialsError, StoreError, StoreMissingError, absolute_uri
from pipeline.waits import counted

_FOLDER = "/banks/"


@dataclass(frozen=True)
class BankProblem:
    """What is wrong with the file of a bank."""

    key: str
    detail: str


def check_banks(uri: str, storage_options: dict[str, Any]) -> tuple[int, list[BankProblem]]:
    """Read a bank, or every one of a folder or a job's output, as a whole; return how many, and what is wrong.

    Each is checked in itself, and against the manifest of the job that made it, if there is one: banks that the
    manifest names and that are gone are problems too. Raises StoreMissingError if there is none, StoreError from the
    storage.
    """
    banks, keys, closed = _files(uri, storage_options)
    recorded = _recorded(banks)
    gone = [] if is_bank(uri) else sorted(recorded.keys() - set(keys))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        checked = pool.map(lambda key: _problem(banks, key, recorded.get(key)), keys)
        read = counted(checked, "the banks to be checked", len(keys))
        problems = [problem for problem in read if problem is not None]
    problems += [BankProblem(key, reason) for key, reason in closed.items()]
    return len(keys), [*problems, *(BankProblem(key, "it is gone: the manifest records it as ok") for key in gone)]


def _files(uri: str, storage_options: dict[str, Any]) -> tuple[Store, list[str], dict[str, str]]:
    """The folder of the banks, their keys in it, and what in it cannot be listed."""
    if not is_bank(uri):
        catalogue = Catalogue.at(uri, storage_options)
        found, closed = catalogue.files()
        return catalogue.store, [*found], closed
    whole = absolute_uri(uri)
    folder, separator, key = whole.rpartition(_FOLDER)
    if not separator:
        folder, _, key = whole.rpartition("/")
    store = Store(folder + separator.rstrip("/"), storage_options)
    if not store.exists(key):
        raise StoreMissingError(f"there is no motion bank {whole}. Check its spelling.")
    return store, [key], {}


def _recorded(banks: Store) -> dict[str, str]:
    """The hash of every bank that the manifest beside a job's folder of banks records, by key."""
    root, separator, _ = f"{banks.uri}/".rpartition(_FOLDER)
    if not separator:
        return {}
    job = Store(root, banks.storage_options, banks.patience_s)
    rows = Manifest(job).read(["kind", "status", "output_uri", "output_sha256"]).to_pylist()
    made = [row for row in rows if (row["kind"], row["status"]) == ("build-bank", "ok")]
    return {(output_key(row["output_uri"]) or "").removeprefix(_FOLDER[1:]): row["output_sha256"] for row in made}


def _problem(banks: Store, key: str, recorded: str | None) -> BankProblem | None:
    try:
        data = banks.read(key)
        MotionBank.from_bytes(data, key)
    except StoreError as error:
        if error.transient or isinstance(error, StoreCredentialsError):
            raise
        return BankProblem(key, str(error))
    except ArtifactError as error:
        return BankProblem(key, str(error))
    found = sha256(data).hexdigest()
    if recorded not in (None, found):
        return BankProblem(key, f"its SHA-256 is {found}, the manifest has {recorded}: it was replaced by another bank")
    return None


def copy_banks(source: Catalogue, rows: Any, target: Store) -> Iterator[str]:
    """Copy the banks of a catalogue's rows into a folder, byte for byte, with a catalogue of their own; yield each key.

    Raises ValueError for two banks of one name, and for a file there that is another bank; StoreError from the storage.
    """
    keys = rows["key"].to_pylist()
    names = Counter(PurePosixPath(key).name for key in keys)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"{twice[0]} is the name of {names[twice[0]]} banks: they would replace each other. Rename them"
        )

    def copy(key: str) -> str:
        name, data = PurePosixPath(key).name, source.store.read(key)
        if not target.exists(name):
            target.put(name, data)
        elif target.read(name) != data:
            raise ValueError(f"{target.uri_of(name)} is there and is another bank: choose another folder, or remove it")
        return name

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        yield from counted(pool.map(copy, keys), "the banks to be copied", len(keys))
    Catalogue(target).refresh()
