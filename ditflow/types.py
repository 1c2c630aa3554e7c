"""Data types shared by the whole algorithm, and their errors.

Axis letters: F latent frames after temporal patching, P = h*w patches of one frame, S = F*P video tokens,
H attention heads, d head size, D = H*d.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ditflow.errors import DitflowError

PositionEmbedding = dict[str, Tensor]
"""A position embedding by part: query_cos, query_sin, key_cos, key_sin [S, d], or additive [S, D]."""
LearnedPosition = dict[str, Tensor]
"""Learned offsets of a position embedding: of its parts, or of coordinates [S, 3] of tokens, or of queries and keys."""
PositionKind = Literal["position", "coordinates"]
"""What is learned of a position embedding: offsets of its values, or of the tokens' coordinates."""


class TokenGridError(DitflowError, ValueError):
    """Tokens, latents or a bank do not fit the token grid."""

    default_code = "token-grid-mismatch"


class StaticReferenceError(DitflowError, ValueError):
    """The reference shows no motion: there is nothing to transfer."""

    default_code = "static-reference"


class MotionFilterError(DitflowError, ValueError):
    """A motion filter cannot be applied to this reference."""

    default_code = "motion-filter"


class NonFiniteError(DitflowError, ArithmeticError):
    """A loss, latents, positions or pixels are NaN or infinite."""

    default_code = "not-finite"


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raise NonFiniteError if a floating-point tensor has a value that is NaN or infinite."""
    for tensor in tensors:
        if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
            count = tensor.numel() - int(finite.sum())
            raise NonFiniteError(
                f"{what}: {count} of {tensor.numel()} values are NaN or infinite. Usual cause: overflow in 16 bits, or "
                "a learning rate far too high; try model.dtype: float32 or a smaller method.learning_rate"
            )


@dataclass(frozen=True)
class TokenGrid:
    """The grid of a clip's video tokens: `frames` token frames of `height` x `width` patches."""

    frames: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """Patches of one frame (P)."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Video tokens of the clip (S)."""
        return self.frames * self.patches

    def check_tokens(self, tokens: int) -> None:
        """Raise TokenGridError unless `tokens` video tokens fill this grid."""
        if tokens != self.tokens:
            raise TokenGridError(
                f"{tokens} tokens do not fill a {self} grid ({self.tokens}). If the difference is the number of "
                "text tokens, split them off before the call."
            )

    def coordinates(self, device: torch.device | str = "cpu") -> Float[Tensor, "patches 2"]:
        """Return the patch coordinates (x, y) of one frame, in patches, row by row."""
        y, x = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
        return torch.stack([x.flatten(), y.flatten()], dim=-1).to(device, torch.float32)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class QueriesKeys:
    """Queries and keys of one block's video tokens, all heads concatenated, after QK norm and rotary embedding."""

    query: Float[Tensor, "tokens inner"]
    key: Float[Tensor, "tokens inner"]
    heads: int


@dataclass(frozen=True)
class Features:
    """Output of one block for the video tokens."""

    tokens: Float[Tensor, "tokens inner"]


Capture = QueriesKeys | Features
"""What a motion loss is given of a block."""
CaptureKind = Literal["queries_keys", "features"]


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of block 0's video tokens as projected, before norm and rotary embedding; used for injection."""

    key: Float[Tensor, "batch tokens inner"]
    value: Float[Tensor, "batch tokens inner"]


@dataclass(frozen=True)
class StepRecord:
    """Record of one denoising step. `losses` is empty in steps without guidance."""

    step: int
    timestep: int | float
    guidance_scale: float
    learning_rate: float | None = None
    losses: list[float] = field(default_factory=list)
    seconds_guidance: float = 0.0
    seconds_denoise: float = 0.0
