"""The last stage of every kind of job: make the output, store it, then record the row. An actor pool."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any

from ditflow.banks.bank import MotionBank
from ditflow.media.video import encode_video
from ditflow.motion.reference import MotionReference
from ditflow.settings import MethodSettings, MotionSettings, settings_dict
from ditflow.transfer import Transferred, learn_bank, transfer_motion
from pipeline import telemetry
from pipeline.job import DEFAULT_FPS, Job
from pipeline.logs import INFO, WARNING, event, is_debug
from pipeline.plan import Input, WorkRow
from pipeline.record import PHASES
from pipeline.stages.attempt import Desk, Outcome, earlier_fault, shown, stopped
from pipeline.stages.banks import RecentBanks
from pipeline.stages.read import Row
from pipeline.stages.worker import Worker
from pipeline.store import Stored, StoreMissingError, StoreUnwritableError

Columns = dict[str, Any]
"""Values of manifest columns."""
Size = tuple[int, int, int]
"""Frames, height and width."""


class FinishRow:
    """Ends every planned row: ok, failed or quarantined, with exactly one row of the manifest."""

    def __init__(self, job: Job, model_revision: str):
        self._job, self._revision = job, model_revision
        self._desk = Desk(job, "generate")
        self._motion = lru_cache(maxsize=2)(self._read_motion)
        self._banks = RecentBanks(job)
        self._makers: dict[str, Callable[[WorkRow, Row], Columns]] = {
            "extract": self._take_motion,
            "synthesize": self._synthesize,
            "reuse": self._synthesize,
            "build-bank": self._build_bank,
        }

    @cached_property
    def _worker(self) -> Worker | None:
        """The model, loaded for the first row: what goes wrong then is told by that row."""
        return None if self._job.kind == "extract" else Worker(self._job, self._revision)

    def __call__(self, row: Row) -> Row:
        """Make one row's output and commit it; return what the driver shows."""
        work = WorkRow.from_json(row["work"])
        try:
            earlier = earlier_fault(row)
            # Ray runs a finished row again when the machine that kept its result is gone.
            committed = self._desk.manifest.recorded(work.row_id) or self._finish(work, row, earlier)
            self._desk.ledger.end(work.row_id)
        except Exception as error:
            return stopped(work.row_id, error)
        return shown(committed, blamed=work.motion_id if earlier else None)

    def _finish(self, work: WorkRow, row: Row, earlier: Outcome[Columns] | None) -> Columns:
        """End the row, as an earlier stage or this one says, and return its record."""
        lighter = None if self._worker is None else self._worker.lighter
        started_at, started = datetime.now(UTC), time.perf_counter()
        prompt = work.prompt if is_debug() else None
        event(
            "row_begun",
            row_id=work.row_id,
            motion_id=work.motion_id,
            variant=work.variant,
            seed=work.seed,
            prompt=prompt,
        )
        outcome = earlier or self._desk.attempt(work.row_id, lambda: self._make(work, row), lighter=lighter)
        record = self._desk.manifest.commit(
            {
                **self._identity(work, row),
                **(outcome.result or {}),
                **_ending(outcome),
                "bank_loads": self._banks.take_loads() if work.bank else None,
                "node": socket.gethostname(),
                "process": os.getpid(),
                "started_at": started_at,
                "finished_at": datetime.now(UTC),
                "seconds_total": time.perf_counter() - started,
            }
        )
        _tell_of_end(record)
        telemetry.row_ended(record)
        return record

    # ------------------------------------------------------------------ what is made

    def _make(self, work: WorkRow, row: Row) -> Columns:
        if self._worker is not None:
            self._worker.reset_peak_memory()
        columns = self._makers[self._job.kind](work, row)
        if self._worker is None or work.prompt is None:
            return columns
        return {**columns, **self._worker.prompt_facts(work.prompt), **self._worker.facts()}

    def _take_motion(self, work: WorkRow, row: Row) -> Columns:
        """The output of an `extract` job is there already: the motion itself."""
        data = self._stored_motion(row["amf_uri"])
        motion = MotionReference.from_bytes(data, row["amf_uri"])
        stored = Stored(row["amf_uri"], hashlib.sha256(data).hexdigest(), len(data))
        return {**_stored(stored), **_video(self._job.references.size, motion.fps), **_notes(motion)}

    def _synthesize(self, work: WorkRow, row: Row) -> Columns:
        """Generate a video: plain, guided by a reference's motion, or with a bank."""
        assert self._worker is not None and work.prompt is not None and work.seed is not None
        reference, size, fps = self._reference(work, row)
        result = transfer_motion(
            self._worker.backbone,
            work.prompt,
            reference=reference,
            size=size,
            seed=work.seed,
            method=self._method(work),
            sampling=self._job.sampling,
        )
        assert result.video is not None
        encoding = time.perf_counter()
        data = encode_video(result.video, fps)
        encoded = time.perf_counter()
        stored = self._desk.store.put(self._job.key("videos", f"{work.row_id}.mp4"), data)
        timings = {"seconds_encode": encoded - encoding, "seconds_write": time.perf_counter() - encoded}
        moved_by = self._moved_by(work, reference) if isinstance(reference, MotionBank) else {}
        made = {**_stored(stored), **_video(size, fps), **_notes(reference)}
        return {**made, **_losses(result), **_timings(result), **timings, **moved_by}

    def _moved_by(self, work: WorkRow, bank: MotionBank) -> Columns:
        """The columns that tell which reference a bank was learned of, so that the video can be held against it."""
        its = bank.header.provenance
        settings = {**self._job_of(work).row_settings(), "video": comparable(its.get("reference_video"), its["size"])}
        return {
            "reference_uri": its.get("reference_uri"),
            "reference_sha256": its.get("reference_sha256"),
            "spec_json": json.dumps(settings, sort_keys=True),
        }

    def _build_bank(self, work: WorkRow, row: Row) -> Columns:
        """Learn a bank; its id is the row's."""
        assert self._worker is not None and work.prompt is not None and work.seed is not None
        reference, size, fps = self._reference(work, row)
        assert isinstance(reference, MotionReference)
        result = learn_bank(
            self._worker.backbone,
            work.prompt,
            reference=reference,
            size=size,
            seed=work.seed,
            method=self._method(work),
            sampling=self._job.sampling,
        )
        assert result.bank is not None and work.reference is not None
        provenance = {
            **result.bank.header.provenance,
            "fps": fps,
            "reference_uri": work.reference.uri,
            "reference_sha256": work.reference.sha256,
            "reference_video": self._job_of(work).row_settings()["video"],
            "reference_fps": reference.fps,
            **({"reference_notes": list(reference.notes)} if reference.notes else {}),
            "seed": work.seed,
        }
        header = replace(result.bank.header, provenance=provenance, tags=work.tags)
        bank = replace(result.bank, header=header).compressed(self._job.output.bank_error)
        writing = time.perf_counter()
        stored = self._desk.store.put(self._job.key("banks", f"{work.row_id}.safetensors"), bank.to_bytes())
        timings = {"seconds_write": time.perf_counter() - writing, "bank_uri": stored.uri}
        made = {**_stored(stored), **_video(size, fps), **_notes(reference)}
        return {**made, **_losses(result), **_timings(result), **timings}

    def _reference(self, work: WorkRow, row: Row) -> tuple[MotionReference | MotionBank | None, Size, float]:
        """What moves the new video, the video's size, and its frames per second."""
        size, own_fps = self._job.references.size, self._job.output.fps
        if work.bank is not None:
            bank = self._bank(work.bank)
            frames, height, width = bank.header.provenance["size"]
            return bank, (frames, height, width), own_fps or bank.header.provenance.get("fps") or DEFAULT_FPS
        if work.motion_id is None:
            return None, size, own_fps or DEFAULT_FPS
        motion = self._motion(row["amf_uri"])
        return motion, size, own_fps or motion.fps or DEFAULT_FPS

    def _bank(self, source: Input) -> MotionBank:
        """A bank, for videos of the size that the job asks for."""
        bank, size = self._banks.get(source), self._job.banks.size
        assert self._worker is not None
        return bank if size is None else bank.resized(self._worker.backbone.layout, size)

    def _job_of(self, work: WorkRow) -> Job:
        """The job with the row's method alone, and with what a table says of the row."""
        return self._job.variants[work.variant].with_own(work.own)

    def _method(self, work: WorkRow) -> MethodSettings:
        return self._job_of(work).method

    def _read_motion(self, uri: str) -> MotionReference:
        return MotionReference.from_bytes(self._stored_motion(uri), uri)

    def _stored_motion(self, uri: str) -> bytes:
        """Read a motion reference that this job has stored. That it is gone is the fault of no row."""
        try:
            return self._job.read(uri)
        except StoreMissingError as error:
            raise StoreUnwritableError(
                f"{uri} is gone, although this job stored it: the output folder was moved, emptied or unmounted while "
                "the job ran. Bring it back, or run the job where it is now."
            ) from error

    # ------------------------------------------------------------------ what is recorded

    def _identity(self, work: WorkRow, row: Row) -> Columns:
        """The columns that are known before anything is made."""
        job, kind = self._job_of(work), self._job.kind
        zero_shot = kind == "reuse" or job.method.zero_shot
        return {
            "row_id": work.row_id,
            "job": job.name,
            "kind": kind,
            "reference_uri": work.reference and work.reference.uri,
            "reference_sha256": work.reference and work.reference.sha256,
            "bank_uri": work.bank and work.bank.uri,
            "prompt": work.prompt,
            "category": work.category,
            "negative_prompt": None if kind == "extract" else job.sampling.negative_prompt,
            "seed": work.seed,
            "variant": work.variant,
            "method": job.method.name,
            "optimize": "zero-shot" if zero_shot else job.method.optimize if job.method.has_loss else None,
            "model": job.model.path,
            "model_revision": self._revision,
            "spec_json": json.dumps(job.row_settings(), sort_keys=True),
            **(_extraction(row) if work.motion_id is not None else {}),
            **(_motion(job.method.motion) if work.motion_id is not None and job.method.has_loss else {}),
            "mask_uri": work.mask and work.mask.uri,
            "mask_sha256": work.mask and work.mask.sha256,
        }


