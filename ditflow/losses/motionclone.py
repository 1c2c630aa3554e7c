"""MotionClone's loss: the strongest temporal attention of every place (arXiv 2406.05338), adapted.

The original works on the temporal attention layers of a UNet. A transformer with full attention has none; here a
place attends to itself in the other frames, with the queries and keys of one of its blocks, head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from ditflow.losses.base import Payload, weighted_mean
from ditflow.parts import setting
from ditflow.types import CaptureKind, QueriesKeys, TokenGrid


@dataclass(frozen=True)
class TemporalAttentionLoss:
    """The largest entry of every row of the reference's same-place attention against the generated video's.

    other_frames: leave out the entry of the frame itself (j = i), which is often the largest.
    The reference is noised once to 40 % of the timesteps, as the original does, with the empty prompt.
    """

    other_frames: bool = setting(False, extraction=True)

    name: ClassVar[str] = "motionclone"
    captures: ClassVar[CaptureKind] = "queries_keys"
    reference_noise: ClassVar[float] = 0.4
    payload_axes: ClassVar[Mapping[str, str]] = {"frame": "H P F", "attention": "H P F"}
    optional_axes: ClassVar[Mapping[str, str]] = {"weight": "F P"}
    revision: ClassVar[int] = 1

    def reference(
        self, capture: QueriesKeys, grid: TokenGrid, weight: Float[Tensor, "frames patches"] | None = None
    ) -> Payload:
        """Return of every row's largest entry {"frame": uint8 or int32 [H, P, F], "attention": fp32 [H, P, F]}.

        With a weight of every patch, {"weight": fp32 [F, P]} as well.
        """
        attention = temporal_attention(capture, grid)
        candidates = attention
        if self.other_frames:
            itself = torch.eye(grid.frames, dtype=torch.bool, device=attention.device)
            candidates = attention.masked_fill(itself, -1)
        frame = candidates.argmax(dim=-1)
        value = attention.gather(-1, frame[..., None])[..., 0]
        return {
            "frame": frame.to(torch.uint8 if grid.frames <= 256 else torch.int32).cpu(),
            "attention": value.detach().cpu(),
            **({} if weight is None else {"weight": weight.float().cpu()}),
        }

    def __call__(self, capture: QueriesKeys, payload: Payload, grid: TokenGrid) -> Float[Tensor, ""]:
        """Return the (weighted) mean squared difference at the reference's largest entries."""
        frame = payload["frame"].to(capture.query.device, torch.int64)
        attention = temporal_attention(capture, grid).gather(-1, frame[..., None])[..., 0]
        wanted = payload["attention"].to(attention.device)
        if "weight" not in payload:
            return mse_loss(attention, wanted)
        return weighted_mean(mse_loss(attention, wanted, reduction="none"), payload["weight"].T.expand_as(wanted))


def temporal_attention(capture: QueriesKeys, grid: TokenGrid) -> Float[Tensor, "heads patches frames frames"]:
    """Return softmax_j(q_h[i, p] . k_h[j, p] / sqrt(d)): how much every place attends to itself in frame j."""
    grid.check_tokens(capture.query.shape[0])
    query, key = (
        part.float().unflatten(1, (capture.heads, -1)).unflatten(0, (grid.frames, grid.patches)).permute(2, 1, 0, 3)
        for part in (capture.query, capture.key)
    )
    return (query * query.shape[-1] ** -0.5 @ key.mT).softmax(dim=-1)
