"""CogVideoX under training: v-prediction on the released noise schedules, joint attention over text and video.

Axes as in `denoiser`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from ditflow.mini.build import HEIGHT, WIDTH
from ditflow.mini.training.denoiser import Denoiser, Noised, RecordingAttention, spread


class CogVideoXDenoiser(Denoiser):
    """A CogVideoX pipeline under training."""

    @property
    def blocks(self) -> Any:
        """The transformer blocks."""
        return self.pipeline.transformer.transformer_blocks

    def set_attention(self, block: Any) -> None:
        """Give a block `JointAttention`."""
        block.attn1.set_processor(JointAttention())

    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """Draw integer timesteps and noise."""
        alphas = self.pipeline.scheduler.alphas_cumprod.float()
        timesteps = (spread(len(clean), generator) * len(alphas)).long().clamp(max=len(alphas) - 1)
        noise = torch.randn(clean.shape, generator=generator)
        alpha_bar = alphas[timesteps]
        return Noised(add_noise(clean, noise, alpha_bar), timesteps, velocity(clean, noise, alpha_bar))

    def predict(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """Call the text encoder and the transformer."""
        return self.pipeline.transformer(
            hidden_states=noisy,
            encoder_hidden_states=self.pipeline.text_encoder(words)[0],
            timestep=timesteps,
            image_rotary_emb=self._rotary(noisy.shape[1]),
            return_dict=False,
        )[0]

    def _rotary(self, frames: int) -> tuple[Tensor, Tensor] | None:
        if not self.pipeline.transformer.config.use_rotary_positional_embeddings:
            return None
        return self.pipeline._prepare_rotary_positional_embeddings(HEIGHT, WIDTH, frames, self.device)


def velocity(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the target of v-prediction, sqrt(a) noise - sqrt(1 - a) clean, for alpha_bar [B]."""
    signal = alpha_bar.view(-1, 1, 1, 1, 1)
    return signal.sqrt() * noise - (1 - signal).sqrt() * clean


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the noisy latents, sqrt(a) clean + sqrt(1 - a) noise, for alpha_bar [B]."""
    signal = alpha_bar.view(-1, 1, 1, 1, 1)
    return signal.sqrt() * clean + (1 - signal).sqrt() * noise


class JointAttention(RecordingAttention):
    """CogVideoX' attention over text and video tokens, text first.

    Its softmax is spelled out: on a CPU in 16 bits that is twice as fast as torch's fused kernel.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attended video and text tokens [B, S, D]."""
        assert attention_mask is None, "CogVideoX attends without a mask"
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (part(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in projections)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([part[:, :, :text], apply_rotary_emb(part[:, :, text:], image_rotary_emb)], dim=2)
                for part in (query, key)
            )
        self.keep(query[:, :, text:], key[:, :, text:])
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1)
        attended = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](attended))
        return output[:, text:], output[:, :text]
