"""Position schemes: rotary and additive position embeddings with learned offsets of values or of coordinates.

Rotary and sin-cos embeddings are sinusoids of a token's coordinates (t, y, x). An offset of a token's coordinates
changes the phase of each sinusoid by its frequency along every axis times the offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ditflow.errors import SettingsError
from ditflow.types import LearnedPosition, PositionEmbedding, PositionKind, TokenGrid

_BASE = 10_000.0
"""Ratio of the highest to the lowest frequency of an axis, as in all supported models."""


@dataclass(frozen=True)
class Sinusoids:
    """The sinusoids of all tokens, and their frequencies along t, y and x in radians per patch."""

    cos: Float[Tensor, "tokens sinusoids"]
    sin: Float[Tensor, "tokens sinusoids"]
    frequencies: Float[Tensor, "3 sinusoids"]

    @classmethod
    def from_embedding(cls, cos: Tensor, sin: Tensor, axes: tuple[tuple[int, int], ...], grid: TokenGrid) -> Sinusoids:
        """Find the frequencies of a model's own embedding on a grid.

        axes: the groups of channels in order: the axis (0: t, 1: y, 2: x) and its number of frequencies. The spacing of
        the tokens is measured in the embedding, since models scale their grids differently. Raises SettingsError for an
        embedding that is not sinusoidal.
        """
        if not torch.allclose(cos**2 + sin**2, torch.ones_like(cos), atol=1e-3):
            raise SettingsError("optimize", "coordinates", "latent or position: this model's positions are learned")
        frequencies, first = torch.zeros(3, cos.shape[1], device=cos.device), 0
        for axis, count in axes:
            width = cos.shape[1] * count // sum(count for _, count in axes)
            decay = _BASE ** (-torch.arange(count, device=cos.device, dtype=torch.float64) / count)
            spacing = _spacing(cos[:, first], sin[:, first], axis, grid)
            frequencies[axis, first : first + width] = spacing * decay.repeat_interleave(width // count).float()
            first += width
        return cls(cos, sin, frequencies)

    def shifted(self, moves: Float[Tensor, "tokens 3"]) -> tuple[Tensor, Tensor]:
        """Return cos and sin with the tokens moved along (t, y, x), in patches; differentiable in the moves."""
        angle = moves @ self.frequencies
        cos, sin = torch.cos(angle), torch.sin(angle)
        return self.cos * cos - self.sin * sin, self.sin * cos + self.cos * sin


def _spacing(cos: Tensor, sin: Tensor, axis: int, grid: TokenGrid) -> Tensor:
    """Return the phase [] between neighbouring tokens of an axis' highest frequency, 1 for a single token."""
    if (grid.frames, grid.height, grid.width)[axis] == 1:
        return torch.ones((), device=cos.device)
    step = (grid.patches, grid.width, 1)[axis]
    return torch.atan2(sin[step] * cos[0] - cos[step] * sin[0], cos[step] * cos[0] + sin[step] * sin[0])


class RotaryPositions:
    """Rotary embedding: cos and sin [S, d] of queries and of keys, learned separately.

    sinusoids: called on first use with coordinates; raises SettingsError for an embedding that is not sinusoidal.
    """

    name = "rotary"

    def __init__(self, cos: Tensor, sin: Tensor, sinusoids: Callable[[], Sinusoids]):
        self._own = {"query_cos": cos, "query_sin": sin, "key_cos": cos, "key_sin": sin}
        self._make_sinusoids = sinusoids

    @cached_property
    def _sinusoids(self) -> Sinusoids:
        return self._make_sinusoids()

    def zero(self, kind: PositionKind) -> LearnedPosition:
        """Return zero offsets of the four parts, or of the coordinates [S, 3] of queries and of keys."""
        return _zeros(self._own) if kind == "position" else _zero_moves(("query", "key"), self._sinusoids)

    def apply(self, learned: LearnedPosition, kind: PositionKind) -> PositionEmbedding:
        """Return cos and sin [S, d] for queries and for keys."""
        if kind == "position":
            return _add(self._own, learned)
        shifted = {part: self._sinusoids.shifted(learned[part]) for part in ("query", "key")}
        return {f"{part}_{name}": both[i] for part, both in shifted.items() for i, name in enumerate(("cos", "sin"))}


class AdditivePositions:
    """Sin-cos embedding [S, D] added to the video tokens, common to queries and keys.

    widths: of the groups of channels, sines before cosines, axis by axis. sinusoids: as for `RotaryPositions`, of the
    concatenated cosines and sines.
    """

    name = "additive"

    def __init__(self, embedding: Tensor, widths: list[int], sinusoids: Callable[[Tensor, Tensor], Sinusoids]):
        self._own, self._widths, self._make_sinusoids = {"additive": embedding}, widths, sinusoids

    @cached_property
    def _sinusoids(self) -> Sinusoids:
        blocks = self._own["additive"].split(self._widths, dim=1)
        sin, cos = torch.cat(blocks[::2], dim=1), torch.cat(blocks[1::2], dim=1)
        return self._make_sinusoids(cos, sin)

    def zero(self, kind: PositionKind) -> LearnedPosition:
        """Return zero offsets of the embedding, or of the tokens' coordinates [S, 3]."""
        return _zeros(self._own) if kind == "position" else _zero_moves(("token",), self._sinusoids)

    def apply(self, learned: LearnedPosition, kind: PositionKind) -> PositionEmbedding:
        """Return the embedding [S, D] of the tokens."""
        if kind == "position":
            return _add(self._own, learned)
        cos, sin = self._sinusoids.shifted(learned["token"])
        sines, cosines = (part.split(self._widths[::2], dim=1) for part in (sin, cos))
        pairs = zip(sines, cosines, strict=True)
        return {"additive": torch.cat([block for pair in pairs for block in pair], dim=1)}


def _zeros(own: PositionEmbedding) -> LearnedPosition:
    return {part: torch.zeros_like(value) for part, value in own.items()}


def _add(own: PositionEmbedding, learned: LearnedPosition) -> PositionEmbedding:
    return {part: value + learned[part] for part, value in own.items()}


def _zero_moves(parts: tuple[str, ...], sinusoids: Sinusoids) -> LearnedPosition:
    return {part: torch.zeros(len(sinusoids.cos), 3, device=sinusoids.cos.device) for part in parts}
