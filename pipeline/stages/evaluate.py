"""Measure a finished video against its reference and its prompt: an actor pool."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ditflow.media.video import read_video
from ditflow.metrics import METRICS
from ditflow.metrics.base import EvaluatedClip, NotMeasurableError
from pipeline import telemetry
from pipeline.faults import EVALUATING
from pipeline.job import Job
from pipeline.manifest import output_key
from pipeline.measurements import Figure, Measurements
from pipeline.plan import Input
from pipeline.record import recorded_settings
from pipeline.stages.attempt import Desk, Outcome, shown, stopped
from pipeline.stages.read import Row, read_unchanged
from pipeline.store import StoreForbiddenError, StoreMissingError


class OutputChangedError(RuntimeError):
    """A video is not the one that its row of the manifest tells of."""


class EvaluateRow:
    """Takes the metrics that a row has not got, and stores them; a row that fails keeps none and can be run again."""

    def __init__(self, job: Job):
        self._job, self._desk = job, Desk(job, "evaluate")
        self._metrics = {name: METRICS[name].from_settings(job.metrics) for name in job.metrics.names}

    def __call__(self, row: Row) -> Row:
        """Measure one row of the manifest (JSON); return what the driver shows."""
        made, names, started = json.loads(row["made"]), json.loads(row["metrics"]), time.perf_counter()
        work_id = f"{EVALUATING}{made['row_id']}"
        try:
            outcome: Outcome[None] = self._desk.attempt(work_id, lambda: self._measure(made, names))
            self._desk.ledger.end(work_id)
        except Exception as error:
            return stopped(made["row_id"], error)
        seconds, fault = time.perf_counter() - started, outcome.fault
        self._desk.tell_of_end("row_measured", work_id, outcome, seconds)
        telemetry.row_measured(self._job.name, made["variant"], None if fault is None else fault.kind, seconds)
        return shown(
            {
                "row_id": made["row_id"],
                "status": "ok" if fault is None else "failed",
                "seconds_total": seconds,
                "error_message": fault and fault.message,
                "node": socket.gethostname(),
                "process": os.getpid(),
                "finished_at": datetime.now(UTC),
            }
        )

    def _measure(self, made: dict[str, Any], names: list[str]) -> None:
        try:
            reference, unread = self._reference(made), None
        except (StoreForbiddenError, StoreMissingError) as error:
            if not made["reference_uri"].startswith(("http://", "https://")):
                raise
            reference, unread = None, str(error)  # nobody can sign the address again: no later try would read it
        clip = EvaluatedClip(self._generated(made), reference, made["prompt"])
        figures = [figure for name in names for figure in self._figures(name, clip, unread)]
        Measurements(self._desk.store).write(made["row_id"], self._job.metrics, figures)

    def _figures(self, name: str, clip: EvaluatedClip, unread: str | None) -> Iterator[Figure]:
        missing = [need for need in METRICS[name].needs if getattr(clip, need) is None]
        if missing:
            why = f"the row has no {' and no '.join(missing)}"
            yield Figure(name, name, None, unread if unread and "reference" in missing else why)
            return
        try:
            values = self._metrics[name](clip)
        except NotMeasurableError as error:
            yield Figure(name, name, None, str(error))
            return
        yield from (Figure(name, figure, value) for figure, value in values.items())

    def _generated(self, made: dict[str, Any]) -> np.ndarray:
        key = output_key(made["output_uri"])
        assert key is not None, "only rows with a video are evaluated"
        data = self._desk.store.read(key)
        if hashlib.sha256(data).hexdigest() != made["output_sha256"]:
            raise OutputChangedError(
                f"{key} is not the video that was recorded: its SHA-256 is another. `ditflow manifest verify` finds "
                "all such files; remove it and its row, and run the job again."
            )
        size = {side: made[side] for side in ("frames", "height", "width")}
        return read_video(data, **size, name=key).frames

    def _reference(self, made: dict[str, Any]) -> np.ndarray | None:
        """The frames of the reference that were used, or None for a row without one."""
        video = recorded_settings(made)["video"]
        if made["reference_uri"] is None or video is None:
            return None
        source = Input.recorded(made["reference_uri"], made["reference_sha256"])
        return read_video(read_unchanged(source, self._job), **video, name=source.uri).frames
