"""Wan under training: flow matching with shifted noise levels, self-attention over video tokens alone.

Axes as in `denoiser`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ditflow.mini.training.denoiser import Denoiser, Noised, RecordingAttention, spread


class WanDenoiser(Denoiser):
    """A Wan pipeline under training."""

    @property
    def blocks(self) -> Any:
        """The transformer blocks."""
        return self.pipeline.transformer.blocks

    def set_attention(self, block: Any) -> None:
        """Give a block's self-attention `SelfAttention`."""
        block.attn1.set_processor(SelfAttention())

    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """Draw sigmas, uniform before the scheduler's shift, and noise: (1 - sigma) clean + sigma noise."""
        config = self.pipeline.scheduler.config
        share = spread(len(clean), generator)
        sigma = config.shift * share / (1 + (config.shift - 1) * share)
        noise = torch.randn(clean.shape, generator=generator)
        level = sigma.view(-1, 1, 1, 1, 1)
        return Noised((1 - level) * clean + level * noise, sigma * config.num_train_timesteps, noise - clean)

    def predict(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """Call the text encoder and the transformer; the embeddings of padding are zeros, as in the pipeline."""
        mask = (words != self.pipeline.tokenizer.pad_token_id).long()
        return self.pipeline.transformer(
            hidden_states=noisy.transpose(1, 2),
            encoder_hidden_states=self.pipeline.text_encoder(words, mask)[0] * mask[..., None],
            timestep=timesteps,
            return_dict=False,
        )[0].transpose(1, 2)


class SelfAttention(RecordingAttention):
    """Wan's self-attention over video tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the attended video tokens [B, S, D]."""
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key, attn.to_v(hidden_states))
        )
        query, key = (_rotated(part, *rotary_emb) for part in (query, key))
        self.keep(query, key)
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))


def _rotated(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of tokens [B, H, S, d] by cos and sin [1, S, 1, d], in which each value stands twice."""
    cos, sin = (part[0, :, 0, ::2] for part in (cos, sin))
    one, other = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2).type_as(tokens)
