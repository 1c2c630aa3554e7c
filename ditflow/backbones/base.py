"""What the algorithm asks of a video diffusion transformer. One file per model family implements it.

Everything the methods need fits in three kinds of pass through the transformer: predict (a whole pass), capture (stops
at the guidance blocks' queries and keys, or behind those blocks) and first_keys_values (stops at block 0's keys and
values). None of them copies the model's own forward code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ditflow.backbones.positions import MovablePosition
from ditflow.settings import ExecutionSettings, ModelDefaults, SettingsError
from ditflow.types import CaptureKind, KeysValues, PositionEmbedding, TokenGrid


@dataclass(frozen=True)
class Geometry:
    """Sizes that decide which clips a model can make; read from its configuration, without its weights.

    spatial, temporal: compression of the VAE. patch, temporal_patch: side and depth of a transformer patch.
    """

    name: str
    blocks: int
    channels: int
    spatial: int
    temporal: int
    patch: int
    temporal_patch: int
    sample_size: tuple[int, int, int]
    """Frames, height and width in pixels that the model was trained on."""
    defaults: ModelDefaults

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """Shape [1, F, C, height, width] of a clip's latents; SettingsError for a size the model cannot do."""
        multiple = self.spatial * self.patch
        for side, pixels in (("height", height), ("width", width)):
            if pixels < multiple or pixels % multiple:
                near = max(multiple, round(pixels / multiple) * multiple)
                means = f"a multiple of {multiple} for {self.name} (VAE {self.spatial} x patch {self.patch})"
                raise SettingsError(side, pixels, f"{means}; the nearest is {near}")
        latent_frames = self._latent_frames(frames)
        return (1, latent_frames, self.channels, height // self.spatial, width // self.spatial)

    def grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        """Return the token grid of latents [1, F, C, height, width]."""
        _, frames, _, height, width = latent_shape
        return TokenGrid(frames // self.temporal_patch, height // self.patch, width // self.patch)

    def check_blocks(self, blocks: Sequence[int]) -> None:
        """Raise SettingsError for a guidance block that the model does not have."""
        if max(blocks) >= self.blocks:
            raise SettingsError("blocks", max(blocks), f"0 to {self.blocks - 1} for {self.name}")

    def _latent_frames(self, frames: int) -> int:
        """Latent frames of a clip, with the padding that a temporal patch asks for.

        A causal VAE keeps the first frame apart (4k + 1 frames) or takes frames by twice its compression; any
        other length would come back from it with another number of frames.
        """
        if not self._comes_back(frames):
            rule = f"{self.temporal}k + 1 frames, or a multiple of {2 * self.temporal}, for {self.name}'s VAE"
            one, other = self._nearest_lengths(frames)
            raise SettingsError("frames", frames, f"{rule}; near are {one} and {other}")
        latent_frames = -(-frames // self.temporal)
        return -(-latent_frames // self.temporal_patch) * self.temporal_patch

    def _comes_back(self, frames: int) -> bool:
        """Whether the VAE gives back a clip of this length in its length."""
        return frames >= 2 and (frames % self.temporal == 1 or frames % (2 * self.temporal) == 0)

    def _nearest_lengths(self, frames: int) -> list[int]:
        """Return the next shorter and the next longer clip that comes back, or the two shortest of all."""
        lengths = [n for n in range(frames - self.temporal, max(frames, 0) + 3 * self.temporal) if self._comes_back(n)]
        below, above = [n for n in lengths if n < frames], [n for n in lengths if n > frames]
        return [*below[-1:], *above][:2]


@dataclass(frozen=True)
class TextLimit:
    """How many tokens of a prompt the text encoder reads, its end mark included; it ignores the rest.

    tokenizer: the model's own, of the transformers library.
    """

    tokens: int
    tokenizer: Any

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Return the length of each prompt in tokens, its end mark included."""
        return [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids] if prompts else []

    def cut(self, prompts: Iterable[str]) -> dict[str, int]:
        """Return the prompts that are longer than the limit, with their lengths in tokens."""
        distinct = list(dict.fromkeys(prompts))
        lengths = zip(distinct, self.count(distinct), strict=True)
        return {prompt: length for prompt, length in lengths if length > self.tokens}


@runtime_checkable
class Solver(Protocol):
    """One run of a noise scheduler: its timesteps, and the state that some schedulers keep between steps."""

    timesteps: Tensor
    training_timesteps: int
    """How many the model was trained on."""

    def step(self, prediction: Tensor, step: int, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of the next step."""
        ...

    def clean(self, prediction: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """Return the clean latents that a prediction for noised ones speaks of; differentiable in both."""
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
    geometry: Geometry
    defaults: ModelDefaults
    execution: ExecutionSettings
    device: torch.device
    text_limit: TextLimit

    def set_execution(self, asked: ExecutionSettings) -> None:
        """Run from now on as asked, and say in `execution` how every `auto` was decided."""
        ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of a clip, see `Geometry.latent_shape`."""
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

    def movable_position(self, grid: TokenGrid) -> MovablePosition:
        """Return the position embedding as a function of how far tokens are moved; SettingsError if it has none."""
        ...

    def predict(
        self,
        latents: Tensor,
        timestep: int,
        embeds: Sequence[Tensor],
        position: PositionEmbedding,
        injected: KeysValues | None = None,
    ) -> list[Tensor]:
        """Return the model's prediction for each of the text embeddings, fp32.

        Differentiable in the latents and the position, where gradients are enabled.
        """
        ...

    def capture(
        self,
        latents: Tensor,
        timestep: int,
        embeds: Tensor,
        blocks: Sequence[int],
        position: PositionEmbedding,
        injected: KeysValues | None = None,
        captures: CaptureKind = "queries_keys",
    ) -> Mapping[int, Any]:
        """Return the `QueriesKeys` or `Features` of these blocks; nothing behind them is computed."""
        ...

    def first_keys_values(self, latents: Tensor, timestep: int, embeds: Tensor) -> KeysValues:
        """Return block 0's keys and values of the video tokens; nothing else is computed."""
        ...
