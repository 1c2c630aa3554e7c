"""CogVideoX 2B, 5B and 1.5 (and any diffusers folder of their classes).

Text and video tokens attend jointly, text first. 5B and 1.5 have a rotary embedding and the DPM solver, 2B has DDIM and
a sin-cos embedding that the patch embedding adds. All predict v.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ditflow.backbones.config import FLAG, ModelConfigError, count, is_count, optional_count, read_config
from ditflow.backbones.contract import ConstantGuider, Guider, NoiseLevel, PositionScheme, TextLimit
from ditflow.backbones.hooked import HookedBackbone, PassHooks, project
from ditflow.backbones.positions import AdditivePositions, RotaryPositions, Sinusoids
from ditflow.errors import SettingsError
from ditflow.layout import LatentLayout
from ditflow.settings import ExecutionSettings, ModelDefaults, ResolvedSampling
from ditflow.types import PositionEmbedding, TokenGrid, check_finite

PIPELINES = ("CogVideoXPipeline",)
"""Pipeline classes that this module supports."""

_RELEASED = {
    # (layers, rotary): CogVideoX-2B and CogVideoX-5B, guidance blocks of the paper's appendix
    (30, False): ModelDefaults(blocks=(15,)),
    (42, True): ModelDefaults(blocks=(20,), dynamic_guidance_scale=True),
}
_TRANSFORMER = {
    "num_layers": count(1000),
    "num_attention_heads": optional_count(1024),
    "attention_head_dim": optional_count(1024),
    "in_channels": count(4096),
    "patch_size": count(64),
    "patch_size_t": optional_count(64),
    "sample_frames": count(10_000),
    "sample_height": count(10_000),
    "sample_width": count(10_000),
    "text_embed_dim": optional_count(65_536),
    "time_embed_dim": optional_count(65_536),
    "max_text_seq_length": optional_count(100_000),
    "use_rotary_positional_embeddings": FLAG,
}
_VAE = {
    "block_out_channels": (
        "1 to 8 whole numbers from 1 to 8192",
        lambda value: isinstance(value, list) and 1 <= len(value) <= 8 and all(is_count(one, 8192) for one in value),
    ),
    "layers_per_block": optional_count(16),
    "latent_channels": optional_count(4096),
    "temporal_compression_ratio": count(64),
    "sample_height": optional_count(65_536),
    "sample_width": optional_count(65_536),
}
_TEXT_ENCODER = {
    "num_layers": count(1000),
    "num_heads": count(1024),
    "d_model": count(65_536),
    "d_ff": count(262_144),
    "d_kv": count(1024),
    "vocab_size": count(2**20),
}
_TOKENIZER = {
    "extra_ids": (
        "a whole number from 0 to 10000, or null",
        lambda value: value in (None, 0) or is_count(value, 10_000),
    )
}
_SCHEDULER = {"num_train_timesteps": optional_count(100_000)}
"""Values of the parts' configurations that are used, or determine their memory."""
_MAX_TEXT_TOKENS = 226  # diffusers' default, for configurations without it
# Peak bytes of the VAE's decoder per pixel of a frame while it decodes eight frames at once, in 16 bits.
_DECODER_BYTES_PER_PIXEL = 64 * 1024


def release_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """Return the precision of the release (2B: float16, 5B: bfloat16), and float32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    config = _read_transformer(folder)
    return torch.bfloat16 if config["use_rotary_positional_embeddings"] else torch.float16


def load(folder: Path, *, dtype: torch.dtype, device: torch.device, **identity: Any) -> CogVideoX:
    """Load a diffusers folder; `identity` goes to `CogVideoX`."""
    _check_parts(folder)
    # One bar for each of five parts, each finished at once.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = CogVideoXPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return CogVideoX(pipeline.to(device), **identity)


def describe(folder: Path, name: str, own_defaults: Mapping[str, Any]) -> tuple[LatentLayout, ModelDefaults]:
    """Read a diffusers folder's layout and defaults from its configurations alone.

    Raises ModelConfigError for configurations of other families.
    """
    transformer, vae = _read_transformer(folder), read_config(folder / "vae" / "config.json", _VAE)
    return layout_of(name, transformer, vae), _defaults_of(transformer, own_defaults)


def _check_tokenizer(folder: Path) -> None:
    """Raise ModelConfigError for a giant number of extra tokens, which transformers would create at once."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    if file.exists():  # it may be left out
        read_config(file, _TOKENIZER)


