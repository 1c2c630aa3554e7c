"""Read and decode a reference video: CPU tasks."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ditflow.media.mask import read_mask
from ditflow.media.video import Clip, OversizedVideoError, read_video
from pipeline.cache import node_cache
from pipeline.faults import READING
from pipeline.job import Job, References
from pipeline.plan import Input, WorkRow
from pipeline.stages.attempt import Desk, Outcome, faultless, not_to_blame
from pipeline.store import MOST_BYTES, open_fs

Row = dict[str, Any]
"""One row of a dataset: JSON texts, numbers, and at most one array of frames."""


_NO_CLIP = Clip(np.zeros((0, 1, 1, 3), np.uint8), 0.0)
_NO_MASK = np.zeros((0, 1, 1), np.uint8)


class ChangedInputError(RuntimeError):
    """A reference or bank is not what it was when the job was planned."""


def motion_key(job: Job, motion_id: str) -> str:
    """Where a reference's extracted motion is stored."""
    return job.key("amf", f"{motion_id}.safetensors")


def read_reference(row: Row, job: Job) -> Row:
    """Decode the frames of a row's reference, unless its motion has been extracted before.

    Adds frames (uint8 [T, H, W, 3], or no frames), mask (uint8 [T or 1, H, W], or no frames), fps, notes (JSON),
    seconds_read, and fault (JSON) if it failed.
    """
    started = time.perf_counter()
    try:
        outcome = _outcome(row, Desk(job, "read"))
    except Exception as error:
        outcome = not_to_blame(error)
    clip, mask = outcome.result or (_NO_CLIP, _NO_MASK)
    return {
        **row,
        "frames": clip.frames,
        "mask": mask,
        "fps": clip.fps,
        "notes": json.dumps(clip.notes),
        "seconds_read": time.perf_counter() - started,
        "fault": outcome.fault_json(),
    }


def _outcome(row: Row, desk: Desk) -> Outcome[tuple[Clip, np.ndarray]]:
    """Read the clip and its mask if they are needed, and return how that ended."""
    if desk.store.exists(motion_key(desk.job, row["motion_id"])):
        return faultless()
    work = WorkRow.from_json(json.loads(row["work"])[0])
    work_id, started = f"{READING}{row['motion_id']}", time.perf_counter()
    outcome: Outcome[tuple[Clip, np.ndarray]] = desk.attempt(work_id, lambda: _read_clip_and_mask(work, desk.job))
    desk.ledger.end(work_id)
    desk.tell_of_end("reference_read", work_id, outcome, time.perf_counter() - started)
    return outcome


def _read_clip_and_mask(work: WorkRow, job: Job) -> tuple[Clip, np.ndarray]:
    assert work.reference is not None
    settings = job.with_own(work.own).references
    clip = read_clip(work.reference, settings, job)
    if work.mask is None:
        return clip, _NO_MASK
    with bounded_memory(settings.max_memory_bytes):
        mask = read_mask(
            read_unchanged(work.mask, job, settings.max_bytes),
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
            start=settings.start,
            stride=settings.stride,
            fit=settings.fit,
            name=work.mask.uri,
        )
    return clip, mask


def read_clip(source: Input, settings: References, job: Job) -> Clip:
    """Return the frames of a reference that the settings choose, read within their limits.

    Raises VideoError, ChangedInputError, StoreError, or OSError.
    """
    check_size(source, job)
    with bounded_memory(settings.max_memory_bytes):
        return read_video(
            read_unchanged(source, job, settings.max_bytes),
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
            start=settings.start,
            stride=settings.stride,
            fit=settings.fit,
            deinterlace=settings.deinterlace,
            max_pixels_per_frame=settings.max_pixels,
            name=source.uri,
        )


def check_size(source: Input, job: Job) -> None:
    """Raise OversizedVideoError for a reference that is larger than `references.max_bytes`, at the cost of a look-up.

    A file that cannot be looked up passes: reading it tells why in the storage's own words.
    """
    fs, path = open_fs(source.source, job.storage_options)
    try:
        size = fs.info(path).get("size")
    except OSError:
        return
    limit = job.references.max_bytes
    if size is not None and size > limit:
        raise OversizedVideoError(
            f"{source.uri}: the file has {size} bytes, more than the accepted {limit}. Cut out the part that is used "
            "(ffmpeg -ss FROM -t SECONDS -i IN OUT.mp4), or raise references.max_bytes and references.max_memory_bytes."
        )


@contextmanager
def bounded_memory(extra_bytes: int) -> Iterator[None]:
    """Let this process take so many more bytes during a `with` block; beyond them, allocations fail.

    A video of two kilobytes can make a demuxer fill gigabytes: its index says how many frames there are, and the
    demuxer makes room for all. This turns a machine that dies of it into one failed row. It counts what the process
    may write to (RLIMIT_DATA), not what it has mapped: object stores and libraries are no concern. On systems
    without /proc nothing is bounded.
    """
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(statistics.read_text().split()[5]) * resource.getpagesize()
    known = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([used + extra_bytes, *known]), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def read_unchanged(source: Input, job: Job, most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a reference or bank; ChangedInputError if they are not those that were planned."""
    data = node_cache(job).read(source.uri, source.sha256, lambda: job.read(source.source, most))
    found = hashlib.sha256(data).hexdigest()
    if source.sha256 not in (None, found):
        raise ChangedInputError(
            f"{source.uri} changed after the job was planned (its SHA-256 is now {found}). Run the job again: the new "
            "content gets rows of its own."
        )
    return data
