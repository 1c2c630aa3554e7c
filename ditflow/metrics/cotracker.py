"""Point tracks by CoTracker3 (arXiv 2410.11831), for users who have its weights; they are never downloaded.

Axis letters: T frames, H rows, W columns of pixels; N tracked points.

The weights are a TorchScript file, which carries its own code, so that neither a checkpoint has to be unpickled nor
CoTracker's package be installed. Its module must answer:

    module(video float32 [1, T, 3, H, W] in 0..255, queries float32 [1, N, 3] of (t, x, y) in frames and pixels)
        -> (tracks float32 [1, T, N, 2] of (x, y) in pixels, visibility [1, T, N] bool or probability)

The offline predictor of CoTracker's package answers so, already with bool. Scripted it fits any clip, traced only
clips of the length and size it was traced with.
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

from ditflow.metrics.tracks import Points, Tracks, check_frames, inside, query_grid

VISIBLE_ABOVE = 0.9
"""Probability above which a point counts as visible, as in CoTracker3's offline predictor."""

Ways = Float32[np.ndarray, "points frames 2"]
Seen = Bool[np.ndarray, "points frames"]


def cotracker(weights: str | Path, *, device: str | torch.device = "cpu") -> Callable[[np.ndarray], Tracks]:
    """Return a tracker, from frames uint8 [T, H, W, 3] RGB to tracks, by the TorchScript file `weights` on a device.

    It starts from the same points as the other trackers, all in the first frame. There they are visible where they
    were asked for; later, where the module says so and they are inside the picture. Unlike in the other trackers a
    point that was hidden can come back.

    A TorchScript file runs as code of its own: use only files that you trust. Nothing is unpickled by Python.

    Raises ValueError if the file is missing or no TorchScript; the tracker raises it for frames that `track` refuses,
    and for an answer of another type, shape or range than the head of this file says.
    """
    target = torch.device(device)
    module = _module(Path(weights), target)

    def tracks_of(frames: np.ndarray) -> Tracks:
        check_frames(frames)
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
        raise ValueError(
            f"{weights} has TorchScript's layout, but torch {torch.__version__} cannot load it onto {device}. Most "
            "likely the file is damaged, was exported by a newer torch, uses operators of another package, or the "
            "device is missing. Copy or export it again."
        ) from error


def _check_archive(weights: Path) -> None:
    if not weights.is_file():
        raise ValueError(
            f"{weights} is no file, expected CoTracker3's weights as TorchScript. They are never downloaded; check the "
            "path."
        )
    entries = _entries(weights)
    if "constants.pkl" not in entries or not any(entry.startswith("code/") for entry in entries):
        raise ValueError(
            f"{weights} is no TorchScript archive: expected a zip file with constants.pkl and code/. Most likely it is "
            "a checkpoint of torch.save, which is not read because unpickling runs what it contains. Load it where it "
            "is trusted, and export it by torch.jit.script(model).save(path), or by torch.jit.trace."
        )


def _entries(archive: Path) -> set[str]:
    """The paths in a zip archive, below its one folder; none if it is no zip archive."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return {name.partition("/")[2] for name in opened.namelist()}
    except zipfile.BadZipFile:
        return set()


def _video(frames: np.ndarray) -> Float32[Tensor, "1 frames 3 height width"]:
    return torch.from_numpy(frames.transpose(0, 3, 1, 2).astype(np.float32, order="C"))[None]


def _queries(grid: Points) -> Float32[Tensor, "1 points 3"]:
    return torch.from_numpy(np.pad(grid, ((0, 0), (1, 0))))[None]  # t = 0 in front of (x, y)


def _checked(answer: Any, frames: int, count: int) -> tuple[Ways, Seen]:
    """What the module answered, without the batch and points first; visibility as yes or no."""
    expected = ([1, frames, count, 2], [1, frames, count])
    pair = isinstance(answer, tuple) and all(isinstance(part, Tensor) for part in answer)
    shapes = tuple(list(part.shape) for part in answer) if pair else type(answer).__name__
    if shapes != expected:
        raise ValueError(
            f"CoTracker's module answered {shapes}, expected tensors {expected}: tracks [1, T, N, 2] and visibility "
            "[1, T, N]. Most likely the inner model was exported, not a predictor; wrap it and export it again."
        )
    points, visibility = (part[0].transpose(0, 1).cpu() for part in answer)
    return points.float().numpy(), _seen(visibility).numpy()


def _seen(visibility: Tensor) -> Bool[Tensor, "points frames"]:
    if visibility.dtype == torch.bool:
        return visibility
    if not ((visibility >= 0) & (visibility <= 1)).all():
        raise ValueError(
            f"CoTracker's module answered visibilities from {visibility.min():.3g} to {visibility.max():.3g}, expected "
            "bool or probabilities from 0 to 1. Most likely they are logits; apply a sigmoid before exporting."
        )
    return visibility > VISIBLE_ABOVE


def _tracks(points: Ways, visible: Seen, grid: Points, height: int, width: int) -> Tracks:
    """Tracks that start on the grid; a point that is hidden or outside stays where it was last seen."""
    # Visible points that are not finite are the module's error, not outside: Tracks refuses them.
    visible = visible & (inside(points, height, width) | ~np.isfinite(points).all(axis=-1))
    visible[:, 0] = True
    points = np.concatenate([grid[:, None], points[:, 1:]], axis=1)
    last_seen = np.maximum.accumulate(np.where(visible, np.arange(visible.shape[1]), 0), axis=1)
    return Tracks(np.take_along_axis(points, last_seen[..., None], axis=1), visible)
