"""Hooked passes through a diffusers transformer, shared by all model families.

The transformer's own forward code runs. During one pass its self-attentions have a processor of the family, which can
capture queries and keys, inject keys and values, rotate queries and keys separately, and stop the pass early. A pass
that needs none of this, and no gradient, runs the unmodified model, so that compilation, caches, quantisation and
context parallelism of diffusers apply.

Axis letters: B batch, S video tokens, H heads, d head dimension, D = H*d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditflow.backbones.contract import Condition, NoiseLevel
from ditflow.layout import LatentLayout
from ditflow.settings import ExecutionSettings
from ditflow.types import Capture, CaptureKind, Features, KeysValues, PositionEmbedding, QueriesKeys

ACTIVATIONS_PER_BLOCK = 14
"""Tensors of tokens x D that a block saves for its backward pass: 12.1 measured by `make bench`, rounded up."""


class PassEnded(Exception):
    """Raised in a pass to stop it early, once all that it should capture is computed."""


@dataclass
class PassHooks:
    """Changes of the attention in one pass, and its captures.

    position: embedding of the video tokens that replaces the model's own. injected: keys and values of the video tokens
    in block 0. capture: blocks of which `what` is captured; the pass stops after the last of them.
    """

    position: PositionEmbedding | None = None
    injected: KeysValues | None = None
    capture: frozenset[int] = frozenset()
    what: CaptureKind = "queries_keys"
    first_keys_values_only: bool = False
    captured: dict[int, Capture] = field(default_factory=dict)
    keys_values: KeysValues | None = None

    def rotation(self, part: str, own: Any) -> Any:
        """Return the rotary cos and sin of the queries or keys (`part`) of the video tokens."""
        return own if self.position is None else (self.position[f"{part}_cos"], self.position[f"{part}_sin"])

    def end_at_keys_values(self, attention: Any, video: Tensor) -> None:
        """Stop the pass in block 0 if it only captures keys and values of the video tokens [1, S, D]."""
        if self.first_keys_values_only:
            self.keys_values = KeysValues(attention.to_k(video), attention.to_v(video))
            raise PassEnded

    def injected_in(self, block: int) -> KeysValues | None:
        """Return the keys and values that replace those of the video tokens in a block."""
        return self.injected if block == 0 else None

    def capture_queries_keys(self, block: int, query: Tensor, key: Tensor) -> None:
        """Capture queries and keys [B, S, H, d] of the video tokens, after norm and rotary embedding."""
        if self.what == "queries_keys" and block in self.capture:
            self._store(block, QueriesKeys(query[0].flatten(1), key[0].flatten(1), query.shape[2]))

    def capture_features(self, block: int, tokens: Tensor) -> None:
        """Capture a block's output for the video tokens [B, S, D]."""
        if self.what == "features" and block in self.capture:
            self._store(block, Features(tokens[0]))

    def _store(self, block: int, capture: Capture) -> None:
        self.captured[block] = capture
        if self.capture == self.captured.keys():
            raise PassEnded


def project(projection: Any, tokens: Tensor, video: Tensor | None) -> Tensor:
    """Return keys or values of tokens [B, L, D]; those of the video tokens, the last ones, may be given: [1, S, D]."""
    if video is None:
        return projection(tokens)
    others = projection(tokens[:, : tokens.shape[1] - video.shape[1]])
    return torch.cat([others, video.expand(len(tokens), -1, -1)], dim=1)