def comparable(video: Mapping[str, Any] | None, size: Sequence[int]) -> dict[str, Any] | None:
    """Which frames of a bank's reference, at the size of a new video, can be held against it; None if none can.

    A video that is longer, or of another shape, than what its bank was learned of has no frames to go with its own.
    """
    frames, height, width = size
    if video is None or (video["frames"], video["height"] * width) != (frames, video["width"] * height):
        return None
    return {**video, "height": height, "width": width}


def _extraction(row: Row) -> Columns:
    """The columns that tell of the reference's motion."""
    stored = earlier_fault(row) is None
    return {
        "amf_uri": row["amf_uri"] if stored else None,
        **{key: row[key] for key in ("seconds_read", "seconds_extract")},
    }


def _motion(motion: MotionSettings | None) -> Columns:
    """The columns that tell where the motion target comes from."""
    settings = settings_dict(motion or MotionSettings())
    return {f"motion_{name}": json.dumps(settings[name], sort_keys=True) for name in ("source", "filters")}


def _tell_of_end(record: Columns) -> None:
    """Write into the log how a row ended."""
    seconds = {phase: record[f"seconds_{phase}"] for phase in (*PHASES, "total")}
    told = (
        "row_id",
        "status",
        "attempts",
        "loss_first",
        "loss_final",
        "peak_memory_bytes",
        "error_kind",
        "error_class",
    )
    event(
        "row_ended",
        INFO if record["status"] == "ok" else WARNING,
        **{name: record[name] for name in told},
        seconds={phase: value for phase, value in seconds.items() if value is not None},
        message=record["error_message"],
    )


