"""Attention Motion Flow: where every patch of one frame is found in every other frame (paper, section 3.2).

Axis letters: F frames, P patches of a frame, S = F*P tokens, D = heads * head size.

The mean over heads of Q_h K_h^T / sqrt(d) equals concat(Q) concat(K)^T / (H sqrt(d)): one product over D. The
softmax runs over the P patches of one key frame at a time, so no more than S x P numbers are ever kept, and the
backward pass computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from ditflow.types import QueriesKeys, TokenGrid

_LARGEST_INT8 = 127


def hard_displacement(attention: QueriesKeys, grid: TokenGrid) -> Int8[Tensor, "frames frames patches 2"]:
    """Displacement of every patch to its best match in every frame: [i, j, p] = (dx, dy) in patches.

    Entry [i, j, p] says where patch p of frame i is found in frame j: coordinates of the largest logit minus p's
    own (ties: the lowest index). Logits are taken in fp32 or better, since bf16 logits flip 1-3 % of the entries.
    """
    assert max(grid.height, grid.width) <= _LARGEST_INT8, f"displacements on a {grid} grid overflow int8"
    query, key = _wide(attention.query), _wide(attention.key)
    grid.check_tokens(query.shape[0])
    matches = torch.stack([(query @ frame_key.T).argmax(dim=-1) for frame_key in key.split(grid.patches)])
    coordinates = grid.coordinates(query.device)
    return _relative(coordinates[matches], grid).to(torch.int8)


def soft_displacement(
    attention: QueriesKeys, grid: TokenGrid, temperature: float
) -> Float[Tensor, "frames frames patches 2"]:
    """Expected displacement under the softmax of the logits times `temperature`; differentiable.

    Same layout and unit as `hard_displacement`. Gradients reach the queries and keys.
    """
    query, key = _wide(attention.query), _wide(attention.key)
    grid.check_tokens(query.shape[0])
    head_dim = query.shape[1] // attention.heads
    scale = temperature / (attention.heads * math.sqrt(head_dim))
    coordinates = grid.coordinates(query.device).to(query.dtype)
    return _relative(_ExpectedCoordinates.apply(query, key, coordinates, scale), grid)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _relative(matches: Float[Tensor, "frames tokens 2"], grid: TokenGrid) -> Tensor:
    """From coordinates by [key frame, query token] to displacements by [query frame, key frame, patch]."""
    by_frames = matches.view(grid.frames, grid.frames, grid.patches, 2).transpose(0, 1)
    return by_frames - grid.coordinates(matches.device).to(matches.dtype)


class _ExpectedCoordinates(torch.autograd.Function):
    """Softmax attention whose values are coordinates, one key frame at a time: [F, S, 2].

    With p = softmax(logits) and output o = p c, the gradient of logit (s, t) under an upstream gradient g is
    p[s, t] * (g[s] . c[t] - g[s] . o[s]).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, coordinates: Tensor, scale: float) -> Tensor:
        expected = [weights @ coordinates for _, weights in _attention(query, key, len(coordinates), scale)]
        output = torch.stack(expected)
        ctx.save_for_backward(query, key, coordinates, output)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key, coordinates, output = ctx.saved_tensors
        gradient = gradients[0]
        query_gradient, key_gradient = torch.zeros_like(query), torch.empty_like(key)
        key_frames = key_gradient.split(len(coordinates))
        for frame, (frame_key, weights) in enumerate(_attention(query, key, len(coordinates), ctx.scale)):
            upstream = gradient[frame]
            centred = upstream @ coordinates.T
            centred -= (upstream * output[frame]).sum(dim=-1, keepdim=True)
            logit_gradient = weights.mul_(centred)
            query_gradient.addmm_(logit_gradient, frame_key, alpha=ctx.scale)
            torch.mm(logit_gradient.T, query, out=key_frames[frame]).mul_(ctx.scale)
        return query_gradient, key_gradient, None, None


def _attention(query: Tensor, key: Tensor, patches: int, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """For every key frame: its keys [P, D] and the attention of all tokens to them [S, P]."""
    for frame_key in key.split(patches):
        yield frame_key, (query @ frame_key.T).mul_(scale).softmax(dim=-1)
