"""Read and decode a reference video: CPU tasks."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np

from ditflow.video import Clip, read_video
from pipeline.job import Job
from pipeline.plan import Input, WorkRow
from pipeline.stages.attempt import Desk, Outcome
from pipeline.store import read_uri

Row = dict[str, Any]
"""One row of a dataset: JSON texts, numbers, and at most one array of frames."""


_NO_CLIP = Clip(np.zeros((0, 1, 1, 3), np.uint8), 0.0)


class ChangedInputError(RuntimeError):
    """A reference or bank is not what it was when the job was planned."""


def motion_key(motion_id: str) -> str:
    """Where a reference's extracted motion is stored."""
    return f"amf/{motion_id}.safetensors"


def read_reference(row: Row, job: Job) -> Row:
    """Decode the frames of a row's reference, unless its motion has been extracted before.

    Adds frames (uint8 [T, H, W, 3], or no frames), fps, seconds_read, and fault (JSON) if it failed.
    """
    desk = Desk(job)
    started = time.perf_counter()
    clip, fault = _NO_CLIP, Outcome[Clip](None, None, 0).fault_json()
    if not desk.store.exists(motion_key(row["motion_id"])):
        work = WorkRow.from_json(json.loads(row["work"])[0])
        work_id = f"read-{row['motion_id']}"
        outcome: Outcome[Clip] = desk.attempt(work_id, lambda: _read_clip(work, job))
        desk.ledger.end(work_id)
        clip, fault = outcome.result or _NO_CLIP, outcome.fault_json()
    return {
        **row,
        "frames": clip.frames,
        "fps": clip.fps,
        "seconds_read": time.perf_counter() - started,
        "fault": fault,
    }


def _read_clip(work: WorkRow, job: Job) -> Clip:
    assert work.reference is not None
    settings = job.with_own(work.own).references
    return read_video(
        read_unchanged(work.reference, job),
        frames=settings.frames,
        height=settings.height,
        width=settings.width,
        start=settings.start,
        stride=settings.stride,
        fit=settings.fit,
        name=work.reference.uri,
    )


def read_unchanged(source: Input, job: Job) -> bytes:
    """Return the bytes of a reference or bank; ChangedInputError if they are not those that were planned."""
    data = read_uri(source.uri, job.storage_options)
    found = hashlib.sha256(data).hexdigest()
    if source.sha256 not in (None, found):
        raise ChangedInputError(
            f"{source.uri} changed after the job was planned (its SHA-256 is now {found}). Run the job again: the new "
            "content gets rows of its own."
        )
    return data
