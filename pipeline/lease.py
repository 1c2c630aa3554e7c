"""One run at a time: a lease on a job's output folder.

`lease/<number>.json` names its holder, who writes it anew all the time; the highest number counts. A run that finds the
newest file unchanged for `expires_s` seconds of its own clock takes the lease over by creating the next number, which
only one can do; clocks of different machines are never compared. A holder that could not renew its lease for so long,
or that finds a higher number, has lost it and must stop.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.logs import ERROR, event
from pipeline.store import Store, StoreDamagedError, StoreError, StoreMissingError

FOLDER = "lease"
_RENEWALS = 6
"""How often a lease is renewed before it would expire."""
_LONGEST_WAIT_S = 3600.0
"""For a holder to show that it lives, whatever its file says."""


class LeaseHeldError(RuntimeError):
    """Another run is working on the same output."""


class LeaseLostError(RuntimeError):
    """Another run took the output over, or may have: this one could not be heard of, or its output is gone."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. beat: how often it was renewed; processes: see `_process_table`; expires_s: see `Lease`."""

    number: int
    token: str
    host: str
    pid: int
    since: str
    beat: int = 0
    processes: str | None = None
    expires_s: float = 0.0

    @classmethod
    def here(cls, number: int, expires_s: float = 0.0) -> Holder:
        """Return this process as a holder."""
        since, processes = datetime.now(UTC).isoformat(timespec="seconds"), _process_table()
        return cls(number, uuid.uuid4().hex, socket.gethostname(), os.getpid(), since, 0, processes, expires_s)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def surely_dead(self) -> bool:
        """Whether its process is known to be gone: its number here is nobody's, or this process's."""
        return self.is_gone or (self._is_known_here and self.pid == os.getpid())

    @property
    def is_gone(self) -> bool:
        """Whether its process was in this process table and is there no more."""
        if not self._is_known_here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    @property
    def _is_known_here(self) -> bool:
        """Whether its process number means the same process here."""
        here = self.host, self.processes
        return self.processes is not None and here == (socket.gethostname(), _process_table())


@cache
def _process_table() -> str | None:
    """Return what identifies the table that process numbers are taken from, or None where nothing does.

    A host name does not: containers share it, and a process number of one means nothing in another. On Linux, the boot
    of the kernel and the PID namespace do.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


@dataclass(frozen=True)
class Held:
    """A lease as its file tells of it. renewed_at: by the storage's clock, if it tells."""

    holder: Holder
    renewed_at: datetime | None


def held(store: Store) -> Held | None:
    """Return the newest lease on an output, or None if nobody holds one.

    Nothing is waited for, so it may be that of a run that is dead.
    """
    found = store.entries(FOLDER)
    number = max(_numbers(found), default=0)
    holder = _read(store, number) if number else None
    return None if holder is None else Held(holder, found[_key(number)].written)