def _ending(outcome: Outcome[Columns]) -> Columns:
    """The columns that tell how a row ended."""
    fault = outcome.fault
    if fault is None:
        return {"status": "ok", "attempts": outcome.attempts}
    return {
        "status": "quarantined" if fault.kind == "worker_died" else "failed",
        "attempts": outcome.attempts,
        "error_kind": fault.kind,
        "error_class": fault.error_class,
        "error_message": fault.message,
    }


def _video(size: Size, fps: float | None) -> Columns:
    frames, height, width = size
    return {"frames": frames, "height": height, "width": width, "fps": fps}


def _notes(reference: MotionReference | MotionBank | None) -> Columns:
    """How the reference was read, also that of which a bank was learned."""
    its = reference.header.provenance.get("reference_notes", ()) if isinstance(reference, MotionBank) else ()
    return {"reference_notes": list(reference.notes if isinstance(reference, MotionReference) else its)}


def _stored(stored: Stored) -> Columns:
    return {"output_uri": stored.uri, "output_sha256": stored.sha256, "output_bytes": stored.bytes}


def _losses(result: Transferred) -> Columns:
    losses = [loss for step in result.losses for loss in step]
    found = {"losses": losses, "noise_losses": result.noise_losses}
    return {**found, "loss_first": losses[0], "loss_final": losses[-1]} if losses else found


def _timings(result: Transferred) -> Columns:
    return {
        f"seconds_{phase}": result.seconds[phase]
        for phase in ("learn", "guidance", "denoise", "decode")
        if phase in result.seconds
    }
