"""One attempt after another at one piece of work, in the process that does it.

Ray would repeat a task that raises for ever, and repeat a task whose process dies for ever too. So nothing raises out
of a stage: an error becomes a `Fault` that travels with the row. A process that dies leaves its mark in the ledger,
and the next process that is handed the same work gives it up when there are too many. A fault that no row is to blame
for travels as well, to the driver, which stops the job.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

from pipeline import telemetry
from pipeline.cpus import limit_threads, usable_cpus
from pipeline.faults import (
    EVALUATING,
    READING,
    Fault,
    JobStoppedError,
    Ledger,
    breaks_device,
    classify,
    fault_of_job,
    retry_faults,
)
from pipeline.job import Job
from pipeline.logs import ERROR, INFO, WARNING, begin, event
from pipeline.manifest import Manifest
from pipeline.relay import forward
from pipeline.store import Store

_Result = TypeVar("_Result")
Rung = Callable[[], AbstractContextManager[None]]
"""A way to do the work, entered for its length."""


@dataclass(frozen=True)
class Outcome(Generic[_Result]):
    """What came of a piece of work: a result or a fault, after how many attempts."""

    result: _Result | None
    fault: Fault | None
    attempts: int

    def fault_json(self) -> str:
        """The fault for a column of a dataset: JSON, null if there is none."""
        return json.dumps(self.fault and {**asdict(self.fault), "attempts": self.attempts})


def stopped(work_id: str, error: Exception) -> dict[str, Any]:
    """Return the row that tells the driver to stop the job, and why; nothing is recorded of its work."""
    return shown({"row_id": work_id, "status": STOPPED, "error_message": classify(error).message})


STOPPED = "stopped"
"""The status of a row that no fault of its own kept from being made; never in a manifest."""


def shown(record: Mapping[str, Any], blamed: str | None = None) -> dict[str, Any]:
    """Return what the driver is told of a row. blamed: what failed it along with other rows, such as its reference."""
    keys = ("row_id", "status", "loss_final", "seconds_total", "error_message", "node", "process")
    finished_at = record.get("finished_at")
    told = {**{key: record.get(key) for key in keys}, "finished_at": finished_at and finished_at.isoformat()}
    return {**told, "blamed": blamed or record["row_id"]}


def earlier_fault(row: Mapping[str, Any]) -> Outcome[Any] | None:
    """Return how an earlier stage failed this row, or None if none did.

    Raises JobStoppedError for a fault that no row is to blame for.
    """
    values = json.loads(row.get("fault", "null"))
    if values is None:
        return None
    attempts = values.pop("attempts")
    return Outcome(None, _rows_own(Fault(**values)), attempts)


def _rows_own(fault: Fault) -> Fault:
    if fault.stops_job:
        raise JobStoppedError(fault.message)
    return fault


def faultless() -> Outcome[Any]:
    """Return the outcome of work that there was none of."""
    return Outcome(None, None, 0)


def not_to_blame(error: Exception) -> Outcome[Any]:
    """Return the outcome of work that was kept from being done by what no row is to blame for."""
    return Outcome(None, fault_of_job(error), 0)


@dataclass(frozen=True)
class Desk:
    """What one stage works with: the job, its storage, its log and its metrics, which call it by its name."""

    job: Job
    stage: str

    def __post_init__(self) -> None:
        begin(self.job.log, self.job.name, forward)
        limit_threads(self.job.resources.threads or usable_cpus())

    @cached_property
    def store(self) -> Store:
        """The job's output folder."""
        return self.job.store()

    @cached_property
    def manifest(self) -> Manifest:
        """The job's manifest."""
        return Manifest(self.store)

    @cached_property
    def ledger(self) -> Ledger:
        """Attempts that were begun and not ended."""
        return Ledger(self.store)

    def attempt(
        self,
        work_id: str,
        work: Callable[[], _Result],
        sleep: Callable[[float], None] = time.sleep,
        lighter: Rung | None = None,
    ) -> Outcome:
        """Do `work`, again after errors that may pass, and return how it ended.

        Raises what storage raises, and JobStoppedError for an error that no row is to blame for.
        lighter: a way that needs less memory, for one more try when the memory was not enough.
        Call `ledger.end(work_id)` when the outcome is safe.
        """
        with telemetry.in_flight(self.job.name, self.stage):
            return self._attempt(work_id, work, sleep, lighter)

    def _attempt(
        self, work_id: str, work: Callable[[], _Result], sleep: Callable[[float], None], lighter: Rung | None
    ) -> Outcome:
        policy = self.job.faults
        number = self._begin(work_id)
        if number > 1 and self.ledger.expired(work_id):
            return Outcome(None, _too_slow(policy.row_deadline_s), number - 1)
        if number > policy.worker_died_attempts:
            return Outcome(None, _killer(number - 1, self.ledger.noted(work_id)), number - 1)
        begun = iter([number])

        def once_more() -> _Result:
            nonlocal number
            number = next(begun, 0) or self._begin(work_id)
            telemetry.attempt_begun(self.job.name, self.stage)
            with self._deadline(work_id), self._sound_device(work_id):
                return work()

        def failed(error: BaseException, again: bool = True) -> Fault:
            fault = classify(error)
            self._tell_of_failure(work_id, number, fault, again)
            return fault

        patience = (policy.attempts, policy.base_seconds, policy.max_seconds, sleep)
        rungs: list[Rung] = [nullcontext, *([lighter] if lighter is not None else [])]
        while True:
            try:
                with rungs.pop(0)():
                    return Outcome(retry_faults(once_more, *patience, failed), None, number)
            except Exception as error:
                lower = bool(rungs) and classify(error).kind == "out_of_memory"
                fault = failed(error, again=lower)
                if not lower:
                    return Outcome(None, _rows_own(fault), number)
                event("rung_lowered", WARNING, **self._name_of(work_id))

    def tell_of_end(self, name: str, work_id: str, outcome: Outcome[Any], seconds: float) -> None:
        """Write into the log, as an event of this name, how a piece of work ended that is no row of the manifest."""
        fault = outcome.fault
        told = {} if fault is None else {"error_kind": fault.kind, "message": fault.message}
        event(
            name,
            INFO if fault is None else WARNING,
            **self._name_of(work_id),
            status="ok" if fault is None else "failed",
            attempts=outcome.attempts,
            seconds=seconds,
            **told,
        )

    def _tell_of_failure(self, work_id: str, attempt: int, fault: Fault, again: bool) -> None:
        """Write into the log that an attempt failed, and whether the work is tried again."""
        told = {"error_kind": fault.kind, "error_class": fault.error_class, "message": fault.message}
        name = self._name_of(work_id)
        event("attempt_failed", WARNING, **name, stage=self.stage, attempt=attempt, again=again, **told)

    def _name_of(self, work_id: str) -> dict[str, str]:
        """Return whose work it is, as the log names it."""
        if self.stage in ("read", "extract"):
            return {"motion_id": work_id.removeprefix(READING)}
        return {"row_id": work_id.removeprefix(EVALUATING)}

    @contextmanager
    def _sound_device(self, work_id: str) -> Iterator[None]:
        """End this process after an error that spoils its GPU for every later row; the next one tries the row again."""
        try:
            yield
        except Exception as error:
            if breaks_device(error):
                _end_process(partial(self._leave, work_id, classify(error).message))
            raise

    @contextmanager
    def _deadline(self, work_id: str) -> Iterator[None]:
        """End this process if the block takes too long; also let go of a failed block's tensors."""
        expire = partial(_end_process, partial(self._expire, work_id))
        watchdog = threading.Timer(self.job.faults.row_deadline_s, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            watchdog.cancel()

    def _leave(self, work_id: str, words: str) -> None:
        """The last act of a process whose device is broken."""
        self.ledger.note(work_id, words)
        event("process_ended", ERROR, **self._name_of(work_id), stage=self.stage, reason=words)

    def _expire(self, work_id: str) -> None:
        """The last act of a process whose time for a piece of work is over."""
        self.ledger.expire(work_id)
        reason = f"faults.row_deadline_s ({self.job.faults.row_deadline_s:g} seconds) is over"
        event("process_ended", ERROR, **self._name_of(work_id), stage=self.stage, reason=reason)

    def _begin(self, work_id: str) -> int:
        return self.ledger.begin(work_id, {"stage": self.stage, "node": socket.gethostname(), "pid": os.getpid()})


def _end_process(last_act: Callable[[], None]) -> None:
    """End this process after a last act, also if that fails."""
    try:
        last_act()
    finally:
        os._exit(1)


def _too_slow(seconds: float) -> Fault:
    return Fault(
        "deadline",
        "DeadlineExceeded",
        f"an attempt took longer than faults.row_deadline_s ({seconds:g} seconds) and was ended. Raise the deadline, "
        "or look for what makes this row slow.",
    )


def _killer(attempts: int, last_words: str) -> Fault:
    why = (
        f"after an error of its GPU: {last_words}"
        if last_words
        else "without an error of its own: a crash in native code, the machine's memory, or a preempted machine"
    )
    return Fault(
        "worker_died",
        "WorkerDied",
        f"the process ended {attempts} times in the middle of this row, {why}. Retry with --retry quarantined, or "
        "remove the input.",
    )
