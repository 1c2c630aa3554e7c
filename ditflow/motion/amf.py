"""Attention Motion Flow: where every patch of one frame is found in every other frame (paper, section 3.2).

Axis letters: F frames, P patches of a frame, S = F*P tokens, D = heads * head size.

The mean over heads of Q_h K_h^T / sqrt(d) equals concat(Q) concat(K)^T / (H sqrt(d)): one product over D. The
softmax runs over the P patches of one key frame at a time, so no more than S x P numbers are ever kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditflow.types import QueriesKeys, TokenGrid

_LARGEST_INT8 = 127


def hard_displacement(attention: QueriesKeys, grid: TokenGrid) -> Int[Tensor, "frames frames patches 2"]:
    """Displacement of every patch to its best match in every frame: [i, j, p] = (dx, dy) in patches.

    Entry [i, j, p] says where patch p of frame i is found in frame j: coordinates of the largest logit minus p's
    own (ties: the lowest index). Logits are taken in fp32 or better, since bf16 logits flip 1-3 % of the entries.
    The result is int8, or int16 on a grid with more than 128 patches to a side.
    """
    query, key = _wide(attention.query), _wide(attention.key)
    grid.check_tokens(query.shape[0])
    matches = torch.stack([(query @ frame_key.T).argmax(dim=-1) for frame_key in key.split(grid.patches)])
    coordinates = grid.coordinates(query.device)
    largest = max(grid.height, grid.width) - 1
    return _relative(coordinates[matches], grid).to(torch.int8 if largest <= _LARGEST_INT8 else torch.int16)


def soft_displacement(
    attention: QueriesKeys, grid: TokenGrid, temperature: float
) -> Float[Tensor, "frames frames patches 2"]:
    """Expected displacement under the softmax of the logits times `temperature`; differentiable.

    Same layout and unit as `hard_displacement`. The backward pass computes the attention again. To optimise the
    squared error against a target, use `displacement_error`.
    """
    query, key, coordinates, scale = _prepared(attention, grid, temperature)

    def expected(frame_key: Tensor, tokens: Tensor) -> Tensor:
        return (tokens @ frame_key.T).mul(scale).softmax(dim=-1) @ coordinates

    by_key_frame = [
        checkpoint(expected, frame_key, query, use_reentrant=False, preserve_rng_state=False)
        for frame_key in key.split(grid.patches)
    ]
    return _relative(torch.stack(by_key_frame), grid)


def displacement_error(
    attention: QueriesKeys,
    grid: TokenGrid,
    temperature: float,
    target: Shaped[Tensor, "frames frames patches 2"],
    weight: Float[Tensor, "frames frames patches"],
) -> Float[Tensor, ""]:
    """Mean squared difference between `soft_displacement` and `target`, in patches squared.

    The mean runs over both components of the displacement vectors, each weighted by `weight`.

    The gradients are made on the way: the error of a key frame is known as soon as its attention is, so nothing is
    computed again in the backward pass.
    """
    query, key, coordinates, scale = _prepared(attention, grid, temperature)
    matches = (target + coordinates).transpose(0, 1).flatten(1, 2)
    total = weight.sum(dtype=torch.float64).to(query.dtype)  # exact for weights of 0 and 1, however many
    weights = (weight.to(query.dtype) / (2 * total)).transpose(0, 1).flatten(1, 2)[..., None]
    return _MatchError.apply(query, key, coordinates, matches, weights, scale)


def _prepared(attention: QueriesKeys, grid: TokenGrid, temperature: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries and keys in fp32 or better, patch coordinates, and the scale of the logits."""
    query, key = _wide(attention.query), _wide(attention.key)
    grid.check_tokens(query.shape[0])
    head_dim = query.shape[1] // attention.heads
    scale = temperature / (attention.heads * math.sqrt(head_dim))
    return query, key, grid.coordinates(query.device).to(query.dtype), scale


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _relative(matches: Float[Tensor, "frames tokens 2"], grid: TokenGrid) -> Tensor:
    """From coordinates by [key frame, query token] to displacements by [query frame, key frame, patch]."""
    by_frames = matches.view(grid.frames, grid.frames, grid.patches, 2).transpose(0, 1)
    return by_frames - grid.coordinates(matches.device).to(matches.dtype)


class _MatchError(torch.autograd.Function):
    """Weighted squared error of attention's expected coordinates, and its gradients, in one sweep over key frames.

    With a = softmax(logits), expected coordinates e = a c, target m and one weight w a token, the error is the sum of
    w |e - m|^2. With g = w (e - m), the gradient of logit (s, t) is 2 a[s, t] (g[s] . c[t] - g[s] . e[s]).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, coordinates: Tensor, matches: Tensor, weights: Tensor, scale: float
    ) -> Tensor:
        differentiable = any(ctx.needs_input_grad)
        error = query.new_zeros(())
        query_gradient, key_gradient = torch.zeros_like(query), torch.empty_like(key)
        key_frames = zip(key.split(len(coordinates)), key_gradient.split(len(coordinates)), strict=True)
        for frame, (frame_key, frame_gradient) in enumerate(key_frames):
            attention = (query @ frame_key.T).mul_(scale).softmax(dim=-1)
            expected = attention @ coordinates
            difference = expected - matches[frame]
            upstream = weights[frame] * difference
            error += (upstream * difference).sum()
            if differentiable:
                centred = (upstream @ coordinates.T).sub_((upstream * expected).sum(dim=-1, keepdim=True))
                logit_gradient = attention.mul_(centred)
                query_gradient.addmm_(logit_gradient, frame_key, alpha=2 * scale)
                torch.mm(logit_gradient.T, query, out=frame_gradient).mul_(2 * scale)
        ctx.save_for_backward(query_gradient, key_gradient)
        return error

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, key_gradient = ctx.saved_tensors
        return query_gradient * gradients[0], key_gradient * gradients[0], None, None, None, None
