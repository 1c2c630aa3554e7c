"""Position embeddings as functions of where the tokens are: what `optimize: coordinates` differentiates.

Rotary and sin-cos embeddings are sinusoids of a token's coordinates (t, y, x). Moving a token turns each of its
sinusoids by the sinusoid's rate along every axis times the way: the model's own embedding is what moves by zero give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ditflow.settings import SettingsError
from ditflow.types import PositionEmbedding, TokenGrid

_BASE = 10_000.0
"""Ratio of the fastest to the slowest sinusoid of an axis, in all models of the family."""


@dataclass(frozen=True)
class Sinusoids:
    """The sinusoids of all tokens, and how fast each turns along t, y and x, in radians per patch."""

    cos: Float[Tensor, "tokens sinusoids"]
    sin: Float[Tensor, "tokens sinusoids"]
    rates: Float[Tensor, "3 sinusoids"]

    @classmethod
    def measured(cls, cos: Tensor, sin: Tensor, axes: tuple[tuple[int, int], ...], grid: TokenGrid) -> Sinusoids:
        """Find the rates of a model's own embedding on a grid.

        axes: what stands side by side: the axis (0: t, 1: y, 2: x) and its number of different sinusoids. The spacing
        of the tokens is read from the embedding itself, because models stretch their grids in ways of their own.
        Raises SettingsError for an embedding that is no sinusoid.
        """
        if not torch.allclose(cos**2 + sin**2, torch.ones_like(cos), atol=1e-3):
            raise SettingsError("optimize", "coordinates", "latent or position: this model's positions are learned")
        rates, first = torch.zeros(3, cos.shape[1], device=cos.device), 0
        for axis, count in axes:
            across = cos.shape[1] * count // sum(count for _, count in axes)
            falling = _BASE ** (-torch.arange(count, device=cos.device, dtype=torch.float64) / count)
            spacing = _spacing(cos[:, first], sin[:, first], axis, grid)
            rates[axis, first : first + across] = spacing * falling.repeat_interleave(across // count).float()
            first += across
        return cls(cos, sin, rates)

    def moved(self, moves: Float[Tensor, "tokens 3"]) -> tuple[Tensor, Tensor]:
        """Return cos and sin of tokens moved along (t, y, x), in patches; differentiable in the moves."""
        angle = moves @ self.rates
        cos, sin = torch.cos(angle), torch.sin(angle)
        return self.cos * cos - self.sin * sin, self.sin * cos + self.cos * sin


def _spacing(cos: Tensor, sin: Tensor, axis: int, grid: TokenGrid) -> Tensor:
    """By what angle [] the fastest sinusoid of an axis turns from one token to the next, 1 where there is only one."""
    if (grid.frames, grid.height, grid.width)[axis] == 1:
        return torch.ones((), device=cos.device)
    step = (grid.patches, grid.width, 1)[axis]
    return torch.atan2(sin[step] * cos[0] - cos[step] * sin[0], cos[step] * cos[0] + sin[step] * sin[0])


class MovablePosition(ABC):
    """A model's position embedding of the video tokens as a function of how far they are moved."""

    parts: tuple[str, ...]
    """What moves by itself."""

    def __init__(self, sinusoids: Sinusoids):
        self._sinusoids = sinusoids

    def unmoved(self) -> dict[str, Tensor]:
        """Return moves [S, 3] of zero for every part, along (t, y, x) in patches."""
        return {
            part: torch.zeros(len(self._sinusoids.cos), 3, device=self._sinusoids.cos.device) for part in self.parts
        }

    @abstractmethod
    def embedding(self, moves: Mapping[str, Tensor]) -> PositionEmbedding:
        """Return the position embedding of moved tokens, differentiable in the moves [S, 3]."""


class MovableRotary(MovablePosition):
    """Queries and keys move apart. Channels: a quarter turns with t, then three eighths each with y and x."""

    parts = ("query", "key")

    def __init__(self, position: PositionEmbedding, grid: TokenGrid):
        cos, sin = position["query_cos"], position["query_sin"]
        channels = cos.shape[1]
        axes = ((0, channels // 8), (1, channels // 8 * 3 // 2), (2, channels // 8 * 3 // 2))
        super().__init__(Sinusoids.measured(cos, sin, axes, grid))

    def embedding(self, moves: Mapping[str, Tensor]) -> PositionEmbedding:
        """Return cos and sin [S, d] for queries and for keys."""
        turned = {part: self._sinusoids.moved(moves[part]) for part in self.parts}
        return {f"{part}_{name}": turned[part][i] for part in self.parts for i, name in enumerate(("cos", "sin"))}


class MovableAdditive(MovablePosition):
    """Tokens move, queries with keys. Channels: a quarter for t, three eighths for x, for y; sines before cosines."""

    parts = ("token",)

    def __init__(self, position: PositionEmbedding, grid: TokenGrid):
        channels = position["additive"].shape[1]
        axes = ((0, channels // 8), (2, channels // 8 * 3 // 2), (1, channels // 8 * 3 // 2))
        self._widths = [count for _, count in axes for _ in ("sin", "cos")]
        blocks = position["additive"].split(self._widths, dim=1)
        sin, cos = torch.cat(blocks[::2], dim=1), torch.cat(blocks[1::2], dim=1)
        super().__init__(Sinusoids.measured(cos, sin, axes, grid))

    def embedding(self, moves: Mapping[str, Tensor]) -> PositionEmbedding:
        """Return the embedding [S, D] of the tokens."""
        cos, sin = self._sinusoids.moved(moves["token"])
        sines, cosines = (part.split(self._widths[::2], dim=1) for part in (sin, cos))
        pairs = zip(sines, cosines, strict=True)
        return {"additive": torch.cat([block for pair in pairs for block in pair], dim=1)}
