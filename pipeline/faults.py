"""Faults: what kind of error ended an attempt, which errors are worth a retry, and how often a row was tried.

The kinds are those of the manifest's `error_kind`. `transient`, `permanent` and `out_of_memory` are told from
an exception by `classify`; `worker_died` and `deadline` leave no exception behind and are found by who
watches.
"""

from __future__ import annotations

import errno
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import tenacity

from ditflow.errors import SettingsError
from pipeline.record import check_row_id
from pipeline.store import (
    Store,
    StoreDamagedError,
    StoreError,
    StoreMissingError,
    StoreUnwritableError,
    is_transient,
    redact,
)

MESSAGE_CHARACTERS = 2000
FOLDER = "attempts"
READING, EVALUATING = "read-", "evaluate-"
"""What the ledger's names of work begin with that has no id of its own."""
_READ_THREADS = 16  # waiting for storage, not computing

_Result = TypeVar("_Result")


class JobStoppedError(RuntimeError):
    """No row can be made as things are: the run was stopped; finished rows keep their records."""


class TooManyFailuresError(JobStoppedError):
    """More rows failed than the job allows."""


@dataclass(frozen=True)
class Policy:
    """How often and how patiently a row is tried; every default of the retrying stands here.

    `attempts` counts tries of a row in all; `worker_died_attempts` those that ended with their process, of
    which more are allowed because preempted machines are no fault of the row. Backoff in seconds. An attempt that
    takes longer than `row_deadline_s` is ended with its process. Storage that throttles, or cannot be reached, is
    waited for at most `storage_patience_s`, time and again within an attempt.

    A run stops when more than `max_failed_fraction` of the job's rows have failed, or `max_failures_in_a_row` one
    after the other; rows of one reference that could not be read count once. A run that is not heard of for `lease_s`
    gives its output up to another.

    Raises ValueError for counts below 1 and for negative or contradicting times.
    """

    attempts: int = 3
    worker_died_attempts: int = 5
    base_seconds: float = 0.5
    max_seconds: float = 20.0
    row_deadline_s: float = 3600.0
    storage_patience_s: float = 300.0
    max_failed_fraction: float = 1.0
    max_failures_in_a_row: int = 50
    lease_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("attempts", "worker_died_attempts", "max_failures_in_a_row"):
            if getattr(self, name) < 1:
                raise SettingsError(name, getattr(self, name), "at least 1")
        if not self.storage_patience_s >= 0:
            raise SettingsError("storage_patience_s", self.storage_patience_s, "seconds, 0 or more")
        if not self.row_deadline_s > 0:
            raise SettingsError("row_deadline_s", self.row_deadline_s, "seconds above 0")
        if not self.lease_s >= 1:
            raise SettingsError("lease_s", self.lease_s, "at least 1 second")
        if not 0 <= self.max_failed_fraction <= 1:
            raise SettingsError("max_failed_fraction", self.max_failed_fraction, "0 to 1")
        if not 0 <= self.base_seconds <= self.max_seconds:
            raise SettingsError("base_seconds", self.base_seconds, f"0 to max_seconds ({self.max_seconds})")


@dataclass(frozen=True)
class Fault:
    """An error as the manifest records it: its kind, its class, and one paragraph without credentials."""

    kind: str
    error_class: str
    message: str

    @property
    def stops_job(self) -> bool:
        """Whether it is no row's fault and would meet every other row as well; the manifest has no such kind."""
        return self.kind == STOPS_JOB


STOPS_JOB = "job"
"""The kind of a fault that no row is to blame for: a model that cannot load, an output that cannot be written to."""


def fault_of_job(error: BaseException) -> Fault:
    """Return an error that no row is to blame for as the fault that stops the job."""
    return replace(classify(error), kind=STOPS_JOB)


def classify(error: BaseException) -> Fault:
    """Return what an exception means for its row: kind, class, and its message with those of its causes.

    STOPS_JOB if the output cannot be written to, else out_of_memory if any error of the chain of causes says so, else
    transient if any is, else permanent: what is not known to pass by itself is not worth another hour of a GPU.
    """
    chain = list(_chain(error))
    return Fault(_kind(chain), type(chain[0]).__name__, _message(chain))