class Lease:
    """The right to work on an output folder, for the length of a `with` block.

    Entering raises LeaseHeldError if another run is alive, and waits up to `expires_s` to find out, or for as long as
    that run's lease lasts; `on_wait` is told for whom. A lease that is lost interrupts the main thread, as Ctrl-C does,
    and `check` says why. StoreError comes from the storage.

    Two threads: one renews, after checking that the lease is still this run's, however late it is: a process that stood
    still for a while has not lost it unless another run began. The other thread ends the run if the storage does not
    answer the first one in time: then another run may have begun.
    """

    def __init__(
        self,
        store: Store,
        expires_s: float = 60.0,
        on_wait: Callable[[Holder], None] = lambda holder: None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._store, self._expires_s, self._on_wait, self._sleep = store, expires_s, on_wait, sleep
        self._ended = threading.Event()
        self._lost: str | None = None
        self._asking_since: float | None = None
        self._trouble = "the storage does not answer"
        self._threads = [
            threading.Thread(target=work, name="lease", daemon=True) for work in (self._renew, self._watch)
        ]

    def __enter__(self) -> Lease:
        self._renewed = time.monotonic()
        self._holder = self._acquired()
        self._store.needs = _key(self._holder.number)  # an output that is gone is not made anew
        event("lease_taken", number=self._holder.number)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(self._expires_s)
        self._store.needs = None
        reason: str | None = None
        with suppress(StoreError):  # what is left behind expires by itself
            reason = self._why_not_own()
            if reason is None:
                for number in sorted(_numbers(self._store.list(FOLDER))):
                    if number <= self._holder.number:
                        self._store.delete(_key(number))
        event("lease_given_back", number=self._holder.number)
        if reason is not None and self._lost is None and error is None:
            self._lost = reason  # a run whose output was moved a moment ago has not succeeded
            self.check()

    def check(self) -> None:
        """Raise LeaseLostError if this run must not go on."""
        if self._lost is not None:
            raise LeaseLostError(
                f"{self._store.uri}: {self._lost}. Finished rows keep their records. See that no other run works on "
                "this output, then run the job again."
            )

    def _acquired(self) -> Holder:
        while True:
            number = max(_numbers(self._store.list(FOLDER)), default=0)
            if number and not self._is_free(number):
                continue
            before = _read(self._store, number) if number else None
            self._renewed = time.monotonic()
            holder = Holder.here(number + 1, self._expires_s)
            if self._store.create(_key(holder.number), _encode(holder)) or _read(self._store, holder.number) == holder:
                now = _read(self._store, number) if number else None
                if before is not None and now is not None and now != before:
                    # Renewed in the last moment: its run sees this lease at its next renewal, unless that was it.
                    self._store.delete(_key(holder.number))
                    raise LeaseHeldError(_held_by(self._store, now))
                return holder

    def _is_free(self, number: int) -> bool:
        """Watch the newest lease: True if nobody renews it, False if it was given back, LeaseHeldError if it lives."""
        first = _read(self._store, number)
        if first is None or first.surely_dead:
            return first is not None
        self._on_wait(first)
        patience_s = max(self._expires_s, min(first.expires_s, _LONGEST_WAIT_S))
        for _ in range(2 * _RENEWALS):
            self._sleep(patience_s / (2 * _RENEWALS))
            now = _read(self._store, number)
            if now is None:
                return False
            if now != first:
                raise LeaseHeldError(_held_by(self._store, now))
        return True

    def _renew(self) -> None:
        while not self._ended.wait(self._expires_s / _RENEWALS):
            if self._asking_since is None:
                self._asking_since = time.monotonic()
            try:
                if self._lost is not None or not self._is_still_own():
                    return
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._store.put(_key(self._holder.number), _encode(self._holder))
                self._renewed, self._asking_since = time.monotonic(), None
            except StoreDamagedError as error:
                self._lose(str(error))
                return
            except StoreError as error:
                self._trouble = str(error)
                self._lose_if_unanswered()
            except BaseException as error:
                self._lose(f"the run's lease can no longer be renewed ({type(error).__name__}: {error})")
                return

    def _watch(self) -> None:
        while self._lost is None and not self._ended.wait(self._expires_s / (2 * _RENEWALS)):
            self._lose_if_unanswered()

    def _is_still_own(self) -> bool:
        """Return whether the newest lease is this run's, which has lost it if not."""
        if max(_numbers(self._store.list(FOLDER)), default=0) > self._holder.number:
            self._lose("another run took this output over")
            return False
        reason = self._why_not_own()
        if reason is not None:
            self._lose(reason)
        return self._lost is None

    def _why_not_own(self) -> str | None:
        """Read the file of this lease back; return why it is not this run's any more, or None if it is."""
        found = _read(self._store, self._holder.number)
        if found is None:
            return "the file of its lease is gone: the output was moved, emptied or unmounted"
        if found.token != self._holder.token:
            return f"another run works on this output ({found}): it was emptied or replaced meanwhile"
        return None

    def _lose_if_unanswered(self) -> None:
        """Lose an expired lease, unless the storage has only just been asked: this process stood still before."""
        asking_since, now = self._asking_since, time.monotonic()
        if asking_since is not None and min(now - self._renewed, 2 * (now - asking_since)) > self._expires_s:
            self._lose(f"the run's lease could not be renewed for {self._expires_s:g} seconds ({self._trouble})")

    def _lose(self, reason: str) -> None:
        if self._lost is not None or self._ended.is_set():
            return
        self._lost = reason
        event("lease_lost", ERROR, number=self._holder.number, reason=reason)
        # Shells start background processes with SIGINT ignored; then nobody would be interrupted by it. A real signal,
        # unlike `_thread.interrupt_main`, also ends what the main thread waits for.
        handled = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
        if handled and (main := threading.main_thread().ident) is not None:
            signal.pthread_kill(main, handled[0])


def _held_by(store: Store, holder: Holder) -> str:
    return (
        f"{store.uri}: another run is working on this output ({holder}). Wait until it ends, or stop it; for a second "
        "run choose another output.uri."
    )


def _numbers(keys: Iterable[str]) -> list[int]:
    """Return the numbers of the leases among files; others, as file systems and people leave them, are none."""
    matches = (re.fullmatch(rf"{FOLDER}/([0-9]{{6,}})\.json", key) for key in keys)
    return [int(match[1]) for match in matches if match and _key(int(match[1])) == match[0]]


def _read(store: Store, number: int) -> Holder | None:
    """Return who holds a lease, None if its file is gone. Raises StoreDamagedError for one that does not say."""

    def holder(values: Any) -> Holder:
        found = Holder(**{field.name: values[field.name] for field in fields(Holder) if field.name in values})
        for field in fields(Holder):
            if not isinstance(getattr(found, field.name), _TYPES[str(field.type)]):
                raise TypeError(f"{field.name} is {getattr(found, field.name)!r:.100}")
        if found.number != number or not 0 < found.pid < 2**31 or not found.expires_s >= 0:
            raise ValueError("it has a number that is not possible")
        return found

    try:
        return store.read_record(
            _key(number),
            holder,
            "it does not say which run works on this output. See that none does, remove it, and run the job again",
        )
    except StoreMissingError:
        return None


_TYPES: dict[str, Any] = {"int": int, "str": str, "float": int | float, "str | None": str | None}


def _key(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()
