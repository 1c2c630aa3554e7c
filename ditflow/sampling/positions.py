"""The optimised variable of `optimize: position` and `optimize: coordinates`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditflow.backbones.contract import PositionScheme
from ditflow.types import LearnedPosition, PositionEmbedding, PositionKind, TokenGrid


@dataclass(frozen=True)
class PositionVariable:
    """A position embedding as a variable: its values (paper, section 3.4), or the coordinates of the tokens.

    Coordinates are learned as offsets [S, 3] along (t, y, x), in patches, from the model's own.
    stay: weight of the mean squared offset. smooth: weight of the mean squared difference between the offsets of
    neighbours along t, y and x. Values are not regularised.
    """

    scheme: PositionScheme
    kind: PositionKind
    grid: TokenGrid
    stay: float = 0.0
    smooth: float = 0.0

    def zero(self) -> LearnedPosition:
        """Return the initial value: the model's own embedding."""
        return self.scheme.zero(self.kind)

    def embedding(self, learned: LearnedPosition) -> PositionEmbedding:
        """Return the embedding with the learned change applied; differentiable."""
        return self.scheme.apply(learned, self.kind)

    def penalty(self, learned: LearnedPosition) -> Tensor | float:
        """Return the regularisation term, in patches squared, averaged over the parts."""
        if self.kind == "position":
            return 0.0
        return sum(self._penalty_of(moves) for moves in learned.values()) / len(learned)

    def _penalty_of(self, moves: Tensor) -> Tensor:
        field = moves.unflatten(0, (self.grid.frames, self.grid.height, self.grid.width))
        rough = [field.diff(dim=axis).square().sum(dim=-1) for axis in range(3) if field.shape[axis] > 1]
        roughness = torch.stack([difference.mean() for difference in rough]).sum() if rough else moves.new_zeros(())
        return self.stay * moves.square().sum(dim=-1).mean() + self.smooth * roughness
