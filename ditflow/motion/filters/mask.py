"""Let only the motion of one object count, by a mask of the reference.

Axis letters: T video frames, H x W pixels, F token frames, P = h * w patches of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, grid_sample

from ditflow.errors import SettingsError
from ditflow.motion.filters.base import ClipContext
from ditflow.motion.target import MotionTarget
from ditflow.parts import setting
from ditflow.types import MotionFilterError, TokenGrid


@dataclass(frozen=True)
class MaskFilter:
    """Multiply the weights of every patch by the share of it that belongs to an object.

    object: its number in the mask; None is everything that is not 0.
    outside: weight of what does not belong to it: 0 leaves it free, 1 would be no mask.
    A mask of the first frame alone is moved along the target's displacement to the other frames.
    """

    object: int | None = setting(None, extraction=True)
    outside: float = setting(0.0, extraction=True)

    name: ClassVar[str] = "mask"
    needs_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.object is not None and not 1 <= self.object <= 255:
            raise SettingsError("object", self.object, "the number of an object, 1 to 255, or null for all of them")
        if not 0 <= self.outside <= 1:
            raise SettingsError("outside", self.outside, "a weight, 0 to 1")

    def __call__(self, target: MotionTarget, clip: ClipContext) -> MotionTarget:
        """Return the target with other weights. Raises MotionFilterError if the mask does not fit, or is empty."""
        shares = self._shares(target, clip)
        if not shares.any():
            which = "any object" if self.object is None else f"object {self.object}"
            raise MotionFilterError(
                f"the mask shows nothing of {which}: there is no motion left. See that it belongs to this reference, "
                "and that `object` is a number in it.",
                code="empty-mask",
                key="motion.filters.mask.object",
            )
        weight = self.outside + (1 - self.outside) * shares
        return replace(target, weight=target.weight * weight[:, None])

    def _shares(self, target: MotionTarget, clip: ClipContext) -> Float[Tensor, "frames patches"]:
        """Return the share of every patch of every token frame that belongs to the object."""
        if clip.mask is None or len(clip.mask) not in (1, clip.frames):
            came = "none" if clip.mask is None else f"one of {len(clip.mask)} frames"
            raise MotionFilterError(
                f"the filter mask needs a mask of the reference, and {came} came: expected one of its first frame or "
                f"of all {clip.frames} frames",
                code="missing-mask" if clip.mask is None else "mask-length",
                key="motion.filters.mask",
            )
        mask = torch.from_numpy(clip.mask)
        inside = (mask != 0 if self.object is None else mask == self.object).float()
        grid = clip.grid
        by_frame = adaptive_avg_pool2d(inside[:, None], (grid.height, grid.width)).flatten(1)
        if len(by_frame) == 1 < grid.frames:
            return _moved(by_frame[0], target, grid)
        return torch.stack([by_frame[frames].mean(dim=0) for frames in clip.layout.frames_of_tokens(clip.frames)])


def _moved(first: Float[Tensor, " patches"], target: MotionTarget, grid: TokenGrid) -> Float[Tensor, "frames patches"]:
    """Return a mask of the first frame for every frame: a patch is inside as much as where it is found in the first."""
    if target.displacement is None:
        raise MotionFilterError(
            "a mask of the first frame alone is moved along displacements, and this motion loss has none. Give a mask "
            "of every frame, or take the loss ditflow.",
            code="mask-needs-displacement",
            key="motion.filters.mask",
        )
    places = grid.coordinates() + target.displacement[:, 0].float()
    sides = torch.tensor([grid.width, grid.height])
    normalised = (2 * places + 1) / sides - 1  # patch centres, as grid_sample wants them
    picture = first.unflatten(0, (1, 1, grid.height, grid.width)).expand(grid.frames, -1, -1, -1)
    found = grid_sample(picture, normalised[:, None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return found.flatten(1)
