"""LTX-Video 0.9 as a backbone for tests: a tiny random pipeline of diffusers' own classes.

Latents are packed into tokens, one for a latent pixel; text comes by masked cross-attention; the rotary embedding spans
the whole width before heads are split; sigmas depend on the number of tokens. Axis letters as in
`ditflow.backbones.contract`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from ditflow.backbones.contract import ConstantGuider, Guider, NoiseLevel, PositionScheme, TextLimit
from ditflow.backbones.flow import FlowSchedule
from ditflow.backbones.hooked import HookedBackbone, PassHooks, project
from ditflow.backbones.positions import RotaryPositions, Sinusoids
from ditflow.layout import LatentLayout
from ditflow.mini.build import build_tokenizer
from ditflow.settings import ExecutionSettings, ModelDefaults, ResolvedSampling
from ditflow.types import TokenGrid, check_finite

LAYERS, TEXT_TOKENS, CHANNELS, FPS = 3, 16, 4, 25


class Condition(NamedTuple):
    """Text embeddings [B, L, text dim] and their mask [B, L]."""

    embeds: Tensor
    mask: Tensor


def build_pipeline() -> LTXPipeline:
    """Build a tiny LTX-Video with random weights: VAE 8x and 2x, patches of one latent pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0)
        vae = AutoencoderKLLTXVideo(
            latent_channels=CHANNELS,
            block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False, False, False),
            patch_size=4,
        )
        transformer = LTXVideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=LAYERS,
            caption_channels=32,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=16, max_image_seq_len=256
        )
        return LTXPipeline(scheduler, vae, T5EncoderModel(text), build_tokenizer(), transformer)


class LTX(HookedBackbone):
    """An LTX-Video model as a `Backbone`."""

    def __init__(self, execution: ExecutionSettings | None = None):
        self.name, self.revision = "tiny-ltx", "revision-ltx"
        self.pipeline = pipeline = build_pipeline()
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        for module in (self.transformer, self.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        self.device, self.dtype = self.transformer.device, self.transformer.dtype
        self.layout = LatentLayout(
            name=self.name,
            blocks=self.transformer.config.num_layers,
            channels=CHANNELS,
            compression=(pipeline.vae_temporal_compression_ratio, pipeline.vae_spatial_compression_ratio),
            patch=(1, 1, 1),
            trained_size=(9, 32, 48),
        )
        self.defaults = ModelDefaults(blocks=(LAYERS // 2,), guidance_scale=3.0)
        self.text_limit = TextLimit(TEXT_TOKENS, pipeline.tokenizer)
        self.set_execution(execution or ExecutionSettings())

    @torch.no_grad()
    def encode_video(self, video: np.ndarray) -> Tensor:
        """Normalised mean latents of a video."""
        self.layout.latent_shape(*video.shape[:3])
        pixels = torch.from_numpy(video).float().div(127.5).sub(1).permute(3, 0, 1, 2)[None]
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        return self.pipeline._normalize_latents(latents, self.vae.latents_mean, self.vae.latents_std).transpose(1, 2)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, frames: int) -> np.ndarray:
        """Decode to uint8 [T, H, W, 3]."""
        latents = latents.transpose(1, 2)
        latents = self.pipeline._denormalize_latents(latents, self.vae.latents_mean, self.vae.latents_std)
        video = self.vae.decode(latents).sample[0].float()
        check_finite("the decoded video", video)
        pixels = video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(1, 2, 3, 0)[-frames:].numpy()

    def decoder_peak_bytes(self) -> int:
        """Nothing to speak of."""
        return 0

    @torch.no_grad()
    def condition(self, prompt: str) -> Condition:
        """Text embeddings with their mask."""
        embeds, mask, *_ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=self.device
        )
        return Condition(embeds, mask)

    def batch(self, conditions: Sequence[Condition]) -> Condition:
        """Join embeddings and masks."""
        return Condition(*map(torch.cat, zip(*conditions, strict=True)))

    def schedule(self, steps: int, grid: TokenGrid) -> FlowSchedule:
        """Return sigmas that are shifted by the number of tokens."""
        config = self.pipeline.scheduler.config
        sizes = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(grid.tokens, *sizes))
        return FlowSchedule(scheduler.sigmas.tolist(), config.num_train_timesteps)

    def guider(self, sampling: ResolvedSampling) -> Guider:
        """Return constant guidance."""
        return ConstantGuider(sampling.guidance_scale)

    def positions(self, grid: TokenGrid) -> PositionScheme:
        """Return rotary positions over the width D."""
        sides, rope = (grid.frames, grid.height, grid.width), self.transformer.rope
        cos, sin = (part[0] for part in rope(torch.empty(1), *sides, self._interpolation()))

        def sinusoids() -> Sinusoids:
            count = rope.dim // 6
            frequencies = rope.theta ** torch.linspace(0, 1, count) * torch.pi
            spacing = torch.tensor(self._interpolation()) / torch.tensor(
                [rope.base_num_frames, rope.base_height, rope.base_width]
            )
            # For every frequency t, y and x, each twice; what does not divide stands in front and does not turn.
            rates = torch.diag_embed(spacing.expand(count, 3)) * frequencies[:, None, None]
            rates = rates.permute(1, 0, 2).flatten(1).repeat_interleave(2, dim=1)
            return Sinusoids(cos, sin, torch.cat([torch.zeros(3, rope.dim % 6), rates], dim=1))

        return RotaryPositions(cos, sin, sinusoids)

    def _interpolation(self) -> tuple[float, float, float]:
        """Seconds, and pixels, of one latent pixel."""
        temporal, spatial = self.layout.compression
        return temporal / FPS, spatial, spatial

    @property
    def blocks(self) -> Any:
        """Transformer blocks."""
        return self.transformer.transformer_blocks

    def processor(self, block: int, hooks: PassHooks) -> Any:
        """Return the self-attention of a block."""
        return _SelfAttention(block, hooks, self.execution.attention_backend)

    def forward(self, latents: Tensor, level: NoiseLevel, condition: Condition, hooks: PassHooks | None) -> Tensor:
        """Call the transformer."""
        batch, (_, frames, _, height, width) = len(condition.embeds), latents.shape
        tokens = latents.to(self.dtype).permute(0, 1, 3, 4, 2).flatten(1, 3).expand(batch, -1, -1)
        output = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=condition.embeds,
            timestep=torch.full((batch,), level.timestep, device=self.device),
            encoder_attention_mask=condition.mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self._interpolation(),
            return_dict=False,
        )[0]
        return output.unflatten(1, (frames, height, width)).permute(0, 1, 4, 2, 3)


