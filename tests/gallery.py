"""Outputs of jobs that never ran, with real videos, flows and records: what a report is made of."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch

from ditflow.media.video import encode_video
from ditflow.motion.reference import MotionReference
from ditflow.types import TokenGrid
from pipeline.job import Job, Output, content_id
from pipeline.manifest import Manifest, parquet_bytes
from pipeline.record import make_row, rows_to_table
from pipeline.store import Store, sha256_of

FRAMES, SIDE, FPS = 9, 32, 8.0
GRID = TokenGrid(3, 4, 4)
STARTED = datetime(2026, 1, 1, tzinfo=UTC)
VIDEO = {"frames": FRAMES, "height": SIDE, "width": SIDE, "start": 0, "stride": 1, "fit": "crop"}


def clip(hue: int = 0, frames: int = FRAMES) -> np.ndarray:
    """A bright square that goes to the right, uint8 [T, H, W, 3]."""
    pictures = np.full((frames, SIDE, SIDE, 3), 40, np.uint8)
    for number, picture in enumerate(pictures):
        left = number * (SIDE - 8) // max(frames - 1, 1)
        picture[12:20, left : left + 8, hue % 3] = 230
    return pictures


def add_reference(folder: Path, name: str = "square.mp4") -> Path:
    """A reference video with a frame more than is used."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(encode_video(clip(frames=FRAMES + 1), FPS))
    return folder / name


def displacement() -> torch.Tensor:
    """Moves that differ in every entry: [F, F, P, 2]."""
    shape = (GRID.frames, GRID.frames, GRID.patches, 2)
    return (torch.arange(int(np.prod(shape))) % 15 - 7).reshape(shape).to(torch.int8)


def add_motion(store: Store, its_id: str = "a0", loss: str = "ditflow") -> str:
    motion = MotionReference(GRID, "revision", loss, {3: {"displacement": displacement()}}, None, FPS)
    return store.put(f"amf/{its_id}.safetensors", motion.to_bytes()).uri


def row_id(number: int) -> str:
    return content_id(number=number)


def row(store: Store, number: int, **changes) -> dict:
    """A finished row whose output is said to be there."""
    variant = changes.get("variant", "flow")
    method = {"name": "ditflow", "iterations": 5, "learn_with": ""}
    spec = {"method": method, "sampling": {"steps": 8}, "video": VIDEO, "fps": None, "dtype": "auto"}
    losses = [2.0 / (step + 1) + number % 7 / 10 for step in range(10)]
    ended = STARTED + timedelta(seconds=number)
    values = {
        "row_id": row_id(number),
        "job": "gallery",
        "kind": "synthesize",
        "status": "ok",
        "prompt": f"prompt {number}",
        "seed": number,
        "variant": variant,
        "method": "ditflow",
        "model": "mini",
        "model_revision": "revision",
        "spec_json": json.dumps(spec),
        "output_uri": store.uri_of(f"videos/{row_id(number)}.mp4"),
        "output_sha256": "0" * 64,
        "output_bytes": 1,
        "losses": losses,
        "loss_first": losses[0],
        "loss_final": losses[-1],
        "seconds_guidance": 3.0,
        "seconds_denoise": 1.0,
        "seconds_total": 4.0 + number,
        "attempts": 1,
        "frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
        "fps": FPS,
        "started_at": ended - timedelta(seconds=4),
        "finished_at": ended,
    }
    return make_row(**{**values, **changes})


FAILED = {
    "status": "failed",
    "output_uri": None,
    "output_sha256": None,
    "output_bytes": None,
    "losses": [],
    "loss_first": None,
    "loss_final": None,
    "error_kind": "permanent",
    "error_class": "CorruptVideoError",
    "error_message": "square.mp4: damaged near frame 3",
}


def add_row(store: Store, number: int, *, video: np.ndarray | None = None, fps: float = FPS, **changes) -> str:
    """Record a row, with its video if one is given; return its id."""
    if video is not None:
        store.put(f"videos/{row_id(number)}.mp4", encode_video(video, fps))
    Manifest(store).commit(row(store, number, **changes))
    return row_id(number)


def add_many(store: Store, rows: list[dict]) -> None:
    """Record many rows in one file, as a merged manifest has them."""
    store.put("manifest/merged-many.parquet", parquet_bytes(rows_to_table(rows)))


def used(reference: Path) -> dict:
    """The columns of a row that used a reference."""
    uri = f"file://{reference}"
    return {"reference_uri": uri, "reference_sha256": sha256_of(uri)}


def job_of(store: Store, **changes) -> Job:
    return Job("evaluate", "report", Output(store.uri), storage_options=store.storage_options, **changes)
