"""CogVideoX 2B, 5B and 1.5 (and any diffusers folder of their classes).

The model's own forward pass runs untouched. Three things are put around it for the length of one pass: our attention
processor on every block, our position embedding in place of the one that the patch embedding would add (2B), and
a checkpointing function that leaves the captured blocks alone. All are taken away again, whatever happens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ditflow.backbones.base import Geometry, TextLimit
from ditflow.backbones.config import FLAG, ModelConfigError, count, count_or_nothing, is_count, read_config
from ditflow.backbones.positions import MovableAdditive, MovablePosition, MovableRotary
from ditflow.settings import ExecutionSettings, ModelDefaults, SettingsError
from ditflow.types import (
    Capture,
    CaptureKind,
    Features,
    KeysValues,
    PositionEmbedding,
    QueriesKeys,
    TokenGrid,
    check_finite,
)

PIPELINES = ("CogVideoXPipeline",)
"""Pipeline classes of model folders that this file can run."""

_RELEASED = {
    # (layers, rotary): CogVideoX-2B and CogVideoX-5B, guidance blocks of the paper's appendix
    (30, False): ModelDefaults(blocks=(15,)),
    (42, True): ModelDefaults(blocks=(20,), dynamic_guidance_scale=True),
}
_TRANSFORMER = {
    "num_layers": count(1000),
    "num_attention_heads": count_or_nothing(1024),
    "attention_head_dim": count_or_nothing(1024),
    "in_channels": count(4096),
    "patch_size": count(64),
    "patch_size_t": count_or_nothing(64),
    "sample_frames": count(10_000),
    "sample_height": count(10_000),
    "sample_width": count(10_000),
    "text_embed_dim": count_or_nothing(65_536),
    "time_embed_dim": count_or_nothing(65_536),
    "max_text_seq_length": count_or_nothing(100_000),
    "use_rotary_positional_embeddings": FLAG,
}
_VAE = {
    "block_out_channels": (
        "1 to 8 whole numbers from 1 to 8192",
        lambda value: isinstance(value, list) and 1 <= len(value) <= 8 and all(is_count(one, 8192) for one in value),
    ),
    "layers_per_block": count_or_nothing(16),
    "latent_channels": count_or_nothing(4096),
    "temporal_compression_ratio": count(64),
    "sample_height": count_or_nothing(65_536),
    "sample_width": count_or_nothing(65_536),
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
_SCHEDULER = {"num_train_timesteps": count_or_nothing(100_000)}
"""What is used of the parts' configurations, or decides how much memory they take."""
_MOST_TEXT_TOKENS = 226  # where a configuration leaves it to diffusers' default
# What one block keeps for its backward pass, in tensors of tokens x D: 12.1 as measured by `make bench`, and some room.
_ACTIVATIONS_PER_BLOCK = 14
# Peak bytes of the VAE's decoder per pixel of a frame while it decodes eight frames at once, in 16 bits.
_DECODER_BYTES_PER_PIXEL = 64 * 1024


def release_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """Return the precision the model was released in (2B: float16, 5B: bfloat16), and float32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    config = _read_transformer(folder)
    return torch.bfloat16 if config["use_rotary_positional_embeddings"] else torch.float16


def load(folder: Path, *, dtype: torch.dtype, device: torch.device, **identity: Any) -> CogVideoX:
    """Load a diffusers folder; `identity` goes to `CogVideoX`."""
    _check_parts(folder)
    # One bar for each of five parts, gone before it can be read.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = CogVideoXPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return CogVideoX(pipeline.to(device), **identity)


def read_geometry(folder: Path, name: str, defaults: Mapping[str, Any]) -> Geometry:
    """Read a diffusers folder's geometry from its configurations alone.

    Raises ModelConfigError for configurations that are not of a model of this family.
    """
    vae = read_config(folder / "vae" / "config.json", _VAE)
    return geometry_of(name, _read_transformer(folder), vae, defaults)


def _check_tokenizer(folder: Path) -> None:
    """Raise ModelConfigError for a giant number of extra tokens, which transformers would create at once."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    if file.exists():  # it may be left out
        read_config(file, _TOKENIZER)


def _read_transformer(folder: Path) -> dict[str, Any]:
    return read_config(folder / "transformer" / "config.json", _TRANSFORMER)


