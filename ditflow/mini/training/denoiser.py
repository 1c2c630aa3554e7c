"""A text-to-video pipeline under training, and the loss of its transformer and text encoder.

What differs between model families (the noise process, the call of the transformer, its attention) is in one subclass
per family. Axes: B clips, F latent frames, C latent channels, h, w sides in latents, L text tokens, S video tokens,
H heads, d head dimension, D = H*d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditflow.mini.training.loop import precision
from ditflow.mini.training.truth import Truth, by_patch, correspondence_loss, weighted_mean
from ditflow.types import QueriesKeys

PROMPT_DROPOUT = 0.1
CORRESPONDENCE_WEIGHT = 0.05
SILHOUETTE_WEIGHT = 0.5


class Noised(NamedTuple):
    """Noisy latents [B, F, C, h, w], their timesteps [B], and the velocity that the model is to predict there."""

    latents: Tensor
    timesteps: Tensor
    velocity: Tensor


class Denoiser(ABC):
    """A pipeline, with attention processors that can keep queries and keys, and a head that reads silhouettes."""

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype):
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        config = pipeline.transformer.config
        self.silhouette = _zero_linear(config.num_attention_heads * config.attention_head_dim, 4)
        for block in self.blocks:
            if device.type == "cpu" or block is self.taught_block:
                self.set_attention(block)

    # ------------------------------------------------------------------ what a family supplies

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """The transformer blocks; each has its self-attention in `attn1`."""

    @abstractmethod
    def set_attention(self, block: Any) -> None:
        """Give a block's self-attention the family's `RecordingAttention`."""

    @abstractmethod
    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """Draw a timestep and noise for each of the clean latents [B, F, C, h, w]."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """Return the predicted velocity of noisy latents [B, F, C, h, w] at timesteps [B]; words [B, L]."""

    # ------------------------------------------------------------------ what all families share

    @property
    def seen_block(self) -> Any:
        """The block whose tokens learn the distance to silhouettes: the one before `taught_block`."""
        return self.blocks[max(len(self.blocks) // 2 - 1, 0)]

    @property
    def taught_block(self) -> Any:
        """The block whose attention learns the true motion: at half depth, where large models are guided too."""
        return self.blocks[len(self.blocks) // 2]

    @property
    def model(self) -> nn.ModuleDict:
        """The trained modules. The silhouette head is only used during training."""
        parts = {"transformer": self.pipeline.transformer, "text_encoder": self.pipeline.text_encoder}
        return nn.ModuleDict({**parts, "silhouette": self.silhouette})

    def words(self, prompts: Sequence[str]) -> Tensor:
        """Return prompts as token ids [B, L], padded as the pipeline pads them."""
        tokenizer = self.pipeline.tokenizer
        options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        return tokenizer(list(prompts), **options, return_tensors="pt").input_ids

    def loss(self, clean: Tensor, words: Tensor, generator: torch.Generator, truth: Truth | None = None) -> Tensor:
        """Return the mean squared error of the predicted velocity of latents [B, F, C, h, w]; words [B, L].

        With a truth, errors are weighted and the auxiliary losses are added.
        """
        noised = self.noised(clean, generator)
        words = drop_prompts(words, self.words([""])[0], generator).to(self.device)
        self.taught_block.attn1.processor.keeps = truth is not None and bool(truth.motion)
        with precision(self.device, self.dtype), _outputs_of(self.seen_block) as tokens:
            predicted = self.predict(noised.latents.to(self.device), noised.timesteps.to(self.device), words)
        error = (predicted.float() - noised.velocity.to(self.device)).square()
        if truth is None:
            return error.mean()
        loss = weighted_mean(error, truth.weight.to(self.device))
        loss += SILHOUETTE_WEIGHT * self._silhouette_loss(tokens[0].float(), truth)
        if truth.motion:
            queries, keys = self.taught_block.attn1.processor.taken()
            loss += CORRESPONDENCE_WEIGHT * correspondence_loss(queries, keys, truth.motion)
        return loss

    def _silhouette_loss(self, tokens: Tensor, truth: Truth) -> Tensor:
        """Return the weighted squared error of the silhouette distances read linearly from tokens [B, S, D]."""
        seen, weight = (by_patch(part).to(self.device) for part in (truth.silhouette, truth.weight[:, :, 0]))
        return weighted_mean((self.silhouette(tokens) - seen).square(), weight)

    @torch.no_grad()
    def attended(self, clean: Tensor) -> list[QueriesKeys]:
        """Return the queries and keys of every block for clean latents [1, F, C, h, w] and the empty prompt."""
        attentions = [block.attn1 for block in self.blocks]
        originals = [attention.processor for attention in attentions]
        try:
            for block in self.blocks:
                self.set_attention(block)
                block.attn1.processor.keeps = True
            self.predict(clean.to(self.device), torch.zeros(1, device=self.device), self.words([""]).to(self.device))
            kept = [attention.processor.taken() for attention in attentions]
        finally:
            for attention, original in zip(attentions, originals, strict=True):
                attention.set_processor(original)
        merged = ([part[0].transpose(0, 1).flatten(1) for part in queries_keys] for queries_keys in kept)
        return [QueriesKeys(query, key, heads=attentions[0].heads) for query, key in merged]


class RecordingAttention:
    """An attention processor that can keep the queries and keys of its latest call.

    keeps: whether it does so.
    """

    keeps = False
    _queries_keys: tuple[Tensor, Tensor] | None = None

    def keep(self, query: Tensor, key: Tensor) -> None:
        """Keep the video tokens' queries and keys [B, H, S, d], if asked to."""
        if self.keeps:
            self._queries_keys = (query, key)

    def taken(self) -> tuple[Tensor, Tensor]:
        """Return the kept queries and keys, once."""
        queries_keys, self._queries_keys = self._queries_keys, None
        assert queries_keys is not None, "no attention was computed since the last call"
        return queries_keys


def spread(batch: int, generator: torch.Generator) -> Tensor:
    """Return numbers [B] in [0, 1), each uniform, that together cover the interval evenly."""
    offset = torch.rand(1, generator=generator)
    return (torch.arange(batch) + offset) / batch


def drop_prompts(words: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Replace one in ten of the prompts [B, L] by the empty one [L], for classifier-free guidance."""
    dropped = torch.rand(len(words), generator=generator) < PROMPT_DROPOUT
    return torch.where(dropped[:, None], empty, words)


@contextmanager
def _outputs_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the video tokens [B, S, D] that a block returns."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
