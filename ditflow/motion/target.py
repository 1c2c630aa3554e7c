"""A motion target: where every patch of one frame should be found in every other frame, and how much that counts.

Axis letters: F token frames, P patches of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class MotionTarget:
    """Displacements and their weights.

    displacement: [i, j, p] is the displacement (dx, dy), in patches, of patch p of frame i to frame j; None for a loss
        with a signal of its own, of which filters can only change the weights.
    weight: 0 or more; what a displacement counts in a loss. 0 leaves it out.
    """

    displacement: Shaped[Tensor, "frames frames patches 2"] | None
    weight: Float[Tensor, "frames frames patches"]
