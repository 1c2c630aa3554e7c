"""Point trackers by name: two of OpenCV, which need no weights, and CoTracker3 with the user's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ditflow.metrics.cotracker import cotracker
from ditflow.metrics.errors import MetricInputError
from ditflow.metrics.tracks import TRACKERS, Tracker, Tracks

COTRACKER = "cotracker3"
"""Name of the tracker that needs weights."""
TRACKER_NAMES = (*TRACKERS, COTRACKER)


def load_tracker(name: str, weights: str | Path | None = None, *, device: str | torch.device = "cpu") -> Tracker:
    """Return a tracker of `TRACKER_NAMES`; weights: the TorchScript file of CoTracker3, loaded onto the device.

    Raises MetricInputError for an unknown name, and for weights that are missing or not expected.
    """
    if name not in TRACKER_NAMES:
        raise MetricInputError(
            f"{name!r} is not a tracker. The trackers are: {', '.join(TRACKER_NAMES)}.",
            code="unknown-tracker",
            key="metrics.tracker",
        )
    if name != COTRACKER:
        if weights is not None:
            raise MetricInputError(
                f"the weights {weights} came with the tracker {name}, expected none: it has no weights. Most likely "
                f"{COTRACKER} is meant.",
                code="tracker-weights-unexpected",
                key="metrics.tracker_weights",
            )
        return TRACKERS[name]
    if weights is None:
        raise MetricInputError(
            f"the tracker {COTRACKER} came without weights, expected the path to its TorchScript file: they are never "
            f"downloaded. Pass the file that you exported, or use {' or '.join(TRACKERS)}, which need none.",
            code="tracker-weights-missing",
            key="metrics.tracker_weights",
        )
    return cotracker(weights, device=device)


def track(frames: np.ndarray, tracker: str = "lucas-kanade", weights: str | Path | None = None) -> Tracks:
    """Return the tracks of one clip, frames uint8 [T, H, W, 3] RGB, by the tracker of a name; see `load_tracker`.

    Weights are loaded at every call: for several clips call `load_tracker` once. Raises MetricInputError as it does,
    and for another type or shape, fewer than 2 frames, or frames with a side below `ditflow.metrics.tracks.MIN_SIDE`.
    """
    return load_tracker(tracker, weights)(frames)
