"""Running a job from the driver: Ray, the saved spec, and the rows as they end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from pipeline import telemetry
from pipeline.catalogue import Catalogue
from pipeline.cluster import ClusterError, Need, check_address, pools_with_room, session_folder, stderr_silenced
from pipeline.cpus import limit_threads, usable_cpus
from pipeline.faults import JobStoppedError, Ledger, TooManyFailuresError
from pipeline.graph import evaluated_rows, evaluation_needs, finished_rows, needs
from pipeline.job import Job, RunningJob
from pipeline.lease import Holder, Lease
from pipeline.logs import ERROR, WARNING, begin, chosen, event
from pipeline.manifest import JOB_KEY, RUN_KEY, Manifest
from pipeline.measurements import Task
from pipeline.plan import Plan
from pipeline.relay import relayed
from pipeline.stages.attempt import STOPPED
from pipeline.stages.read import Row
from pipeline.status import Run
from pipeline.store import Store, StoreError

ROWS_REMEMBERED = 500
"""After so many rows their statuses are kept: what a resumed run has to read one by one are at most so many."""
_MANY_ROWS, _MANY_FILES = 100_000, 10_000
_LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Tally:
    """Rows of this run by status."""

    ok: int = 0
    failed: int = 0
    quarantined: int = 0

    @property
    def not_ok(self) -> int:
        """Rows that failed or were quarantined."""
        return self.failed + self.quarantined

    def count(self, status: str) -> None:
        """Count one more row."""
        setattr(self, status, getattr(self, status) + 1)


@contextmanager
def sole_run(job: Job, on_wait: Callable[[Holder], None]) -> Iterator[None]:
    """Be the only run that works on the job's output, for the length of a `with` block.

    A run that is stopped (Ctrl-C, SIGTERM, or an error that no row is to blame for) ends its workers first and takes
    back the tries of the rows in flight.

    Raises LeaseHeldError, after a while of which `on_wait` is told, and LeaseLostError.
    """
    _logged(job)
    store = Store(job.output.uri, job.storage_options)  # a lease has no time for patience
    with Lease(store, job.faults.lease_s, on_wait) as lease:
        try:
            yield
            lease.check()
        except (KeyboardInterrupt, JobStoppedError) as stop:
            with _undisturbed():
                event("job_stopped", ERROR, reason=str(stop) or type(stop).__name__)
                begun = ray.is_initialized()  # else the tries are those of earlier runs
                if begun:
                    _end_workers(_HURRY_S if isinstance(stop, KeyboardInterrupt) else _NO_HURRY_S)
                lease.check()
                if begun:
                    with suppress(StoreError):  # it may be what stopped the job
                        Ledger(store).forgive()
            raise


_HURRY_S, _NO_HURRY_S = 5.0, 60.0
"""How long Ray's end is waited for; who sends a signal may kill this process soon."""


def _end_workers(within_s: float) -> None:
    """End Ray and its processes, but wait only so long: a signal to the whole group may have ended Ray's own before."""
    ending = threading.Thread(target=ray.shutdown, name="end of Ray", daemon=True)
    ending.start()
    ending.join(within_s)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal interrupt a `with` block: the second of two Ctrl-C would keep rows from getting their tries back.

    The signals are taken, not ignored: who ends the process after a while has to hear of them.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers if _is_heeded(number)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_heeded(number: int) -> bool:
    """Whether a signal has a handler of Python's, which could be put back."""
    return callable(signal.getsignal(number))


