"""Point tracks of a clip by OpenCV, without weights: the input of the motion metrics.

Axis letters: T frames, H rows, W columns of pixels; N tracked points.

Both trackers start from the same evenly spaced points of the first frame and follow them from frame to frame. A
point is lost for good when it leaves the frame, or when its forward-backward error exceeds
`MAX_FORWARD_BACKWARD_ERROR`. Coordinates are (x, y); whole numbers are pixel centres. `trackers.py` has all trackers by
name, also the one that needs weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from ditflow.media.optical_flow import GreyFrame, dis_flow, follow, is_inside
from ditflow.metrics.errors import MetricInputError

POINTS_PER_SIDE = 20
"""Points along the smaller side of the first frame; along the longer side the spacing is the same.

That is 400 points, 3.2 pixels apart, in 64x64, and 600 points, 24 pixels apart, in 480x720: dense enough for the
smallest visible motion, and few enough to compare all pairs of points of two clips.
"""
MAX_FORWARD_BACKWARD_ERROR = 0.5
"""Pixels between a point and its position after one step forward and one back, above which it is lost."""
MIN_SIDE = 16
"""Smallest side in pixels in which the trackers' windows fit."""
DIS_HALF_RESOLUTION_FROM = 256
"""Smaller side in pixels from which the dense flow is computed at half the resolution: as accurate there, in a quarter
of the time. In a 64x64 clip half the resolution would blur small objects into the background."""

Points = Float32[np.ndarray, "points 2"]
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From two neighbouring grey frames and points of the first: their positions in the second, and their forward-backward
errors."""


@dataclass(frozen=True, eq=False)
class Tracks:
    """Positions and visibility of N points over T frames.

    points: (x, y) in pixels; an invisible point keeps its last visible position. Raises MetricInputError for
    inconsistent shapes, other types, and coordinates that are not finite.
    """

    points: Float32[np.ndarray, "points frames 2"]
    visible: Bool[np.ndarray, "points frames"]

    def __post_init__(self) -> None:
        fits = self.points.ndim == 3 and self.points.shape == (*self.visible.shape, 2)
        if not fits or self.points.dtype != np.float32 or self.visible.dtype != bool:
            raise MetricInputError(
                f"points {self.points.dtype} {list(self.points.shape)} and visible {self.visible.dtype} "
                f"{list(self.visible.shape)} came, expected float32 [N, T, 2] and bool [N, T]. Trackers that put time "
                "first (CoTracker: [T, N, 2]) need a transpose.",
                code="tracks-invalid",
            )
        if not np.isfinite(self.points).all():
            raise MetricInputError(
                f"{np.sum(~np.isfinite(self.points))} coordinates of the tracks are not finite. Most likely a tracker "
                "marks lost points so: give them their last position, and visible = False.",
                code="tracks-invalid",
            )


def lucas_kanade_tracks(frames: np.ndarray) -> Tracks:
    """Return tracks by pyramidal Lucas-Kanade, which matches the small window around every point.

    Raises MetricInputError as `check_trackable` does. Points without texture around them are lost, too.
    """
    check_trackable(frames)
    window, levels = _window_and_levels(min(frames.shape[1:3]))
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003)

    def match(points: Points, before: GreyFrame, after: GreyFrame) -> tuple[Points, np.ndarray]:
        moved, found, _ = cv2.calcOpticalFlowPyrLK(
            before, after, points, np.empty_like(points), winSize=(window, window), maxLevel=levels, criteria=stop
        )
        return moved, found[:, 0] == 1

    def step(before: GreyFrame, after: GreyFrame, points: Points) -> tuple[Points, np.ndarray]:
        arrived, found = match(points, before, after)
        returned, found_back = match(arrived, after, before)
        return arrived, np.where(found & found_back, np.hypot(*(returned - points).T), np.inf)

    return _follow(frames, step)


def dis_tracks(frames: np.ndarray) -> Tracks:
    """Return tracks by dense inverse search flow (DIS), interpolated bilinearly between pixels.

    Raises MetricInputError as `check_trackable` does. Points without texture move with their surroundings.
    """
    check_trackable(frames)
    flow = dis_flow(finest_scale(frames))

    def step(before: GreyFrame, after: GreyFrame, points: Points) -> tuple[Points, np.ndarray]:
        arrived, error = follow(points[:, None], flow(before, after), flow(after, before))
        return arrived[:, 0], error[:, 0]

    return _follow(frames, step)


Tracker = Callable[[np.ndarray], Tracks]
"""From frames uint8 [T, H, W, 3] RGB to tracks."""
TRACKERS: dict[str, Tracker] = {"lucas-kanade": lucas_kanade_tracks, "dis": dis_tracks}
"""Trackers without weights by name."""


def finest_scale(frames: UInt8[np.ndarray, "frames height width 3"]) -> int:
    """Return the finest scale for the flow of these frames; see `DIS_HALF_RESOLUTION_FROM`."""
    return 0 if min(frames.shape[1:3]) < DIS_HALF_RESOLUTION_FROM else 1


def query_grid(height: int, width: int) -> Points:
    """Return evenly spaced points [N, 2] of a frame, (x, y) in pixels, row by row: centres of equal cells."""
    spacing = max(1.0, min(height, width) / POINTS_PER_SIDE)
    x, y = ((np.arange(count := round(side / spacing)) + 0.5) * side / count - 0.5 for side in (width, height))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)


def _follow(frames: UInt8[np.ndarray, "frames height width 3"], step: Step) -> Tracks:
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    places = [query_grid(*grey[0].shape)]
    seen = [np.ones(len(places[0]), bool)]
    for before, after in pairwise(grey):
        arrived, error = step(before, after, places[-1])
        kept = seen[-1] & (error <= MAX_FORWARD_BACKWARD_ERROR) & is_inside(arrived, *after.shape)
        places.append(np.where(kept[:, None], arrived, places[-1]))
        seen.append(kept)
    return Tracks(np.stack(places, axis=1), np.stack(seen, axis=1))


def _window_and_levels(side: int) -> tuple[int, int]:
    """Return the odd window side in pixels and the number of pyramid levels above full resolution, by the smaller side.

    7 and 2 in 64x64, 19 and 4 in 480x720. Wider windows drag points along with passing objects, narrower ones lose more
    points; the coarsest level is at least 16 pixels wide, enough for a step of a tenth of the frame.
    """
    window = 2 * round(3.5 * math.sqrt(side / 64) - 0.5) + 1
    return window, int(math.log2(side / MIN_SIDE))


def check_rgb_frames(frames: np.ndarray) -> None:
    """Raise MetricInputError unless frames are uint8 [T, H, W, 3]."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise MetricInputError(
            f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [T, H, W, 3] RGB. Pictures in 0..1 must "
            "be multiplied by 255 and rounded; channels come last.",
            code="frames-invalid",
        )


def check_trackable(frames: np.ndarray) -> None:
    """Raise MetricInputError unless frames are uint8 [T, H, W, 3], at least 2, with sides of at least `MIN_SIDE`."""
    check_rgb_frames(frames)
    if len(frames) < 2 or min(frames.shape[1:3]) < MIN_SIDE:
        raise MetricInputError(
            f"{len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} pixels came, expected 2 or more of at least "
            f"{MIN_SIDE}x{MIN_SIDE}: one frame has no motion, and the tracking window needs room. If this is a single "
            "picture, it cannot be scored; if it is a clip, check how it was decoded and resized.",
            code="frames-too-few" if len(frames) < 2 else "frames-too-small",
        )
