"""The contract between the algorithm and a video diffusion transformer, implemented by one file per model family.

All methods use three kinds of pass through the transformer: `predict` (the whole model), `capture` (stops at the
guidance blocks' queries and keys, or at their output) and `first_keys_values` (stops at block 0's keys and values).

Axis letters: B batch, F latent frames, C latent channels, h x w latent pixels, S video tokens, D inner dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ditflow.layout import LatentLayout
from ditflow.settings import ExecutionSettings, ModelDefaults, ResolvedSampling
from ditflow.types import CaptureKind, KeysValues, LearnedPosition, PositionEmbedding, PositionKind, TokenGrid

Condition = Any
"""A family's encoding of a prompt (and an image): text embeddings, and whatever else its passes need. Opaque here."""


# ------------------------------------------------------------------------------------------------- sizes and lengths


@dataclass(frozen=True)
class TextLimit:
    """Maximum prompt length of the text encoder in tokens, end token included; longer prompts are truncated.

    tokenizer: the model's own, of the transformers library.
    """

    tokens: int
    tokenizer: Any

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Return the length of each prompt in tokens, end token included."""
        return [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids] if prompts else []

    def too_long(self, prompts: Iterable[str]) -> dict[str, int]:
        """Return the prompts that are longer than the limit, with their lengths in tokens."""
        distinct = list(dict.fromkeys(prompts))
        lengths = zip(distinct, self.count(distinct), strict=True)
        return {prompt: length for prompt, length in lengths if length > self.tokens}


# ------------------------------------------------------------------------------------------------- noise and sampling


@dataclass(frozen=True)
class NoiseLevel:
    """The noise level of latents.

    index: position in the schedule; None off it. timestep: of the model's training, 0 is clean. sigma: share of noise
    in the flow-equivalent process `(1 - sigma) * clean + sigma * noise`; 0 is clean, 1 is pure noise.
    """

    index: int | None
    timestep: int | float
    sigma: float


CLEAN = NoiseLevel(None, 0, 0.0)
"""The level of a finished video, used for the reference."""


@runtime_checkable
class Schedule(Protocol):
    """Noise levels and solver of one sampling run; some solvers have state between steps."""

    levels: Sequence[NoiseLevel]

    def level_at(self, share: float) -> NoiseLevel:
        """Return the noise level at a share (0 to 1) of the training timesteps."""
        ...

    def step(self, prediction: Tensor, level: NoiseLevel, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of the next level; changes made to `latents` before the step must take effect."""
        ...

    def to_clean(self, prediction: Tensor, level: NoiseLevel, latents: Tensor) -> Tensor:
        """Return the clean latents that a prediction implies; differentiable in both."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """Return clean latents noised to a level, also one off the schedule."""
        ...


@runtime_checkable
class Guider(Protocol):
    """Classifier-free guidance: combines the predictions for the conditions of a step."""

    def scale(self, level: NoiseLevel) -> float:
        """Return the guidance scale at a noise level; 1 is off."""
        ...

    def combine(self, predictions: Sequence[Tensor], level: NoiseLevel) -> Tensor:
        """Combine the predictions for the prompt and, if there is one, the negative prompt."""
        ...


@dataclass(frozen=True)
class ConstantGuider:
    """Classifier-free guidance with one scale for all noise levels."""

    guidance_scale: float

    def scale(self, level: NoiseLevel) -> float:
        """Return the guidance scale."""
        return self.guidance_scale

    def combine(self, predictions: Sequence[Tensor], level: NoiseLevel) -> Tensor:
        """Extrapolate from the negative prompt's prediction beyond the prompt's."""
        if len(predictions) == 1:
            return predictions[0]
        prompted, unprompted = predictions
        return unprompted + self.scale(level) * (prompted - unprompted)


# ------------------------------------------------------------------------------------------------- positions


@runtime_checkable
class PositionScheme(Protocol):
    """A family's position encoding of the tokens of one grid; opaque to banks and guidance."""

    name: str

    def zero(self, kind: PositionKind) -> LearnedPosition:
        """Return zero offsets by part: of values (`position`), or of coordinates [S, 3] along t, y, x in patches.

        Raises SettingsError for `coordinates` if the embedding is not a function of coordinates.
        """
        ...

    def apply(self, learned: LearnedPosition, kind: PositionKind) -> PositionEmbedding:
        """Return the embedding with these offsets; differentiable. With `zero` it is the model's own."""
        ...


# ------------------------------------------------------------------------------------------------- the model


@runtime_checkable
class Backbone(Protocol):
    """A frozen text-to-video diffusion transformer with its VAE, text encoder and noise scheduler.

    Latents are fp32 [1, F, C, h, w]; videos are uint8 RGB [T, H, W, 3]. A position of None is the model's own;
    `predict` with neither a position nor injection runs the unmodified diffusers model.
    """

    name: str
    revision: str
    layout: LatentLayout
    defaults: ModelDefaults
    execution: ExecutionSettings
    device: torch.device
    text_limit: TextLimit

    def set_execution(self, asked: ExecutionSettings) -> None:
        """Set the execution mode; `execution` then has the resolved value of every `auto`."""
        ...

    def encode_video(self, video: np.ndarray) -> Tensor:
        """Return the normalised mean latents of a video."""
        ...

    def decode_latents(self, latents: Tensor, frames: int) -> np.ndarray:
        """Return the last `frames` frames of the decoded video. Raises NonFiniteError if the decoder overflows."""
        ...

    def condition(self, prompt: str) -> Condition:
        """Encode a prompt, truncated to `text_limit`."""
        ...

    def guider(self, sampling: ResolvedSampling) -> Guider:
        """Return the guidance rule of these settings."""
        ...

    def schedule(self, steps: int, grid: TokenGrid) -> Schedule:
        """Return a new schedule of this many denoising steps; in some families it depends on the grid."""
        ...

    def positions(self, grid: TokenGrid) -> PositionScheme:
        """Return the position scheme of the video tokens of a grid."""
        ...

    def predict(
        self,
        latents: Tensor,
        level: NoiseLevel,
        conditions: Sequence[Condition],
        position: PositionEmbedding | None = None,
        injected: KeysValues | None = None,
    ) -> list[Tensor]:
        """Return the model's prediction for each condition, fp32; differentiable in the latents and the position."""
        ...

    def capture(
        self,
        latents: Tensor,
        level: NoiseLevel,
        condition: Condition,
        blocks: Sequence[int],
        position: PositionEmbedding | None = None,
        injected: KeysValues | None = None,
        what: CaptureKind = "queries_keys",
    ) -> Mapping[int, Any]:
        """Return the `QueriesKeys` or `Features` of these blocks, differentiable; later blocks are skipped."""
        ...

    def first_keys_values(self, latents: Tensor, level: NoiseLevel, condition: Condition) -> KeysValues:
        """Return block 0's keys and values of the video tokens, as projected; everything later is skipped."""
        ...
