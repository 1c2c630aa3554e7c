"""Extract a reference's motion, once for all rows that use it: an actor pool."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from ditflow.motion.reference import extract_motion
from ditflow.settings import MethodSettings
from pipeline import telemetry
from pipeline.job import Job
from pipeline.plan import WorkRow
from pipeline.stages.attempt import Desk, Outcome, faultless, not_to_blame
from pipeline.stages.read import Row, motion_key
from pipeline.stages.worker import Worker


class ExtractMotion:
    """Stores the motion of decoded references under `amf/`; adds amf_uri, seconds_extract and fault."""

    def __init__(self, job: Job, model_revision: str):
        self._desk, self._revision = Desk(job, "extract"), model_revision

    @cached_property
    def _worker(self) -> Worker:
        """The model, loaded for the first reference: what goes wrong then is told by its row."""
        return Worker(self._desk.job, self._revision)

    def __call__(self, row: Row) -> Row:
        """Replace the frames of a row by the URI of their motion."""
        frames, mask = row.pop("frames"), row.pop("mask")
        known = {"fps": row.pop("fps"), "notes": tuple(json.loads(row.pop("notes")))}
        key, seconds = motion_key(self._desk.job, row["motion_id"]), 0.0
        if json.loads(row["fault"]) is None and len(frames):
            try:
                outcome, seconds = self._outcome(row, key, frames, mask if len(mask) else None, known)
            except Exception as error:
                outcome = not_to_blame(error)
            row["fault"] = outcome.fault_json()
        return {**row, "amf_uri": self._desk.store.uri_of(key), "seconds_extract": seconds}

    def _outcome(
        self, row: Row, key: str, frames: np.ndarray, mask: np.ndarray | None, known: Mapping[str, Any]
    ) -> tuple[Outcome[None], float]:
        """Extract and store the motion; return how that ended, and after how many seconds."""
        work_id, method = row["motion_id"], self._desk.job.variants[variant_of(row)].method
        lighter, started = self._worker.lighter, time.perf_counter()
        extract = partial(self._extract, key, frames, mask, known, method)
        outcome: Outcome[None] = self._desk.attempt(work_id, extract, lighter=lighter)
        self._desk.ledger.end(work_id)
        seconds = time.perf_counter() - started
        self._desk.tell_of_end("motion_extracted", work_id, outcome, seconds)
        if outcome.fault is None:
            telemetry.reference_extracted(self._desk.job.name)
        return outcome, seconds

    def _extract(
        self, key: str, frames: np.ndarray, mask: np.ndarray | None, known: Mapping[str, Any], method: MethodSettings
    ) -> None:
        motion = extract_motion(self._worker.backbone, frames, method, mask)
        self._desk.store.put(key, replace(motion, **known).to_bytes())


def variant_of(row: Row) -> str:
    """Return the method of a reference's row; any other method with this motion would extract the same."""
    return WorkRow.from_json(json.loads(row["work"])[0]).variant


def without_motion(work: WorkRow) -> Row:
    """Return a row for work that needs no reference's motion, as `FanOut` returns the others."""
    nothing = {"amf_uri": "", "seconds_read": 0.0, "seconds_extract": 0.0}
    return {"work": work.to_json(), **nothing, "fault": faultless().fault_json()}


class FanOut:
    """One row per piece of work: the reference's row for each of its prompts and seeds. A class, as actors are."""

    def __call__(self, row: Row) -> Iterator[Row]:
        """Yield the rows of one reference."""
        shared = {key: row[key] for key in ("amf_uri", "seconds_read", "seconds_extract", "fault")}
        for number, work in enumerate(json.loads(row["work"])):
            # What was done once is counted once.
            once = {} if number == 0 else {"seconds_read": 0.0, "seconds_extract": 0.0}
            yield {"work": work, **shared, **once}
