"""What a motion filter is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from ditflow.layout import LatentLayout
from ditflow.motion.target import MotionTarget
from ditflow.types import TokenGrid


@dataclass(frozen=True)
class ClipContext:
    """What a filter may know of the reference.

    frames: of its video. mask: the number of the object that every pixel belongs to, 0 for none, of every video frame,
    or of the first alone [1, H, W].
    """

    grid: TokenGrid
    layout: LatentLayout
    frames: int
    mask: UInt8[np.ndarray, "time height width"] | None = None


@runtime_checkable
class MotionFilter(Protocol):
    """A motion filter, found by its `name`: a frozen dataclass whose fields are its settings (`ditflow.parts`).

    needs_mask: whether the reference must come with a mask.
    """

    name: ClassVar[str]
    needs_mask: ClassVar[bool]

    def __call__(self, target: MotionTarget, clip: ClipContext) -> MotionTarget:
        """Return the changed target. Raises MotionFilterError for a target or clip that it cannot be applied to."""
        ...