def _check_parts(folder: Path) -> None:
    """Raise ModelConfigError for parts that must not be built.

    A part larger than its weights would be allocated before the weights are read. A scheduler configuration that is a
    JSON string would be taken by diffusers for the name of a model, and requested from the hub.
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
            f"{file}: {layers} layers of width {width} need more than the {weights} bytes of *.safetensors beside it. "
            "Is the download complete?"
        )


def read_text_limit(folder: Path) -> TextLimit:
    """Read how long a prompt of a diffusers folder may be; the weights are left alone."""
    _check_tokenizer(folder)
    limit = _read_transformer(folder).get("max_text_seq_length") or _MOST_TEXT_TOKENS
    return TextLimit(limit, AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))


def geometry_of(
    name: str, transformer: Mapping[str, Any], vae: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Geometry:
    """Return the geometry that two diffusers configurations describe."""
    spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    rotary, layers = bool(transformer["use_rotary_positional_embeddings"]), transformer["num_layers"]
    half_depth = ModelDefaults(blocks=(layers // 2,), dynamic_guidance_scale=rotary)
    return Geometry(
        name=name,
        blocks=layers,
        channels=transformer["in_channels"],
        spatial=spatial,
        temporal=int(vae["temporal_compression_ratio"]),
        patch=transformer["patch_size"],
        temporal_patch=transformer.get("patch_size_t") or 1,
        sample_size=(
            transformer["sample_frames"],
            transformer["sample_height"] * spatial,
            transformer["sample_width"] * spatial,
        ),
        defaults=replace(_RELEASED.get((layers, rotary), half_depth), **defaults),
    )


class CogVideoX:
    """A CogVideoX model as a `Backbone`: frozen, in evaluation mode, with nothing of ours left in it between passes."""

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
        self.device, self.dtype = self.transformer.device, self.transformer.dtype
        self._rotary = bool(self.transformer.config.use_rotary_positional_embeddings)
        self.geometry = geometry_of(name, self.transformer.config, self.vae.config, defaults or {})
        self.defaults = self.geometry.defaults
        self.text_limit = TextLimit(self.transformer.config.max_text_seq_length, pipeline.tokenizer)
        self._latest_position: tuple[TokenGrid, PositionEmbedding] | None = None
        self.execution: ExecutionSettings
        self.set_execution(execution or ExecutionSettings())

    # ------------------------------------------------------------------ geometry

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Shape [1, F, C, height, width] of a clip's latents; SettingsError for a size the model cannot do."""
        return self.geometry.latent_shape(frames, height, width)

    def grid(self, latents: Tensor) -> TokenGrid:
        """Return the token grid that these latents fill."""
        return self.geometry.grid(latents.shape)

    def default_position(self, grid: TokenGrid) -> PositionEmbedding:
        """Rotary cos and sin for queries and for keys [S, d], or the additive embedding of the video tokens [S, D].

        That of the latest grid is kept, because every pass asks for it, and copied.
        """
        if self._latest_position is None or self._latest_position[0] != grid:
            self._latest_position = (grid, self._position_of(grid))
        return {part: value.clone() for part, value in self._latest_position[1].items()}

    def _position_of(self, grid: TokenGrid) -> PositionEmbedding:
        if self._rotary:
            cos, sin = (part.float() for part in self._rotary_embedding(grid))
            return {"query_cos": cos, "query_sin": sin, "key_cos": cos.clone(), "key_sin": sin.clone()}
        embed = self.transformer.patch_embed
        latent_size = (grid.height * self.geometry.patch, grid.width * self.geometry.patch)
        pixel_frames = (grid.frames - 1) * embed.temporal_compression_ratio + 1
        joint = embed._get_positional_embeddings(*latent_size, pixel_frames, device=self.device)
        return {"additive": joint[0, embed.max_text_seq_length :].float()}

    def movable_position(self, grid: TokenGrid) -> MovablePosition:
        """Return the position embedding as a function of how far tokens are moved; SettingsError if it is learned."""
        movable = MovableRotary if self._rotary else MovableAdditive
        return movable(self.default_position(grid), grid)

    def _rotary_embedding(self, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """Cos and sin of the video tokens' rotation, [S, d]."""
        size, config = (grid.height, grid.width), self.transformer.config
        if config.patch_size_t is not None:
            # 1.5 counts patches from the corner. The pipeline's own method cuts these from those of the trained size,
            # and fails where a side is longer, as in a portrait.
            return get_3d_rotary_pos_embed(
                config.attention_head_dim, None, size, grid.frames, grid_type="slice", max_size=size, device=self.device
            )
        height, width = (side * self.geometry.patch * self.geometry.spatial for side in size)
        # The pipeline's own method: how 1.0 fits a grid into the trained one is its business.
        return self.pipeline._prepare_rotary_positional_embeddings(height, width, grid.frames, self.device)

    # ------------------------------------------------------------------ pixels and words

    @torch.no_grad()
    def encode_video(self, video: np.ndarray) -> Tensor:
        """Scaled mean latents [1, F, C, h, w] fp32 of a uint8 video [T, H, W, 3] (the mean, not a sample)."""
        shape = self.latent_shape(*video.shape[:3])
        pixels = torch.from_numpy(video).to(self.device, torch.float32).div(127.5).sub(1)
        moments = self.vae.encode(pixels.permute(3, 0, 1, 2)[None].to(self.vae.dtype)).latent_dist
        latents = (moments.mode().float() * self.vae.config.scaling_factor).permute(0, 2, 1, 3, 4)
        missing = shape[1] - latents.shape[1]
        return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, frames: int) -> np.ndarray:
        """Decode to uint8 [T, H, W, 3].

        The last `frames` frames count: padding for a temporal patch stands in front, and the VAE's decoder gives
        the first latent four frames instead of one when the number of latent frames is even. Raises NonFiniteError if
        the decoder overflowed.
        """
        wanted = -(-frames // self.geometry.temporal)
        scaled = latents[:, latents.shape[1] - wanted :].permute(0, 2, 1, 3, 4) / self.vae.config.scaling_factor
        video = self.vae.decode(scaled.to(self.vae.dtype)).sample[0].float()
        check_finite("the decoded video", video)
        pixels = video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(1, 2, 3, 0)[-frames:].cpu().numpy()

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:
        """Text embeddings [1, L, text dim] in the model's precision. Tokens beyond `text_limit` are cut."""
        embeds, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_limit.tokens, device=self.device
        )
        return embeds.to(self.dtype)

    def solver(self, steps: int) -> _Solver:
        """Return a fresh solver for a run of `steps`."""
        return _Solver(self.pipeline.scheduler, steps, self.device)

    # ------------------------------------------------------------------ passes through the transformer

    def predict(
        self,
        latents: Tensor,
        timestep: int,
        embeds: Sequence[Tensor],
        position: PositionEmbedding,
        injected: KeysValues | None = None,
    ) -> list[Tensor]:
        """v-prediction for each text embedding, fp32: in one batch or one after the other, as execution says.

        Differentiable in the latents and the position, where gradients are enabled.
        """
        batches = list(embeds) if self.execution.cfg == "serial" else [torch.cat(list(embeds))]
        hooks = _PassHooks(position, injected=injected)
        predictions = [self._forward(hooks, latents, timestep, batch) for batch in batches]
        return list(torch.cat(predictions).float().split(1))

    def capture(
        self,
        latents: Tensor,
        timestep: int,
        embeds: Tensor,
        blocks: Sequence[int],
        position: PositionEmbedding,
        injected: KeysValues | None = None,
        captures: CaptureKind = "queries_keys",
    ) -> dict[int, Any]:
        """Queries and keys, or features, of `blocks`, differentiable in the latents and the position.

        The pass ends at the last block's queries and keys, or behind it.
        """
        self.geometry.check_blocks(blocks)
        hooks = _PassHooks(position, injected=injected, capture=frozenset(blocks), captures=captures)
        self._forward(hooks, latents, timestep, embeds)
        return hooks.captured

    @torch.no_grad()
    def first_keys_values(self, latents: Tensor, timestep: int, embeds: Tensor) -> KeysValues:
        """Block 0's keys and values of the video tokens: patch embedding, norm and two projections."""
        hooks = _PassHooks(self.default_position(self.grid(latents)), stop_at_first_keys_values=True)
        self._forward(hooks, latents, timestep, embeds)
        assert hooks.keys_values is not None, "block 0 was not reached"
        return hooks.keys_values

    def _forward(self, hooks: _PassHooks, latents: Tensor, timestep: int, embeds: Tensor) -> Tensor:
        """One pass; the output is empty when a hook stopped it."""
        batch = embeds.shape[0]
        with self._installed(hooks):
            try:
                return self.transformer(
                    hidden_states=latents.to(self.dtype).expand(batch, -1, -1, -1, -1),
                    encoder_hidden_states=embeds,
                    timestep=torch.full((batch,), timestep, device=self.device),
                    image_rotary_emb=hooks.position if self._rotary else None,
                    return_dict=False,
                )[0]
            except _PassEnded:
                return latents.new_empty(0)

    @contextmanager
    def _installed(self, hooks: _PassHooks) -> Iterator[None]:
        """Put the hooks around the model's forward pass, and leave the model as it was."""
        with ExitStack() as stack:
            for index in range(len(self.transformer.transformer_blocks)):
                stack.enter_context(self._hooked_block(index, hooks))
            stack.enter_context(self._own_additive_position(hooks.position))
            stack.enter_context(self._checkpointed(hooks))
            yield

    @contextmanager
    def _hooked_block(self, index: int, hooks: _PassHooks) -> Iterator[None]:
        """Let one block attend by our processor."""
        block = self.transformer.transformer_blocks[index]
        original = block.attn1.processor
        block.attn1.set_processor(_BlockAttention(index, hooks, self.execution.attention_backend))
        handle = block.register_forward_hook(partial(hooks.keep_features, index))
        try:
            yield
        finally:
            handle.remove()
            block.attn1.set_processor(original)

    @contextmanager
    def _own_additive_position(self, position: PositionEmbedding) -> Iterator[None]:
        """Add `position` to the video tokens in place of the model's own additive embedding."""
        if self._rotary:
            yield
            return
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

    @contextmanager
    def _checkpointed(self, hooks: _PassHooks) -> Iterator[None]:
        """Recompute the activations of every block that is not captured, if this pass needs it."""
        if not (torch.is_grad_enabled() and self._must_checkpoint(hooks)):
            yield
            return
        index_of = {id(block): index for index, block in enumerate(self.transformer.transformer_blocks)}

        def run(block: Any, *args: Any) -> Any:
            index = index_of[id(block)]
            if index in hooks.capture:
                return block(*args)

            def hooked(*inputs: Any) -> Any:
                # The backward pass comes when the model is back to normal, and must see the same attention.
                with self._hooked_block(index, hooks):
                    return block(*inputs)

            return checkpoint(hooked, *args, use_reentrant=False)

        self.transformer.enable_gradient_checkpointing(run)
        try:
            yield
        finally:
            self.transformer.disable_gradient_checkpointing()

    # ------------------------------------------------------------------ memory

    def _must_checkpoint(self, hooks: _PassHooks) -> bool:
        """Decide `auto` at the first optimisation pass, and for good: the decision is recorded in `execution`."""
        if self.execution.checkpointing == "auto":
            decision: Literal["on", "off"] = "off" if self._activations_fit(hooks) else "on"
            self.execution = replace(self.execution, checkpointing=decision)
        return self.execution.checkpointing == "on"

    def _activations_fit(self, hooks: _PassHooks) -> bool:
        """Whether the activations of every block of the pass leave a fifth of the free memory alone."""
        if self.device.type != "cuda":
            return True
        tokens = next(iter(hooks.position.values())).shape[0] + self.transformer.config.max_text_seq_length
        inner = self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim
        per_block = _ACTIVATIONS_PER_BLOCK * tokens * inner * self.dtype.itemsize
        # A whole pass, where nothing is captured, is followed by a look at what it predicts, which is kept beside it.
        blocks = max(hooks.capture) + 1 if hooks.capture else 2 * len(self.transformer.transformer_blocks)
        return per_block * blocks < 0.8 * _free_memory(self.device)

    def set_execution(self, asked: ExecutionSettings) -> None:
        """Run from now on as asked; every `auto` but that of checkpointing is decided here, by the free memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        roomy = self.device.type != "cuda" or _free_memory(self.device) > self._decoder_bytes()
        tiling = ("off" if roomy else "on") if asked.vae_tiling == "auto" else asked.vae_tiling
        cfg = ("batched" if roomy else "serial") if asked.cfg == "auto" else asked.cfg
        self.vae.enable_tiling() if tiling == "on" else self.vae.disable_tiling()
        self.execution = replace(asked, vae_tiling=tiling, cfg=cfg)

    def _decoder_bytes(self) -> int:
        config = self.transformer.config
        pixels = config.sample_height * config.sample_width * self.geometry.spatial**2
        return pixels * _DECODER_BYTES_PER_PIXEL


class _Solver:
    """A copy of the model's noise scheduler, with DPM's memory of the previous step."""

    def __init__(self, scheduler: Any, steps: int, device: torch.device):
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.set_timesteps(steps, device=device)
        self.timesteps: Tensor = self._scheduler.timesteps
        self.training_timesteps: int = self._scheduler.config.num_train_timesteps
        self._previous_sample: Tensor | None = None

    def step(self, prediction: Tensor, step: int, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of the next step."""
        timestep = self.timesteps[step]
        if not isinstance(self._scheduler, CogVideoXDPMScheduler):
            return self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        previous_timestep = self.timesteps[step - 1] if step > 0 else None
        latents, self._previous_sample = self._scheduler.step(
            prediction,
            self._previous_sample,
            timestep,
            previous_timestep,
            latents,
            generator=generator,
            return_dict=False,
        )
        return latents

    def clean(self, prediction: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """Return the clean latents that a v-prediction for noised ones speaks of; SettingsError for other models."""
        if (kind := self._scheduler.config.prediction_type) != "v_prediction":
            raise SettingsError("measured", "prediction", f"pass: this model predicts {kind}, not v_prediction")
        kept = self._scheduler.alphas_cumprod[timestep].item()
        return kept**0.5 * latents - (1 - kept) ** 0.5 * prediction

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Return clean latents noised to a timestep."""
        return self._scheduler.add_noise(latents, noise, torch.tensor([timestep], device=latents.device))


class _PassEnded(Exception):
    """All that this pass was for has been computed."""


@dataclass
class _PassHooks:
    """What one pass changes in the attention, and what it hands out."""

    position: PositionEmbedding
    injected: KeysValues | None = None
    capture: frozenset[int] = frozenset()
    captures: CaptureKind = "queries_keys"
    stop_at_first_keys_values: bool = False
    captured: dict[int, Capture] = field(default_factory=dict)
    keys_values: KeysValues | None = None

    def keep_queries_keys(self, block: int, query: Tensor, key: Tensor) -> None:
        """Keep the video tokens' queries and keys [B, S, H, d] of a captured block."""
        if self.captures == "queries_keys" and block in self.capture:
            heads = query.shape[2]
            self._keep(block, QueriesKeys(query[0].flatten(1), key[0].flatten(1), heads))

    def keep_features(self, block: int, module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        """Keep the video tokens [B, S, D] that a captured block puts out: a forward hook."""
        if self.captures == "features" and block in self.capture:
            self._keep(block, Features(output[0][0]))

    def _keep(self, block: int, capture: Capture) -> None:
        """Keep a capture; end the pass when nothing more is needed."""
        self.captured[block] = capture
        if self.capture == self.captured.keys():
            raise _PassEnded


class _BlockAttention:
    """One block's joint text and video attention, for the length of one pass.

    The same attention as diffusers' processor, with position embeddings for queries and keys apart, written out of
    place (slice assignment breaks the gradient), and with the hooks.
    """

    def __init__(self, block: int, hooks: _PassHooks, backend: str):
        self._block, self._hooks, self._backend = block, hooks, backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: PositionEmbedding | None = None,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        assert attention_mask is None, "CogVideoX attends without a mask"
        if self._hooks.stop_at_first_keys_values:
            self._hooks.keys_values = KeysValues(attn.to_k(hidden_states), attn.to_v(hidden_states))
            raise _PassEnded
        text_tokens = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        injected = self._hooks.injected if self._block == 0 else None
        query = _split_heads(attn, attn.to_q(tokens), attn.norm_q)
        key = _split_heads(attn, _projected(attn.to_k, tokens, injected.key if injected else None), attn.norm_k)
        if image_rotary_emb is not None:
            query = _rotate_video(query, image_rotary_emb, "query", text_tokens)
            key = _rotate_video(key, image_rotary_emb, "key", text_tokens)
        self._hooks.keep_queries_keys(self._block, query[:, text_tokens:], key[:, text_tokens:])
        value = _split_heads(attn, _projected(attn.to_v, tokens, injected.value if injected else None), None)
        attended = dispatch_attention_fn(query, key, value, backend=self._backend)
        output = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))
        return output[:, text_tokens:], output[:, :text_tokens]


def _split_heads(attn: Any, tokens: Tensor, norm: Any) -> Tensor:
    """[B, L, D] -> [B, L, H, d], normalised per head."""
    heads = tokens.unflatten(2, (attn.heads, -1))
    return heads if norm is None else norm(heads)


def _rotate_video(tokens: Tensor, position: PositionEmbedding, part: str, text_tokens: int) -> Tensor:
    """Rotate the video tokens of [B, L, H, d]; text tokens have no position."""
    rotation = (position[f"{part}_cos"], position[f"{part}_sin"])
    video = apply_rotary_emb(tokens[:, text_tokens:], rotation, sequence_dim=1)
    return torch.cat([tokens[:, :text_tokens], video], dim=1)


def _projected(projection: Any, tokens: Tensor, video: Tensor | None) -> Tensor:
    """Keys or values of tokens [B, L, D]; those of the video, at their end, may be given: the reference's [1, S, D]."""
    if video is None:
        return projection(tokens)
    text = projection(tokens[:, : tokens.shape[1] - video.shape[1]])
    return torch.cat([text, video.expand(len(tokens), -1, -1)], dim=1)


def _free_memory(device: torch.device) -> int:
    """Bytes a new allocation can use: free on the device, plus what torch holds in reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
