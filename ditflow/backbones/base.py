"""What the algorithm asks of a video diffusion transformer. One file per model family implements it.

Everything the methods need fits in four kinds of pass through the transformer: predict (a whole pass), capture
(stops at the guidance blocks' queries and keys), first_keys_values (stops at block 0's keys and values), and none of
them copies the model's own forward code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ditflow.settings import ExecutionSettings, ModelDefaults
from ditflow.types import KeysValues, PositionEmbedding, QueriesKeys, TokenGrid


@runtime_checkable
class Solver(Protocol):
    """One run of a noise scheduler: its timesteps, and the state that some schedulers keep between steps."""

    timesteps: Tensor

    def step(self, prediction: Tensor, step: int, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of the next step."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Return clean latents noised to a timestep."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen text-to-video diffusion transformer with its VAE, text encoder and noise scheduler.

    Latents are fp32 [1, F, C, height, width]; videos are uint8 RGB [T, H, W, 3]; text embeddings [1, L, text dim].
    """

    name: str
    revision: str
    defaults: ModelDefaults
    execution: ExecutionSettings
    device: torch.device

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of a clip; ValueError names what the model cannot do and what is near."""
        ...

    def grid(self, latents: Tensor) -> TokenGrid:
        """Return the token grid that these latents fill."""
        ...

    def encode_video(self, video: np.ndarray) -> Tensor:
        """Return the scaled mean latents of a video."""
        ...

    def decode_latents(self, latents: Tensor, frames: int) -> np.ndarray:
        """Return the last `frames` frames of the decoded video."""
        ...

    def encode_prompt(self, prompt: str) -> Tensor:
        """Return the text embeddings of one prompt."""
        ...

    def solver(self, steps: int) -> Solver:
        """Return a fresh solver for a run of `steps`."""
        ...

    def default_position(self, grid: TokenGrid) -> PositionEmbedding:
        """Return the model's own position embedding of the video tokens, fp32, without gradient."""
        ...

    def predict(
        self,
        latents: Tensor,
        timestep: int,
        embeds: Sequence[Tensor],
        position: PositionEmbedding,
        injected: KeysValues | None = None,
    ) -> list[Tensor]:
        """Return the model's prediction for each of the text embeddings, fp32, without gradient."""
        ...

    def capture(
        self,
        latents: Tensor,
        timestep: int,
        embeds: Tensor,
        blocks: Sequence[int],
        position: PositionEmbedding,
        injected: KeysValues | None = None,
    ) -> dict[int, QueriesKeys]:
        """Return the queries and keys of these blocks; nothing behind the last one is computed."""
        ...

    def first_keys_values(self, latents: Tensor, timestep: int, embeds: Tensor) -> KeysValues:
        """Return block 0's keys and values of the video tokens; nothing else is computed."""
        ...
