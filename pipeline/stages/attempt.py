"""One attempt after another at one piece of work, in the process that does it.

Ray would repeat a task that raises for ever, and repeat a task whose process dies for ever too. So nothing raises out
of a stage: an error becomes a `Fault` that travels with the row. A process that dies leaves its mark in the ledger,
and the next process that is handed the same work gives it up when there are too many.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from pipeline.faults import Fault, Ledger, classify, retry_faults
from pipeline.job import Job
from pipeline.manifest import Manifest
from pipeline.store import Store

_Result = TypeVar("_Result")
_WORTH_ANOTHER_TRY = ("transient", "out_of_memory")


@dataclass(frozen=True)
class Outcome(Generic[_Result]):
    """What came of a piece of work: a result or a fault, after how many attempts."""

    result: _Result | None
    fault: Fault | None
    attempts: int

    def fault_json(self) -> str:
        """The fault for a column of a dataset: JSON, null if there is none."""
        return json.dumps(self.fault and {**asdict(self.fault), "attempts": self.attempts})


def earlier_fault(row: Mapping[str, Any]) -> Outcome[Any] | None:
    """Return how an earlier stage failed this row, or None if none did."""
    values = json.loads(row.get("fault", "null"))
    if values is None:
        return None
    attempts = values.pop("attempts")
    return Outcome(None, Fault(**values), attempts)


@dataclass(frozen=True)
class Desk:
    """What a stage works with: the job and its storage."""

    job: Job

    @cached_property
    def store(self) -> Store:
        """The job's output folder."""
        return Store(self.job.output.uri, self.job.storage_options)

    @cached_property
    def manifest(self) -> Manifest:
        """The job's manifest."""
        return Manifest(self.store)

    @cached_property
    def ledger(self) -> Ledger:
        """Attempts that were begun and not ended."""
        return Ledger(self.store)

    def attempt(
        self, work_id: str, work: Callable[[], _Result], sleep: Callable[[float], None] = time.sleep
    ) -> Outcome:
        """Do `work`, again after errors that may pass, and return how it ended. Raises only what storage raises.

        Call `ledger.end(work_id)` when the outcome is safe.
        """
        policy = self.job.faults
        number = self._begin(work_id)
        if number > 1 and self.ledger.expired(work_id):
            return Outcome(None, _too_slow(policy.row_deadline_s), number - 1)
        if number > policy.worker_died_attempts:
            return Outcome(None, _killer(number - 1), number - 1)
        begun = iter([number])

        def once_more() -> _Result:
            nonlocal number
            number = next(begun, 0) or self._begin(work_id)
            with self._deadline(work_id):
                return work()

        try:
            result = retry_faults(
                once_more, policy.attempts, policy.base_seconds, policy.max_seconds, sleep, kinds=_WORTH_ANOTHER_TRY
            )
        except Exception as error:
            return Outcome(None, classify(error), number)
        return Outcome(result, None, number)

    @contextmanager
    def _deadline(self, work_id: str) -> Iterator[None]:
        """End this process if the block takes too long; also let go of a failed block's tensors."""

        def expire() -> None:
            self.ledger.expire(work_id)
            os._exit(1)

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

    def _begin(self, work_id: str) -> int:
        return self.ledger.begin(work_id, {"node": socket.gethostname(), "pid": os.getpid()})


def _too_slow(seconds: float) -> Fault:
    return Fault(
        "deadline",
        "DeadlineExceeded",
        f"an attempt took longer than faults.row_deadline_s ({seconds:g} seconds) and was ended. Raise the deadline, "
        "or look for what makes this row slow.",
    )


def _killer(attempts: int) -> Fault:
    return Fault(
        "worker_died",
        "WorkerDied",
        f"the process ended {attempts} times in the middle of this row, without an error of its own: a crash in native "
        "code, the machine's memory, or a preempted machine. Retry with --retry quarantined, or remove the input.",
    )