def _read_transformer(folder: Path) -> dict[str, Any]:
    return read_config(folder / "transformer" / "config.json", _TRANSFORMER)


def _check_parts(folder: Path) -> None:
    """Raise ModelConfigError for parts that must not be built.

    A part larger than its weights would be allocated before the weights are read. Diffusers would take a scheduler
    configuration that is a JSON string for the name of a model, and request it from the hub.
    """
    read_config(folder / "text_encoder" / "config.json", _TEXT_ENCODER)
    read_config(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _check_tokenizer(folder)
    file, config = folder / "transformer" / "config.json", _read_transformer(folder)
    heads, head_dim = config.get("num_attention_heads") or 30, config.get("attention_head_dim") or 64  # as in diffusers
    layers, width = config["num_layers"], heads * head_dim
    weights = sum(part.stat().st_size for part in file.parent.glob("*.safetensors"))
    if 12 * layers * width**2 > weights:  # attention and feed-forward alone, at a byte each
        raise ModelConfigError(
            f"{file}: {layers} layers of width {width} need more than the {weights} bytes of *.safetensors next to it. "
            "Is the download complete?",
            code="model-weights-incomplete",
        )


def read_text_limit(folder: Path) -> TextLimit:
    """Read the prompt length limit of a diffusers folder, without its weights."""
    _check_tokenizer(folder)
    limit = _read_transformer(folder).get("max_text_seq_length") or _MAX_TEXT_TOKENS
    return TextLimit(limit, AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))


