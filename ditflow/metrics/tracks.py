"""Point tracks of a clip by OpenCV, without any weights: what the motion metrics compare.

Axis letters: T frames, H rows, W columns of pixels; N tracked points.

Both trackers start from the same evenly spaced points of the first frame and follow them from frame to frame. A
point is lost for good when it leaves the picture, or when following it back from the next frame misses its place by
more than `LARGEST_RETURN_ERROR`. Coordinates are (x, y); whole ones are pixel centres. The third tracker, for users
who have its weights, is in `cotracker.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

POINTS_PER_SIDE = 20
"""Points along the smaller side of the first frame; along the longer one they are as far apart.

That is 400 points, 3.2 pixels apart, in 64x64, and 600 points, 24 pixels apart, in 480x720: dense enough for the
smallest things that move visibly, and few enough for all pairs of two clips' points to be compared.
"""
LARGEST_RETURN_ERROR = 0.5
"""Pixels between a point and its place after one step forward and one back, above which it is lost."""
SMALLEST_SIDE = 16
"""Pixels of the smaller side below which the trackers' windows do not fit."""
DIS_HALVES_FROM = 256
"""Pixels of the smaller side from which the dense flow is found at half the resolution: as good there, in a quarter
of the time. In a 64x64 clip half the resolution would blur small things into their surroundings."""
COTRACKER = "cotracker3"
"""Name of the tracker that needs weights."""

Picture = UInt8[np.ndarray, "height width"]
Points = Float32[np.ndarray, "points 2"]
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From two neighbouring grey frames and points of the first: where they are in the second, and their return errors."""
Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From two grey pictures uint8 [H, W] to the displacements float32 [H, W, 2] of the first one's pixels, (x, y)."""


@dataclass(frozen=True, eq=False)
class Tracks:
    """N points followed through T frames.

    points: (x, y) in pixels; an invisible point carries its last visible position. visible: whether the point is
    seen in that frame. Raises ValueError if types or shapes do not fit together or a coordinate is not finite.
    """

    points: Float32[np.ndarray, "points frames 2"]
    visible: Bool[np.ndarray, "points frames"]

    def __post_init__(self) -> None:
        fits = self.points.ndim == 3 and self.points.shape == (*self.visible.shape, 2)
        if not fits or self.points.dtype != np.float32 or self.visible.dtype != bool:
            raise ValueError(
                f"points {self.points.dtype} {list(self.points.shape)} and visible {self.visible.dtype} "
                f"{list(self.visible.shape)} came, expected float32 [N, T, 2] and bool [N, T]. Trackers that put time "
                "first (CoTracker: [T, N, 2]) need a transpose."
            )
        if not np.isfinite(self.points).all():
            raise ValueError(
                f"{np.sum(~np.isfinite(self.points))} coordinates of the tracks are not finite. Most likely a tracker "
                "marks lost points so: give them their last position, and visible = False."
            )


def track(frames: np.ndarray, tracker: str = "lucas-kanade", weights: str | Path | None = None) -> Tracks:
    """Return the tracks of a clip, frames uint8 [T, H, W, 3] RGB, by a tracker of `TRACKERS` or by CoTracker3.

    weights: the TorchScript file of "cotracker3", for this tracker alone; it is read at every call. For many clips,
    or for a GPU, load it once with `ditflow.metrics.cotracker.cotracker`.

    Raises ValueError for an unknown tracker, weights that are missing or not expected, another type or shape, fewer
    than 2 frames, or pictures with a side below `SMALLEST_SIDE`.
    """
    if tracker not in (*TRACKERS, COTRACKER):
        raise ValueError(f"{tracker!r} is no tracker. The trackers are: {', '.join(TRACKERS)}, {COTRACKER}.")
    if tracker == COTRACKER:
        return _by_cotracker(frames, weights)
    if weights is not None:
        raise ValueError(
            f"the weights {weights} came with the tracker {tracker}, expected none: it has no weights. Most likely "
            f"{COTRACKER} is meant."
        )
    return TRACKERS[tracker](frames)


def lucas_kanade_tracks(frames: np.ndarray) -> Tracks:
    """Return tracks by pyramidal Lucas-Kanade: every point is matched by the small window around it.

    Takes and raises what `track` does. Points without texture around them are lost, too.
    """
    check_frames(frames)
    window, levels = _window_and_levels(min(frames.shape[1:3]))
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003)

    def find(points: Points, before: Picture, after: Picture) -> tuple[Points, np.ndarray]:
        moved, found, _ = cv2.calcOpticalFlowPyrLK(
            before, after, points, np.empty_like(points), winSize=(window, window), maxLevel=levels, criteria=stop
        )
        return moved, found[:, 0] == 1

    def step(before: Picture, after: Picture, points: Points) -> tuple[Points, np.ndarray]:
        arrived, found = find(points, before, after)
        returned, found_back = find(arrived, after, before)
        return arrived, np.where(found & found_back, _distance(returned, points), np.inf)

    return _follow(frames, step)


