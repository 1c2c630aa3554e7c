"""What a run tells Prometheus while it works: one table of Ray's metrics, and the moments at which they are taken.

Measurements of videos are elsewhere (`pipeline.measurements`); this is about the work. The manifest stays the truth: a
process that dies takes along what it has not told yet, up to ten seconds of it.

Ray's agent on every node collects from its processes, also as they end, and serves all at the node's metrics port,
under names that begin with `ray_`. Without an agent nothing is collected, and recording costs as little. Every process
is a series of its own (label WorkerId), so labels of ours are few and bounded: no row's id, no prompt, no URI. None is
called `job`, which Prometheus takes for the name of its own scrape job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.record import PHASES as PHASES_OF_A_ROW

_log = logging.getLogger(__name__)

PHASES = (*PHASES_OF_A_ROW, "total")
"""Of the manifest's columns `seconds_*`."""
STAGES = ("read", "extract", "generate", "evaluate")
NO_ERROR = "none"
LEAST_SECONDS = 1e-4
"""Less is the time between two looks at the clock, not that of a phase."""
_REPEAT_S = 1.0


@dataclass(frozen=True)
class Metric:
    """One metric: its name at Ray, its kind, what it means, its labels, and the bounds of a histogram's buckets."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that Prometheus knows it by."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
        return tuple(f"ray_{self.name}{ending}" for ending in endings[self.kind])


# From an encoded mini clip to an hour of guidance, each about twice the one before.
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 3600)

METRICS = (
    Metric("ditflow_rows_planned", "gauge", "rows of the job in all, while a run of it lives", ("job_name",)),
    Metric("ditflow_rows_left", "gauge", "rows that the run has still to end, while it lives", ("job_name",)),
    Metric(
        "ditflow_rows",
        "counter",
        "rows that were ended (stage generate) or measured (stage evaluate); error_kind none for those that are ok",
        ("job_name", "stage", "variant", "status", "error_kind"),
    ),
    Metric("ditflow_attempts", "counter", "tries that were begun", ("job_name", "stage")),
    Metric("ditflow_rows_in_flight", "gauge", "1 while the process works on a row, else 0", ("job_name", "stage")),
    Metric(
        "ditflow_phase_seconds",
        "histogram",
        "seconds of a row by phase, for quantiles; Ray makes its _sum of the buckets' middles",
        ("job_name", "variant", "phase"),
        _SECONDS,
    ),
    Metric(
        "ditflow_work_seconds", "counter", "the same seconds, with their exact sum", ("job_name", "variant", "phase")
    ),
    # Gauges: losses have scales of their own, which no buckets fit, and a loss of one's own may be negative.
    Metric(
        "ditflow_loss",
        "gauge",
        "motion loss of the process's newest row, first or final",
        ("job_name", "variant", "at"),
    ),
    Metric(
        "ditflow_peak_memory_bytes",
        "gauge",
        "highest memory use of the process's newest row on its GPU; of the process itself on a CPU",
        ("job_name",),
    ),
    Metric("ditflow_bank_loads", "counter", "motion banks that were read", ("job_name",)),
    Metric("ditflow_references_extracted", "counter", "references whose motion was extracted", ("job_name",)),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


# -------------------------------------------------------------------------------------------------- what is told


def run_goes_on(job: str, planned: int, left: int) -> None:
    """Tell how many rows the job has and how many its run has still to end. For the driver."""
    _record("ditflow_rows_planned", planned, job_name=job)
    _record("ditflow_rows_left", left, job_name=job)


@contextmanager
def in_flight(job: str, stage: str) -> Iterator[None]:
    """Tell that this process works on a row, for the length of a `with` block."""
    _record("ditflow_rows_in_flight", 1, job_name=job, stage=stage)
    try:
        yield
    finally:
        _record("ditflow_rows_in_flight", 0, job_name=job, stage=stage)


def attempt_begun(job: str, stage: str) -> None:
    """Count a try."""
    _record("ditflow_attempts", 1, job_name=job, stage=stage)


def reference_extracted(job: str) -> None:
    """Count a reference whose motion was extracted and stored."""
    _record("ditflow_references_extracted", 1, job_name=job)


def row_ended(record: Mapping[str, Any]) -> None:
    """Count a row of the manifest, with its seconds, losses, memory and banks.

    A phase of less than LEAST_SECONDS was not gone through: what was done once for several rows counts for one of them.
    The whole attempt (`total`) counts for rows that are ok: it tells what such a row takes.
    """
    own = {"job_name": record["job"], "variant": record["variant"]}
    _row("generate", record["status"], record["error_kind"], own)
    for phase in PHASES:
        if record["status"] == "ok" or phase != "total":
            _seconds(phase, record[f"seconds_{phase}"], own)
    for at in ("first", "final"):
        _record("ditflow_loss", record[f"loss_{at}"], **own, at=at)
    _record("ditflow_peak_memory_bytes", record["peak_memory_bytes"], job_name=record["job"])
    _record("ditflow_bank_loads", record["bank_loads"] or None, job_name=record["job"])


def row_measured(job: str, variant: str, error_kind: str | None, seconds: float) -> None:
    """Count a finished row whose video was measured, or failed to be."""
    own = {"job_name": job, "variant": variant}
    _row("evaluate", "ok" if error_kind is None else "failed", error_kind, own)
    if error_kind is None:
        _seconds("evaluate", seconds, own)


def _row(stage: str, status: str, error_kind: str | None, own: Mapping[str, str]) -> None:
    _record("ditflow_rows", 1, **own, stage=stage, status=status, error_kind=error_kind or NO_ERROR)


def _seconds(phase: str, seconds: float | None, own: Mapping[str, str]) -> None:
    if seconds is not None and seconds >= LEAST_SECONDS:
        _record("ditflow_phase_seconds", seconds, **own, phase=phase)
        _record("ditflow_work_seconds", seconds, **own, phase=phase)


# ------------------------------------------------------------------------------------------------- how it is told


def _record(name: str, value: float | None, **labels: str) -> None:
    """Add to a counter, set a gauge or observe a value; None is no value.

    What goes wrong is logged and costs no row: this only watches.
    """
    if value is None:
        return
    try:
        _recorder(name)(value, labels)
    except Exception as error:
        _log.warning("metric %s was not recorded: %s: %s", name, type(error).__name__, error)


@cache
def _recorder(name: str) -> Callable[[float, dict[str, str]], None]:
    """Make a metric, once per process, and return what records a value with its labels."""
    metric = _BY_NAME[name]
    if metric.kind == "histogram":
        return Histogram(name, metric.meaning, list(metric.buckets), metric.labels).observe
    if metric.kind == "gauge":
        return _LastingGauge(Gauge(name, metric.meaning, metric.labels)).set
    return Counter(name, metric.meaning, metric.labels).inc


class _LastingGauge:
    """A gauge that is set again and again to its latest values, for as long as its process lives.

    Ray forgets a value that was not set for two of its reports: 20 seconds, or 2 where it reports as often as it can.
    """

    def __init__(self, gauge: Gauge):
        self._gauge, self._latest = gauge, dict[tuple[str, ...], tuple[float, dict[str, str]]]()
        threading.Thread(target=self._repeat, name="ditflow-gauge", daemon=True).start()

    def set(self, value: float, labels: dict[str, str]) -> None:
        """Set the gauge, for these labels."""
        self._latest[tuple(labels.values())] = (value, labels)
        self._gauge.set(value, labels)

    def _repeat(self) -> None:
        while True:
            time.sleep(_REPEAT_S)
            for value, labels in list(self._latest.values()):
                self._gauge.set(value, labels)