def _kind(chain: list[BaseException]) -> str:
    if any(isinstance(error, StoreUnwritableError) for error in chain):  # inputs are never written: it is the output
        return STOPS_JOB
    if any(_is_out_of_memory(error) for error in chain):
        return "out_of_memory"
    for error in chain:
        if isinstance(error, StoreError):  # it has judged its causes already
            return "transient" if error.transient else "permanent"
        if is_transient(error):
            return "transient"
    return "permanent"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, outermost first.

    Only what `raise ... from` names is a cause: an error that merely was being handled may be unrelated.
    Ray's task errors keep the worker's exception in `cause`, and say nothing of their own.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        carried = getattr(current, "cause", None)
        if isinstance(carried, BaseException):
            current = carried
            continue
        yield current
        current = current.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__):  # torch's, without importing torch
        return True
    # Older torch raises a plain RuntimeError, and so do cuBLAS, cuDNN and the CPU allocator.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _MEMORY_SIGNS)


_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cublas_status_alloc_failed",
)


def breaks_device(error: BaseException) -> bool:
    """Return whether an error leaves this process's GPU context unusable, so that every later row would fail in it."""
    for one in _chain(error):
        text = str(one).lower()
        if isinstance(one, RuntimeError) and not _is_out_of_memory(one) and any(sign in text for sign in _DEVICE_SIGNS):
            return True
    return False


_DEVICE_SIGNS = (
    "cuda error",
    "cudnn_status_execution_failed",
    "cublas_status_execution_failed",
    "cublas_status_internal_error",
    "nccl error",
    "hip error",
)


def _message(chain: list[BaseException]) -> str:
    parts = []
    for error in chain:
        text = " ".join(str(error).split())
        parts.append(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    # The outermost text stands without its class, which has a column of its own.
    first = " ".join(str(chain[0]).split())
    whole = redact("; caused by ".join([first or parts[0], *parts[1:]]))
    return whole if len(whole) <= MESSAGE_CHARACTERS else whole[: MESSAGE_CHARACTERS - 4] + " ..."


def retry_faults(
    function: Callable[[], _Result],
    attempts: int,
    base_seconds: float,
    max_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    on_retry: Callable[[BaseException], object] = lambda error: None,
) -> _Result:
    """Return `function()`, calling it again after a transient fault, at most `attempts` times in all.

    on_retry: told of every error that leads to another try, before it.

    Waits a random time up to `base_seconds`, then twice that, four times, ... never above `max_seconds`: many
    workers that failed together must not come back together.

    Raises the function's own error: the last one, or at once one that is not transient.
    """

    def told(state: tenacity.RetryCallState) -> None:
        on_retry(_error_of(state))

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=base_seconds, max=max_seconds),
        retry=tenacity.retry_if_exception(lambda error: classify(error).kind == "transient"),
        sleep=sleep,
        before_sleep=told,
        reraise=True,
    )
    return retrying(function)