def layout_of(name: str, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentLayout:
    """Return the layout of two diffusers configurations."""
    spatial, temporal = 2 ** (len(vae["block_out_channels"]) - 1), int(vae["temporal_compression_ratio"])
    patch = transformer["patch_size"]
    sides = (transformer["sample_height"] * spatial, transformer["sample_width"] * spatial)
    return LatentLayout(
        name=name,
        blocks=transformer["num_layers"],
        channels=transformer["in_channels"],
        compression=(temporal, spatial),
        patch=(transformer.get("patch_size_t") or 1, patch, patch),
        trained_size=(transformer["sample_frames"], *sides),
        also_multiples_of=2 * temporal,
    )


def _defaults_of(transformer: Mapping[str, Any], own: Mapping[str, Any]) -> ModelDefaults:
    rotary, layers = bool(transformer["use_rotary_positional_embeddings"]), transformer["num_layers"]
    half_depth = ModelDefaults(blocks=(layers // 2,), dynamic_guidance_scale=rotary)
    return replace(_RELEASED.get((layers, rotary), half_depth), **own)


class CogVideoX(HookedBackbone):
    """CogVideoX as a `Backbone`: frozen, in evaluation mode."""

    def __init__(
        self,
        pipeline: CogVideoXPipeline,
        *,
        name: str,
        revision: str,
        defaults: Mapping[str, Any] | None = None,
        execution: ExecutionSettings | None = None,
    ):
        self.name, self.revision = name, revision
        self.pipeline, self.transformer, self.vae = pipeline, pipeline.transformer, pipeline.vae
        for module in (self.transformer, self.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        config = self.transformer.config
        self.device, self.dtype = self.transformer.device, self.transformer.dtype
        self.layout = layout_of(name, config, self.vae.config)
        self.defaults = _defaults_of(config, defaults or {})
        self.text_tokens = config.max_text_seq_length
        self.text_limit = TextLimit(self.text_tokens, pipeline.tokenizer)
        self._rotary = bool(config.use_rotary_positional_embeddings)
        self._latest_rotation: tuple[TokenGrid, tuple[Tensor, Tensor]] | None = None
        self.set_execution(execution or ExecutionSettings())

    # ------------------------------------------------------------------ pixels and prompts

    @torch.no_grad()
    def encode_video(self, video: np.ndarray) -> Tensor:
        """Return the scaled latents [1, F, C, h, w] fp32 of a uint8 video [T, H, W, 3]: the mean, not a sample."""
        shape = self.layout.latent_shape(*video.shape[:3])
        pixels = torch.from_numpy(video).to(self.device, torch.float32).div(127.5).sub(1)
        moments = self.vae.encode(pixels.permute(3, 0, 1, 2)[None].to(self.vae.dtype)).latent_dist
        latents = (moments.mode().float() * self.vae.config.scaling_factor).permute(0, 2, 1, 3, 4)
        missing = shape[1] - latents.shape[1]
        return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, frames: int) -> np.ndarray:
        """Decode to uint8 [T, H, W, 3].

        The last `frames` frames are kept: the padding of a temporal patch comes first, and the VAE decodes the first
        latent frame to four frames instead of one if the number of latent frames is even.
        """
        latent_frames = -(-frames // self.layout.compression[0])
        scaled = latents[:, latents.shape[1] - latent_frames :].permute(0, 2, 1, 3, 4) / self.vae.config.scaling_factor
        video = self.vae.decode(scaled.to(self.vae.dtype)).sample[0].float()
        check_finite("the decoded video", video)
        pixels = video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(1, 2, 3, 0)[-frames:].cpu().numpy()

    def decoder_peak_bytes(self) -> int:
        """Return the peak memory of the VAE's decoder for the trained size."""
        _, height, width = self.layout.trained_size
        return height * width * _DECODER_BYTES_PER_PIXEL

    @torch.no_grad()
    def condition(self, prompt: str) -> Tensor:
        """Return text embeddings [1, L, text dim] in the model's precision."""
        embeds, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens, device=self.device
        )
        return embeds.to(self.dtype)

    # ------------------------------------------------------------------ sampling

    def schedule(self, steps: int, grid: TokenGrid) -> DiscreteSchedule:
        """Return a new schedule."""
        return DiscreteSchedule(self.pipeline.scheduler, steps, self.device)

    def guider(self, sampling: ResolvedSampling) -> Guider:
        """Return constant or, for 5B, dynamic guidance."""
        if sampling.dynamic_guidance_scale and sampling.guidance_scale != 1:
            return DynamicGuider(sampling.guidance_scale, sampling.steps)
        return ConstantGuider(sampling.guidance_scale)

    # ------------------------------------------------------------------ positions

    def positions(self, grid: TokenGrid) -> PositionScheme:
        """Return rotary or additive positions.

        Channels: a quarter for t, then three eighths each for y and x (additive: x and y).
        """
        if self._rotary:
            cos, sin = self._rotation(grid)
            t, yx = cos.shape[1] // 8, cos.shape[1] // 8 * 3 // 2
            axes = ((0, t), (1, yx), (2, yx))
            return RotaryPositions(cos, sin, lambda: Sinusoids.from_embedding(cos, sin, axes, grid))
        embedding = self._additive_embedding(grid)
        t, yx = embedding.shape[1] // 8, embedding.shape[1] // 8 * 3 // 2
        axes = ((0, t), (2, yx), (1, yx))
        widths = [count for _, count in axes for _ in ("sin", "cos")]
        return AdditivePositions(embedding, widths, lambda cos, sin: Sinusoids.from_embedding(cos, sin, axes, grid))

    def _rotation(self, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """Return cos and sin [S, d] of the model's own rotary embedding; those of the latest grid are cached."""
        if self._latest_rotation is None or self._latest_rotation[0] != grid:
            cos, sin = (part.float() for part in self._rotary_embedding(grid))
            self._latest_rotation = (grid, (cos, sin))
        return self._latest_rotation[1]

    def _additive_embedding(self, grid: TokenGrid) -> Tensor:
        """Return the model's own additive embedding [S, D] of the video tokens (2B)."""
        embed, patch = self.transformer.patch_embed, self.layout.patch[1]
        pixel_frames = (grid.frames - 1) * embed.temporal_compression_ratio + 1
        joint = embed._get_positional_embeddings(
            grid.height * patch, grid.width * patch, pixel_frames, device=self.device
        )
        return joint[0, embed.max_text_seq_length :].float()

    def _rotary_embedding(self, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        size, config = (grid.height, grid.width), self.transformer.config
        if config.patch_size_t is not None:
            # 1.5 counts patches from the corner. The pipeline's own method crops the embedding of the trained size,
            # and fails if a side is longer, as in a portrait.
            return get_3d_rotary_pos_embed(
                config.attention_head_dim, None, size, grid.frames, grid_type="slice", max_size=size, device=self.device
            )
        height, width = (side * self.layout.patch[1] * self.layout.compression[1] for side in size)
        # The pipeline's own method scales the grid of 1.0 to the trained one.
        return self.pipeline._prepare_rotary_positional_embeddings(height, width, grid.frames, self.device)

    # ------------------------------------------------------------------ passes

    @property
    def blocks(self) -> Any:
        """Transformer blocks."""
        return self.transformer.transformer_blocks

    def processor(self, block: int, hooks: PassHooks) -> Any:
        """Return the joint attention of a block."""
        return _JointAttention(block, hooks, self.execution.attention_backend)

    def forward(self, latents: Tensor, level: NoiseLevel, condition: Tensor, hooks: PassHooks | None) -> Tensor:
        """Call the transformer."""
        batch, grid = len(condition), self.layout.grid(latents.shape)
        position = hooks.position if hooks else None
        if not self._rotary and position is None and condition.shape[1] != self.transformer.config.max_text_seq_length:
            # Diffusers adds one embedding to text and video, and so takes prompts of this one length only.
            position = {"additive": self._additive_embedding(grid)}
        with nullcontext() if self._rotary or position is None else self._position_added(position):
            return self.transformer(
                hidden_states=latents.to(self.dtype).expand(batch, -1, -1, -1, -1),
                encoder_hidden_states=condition,
                timestep=torch.full((batch,), level.timestep, device=self.device),
                image_rotary_emb=self._rotation(grid) if self._rotary else None,
                return_dict=False,
            )[0]

    @contextmanager
    def _position_added(self, position: PositionEmbedding) -> Iterator[None]:
        """Add a position to the video tokens in place of the model's additive embedding (2B)."""
        embed = self.transformer.patch_embed

        def add_position(_: Any, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
            text_tokens = inputs[0].shape[1]
            video = tokens[:, text_tokens:] + position["additive"].to(tokens.dtype)
            return torch.cat([tokens[:, :text_tokens], video], dim=1)

        handle = embed.register_forward_hook(add_position)
        embed.use_positional_embeddings = False
        try:
            yield
        finally:
            embed.use_positional_embeddings = True
            handle.remove()


class _JointAttention:
    """Diffusers' attention processor for joint attention of text and video, with hooks.

    Queries and keys are rotated separately and out of place, since slice assignment breaks the gradient.
    """

    def __init__(self, block: int, hooks: PassHooks, backend: str):
        self._block, self._hooks, self._backend = block, hooks, backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        assert attention_mask is None, "CogVideoX attends without a mask"
        hooks = self._hooks
        hooks.end_at_keys_values(attn, hidden_states)
        text_tokens = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        injected = hooks.injected_in(self._block)
        query = _split_heads(attn, attn.to_q(tokens), attn.norm_q)
        key = _split_heads(attn, project(attn.to_k, tokens, injected.key if injected else None), attn.norm_k)
        if image_rotary_emb is not None:
            query = _rotate_video(query, hooks.rotation("query", image_rotary_emb), text_tokens)
            key = _rotate_video(key, hooks.rotation("key", image_rotary_emb), text_tokens)
        hooks.capture_queries_keys(self._block, query[:, text_tokens:], key[:, text_tokens:])
        value = _split_heads(attn, project(attn.to_v, tokens, injected.value if injected else None), None)
        attended = dispatch_attention_fn(query, key, value, backend=self._backend)
        output = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))
        return output[:, text_tokens:], output[:, :text_tokens]


def _split_heads(attn: Any, tokens: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
    """[B, L, D] -> [B, L, H, d], normalised per head."""
    heads = tokens.unflatten(2, (attn.heads, -1))
    return heads if norm is None else norm(heads)


def _rotate_video(tokens: Tensor, rotation: tuple[Tensor, Tensor], text_tokens: int) -> Tensor:
    """Rotate the video tokens of [B, L, H, d]; text tokens have no position."""
    video = apply_rotary_emb(tokens[:, text_tokens:], rotation, sequence_dim=1)
    return torch.cat([tokens[:, :text_tokens], video], dim=1)


@dataclass(frozen=True)
class DynamicGuider(ConstantGuider):
    """Guidance scale that increases over the steps: diffusers' formula for CogVideoX-5B.

    It mixes the raw timestep with the number of steps; published results use it.
    """

    steps: int

    def scale(self, level: NoiseLevel) -> float:
        """Return the guidance scale at a noise level."""
        progress = ((self.steps - level.timestep) / self.steps) ** 5
        return 1 + self.guidance_scale * (1 - math.cos(math.pi * progress)) / 2


class DiscreteSchedule:
    """A diffusers scheduler at discrete timesteps: DDIM, or DPM with its previous sample."""

    def __init__(self, scheduler: Any, steps: int, device: torch.device):
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.set_timesteps(steps, device=device)
        timesteps = self._scheduler.timesteps.tolist()
        self.levels: Sequence[NoiseLevel] = [
            NoiseLevel(index, int(t), self._sigma(int(t))) for index, t in enumerate(timesteps)
        ]
        self._previous_sample: Tensor | None = None

    def level_at(self, share: float) -> NoiseLevel:
        """Return the noise level at a share of the training timesteps."""
        timestep = round(share * self._scheduler.config.num_train_timesteps)
        return NoiseLevel(None, timestep, self._sigma(timestep))

    def step(self, prediction: Tensor, level: NoiseLevel, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of the next level."""
        timesteps, index = self._scheduler.timesteps, level.index
        assert index is not None, "only levels of the schedule have a next one"
        if not isinstance(self._scheduler, CogVideoXDPMScheduler):
            return self._scheduler.step(prediction, timesteps[index], latents, return_dict=False)[0]
        latents, self._previous_sample = self._scheduler.step(
            prediction,
            self._previous_sample,
            timesteps[index],
            timesteps[index - 1] if index > 0 else None,
            latents,
            generator=generator,
            return_dict=False,
        )
        return latents

    def to_clean(self, prediction: Tensor, level: NoiseLevel, latents: Tensor) -> Tensor:
        """Return the clean latents of a v-prediction; SettingsError for other models."""
        if (kind := self._scheduler.config.prediction_type) != "v_prediction":
            raise SettingsError("measured", "prediction", f"pass: this model predicts {kind}, not v_prediction")
        signal_variance = self._signal_variance(level.timestep)
        return signal_variance**0.5 * latents - (1 - signal_variance) ** 0.5 * prediction

    def add_noise(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """Return clean latents noised to a level."""
        timesteps = torch.tensor([int(level.timestep)], device=latents.device)
        return self._scheduler.add_noise(latents, noise, timesteps)

    def _signal_variance(self, timestep: int | float) -> float:
        """Return the share of signal in the variance at a timestep."""
        return self._scheduler.alphas_cumprod[int(timestep)].item()

    def _sigma(self, timestep: int) -> float:
        """Return the flow-equivalent sigma at a timestep."""
        signal_variance = self._signal_variance(timestep)
        signal, noise = signal_variance**0.5, (1 - signal_variance) ** 0.5
        return noise / (signal + noise)
