"""Wan 2.1 as a backbone for tests: a tiny random pipeline of diffusers' own classes.

Self-attention sees the video alone, text comes by cross-attention. Axis letters as in `ditflow.backbones.contract`.
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from ditflow.backbones.contract import ConstantGuider, Guider, NoiseLevel, PositionScheme, TextLimit
from ditflow.backbones.flow import FlowSchedule
from ditflow.backbones.hooked import HookedBackbone, PassHooks, project
from ditflow.backbones.positions import RotaryPositions, Sinusoids
from ditflow.layout import LatentLayout
from ditflow.mini.build import build_tokenizer
from ditflow.settings import ExecutionSettings, ModelDefaults, ResolvedSampling
from ditflow.types import TokenGrid, check_finite

LAYERS, TEXT_TOKENS, CHANNELS = 3, 16, 4


def build_pipeline() -> WanPipeline:
    """Build a tiny Wan with random weights: VAE 8x and 4x, patches 1x2x2, heads of 24 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = UMT5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0)
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 2.0, 1.0],
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=LAYERS,
            rope_max_seq_len=32,
        )
        return WanPipeline(
            tokenizer=build_tokenizer(),
            text_encoder=UMT5EncoderModel(text),
            vae=vae,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


class Wan(HookedBackbone):
    """A Wan model as a `Backbone`."""

    def __init__(self, execution: ExecutionSettings | None = None):
        self.name, self.revision = "tiny-wan", "revision-wan"
        self.pipeline = pipeline = build_pipeline()
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        for module in (self.transformer, self.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        self.device, self.dtype = self.transformer.device, self.transformer.dtype
        config = self.transformer.config
        self.layout = LatentLayout(
            name=self.name,
            blocks=config.num_layers,
            channels=CHANNELS,
            compression=(pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial),
            patch=tuple(config.patch_size),
            trained_size=(9, 32, 48),
        )
        self.defaults = ModelDefaults(blocks=(LAYERS // 2,), guidance_scale=5.0)
        self.text_limit = TextLimit(TEXT_TOKENS, pipeline.tokenizer)
        self.set_execution(execution or ExecutionSettings())

    @torch.no_grad()
    def encode_video(self, video: np.ndarray) -> Tensor:
        """Normalised mean latents of a video."""
        self.layout.latent_shape(*video.shape[:3])
        pixels = torch.from_numpy(video).float().div(127.5).sub(1).permute(3, 0, 1, 2)[None]
        mean, std = self._statistics()
        return ((self.vae.encode(pixels).latent_dist.mode().float() - mean) / std).permute(0, 2, 1, 3, 4)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, frames: int) -> np.ndarray:
        """Decode to uint8 [T, H, W, 3]."""
        mean, std = self._statistics()
        video = self.vae.decode(latents.permute(0, 2, 1, 3, 4) * std + mean).sample[0].float()
        check_finite("the decoded video", video)
        pixels = video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(1, 2, 3, 0)[-frames:].numpy()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = torch.tensor([config.latents_mean, config.latents_std])[:, None, :, None, None, None]
        return mean, std

    def decoder_peak_bytes(self) -> int:
        """Nothing to speak of."""
        return 0

    @torch.no_grad()
    def condition(self, prompt: str) -> Tensor:
        """Text embeddings [1, L, text dim]."""
        return self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=self.device
        )[0]

    def schedule(self, steps: int, grid: TokenGrid) -> FlowSchedule:
        """Return the shifted sigmas of the model's scheduler."""
        config = self.pipeline.scheduler.config
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(steps)
        return FlowSchedule(scheduler.sigmas.tolist(), config.num_train_timesteps)

    def guider(self, sampling: ResolvedSampling) -> Guider:
        """Return constant guidance."""
        return ConstantGuider(sampling.guidance_scale)

    def positions(self, grid: TokenGrid) -> PositionScheme:
        """Return rotary positions of half the channels: of every pair, the processor reads one cos and one sin."""
        patch = self.layout.patch
        sides = (grid.frames * patch[0], grid.height * patch[1], grid.width * patch[2])
        cos, sin = _halves(self.transformer.rope(torch.empty(1, 1, *sides)))
        rope = self.transformer.rope
        axes = tuple(enumerate((rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2)))
        return RotaryPositions(cos, sin, lambda: Sinusoids.from_embedding(cos, sin, axes, grid))

    @property
    def blocks(self) -> Any:
        """Transformer blocks."""
        return self.transformer.blocks

    def processor(self, block: int, hooks: PassHooks) -> Any:
        """Return the self-attention of a block."""
        return _SelfAttention(block, hooks, self.execution.attention_backend)

    def forward(self, latents: Tensor, level: NoiseLevel, condition: Tensor, hooks: PassHooks | None) -> Tensor:
        """Call the transformer."""
        batch = len(condition)
        video = latents.to(self.dtype).permute(0, 2, 1, 3, 4).expand(batch, -1, -1, -1, -1)
        timestep = torch.full((batch,), level.timestep, device=self.device)
        return self.transformer(video, timestep, condition, return_dict=False)[0].permute(0, 2, 1, 3, 4)


class _SelfAttention:
    """Wan's self-attention, as diffusers' processor, with hooks."""

    def __init__(self, block: int, hooks: PassHooks, backend: str):
        self._block, self._hooks, self._backend = block, hooks, backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        hooks = self._hooks
        hooks.end_at_keys_values(attn, hidden_states)
        injected, own = hooks.injected_in(self._block), _halves(rotary_emb)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(project(attn.to_k, hidden_states, injected.key if injected else None))
        query = _rotated(query, *hooks.rotation("query", own))
        key = _rotated(key.unflatten(2, (attn.heads, -1)), *hooks.rotation("key", own))
        hooks.capture_queries_keys(self._block, query, key)
        value = project(attn.to_v, hidden_states, injected.value if injected else None)
        value = value.unflatten(2, (attn.heads, -1))
        attended = dispatch_attention_fn(query, key, value, backend=self._backend).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](attended))


def _halves(rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cos and sin [1, S, 1, d], each channel twice, as [S, d/2]."""
    cos, sin = rotation
    return cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]


def _rotated(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of [B, S, H, d]."""
    one, other = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2).type_as(tokens)


def build(**options: Any) -> Wan:
    """Return the backbone."""
    return Wan(**options)


def by_diffusers(backbone: Wan, noise: Tensor, prompt: str, steps: int, guidance_scale: float) -> Tensor:
    """Final latents of diffusers' own pipeline."""
    latents = noise.permute(0, 2, 1, 3, 4)
    _, frames, _, height, width = noise.shape
    return backbone.pipeline(
        prompt=prompt,
        negative_prompt="",
        num_frames=4 * (frames - 1) + 1,
        height=8 * height,
        width=8 * width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXT_TOKENS,
        latents=latents,
        output_type="latent",
    ).frames.permute(0, 2, 1, 3, 4)