def dis_tracks(frames: np.ndarray) -> Tracks:
    """Return tracks by dense inverse search flow (DIS), in which points between pixels move bilinearly.

    Takes and raises what `track` does. Points without texture move with their surroundings.
    """
    check_frames(frames)
    flow = dis_flow(*frames.shape[1:3])

    def step(before: Picture, after: Picture, points: Points) -> tuple[Points, np.ndarray]:
        arrived = points + _at(flow(before, after), points)
        returned = arrived + _at(flow(after, before), arrived)
        return arrived, _distance(returned, points)

    return _follow(frames, step)


Tracker = Callable[[np.ndarray], Tracks]
"""From frames uint8 [T, H, W, 3] RGB to tracks."""
TRACKERS: dict[str, Tracker] = {"lucas-kanade": lucas_kanade_tracks, "dis": dis_tracks}
"""Trackers by name."""


def dis_flow(height: int, width: int) -> Flow:
    """Return the dense inverse search flow (DIS) for pictures of a size in pixels, as `dis_tracks` uses it."""
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow.setFinestScale(0 if min(height, width) < DIS_HALVES_FROM else 1)
    return lambda before, after: flow.calc(before, after, None)


def query_grid(height: int, width: int) -> Points:
    """Return evenly spaced points [N, 2] of a picture, (x, y) in pixels, row by row: centres of equal cells."""
    spacing = max(1.0, min(height, width) / POINTS_PER_SIDE)
    x, y = ((np.arange(count := round(side / spacing)) + 0.5) * side / count - 0.5 for side in (width, height))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)


def inside(points: Float32[np.ndarray, "*many 2"], height: int, width: int) -> Bool[np.ndarray, "*many"]:
    """Return which points (x, y) are on a pixel of the picture; those that are not finite are not."""
    x, y = points[..., 0], points[..., 1]
    return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)


def _follow(frames: UInt8[np.ndarray, "frames height width 3"], step: Step) -> Tracks:
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    places = [query_grid(*grey[0].shape)]
    seen = [np.ones(len(places[0]), bool)]
    for before, after in pairwise(grey):
        arrived, error = step(before, after, places[-1])
        kept = seen[-1] & (error <= LARGEST_RETURN_ERROR) & inside(arrived, *after.shape)
        places.append(np.where(kept[:, None], arrived, places[-1]))
        seen.append(kept)
    return Tracks(np.stack(places, axis=1), np.stack(seen, axis=1))


def _by_cotracker(frames: np.ndarray, weights: str | Path | None) -> Tracks:
    if weights is None:
        raise ValueError(
            f"the tracker {COTRACKER} came without weights, expected the path to its TorchScript file: they are never "
            f"downloaded. Pass the file that you exported, or use {' or '.join(TRACKERS)}, which need none."
        )
    from ditflow.metrics.cotracker import cotracker  # which imports this file

    return cotracker(weights)(frames)


def _distance(points: Points, others: Points) -> Float32[np.ndarray, " points"]:
    return np.hypot(*(points - others).T)


def _at(field: Float32[np.ndarray, "height width 2"], points: Points) -> Points:
    """Bilinear values of a field at points; beyond its edge, the edge's."""
    return cv2.remap(field, points[:, None], None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]


def _window_and_levels(side: int) -> tuple[int, int]:
    """The window's side in pixels, odd, and the pyramid's levels above the full picture, by the smaller side.

    7 and 2 in 64x64, 19 and 4 in 480x720. Wider windows drag points along with things that pass by, narrower ones
    lose more points; the coarsest level is at least 16 pixels wide, so that a step of a tenth of the picture is found.
    """
    window = 2 * round(3.5 * math.sqrt(side / 64) - 0.5) + 1
    return window, int(math.log2(side / SMALLEST_SIDE))


def check_pictures(frames: np.ndarray) -> None:
    """Raise ValueError if frames are not uint8 [T, H, W, 3]."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [T, H, W, 3] RGB. Pictures in 0..1 must "
            "be multiplied by 255 and rounded; channels come last."
        )


def check_frames(frames: np.ndarray) -> None:
    """Raise ValueError if motion cannot be found in frames, which must be what `track` takes."""
    check_pictures(frames)
    if len(frames) < 2 or min(frames.shape[1:3]) < SMALLEST_SIDE:
        raise ValueError(
            f"{len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} pixels came, expected 2 or more of at least "
            f"{SMALLEST_SIDE}x{SMALLEST_SIDE}: one frame has no motion, and points need room around them. If this is "
            "a single picture, it cannot be scored; if it is a clip, check how it was decoded and resized."
        )