def connect() -> None:
    """Connect to the cluster at RAY_ADDRESS, or start an embedded one on this machine, once per process."""
    if ray.is_initialized():
        return
    limit_threads(usable_cpus())
    check_address()
    # Rows report their own errors; what Ray says of its progress is not for the person who waits.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        with _own_signals():
            try:
                ray.init(**quiet)
            except (RuntimeError, ConnectionError, ValueError, ray.exceptions.RayError) as error:
                reason = " ".join(str(error).split())
                raise ClusterError(f"RAY_ADDRESS: {os.environ['RAY_ADDRESS']} cannot be used: {reason}") from error
        return
    # Actors without a GPU must not lose sight of those that Ray does not manage; the core's own log has nothing to say.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    folder = session_folder()
    with stderr_silenced(), _own_signals():
        # "local": never the cluster of somebody else that happens to run on this machine.
        local = {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES, "_temp_dir": folder}
        if not _SHARED_MEMORY.is_dir():
            local["_plasma_directory"] = folder
        try:
            ray.init("local", **local, **quiet)
        except Exception as error:  # Ray has no class for a start that took too long
            ray.shutdown()
            reason = " ".join(str(error).split())
            raise ClusterError(
                f"Ray could not be started on this machine: {reason}. Its logs are in {folder}/session_latest/logs. "
                "See that there are free memory and room on that disk, and that the machine is not too busy, then run "
                "the job again."
            ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this program's handler of SIGTERM: Ray puts one of its own in its place, which aborts.

    Ray's processes inherit that SIGHUP is blocked: a terminal that closes sends it to all of them at once, and this
    process has to stop them in order.
    """
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def run_plan(
    job: Job,
    plan: Plan,
    model_revision: str,
    spec_yaml: str,
    on_row: Callable[[Row], None],
    on_note: Callable[[str], None] = lambda note: None,
) -> Tally:
    """Do the rows of a plan and return how they ended. The resolved spec is saved first as `job.yaml`.

    on_note: called with what is to be said of the job as a whole, such as pools that the cluster has no room for.

    Raises JobStoppedError for what would meet every row: a model that cannot load, storage that refuses, too many
    failures. Raises SettingsError for a pool that does not fit the cluster, and ClusterError, before anything is
    written.
    """
    tally, job, started = Tally(), _settled(_logged(job), plan.total), time.perf_counter()
    if not plan.todo:
        return tally
    connect()
    job, notes = _with_room(job, *needs(job, plan.todo), on_note)
    store = job.store()
    store.put(JOB_KEY, spec_yaml.encode())
    store.put(RUN_KEY, replace(_begun(job, plan), notes=notes).to_json())
    job = RunningJob.of(job)
    store = job.store()
    Manifest(store).forget(plan.retried)
    Manifest(store).compact(least=_MANY_FILES)
    event("run_begun", kind=job.kind, rows=plan.total, todo=len(plan.todo), output=store.uri, model=model_revision)
    limits = _Limits(job, plan.total)
    telemetry.run_goes_on(job.name, plan.total, len(plan.todo))
    with relayed(job.log):
        rows = finished_rows(job, plan.todo, model_revision)
        for number, row in enumerate(rows, start=1):
            _check_goes_on(row)
            tally.count(row["status"])
            telemetry.run_goes_on(job.name, plan.total, len(plan.todo) - number)
            on_row(row)
            limits.check(row)
            if number % ROWS_REMEMBERED == 0:
                Manifest(store).remember()
    if job.kind == "build-bank":
        # Any other trouble is told by `ditflow bank list`, which makes the index as well.
        with suppress(StoreError):
            Catalogue.at(job.output.uri, job.storage_options, job.faults.storage_patience_s).refresh()
    event("run_ended", **asdict(tally), seconds=time.perf_counter() - started)
    return tally


def _with_room(
    job: Job, pools: Mapping[str, Need], reader_cpus: float, on_note: Callable[[str], None]
) -> tuple[Job, tuple[str, ...]]:
    """Return the job with pools that the cluster has room for, and what there is to say of them, said and logged."""
    fitting, notes = pools_with_room(pools, reader_cpus)
    for note in notes:
        on_note(note)
        event("no_room", WARNING, message=note)
    resources: Any = fitting
    return replace(job, resources=replace(job.resources, **resources)), tuple(notes)


def _begun(job: Job, plan: Plan) -> Run:
    """What a run that begins now sets out to do."""
    motions = len(plan.motions)
    return Run(plan.total, time.time(), len(plan.todo), plan.kept, motions, job.faults.lease_s)


def _check_goes_on(row: Row) -> None:
    if row["status"] == STOPPED:
        raise JobStoppedError(f"the job was stopped: {row['error_message']}")


class _Limits:
    """Watches how many rows fail, in all and one after the other."""

    def __init__(self, job: Job, planned: int):
        self._policy, self._planned = job.faults, planned
        self._failed = 0
        self._in_a_row: set[str] = set()

    def check(self, row: Row) -> None:
        """Take note of a row that has ended; TooManyFailuresError if it is one failure too many."""
        if row["status"] == "ok":
            self._in_a_row.clear()
            return
        self._failed += 1
        self._in_a_row.add(row["blamed"])
        if self._failed > self._policy.max_failed_fraction * self._planned:
            raise TooManyFailuresError(
                f"{self._failed} of {self._planned} rows failed, more than faults.max_failed_fraction "
                f"({self._policy.max_failed_fraction:g}) allows. The last one: {row['error_message']}"
            )
        if len(self._in_a_row) >= self._policy.max_failures_in_a_row:
            raise TooManyFailuresError(
                f"{len(self._in_a_row)} rows failed one after the other (faults.max_failures_in_a_row), so the others "
                f"would most likely fail as well. The last one: {row['error_message']} Mend what is wrong and run the "
                "job again with --retry failed, or raise the limit."
            )


def run_evaluation(
    job: Job,
    tasks: list[Task],
    on_row: Callable[[Row], None],
    on_note: Callable[[str], None] = lambda note: None,
) -> Tally:
    """Measure the finished rows of a job and return how that ended; rows that failed can be measured again."""
    tally, job, started = Tally(), _logged(job), time.perf_counter()
    if not tasks:
        return tally
    connect()
    job, _ = _with_room(job, *evaluation_needs(job), on_note)
    event("run_begun", kind="evaluate", rows=len(tasks), todo=len(tasks), output=job.output.uri)
    with relayed(job.log):
        for row in evaluated_rows(job, tasks):
            _check_goes_on(row)
            tally.count(row["status"])
            on_row(row)
    event("run_ended", **asdict(tally), seconds=time.perf_counter() - started)
    return tally


def _logged(job: Job) -> Job:
    """Begin this process's log of a job, as its environment or the spec asks; return the job as its workers get it."""
    asked = replace(job, log=chosen(job.log))
    begin(asked.log, asked.name)
    return asked


def _settled(job: Job, rows: int) -> Job:
    """Decide what the job leaves open, once for all of its workers."""
    spread = rows >= _MANY_ROWS if job.output.spread is None else job.output.spread
    return replace(_with_threads(job), output=replace(job.output, spread=spread))


def _with_threads(job: Job) -> Job:
    """Settle the number of CPU threads before the work begins: sums in another order give other bytes."""
    if job.resources.threads is not None:
        return job
    share = max(1, usable_cpus() // job.resources.generate.bounds[1])
    return replace(job, resources=replace(job.resources, threads=share))
