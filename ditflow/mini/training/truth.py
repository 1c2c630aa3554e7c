"""What the world knows about its clips, and the auxiliary losses that teach it to a transformer.

Models of this size do not learn them from denoising alone in hours: where points move (`correspondence_loss`), and
where the silhouettes of sprites are.

Axes: B clips, F latent frames, h, w sides in latents, P patches of a latent frame, H heads, d head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditflow.mini.build import FRAMES, HEIGHT, WIDTH
from ditflow.mini.world import Scene, TrueMotion, near_sprites, signed_distance, true_motion

SILHOUETTE_REACH = 12.0
"""Distances to silhouettes are clipped at this many pixels."""
SPRITE_WEIGHT = 4.0
"""Weight of the error around sprites; elsewhere it is 1. Backgrounds fill most of a clip and would dominate."""
TEMPERATURE = 2.0
"""Of the softmax in which motion is read from attention."""
SIZE = (FRAMES, HEIGHT, WIDTH)
GRID = ((FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
"""Latent frames, and patches along height and width."""


@dataclass(frozen=True)
class Truth:
    """What is known about clips besides their latents.

    weight [B, F, 1, h, w]: of the denoising error, larger around sprites. silhouette [B, F, h, w]: signed distance to
    the nearest silhouette over `SILHOUETTE_REACH`, in [-1, 1]. motion: of each clip; empty for single frames.
    """

    weight: Tensor
    silhouette: Tensor
    motion: Sequence[TrueMotion] = ()

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Truth:
        """Return the truth about scenes, on the grid of their latents."""
        cells = (GRID[0], HEIGHT // 4, WIDTH // 4)
        near = torch.from_numpy(np.stack([near_sprites(scene, SIZE, cells) for scene in scenes]))
        distance = torch.from_numpy(np.stack([signed_distance(scene, SIZE, cells) for scene in scenes]))
        weight = 1 + (SPRITE_WEIGHT - 1) * near[:, :, None].float()
        silhouette = (distance / SILHOUETTE_REACH).clamp(-1, 1)
        return cls(weight, silhouette, [true_motion(scene, SIZE, GRID) for scene in scenes])

    def first_frame(self) -> Truth:
        """Return the truth about the first latent frame alone, without motion."""
        return Truth(self.weight[:, :1], self.silhouette[:, :1])


def by_patch(cells: Tensor) -> Tensor:
    """Return cells [B, F, h, w] as the four cells of each patch [B, F*h/2*w/2, 4], in the order of the tokens."""
    return cells.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4).flatten(1, 3)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean of values; the weight is broadcast to them."""
    weight = weight.expand_as(values)
    return (values * weight).sum() / weight.sum()


def correspondence_loss(queries: Tensor, keys: Tensor, motion: Sequence[TrueMotion]) -> Tensor:
    """Return the cross-entropy between AMF's softmax and the true motion, averaged over sprites and background.

    queries, keys: video tokens [B, H, F*P, d]. The logits are AMF's: the mean over heads, times `TEMPERATURE`, with a
    softmax over the patches of every other frame. The target is the position of the point under a patch's centre,
    distributed bilinearly over the four patches around it, as long as the point is visible.
    """
    frames, height, width = GRID
    heads, _, head_dim = queries.shape[1:]
    queries, keys = (part.transpose(1, 2).flatten(2) for part in (queries, keys))
    logits = (queries @ keys.mT).float() * (TEMPERATURE / (heads * math.sqrt(head_dim)))
    by_frame = logits.view(-1, frames, height * width, frames, height * width).transpose(2, 3)
    rows_columns = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    place = torch.from_numpy(np.stack([clip.displacement for clip in motion])) + rows_columns.flip(-1).float()
    target = _linear_weights(place[..., 1], height).unsqueeze(-1) * _linear_weights(place[..., 0], width).unsqueeze(-2)
    cost = -(target.flatten(-2).to(logits.device) * by_frame.log_softmax(-1)).sum(-1)
    other_frame = ~torch.eye(frames, dtype=torch.bool)[..., None]
    seen = torch.from_numpy(np.stack([clip.visible for clip in motion])) & other_frame
    sprite = torch.from_numpy(np.stack([clip.owner for clip in motion]) >= 0)[:, :, None]
    return torch.stack([cost[(seen & kind).to(cost.device)].mean() for kind in (sprite, ~sprite)]).mean()


def _linear_weights(place: Tensor, size: int) -> Tensor:
    """Return the weights [..., size] that interpolate at `place` [...] between `size` patches; outside: the border."""
    distance = place.clamp(0, size - 1)[..., None] - torch.arange(size)
    return (1 - distance.abs()).clamp(min=0)