class _SelfAttention:
    """LTX-Video's self-attention, as diffusers' processor, with hooks."""

    def __init__(self, block: int, hooks: PassHooks, backend: str):
        self._block, self._hooks, self._backend = block, hooks, backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        hooks = self._hooks
        hooks.end_at_keys_values(attn, hidden_states)
        injected = hooks.injected_in(self._block)
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(project(attn.to_k, hidden_states, injected.key if injected else None))
        query = apply_rotary_emb(query, hooks.rotation("query", image_rotary_emb)).unflatten(2, (attn.heads, -1))
        key = apply_rotary_emb(key, hooks.rotation("key", image_rotary_emb)).unflatten(2, (attn.heads, -1))
        hooks.capture_queries_keys(self._block, query, key)
        value = project(attn.to_v, hidden_states, injected.value if injected else None)
        value = value.unflatten(2, (attn.heads, -1))
        attended = dispatch_attention_fn(query, key, value, backend=self._backend).flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](attended))


def build(**options: Any) -> LTX:
    """Return the backbone."""
    return LTX(**options)


def by_diffusers(backbone: LTX, noise: Tensor, prompt: str, steps: int, guidance_scale: float) -> Tensor:
    """Final latents of diffusers' own pipeline."""
    _, frames, _, height, width = noise.shape
    temporal, spatial = backbone.layout.compression
    packed = backbone.pipeline(
        prompt=prompt,
        negative_prompt="",
        num_frames=temporal * (frames - 1) + 1,
        height=spatial * height,
        width=spatial * width,
        frame_rate=FPS,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXT_TOKENS,
        latents=backbone.pipeline._pack_latents(noise.transpose(1, 2)),
        output_type="latent",
    ).frames
    return packed.unflatten(1, (frames, height, width)).permute(0, 1, 4, 2, 3)
