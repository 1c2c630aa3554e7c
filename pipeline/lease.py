"""One run at a time: a lease on a job's output folder.

`lease/<number>.json` names its holder, who writes it anew all the time; the highest number counts. A run that finds the
newest file unchanged for `expires_s` seconds of its own clock takes the lease over by creating the next number, which
only one can do; clocks of different machines are never compared. A holder that could not renew its lease for so long,
or that finds a higher number, has lost it and must stop.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType

from pipeline.logs import ERROR, event
from pipeline.store import Store, StoreError, StoreMissingError

FOLDER = "lease"
_RENEWALS = 6
"""How often a lease is renewed before it would expire."""


class LeaseHeldError(RuntimeError):
    """Another run is working on the same output."""


class LeaseLostError(RuntimeError):
    """Another run took the output over, because this one could not be heard of."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. beat: how often it was renewed; processes: see `_process_table`."""

    number: int
    token: str
    host: str
    pid: int
    since: str
    beat: int = 0
    processes: str | None = None

    @classmethod
    def here(cls, number: int) -> Holder:
        """Return this process as a holder."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(number, uuid.uuid4().hex, socket.gethostname(), os.getpid(), since, processes=_process_table())

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
    if not found:
        return None
    key = max(found)
    try:
        return Held(Holder(**json.loads(store.read(key))), found[key].written)
    except StoreMissingError:
        return None


class Lease:
    """The right to work on an output folder, for the length of a `with` block.

    Entering raises LeaseHeldError if another run is alive, and waits up to `expires_s` to find out; `on_wait` is told
    for whom. A lease that is lost interrupts the main thread, as Ctrl-C does, and `check` says why. StoreError comes
    from the storage.
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
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._holder = self._acquired()
        event("lease_taken", number=self._holder.number)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        for number in sorted(self._numbers()):
            if number <= self._holder.number:
                self._store.delete(_key(number))
        event("lease_given_back", number=self._holder.number)

    def check(self) -> None:
        """Raise LeaseLostError if this run must not go on."""
        if self._lost is not None:
            raise LeaseLostError(
                f"{self._store.uri}: {self._lost}. Finished rows keep their records. See that no other run works on "
                "this output, then run the job again."
            )

    def _acquired(self) -> Holder:
        while True:
            number = max(self._numbers(), default=0)
            if number and not self._is_free(number):
                continue
            holder = Holder.here(number + 1)
            if self._store.create(_key(holder.number), _encode(holder)) or self._read(holder.number) == holder:
                return holder

    def _is_free(self, number: int) -> bool:
        """Watch the newest lease: True if nobody renews it, False if it was given back, LeaseHeldError if it lives."""
        first = self._read(number)
        if first is None or first.surely_dead:
            return first is not None
        self._on_wait(first)
        for _ in range(2 * _RENEWALS):
            self._sleep(self._expires_s / (2 * _RENEWALS))
            now = self._read(number)
            if now is None:
                return False
            if now != first:
                raise LeaseHeldError(
                    f"{self._store.uri}: another run is working on this output ({now}). Wait until it ends, or stop "
                    "it; for a second run choose another output.uri."
                )
        return True

    def _keep(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(self._expires_s / _RENEWALS):
            try:
                if max(self._numbers(), default=0) > self._holder.number:
                    self._lose("another run took this output over")
                    return
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._store.put(_key(self._holder.number), _encode(self._holder))
                renewed = time.monotonic()
            except StoreError as error:
                if time.monotonic() - renewed > self._expires_s:
                    self._lose(f"the run's lease could not be renewed for {self._expires_s:g} seconds ({error})")
                    return

    def _lose(self, reason: str) -> None:
        self._lost = reason
        event("lease_lost", ERROR, number=self._holder.number, reason=reason)
        # Shells start background processes with SIGINT ignored; then nobody would be interrupted by it.
        handled = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
        _thread.interrupt_main(handled[0] if handled else signal.SIGINT)

    def _numbers(self) -> list[int]:
        return [int(key.removeprefix(f"{FOLDER}/").removesuffix(".json")) for key in self._store.list(FOLDER)]

    def _read(self, number: int) -> Holder | None:
        try:
            return Holder(**json.loads(self._store.read(_key(number))))
        except StoreMissingError:
            return None


def _key(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()
