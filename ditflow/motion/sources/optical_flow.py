"""Motion targets by dense optical flow: from the pixels alone, on any video, without a model.

DIS flow of OpenCV from every frame to the next and back; points of every patch are followed through the clip, and the
median of a patch's points is its displacement.

Axis letters: T video frames, H x W pixels, F latent frames, P patches of a frame, n points of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8

from ditflow.errors import SettingsError
from ditflow.layout import LatentLayout
from ditflow.media.optical_flow import dis_flow, follow, is_inside
from ditflow.motion.target import MotionTarget
from ditflow.parts import setting
from ditflow.types import TokenGrid

Points = Float32[np.ndarray, "patches points 2"]


@dataclass(frozen=True)
class OpticalFlowSource:
    """Dense optical flow, from every frame to the next and back.

    enlarged: by how much pictures are enlarged before their flow is found: small things move by more pixels then.
    points_per_side: points of a patch along each side.
    frame: which of the video frames of a token frame stands for it.
    lost_from: pixels by which a point misses its place after a step forward and back, from which on it is lost. On
        surfaces without texture many points miss theirs by a pixel, and their displacement is right all the same.
    lost: weight of a displacement of which most points are lost or out of the picture.
    rest: patches; a shorter displacement is 0. Flow is never exactly 0 where nothing moves, and a loss that compares
        only what moves would compare everything.
    """

    enlarged: float = setting(2.0, extraction=True)
    points_per_side: int = setting(4, extraction=True)
    frame: Literal["first", "middle", "last"] = setting("middle", extraction=True)
    lost_from: float = setting(2.0, extraction=True)
    lost: float = setting(0.0, extraction=True)
    rest: float = setting(0.5, extraction=True)

    name: ClassVar[str] = "optical_flow"
    uses_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.25 <= self.enlarged <= 4:
            raise SettingsError("enlarged", self.enlarged, "a factor from 0.25 to 4")
        if not 1 <= self.points_per_side <= 16:
            raise SettingsError("points_per_side", self.points_per_side, "1 to 16")
        if not 0 < self.lost_from < math.inf:
            raise SettingsError("lost_from", self.lost_from, "a number of pixels above 0")
        if not 0 <= self.lost <= 1:
            raise SettingsError("lost", self.lost, "a weight, 0 to 1")
        if not 0 <= self.rest < math.inf:
            raise SettingsError("rest", self.rest, "a number of patches, 0 or more")

    def target(self, video: UInt8[np.ndarray, "time height width 3"], layout: LatentLayout) -> MotionTarget:
        """Return the motion of an RGB video, for a model of this layout.

        Raises SettingsError for a size that the model cannot do.
        """
        grid = layout.grid(layout.latent_shape(*video.shape[:3]))
        frames = [_one_of(group, self.frame) for group in layout.frames_of_tokens(len(video))]
        followed = _Followed(video, self)
        displacement = np.zeros((grid.frames, grid.frames, grid.patches, 2), np.float32)
        weight = np.ones((grid.frames, grid.frames, grid.patches), np.float32)
        starts = _patch_points(grid, video.shape[1], video.shape[2], self.points_per_side)
        side = np.array([video.shape[2] / grid.width, video.shape[1] / grid.height], np.float32)
        for i, start in enumerate(frames):
            for others in ([*range(i + 1, grid.frames)], [*range(i)][::-1]):
                for j, (places, seen) in zip(
                    others, followed.to(starts, start, [frames[j] for j in others]), strict=True
                ):
                    displacement[i, j] = np.median(places - starts, axis=1) / side
                    weight[i, j] = np.where(seen.mean(axis=1) > 0.5, 1.0, self.lost)
        displacement[np.linalg.norm(displacement, axis=-1) < self.rest] = 0
        return MotionTarget(torch.from_numpy(displacement), torch.from_numpy(weight))


def _one_of(frames: Sequence[int], which: str) -> int:
    return {"first": frames[0], "middle": frames[len(frames) // 2], "last": frames[-1]}[which]


class _Followed:
    """The dense flow between neighbouring frames of a clip, in both directions, in pixels of the clip."""

    def __init__(self, video: np.ndarray, settings: OpticalFlowSource):
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
        self._shape, self._largest_error = grey[0].shape, settings.lost_from
        by = settings.enlarged
        large = [cv2.resize(picture, None, fx=by, fy=by, interpolation=cv2.INTER_CUBIC) for picture in grey]
        flow = dis_flow()
        size = (self._shape[1], self._shape[0])

        def between(before: np.ndarray, after: np.ndarray) -> np.ndarray:
            return cv2.resize(flow(before, after), size, interpolation=cv2.INTER_AREA) / by

        self._flows = {
            1: [between(large[t], large[t + 1]) for t in range(len(large) - 1)],
            -1: [between(large[t + 1], large[t]) for t in range(len(large) - 1)],
        }

    def to(self, starts: Points, start: int, ends: Sequence[int]) -> list[tuple[Points, Bool[np.ndarray, "patches n"]]]:
        """Follow points of a frame to others, all later or all earlier ones, the nearest first.

        Returns places and which points are still seen. A point that is lost moves on with the flow at its place.
        """
        found, points, seen = [], starts, np.ones(starts.shape[:2], bool)
        direction, at = (1 if ends and ends[0] > start else -1), start
        for end in ends:
            while at != end:
                step = at if direction == 1 else at - 1
                points, error = follow(points, self._flows[direction][step], self._flows[-direction][step])
                seen = seen & (error <= self._largest_error) & is_inside(points, *self._shape)
                at += direction
            found.append((points, seen))
        return found


def _patch_points(grid: TokenGrid, height: int, width: int, per_side: int) -> Points:
    """Evenly spaced points (x, y) in pixels of every patch of a frame, row by row."""
    x, y = (
        (np.arange(count * per_side, dtype=np.float32) + 0.5) * pixels / (count * per_side) - 0.5
        for count, pixels in ((grid.width, width), (grid.height, height))
    )
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(grid.height, per_side, grid.width, per_side, 2)
    return np.ascontiguousarray(points.transpose(0, 2, 1, 3, 4).reshape(grid.patches, per_side**2, 2))