class HookedBackbone(ABC):
    """Base class of the families: the three passes, gradient checkpointing and execution modes.

    A family sets these attributes and defines its blocks, their attention processor and the call of the transformer.
    """

    transformer: Any
    vae: Any
    layout: LatentLayout
    device: torch.device
    dtype: torch.dtype
    execution: ExecutionSettings
    text_tokens: int = 0
    """Text tokens in the joint self-attention with the video's."""

    # ------------------------------------------------------------------ what a family supplies

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """Transformer blocks, a ModuleList; each has its self-attention as `attn1`."""

    @abstractmethod
    def processor(self, block: int, hooks: PassHooks) -> Any:
        """Return the attention processor of a block's self-attention for one pass, differentiable."""

    @abstractmethod
    def forward(self, latents: Tensor, level: NoiseLevel, condition: Condition, hooks: PassHooks | None) -> Tensor:
        """Call the transformer on latents [1, F, C, h, w] for a batch of conditions; return [B, F, C, h, w]."""

    @abstractmethod
    def decoder_peak_bytes(self) -> int:
        """Return the peak memory of decoding a video of the trained size without tiling."""

    def batch(self, conditions: Sequence[Condition]) -> Condition:
        """Join conditions into one batch."""
        return torch.cat(list(conditions))

    # ------------------------------------------------------------------ the passes of the contract

    def predict(
        self,
        latents: Tensor,
        level: NoiseLevel,
        conditions: Sequence[Condition],
        position: PositionEmbedding | None = None,
        injected: KeysValues | None = None,
    ) -> list[Tensor]:
        """Return the prediction for each condition, fp32, in one batch or sequentially (`execution.cfg`)."""
        batches = conditions if self.execution.cfg == "serial" else [self.batch(conditions)]
        unmodified = position is None and injected is None and not torch.is_grad_enabled()
        hooks = None if unmodified else PassHooks(position, injected)
        predictions = [self._pass(hooks, latents, level, batch) for batch in batches]
        return list(torch.cat(predictions).float().split(1))

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
        """Return queries and keys, or features, of `blocks`; the pass stops after the last of them."""
        self.layout.check_blocks(blocks)
        hooks = PassHooks(position, injected, frozenset(blocks), what)
        self._pass(hooks, latents, level, condition)
        return hooks.captured

    @torch.no_grad()
    def first_keys_values(self, latents: Tensor, level: NoiseLevel, condition: Condition) -> KeysValues:
        """Return block 0's keys and values of the video tokens: patch embedding, norm and two projections."""
        hooks = PassHooks(first_keys_values_only=True)
        self._pass(hooks, latents, level, condition)
        assert hooks.keys_values is not None, "block 0 was not reached"
        return hooks.keys_values

    def _pass(self, hooks: PassHooks | None, latents: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """Run one pass; the output is empty if a hook stopped it."""
        if hooks is None:
            return self.forward(latents, level, condition, None)
        with ExitStack() as stack:
            for index in range(len(self.blocks)):
                stack.enter_context(self._hooked_block(index, hooks))
            stack.enter_context(self._checkpointed(hooks, self.layout.grid(latents.shape).tokens))
            try:
                return self.forward(latents, level, condition, hooks)
            except PassEnded:
                return latents.new_empty(0)

    @contextmanager
    def _hooked_block(self, index: int, hooks: PassHooks) -> Iterator[None]:
        """Install our attention processor in one block, and restore the original in any case."""
        block = self.blocks[index]
        original = block.attn1.processor
        block.attn1.set_processor(self.processor(index, hooks))

        def capture_output(module: Any, inputs: Any, output: Any) -> None:
            hooks.capture_features(index, output[0] if isinstance(output, tuple) else output)

        handle = block.register_forward_hook(capture_output)
        try:
            yield
        finally:
            handle.remove()
            block.attn1.set_processor(original)

    # ------------------------------------------------------------------ memory

    @contextmanager
    def _checkpointed(self, hooks: PassHooks, tokens: int) -> Iterator[None]:
        """Enable gradient checkpointing of the blocks that are not captured, if this pass needs it."""
        if not (torch.is_grad_enabled() and self._must_checkpoint(hooks, tokens)):
            yield
            return
        index_of = {id(block): index for index, block in enumerate(self.blocks)}

        def run(block: Any, *args: Any) -> Any:
            index = index_of[id(block)]
            if index in hooks.capture:
                return block(*args)

            def hooked(*inputs: Any) -> Any:
                # The backward pass runs after the model is restored, and must recompute with the same attention.
                with self._hooked_block(index, hooks):
                    return block(*inputs)

            return checkpoint(hooked, *args, use_reentrant=False)

        self.transformer.enable_gradient_checkpointing(run)
        try:
            yield
        finally:
            self.transformer.disable_gradient_checkpointing()

    def _must_checkpoint(self, hooks: PassHooks, tokens: int) -> bool:
        """Return whether to checkpoint; `auto` is resolved once, at the first pass with gradients, into `execution`."""
        if self.execution.checkpointing == "auto":
            decision: Literal["on", "off"] = "off" if self._activations_fit(hooks, tokens) else "on"
            self.execution = replace(self.execution, checkpointing=decision)
        return self.execution.checkpointing == "on"

    def _activations_fit(self, hooks: PassHooks, tokens: int) -> bool:
        """Return whether the activations of all blocks of the pass take at most 80 % of the free memory."""
        if self.device.type != "cuda":
            return True
        config = self.transformer.config
        inner = config.num_attention_heads * config.attention_head_dim
        per_block = ACTIVATIONS_PER_BLOCK * (tokens + self.text_tokens) * inner * self.dtype.itemsize
        # A full pass without captures is followed by one over its prediction, while its activations are still needed.
        blocks = max(hooks.capture) + 1 if hooks.capture else 2 * len(self.blocks)
        return per_block * blocks < 0.8 * free_memory(self.device)

    def set_execution(self, asked: ExecutionSettings) -> None:
        """Set the execution mode; every `auto` but checkpointing is resolved here, by the free memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        has_room = self.device.type != "cuda" or free_memory(self.device) > self.decoder_peak_bytes()
        tiling = ("off" if has_room else "on") if asked.vae_tiling == "auto" else asked.vae_tiling
        cfg = ("batched" if has_room else "serial") if asked.cfg == "auto" else asked.cfg
        self.vae.enable_tiling() if tiling == "on" else self.vae.disable_tiling()
        self.execution = replace(asked, vae_tiling=tiling, cfg=cfg)


def free_memory(device: torch.device) -> int:
    """Return the bytes available for allocation: free on the device, or reserved by torch."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
