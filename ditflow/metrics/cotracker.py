"""Point tracks by CoTracker3 (arXiv 2410.11831), with weights of the user; they are never downloaded.

Axis letters: T frames, H rows, W columns of pixels; N tracked points.

The weights are a TorchScript file, which contains its own code: no checkpoint is unpickled, and CoTracker's package is
not needed. Its module has the signature:

    module(video float32 [1, T, 3, H, W] in 0..255, queries float32 [1, N, 3] of (t, x, y) in frames and pixels)
        -> (tracks float32 [1, T, N, 2] of (x, y) in pixels, visibility [1, T, N] bool or probability)

The offline predictor of CoTracker's package has it, with bool. Scripted it takes any clip, traced only clips of the
length and size that it was traced with.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from ditflow.metrics.errors import MetricInputError
from ditflow.metrics.tracks import Points, Tracks, check_trackable, is_inside, query_grid

VISIBILITY_THRESHOLD = 0.9
"""Probability above which a point counts as visible, as in CoTracker3's offline predictor."""

Positions = Float32[np.ndarray, "points frames 2"]
Visibility = Bool[np.ndarray, "points frames"]


def cotracker(weights: str | Path, *, device: str | torch.device = "cpu") -> Callable[[np.ndarray], Tracks]:
    """Return a tracker, from frames uint8 [T, H, W, 3] RGB to tracks, by the TorchScript file `weights` on a device.

    It starts from the same points as the other trackers, all in the first frame, where they are visible. Later they are
    visible where the module says so and they are inside the frame; unlike in the other trackers, a hidden point can
    reappear.

    TorchScript is code that is run: use only files that you trust. Nothing is unpickled by Python.

    Raises MetricInputError if the file is missing or not TorchScript; the tracker raises it as `check_trackable` does,
    and for an output of another type, shape or range than the signature above.
    """
    target = torch.device(device)
    module = _module(Path(weights), target)

    def tracks_of(frames: np.ndarray) -> Tracks:
        check_trackable(frames)
        grid = query_grid(*frames.shape[1:3])
        with torch.no_grad():
            answer = module(_video(frames).to(target), _queries(grid).to(target))
        points, visible = _checked(answer, len(frames), len(grid))
        return _tracks(points, visible, grid, *frames.shape[1:3])

    return tracks_of


def _module(weights: Path, device: torch.device) -> torch.jit.ScriptModule:
    _check_archive(weights)
    try:
        return torch.jit.load(weights, map_location=device).eval()
    except RuntimeError as error:
        raise MetricInputError(
            f"{weights} has TorchScript's layout, but torch {torch.__version__} cannot load it onto {device}. Most "
            "likely the file is damaged, was exported by a newer torch, uses operators of another package, or the "
            "device is missing. Copy or export it again.",
            code="tracker-weights-damaged",
            key="metrics.tracker_weights",
        ) from error


def _check_archive(weights: Path) -> None:
    if not weights.is_file():
        raise MetricInputError(
            f"{weights} is not a file, expected CoTracker3's weights as TorchScript. They are never downloaded; check "
            "the path.",
            code="tracker-weights-missing",
            key="metrics.tracker_weights",
        )
    entries = _entries(weights)
    if "constants.pkl" not in entries or not any(entry.startswith("code/") for entry in entries):
        raise MetricInputError(
            f"{weights} is not a TorchScript archive: expected a zip file with constants.pkl and code/. Most likely it "
            "is a checkpoint of torch.save, which is not read because unpickling runs code in it. If you trust it, "
            "load it and export it by torch.jit.script(model).save(path), or by torch.jit.trace.",
            code="tracker-weights-not-torchscript",
            key="metrics.tracker_weights",
        )


def _entries(archive: Path) -> set[str]:
    """Return the paths in a zip archive, below its top folder; none if it is not a zip archive."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return {name.partition("/")[2] for name in opened.namelist()}
    except zipfile.BadZipFile:
        return set()


def _video(frames: np.ndarray) -> Float32[Tensor, "1 frames 3 height width"]:
    return torch.from_numpy(frames.transpose(0, 3, 1, 2).astype(np.float32, order="C"))[None]


def _queries(grid: Points) -> Float32[Tensor, "1 points 3"]:
    return torch.from_numpy(np.pad(grid, ((0, 0), (1, 0))))[None]  # (t = 0, x, y)


def _checked(answer: Any, frames: int, count: int) -> tuple[Positions, Visibility]:
    """Return the module's output without the batch axis, points first, and visibility as bool."""
    expected = ([1, frames, count, 2], [1, frames, count])
    pair = isinstance(answer, tuple) and all(isinstance(part, Tensor) for part in answer)
    shapes = tuple(list(part.shape) for part in answer) if pair else type(answer).__name__
    if shapes != expected:
        raise MetricInputError(
            f"CoTracker's module returned {shapes}, expected tensors {expected}: tracks [1, T, N, 2] and visibility "
            "[1, T, N]. Most likely the inner model was exported, not a predictor; wrap it and export it again.",
            code="tracker-output-invalid",
            key="metrics.tracker_weights",
        )
    points, visibility = (part[0].transpose(0, 1).cpu() for part in answer)
    return points.float().numpy(), _is_visible(visibility).numpy()


def _is_visible(visibility: Tensor) -> Bool[Tensor, "points frames"]:
    if visibility.dtype == torch.bool:
        return visibility
    if not ((visibility >= 0) & (visibility <= 1)).all():
        raise MetricInputError(
            f"CoTracker's module returned visibilities from {visibility.min():.3g} to {visibility.max():.3g}, expected "
            "bool or probabilities from 0 to 1. Most likely they are logits; apply a sigmoid before exporting.",
            code="tracker-output-invalid",
            key="metrics.tracker_weights",
        )
    return visibility > VISIBILITY_THRESHOLD


def _tracks(points: Positions, visible: Visibility, grid: Points, height: int, width: int) -> Tracks:
    """Return tracks that start on the grid; a point that is hidden or outside keeps its last visible position."""
    # Visible points that are not finite are an error of the module, which Tracks raises.
    visible = visible & (is_inside(points, height, width) | ~np.isfinite(points).all(axis=-1))
    visible[:, 0] = True
    points = np.concatenate([grid[:, None], points[:, 1:]], axis=1)
    last_seen = np.maximum.accumulate(np.where(visible, np.arange(visible.shape[1]), 0), axis=1)
    return Tracks(np.take_along_axis(points, last_seen[..., None], axis=1), visible)
