"""What `optimize: position` and `optimize: coordinates` change of a generation's position embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditflow.backbones.base import Backbone
from ditflow.backbones.positions import MovablePosition
from ditflow.types import LearnedPosition, PositionEmbedding, TokenGrid


@dataclass(frozen=True)
class FreePosition:
    """Every value of the embedding is learned (paper, section 3.4), as its change from the model's own."""

    own: PositionEmbedding

    def start(self) -> LearnedPosition:
        """Return no change."""
        return {part: torch.zeros_like(value) for part, value in self.own.items()}

    def embedding(self, learned: LearnedPosition) -> PositionEmbedding:
        """Return the changed embedding."""
        return {part: value + learned[part] for part, value in self.own.items()}

    def penalty(self, learned: LearnedPosition) -> Tensor | float:
        """Nothing holds the values."""
        return 0.0


@dataclass(frozen=True)
class MovedTokens:
    """The tokens' coordinates are learned, as moves [S, 3] along (t, y, x) in patches from where the model has them.

    stay: weight of the mean squared length of the moves; smooth: of the mean squared difference between the moves of
    neighbours in t, y and x.
    """

    movable: MovablePosition
    grid: TokenGrid
    stay: float
    smooth: float

    def start(self) -> LearnedPosition:
        """Return no move."""
        return self.movable.unmoved()

    def embedding(self, learned: LearnedPosition) -> PositionEmbedding:
        """Return the embedding of the moved tokens."""
        return self.movable.embedding(learned)

    def penalty(self, learned: LearnedPosition) -> Tensor | float:
        """Return what the moves cost, in patches squared times the weights; the mean over parts."""
        return sum(self._cost(moves) for moves in learned.values()) / len(learned)

    def _cost(self, moves: Tensor) -> Tensor:
        field = moves.unflatten(0, (self.grid.frames, self.grid.height, self.grid.width))
        rough = [field.diff(dim=axis).square().sum(dim=-1) for axis in range(3) if field.shape[axis] > 1]
        roughness = torch.stack([difference.mean() for difference in rough]).sum() if rough else moves.new_zeros(())
        return self.stay * moves.square().sum(dim=-1).mean() + self.smooth * roughness


def positions_of(
    backbone: Backbone, grid: TokenGrid, optimize: str, stay: float = 0.0, smooth: float = 0.0
) -> FreePosition | MovedTokens:
    """Return what positions are made of by a method, or a bank, of this kind (`MethodSettings.optimize`)."""
    if optimize == "coordinates":
        return MovedTokens(backbone.movable_position(grid), grid, stay, smooth)
    return FreePosition(backbone.default_position(grid))
