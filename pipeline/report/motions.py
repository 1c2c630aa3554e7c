"""Attention motion flows as the page draws them: from every latent frame to the next."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ditflow.artifact import ArtifactError
from ditflow.motion.reference import MotionReference
from pipeline.manifest import READ_THREADS, output_key
from pipeline.report.folder import ReportFolder, script
from pipeline.store import StoreError, read_uri

_UNITS_PER_PATCH = 16
"""Moves are written as whole numbers of this part of a patch: those of soft flows are no whole patches."""


def write_motions(folder: ReportFolder, motions: Mapping[str, str]) -> list[str]:
    """Write what is not there yet of the flows at these URIs; return the ids of those that the page has."""
    missing = {its_id: uri for its_id, uri in motions.items() if not folder.has(_name(its_id))}
    with ThreadPoolExecutor(READ_THREADS) as pool:
        data = dict(zip(missing, pool.map(lambda item: _read(folder, *item), missing.items()), strict=True))
    for its_id, code in data.items():
        if code is not None:
            folder.put(_name(its_id), code)
    return [its_id for its_id in motions if data.get(its_id, b"there") is not None]


def _name(its_id: str) -> str:
    return f"motions/{its_id}.js"


def _read(folder: ReportFolder, its_id: str, uri: str) -> bytes | None:
    """Return the script of a flow, or None for one that is gone or was never stored."""
    store, key = folder.store, output_key(uri)
    try:
        data = store.read(key) if key else read_uri(uri, store.storage_options, store.patience_s)
        motion = MotionReference.from_bytes(data, uri)
    except (StoreError, ArtifactError):
        return None
    if motion.loss != "ditflow" or not motion.payloads:
        return None
    return script("motion", its_id, {"grid": _grid(motion), "unit": _UNITS_PER_PATCH, "moves": _moves(motion)})


def _grid(motion: MotionReference) -> list[int]:
    return [motion.grid.frames, motion.grid.height, motion.grid.width]


def _moves(motion: MotionReference) -> str:
    """Return the moves (dx, dy) of every patch from each frame to the next, as base64 of little-endian int16."""
    displacement = motion.displacement.float().numpy()
    frames = np.arange(motion.grid.frames - 1)
    moves = np.rint(displacement[frames, frames + 1] * _UNITS_PER_PATCH)
    return base64.b64encode(moves.astype("<i2").tobytes()).decode()