def _error_of(state: tenacity.RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


class Ledger:
    """The tries of each row, written to storage before each try, so that a process that dies leaves its mark.

    `attempts/<row_id>/001.json`, `002.json`, ... exist from a try's beginning until its row is in the
    manifest. Cheap to pickle, like its store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def begin(self, row_id: str, attempt_info: Mapping[str, Any]) -> int:
        """Record that a try of the row begins and return its number, 1 for the first.

        `attempt_info` is stored with it and must be JSON (node, process id, ...). One request for a first
        try.

        Raises StoreError from the storage, TypeError if the info is no JSON.
        """
        token = uuid.uuid4().hex
        number = 1
        while not self._claim(row_id, number, token, attempt_info):
            number = max(number, self._last(row_id)) + 1
        return number

    def attempts(self, row_id: str) -> list[dict[str, Any]]:
        """Return what `begin` stored for each try of the row, in order; empty once it is ended."""
        tries = (self._marker(key, dict) for key in self._keys(row_id))
        return [marker for marker in tries if marker is not None]

    def end(self, row_id: str) -> None:
        """Remove the row's tries. Call it after the row's record is in the manifest, never before."""
        # Last first: an interruption leaves 001, 002, ... without a gap, on which begin() relies.
        # "deadline" and "last-words" sort behind every number.
        for key in sorted(self.store.list(f"{FOLDER}/{check_row_id(row_id)}"), key=_by_number, reverse=True):
            self.store.delete(key)

    def end_all(self, row_ids: Collection[str]) -> None:
        """End those of these rows that were begun; their processes died after the record was written."""
        for row_id in self.unfinished():
            if row_id in row_ids:
                self.end(row_id)

    def forgive(self) -> None:
        """Take back the latest try of every row that was begun and not ended: the run was stopped, not the row's fault.

        For a job whose processes have ended.
        """
        for row_id in self.unfinished():
            self.store.delete(self._keys(row_id)[-1])

    def note(self, row_id: str, words: str) -> None:
        """Leave the last words of a process that is about to end over the row."""
        self.store.put(_note_key(row_id), words.encode())

    def noted(self, row_id: str) -> str:
        """Return the last words of the latest process that left any, or nothing."""
        try:
            return self.store.read(_note_key(row_id)).decode(errors="replace")
        except StoreMissingError:
            return ""

    def expire(self, row_id: str) -> None:
        """Record that a try of the row is ended by its deadline, with its process."""
        self.store.put(_deadline_key(row_id), b"")

    def expired(self, row_id: str) -> bool:
        """Return whether a try of the row was ended by its deadline."""
        return self.store.exists(_deadline_key(row_id))

    def unfinished(self) -> dict[str, int]:
        """Return the number of tries by row id of every row that was begun and not ended."""
        return dict(Counter(key.split("/")[1] for key in self._markers(FOLDER)))

    def in_flight(self, make: Callable[[Any], Any] = dict) -> list[Any]:
        """Return what `make` makes of the latest try of all that was begun and not ended, the oldest first.

        Raises StoreDamagedError, which names the file, for a try of which nothing can be made.
        """

        def timed(marker: Any) -> tuple[str, Any]:
            return str(marker["started_at"]), make(marker)

        keys = sorted(self._markers(FOLDER), key=_by_number)
        latest = {key.split("/")[1]: key for key in keys}
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            markers = [marker for marker in pool.map(lambda key: self._marker(key, timed), latest.values()) if marker]
        return [made for _, made in sorted(markers, key=lambda marker: marker[0])]

    def _marker(self, key: str, make: Callable[[Any], _Result]) -> _Result | None:
        try:
            return self.store.read_record(key, make, "remove it if no run works on this output: the row is tried again")
        except StoreMissingError:  # it has ended
            return None

    def _claim(self, row_id: str, number: int, token: str, info: Mapping[str, Any]) -> bool:
        started_at = datetime.now(UTC).isoformat()
        marker = {**info, "row_id": row_id, "attempt": number, "token": token, "started_at": started_at}
        key = _key(row_id, number)
        if self.store.create(key, json.dumps(marker).encode()):
            return True
        # A request that succeeded but whose answer was lost is repeated and then loses to itself.
        try:
            return self.store.read_record(key, lambda found: found["token"] == token, "")
        except StoreDamagedError:  # another try, then
            return False

    def _last(self, row_id: str) -> int:
        keys = self._keys(row_id)
        return int(keys[-1].rsplit("/", 1)[-1].removesuffix(".json")) if keys else 0

    def _keys(self, row_id: str) -> list[str]:
        return sorted(self._markers(f"{FOLDER}/{check_row_id(row_id)}"), key=_by_number)

    def _markers(self, folder: str) -> list[str]:
        """Return the keys of all tries below a folder; last words, deadlines and foreign files are none."""
        return [key for key in self.store.list(folder) if _MARKER.fullmatch(key)]


_MARKER = re.compile(rf"{FOLDER}/[^/]+/[0-9]{{3,}}\.json")


def _key(row_id: str, number: int) -> str:
    return f"{FOLDER}/{check_row_id(row_id)}/{number:03d}.json"


def _by_number(key: str) -> tuple[int, str]:
    return (len(key), key)


def _deadline_key(row_id: str) -> str:
    return f"{FOLDER}/{check_row_id(row_id)}/deadline"


def _note_key(row_id: str) -> str:
    return f"{FOLDER}/{check_row_id(row_id)}/last-words"
