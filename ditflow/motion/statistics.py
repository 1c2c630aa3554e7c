"""What the motion of a reference comes to, in a few numbers by which banks can be chosen.

Axis letters: F latent frames, P patches of a frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

_NO_DIRECTION = 1e-6
"""Directions whose mean is shorter than this cancel out."""


@dataclass(frozen=True)
class MotionStatistics:
    """Statistics of the flow from every latent frame to the next, over all patches of all frames.

    mean_displacement: mean length, in patches per latent frame. moving: share of the patches that move.
    direction: of the mean of the moving patches' directions, in degrees, counter-clockwise: 0 is right, 90 up, 180
    left, 270 down; None if nothing moves or all cancels out. concentration: length of that mean, from 0 (all ways) to
    1 (all the same way). largest_displacement: the greatest length, in patches per latent frame.
    """

    mean_displacement: float
    moving: float
    direction: float | None
    concentration: float
    largest_displacement: float

    def close_to(self, other: MotionStatistics) -> bool:
        """Whether they are the same but for the last digits, which differ between machines."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(one == two or _close(one, two) for one, two in pairs)


def _close(one: float | None, two: float | None) -> bool:
    return None not in (one, two) and math.isclose(one, two, rel_tol=1e-6, abs_tol=1e-6)  # type: ignore[arg-type]


def consecutive(displacement: Int[Tensor, "frames frames patches 2"]) -> Int[Tensor, "pairs patches 2"]:
    """Return the displacement from every latent frame to the next, [F-1, P, 2] as (dx, dy) in patches."""
    frames = torch.arange(len(displacement) - 1)
    return displacement[frames, frames + 1]


def motion_statistics(flow: Int[Tensor, "pairs patches 2"]) -> MotionStatistics:
    """Return the statistics of a consecutive-frame flow of at least one pair of frames."""
    moves = flow.reshape(-1, 2).double()
    lengths = moves.norm(dim=-1)
    moving = lengths > 0
    directions = moves[moving] / lengths[moving, None]
    x, y = directions.mean(dim=0).tolist() if len(directions) else (0.0, 0.0)
    concentration = min(math.hypot(x, y), 1.0)
    degrees = round(math.degrees(math.atan2(-y, x)), 6) % 360  # dy points down
    return MotionStatistics(
        mean_displacement=lengths.mean().item(),
        moving=moving.double().mean().item(),
        direction=degrees if concentration > _NO_DIRECTION else None,
        concentration=concentration if concentration > _NO_DIRECTION else 0.0,
        largest_displacement=lengths.max().item(),
    )


def pixels_per_second(
    mean_displacement: float, grid: tuple[int, int, int], size: tuple[int, int, int], fps: float
) -> float:
    """Return a mean displacement in patches per latent frame as a speed.

    grid: latent frames, and patches along height and width, which are square. size: frames, height and width of the
    video in pixels, played at `fps`. The latent frames span the video from its first frame to its last.
    """
    pixels = mean_displacement * size[2] / grid[2]
    seconds = (size[0] - 1) / (grid[0] - 1) / fps
    return pixels / seconds
