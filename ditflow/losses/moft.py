"""MOFT's loss: the few feature channels that carry motion (Motion Feature, arXiv 2405.14864).

An adaptation: the original takes the features of a UNet's decoder, this one those of a transformer's block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ditflow.losses.base import Payload, weighted_mean
from ditflow.types import CaptureKind, Features, StaticReferenceError, TokenGrid

CHANNEL_SHARE = 0.04
"""Share of the channels that count as carrying motion."""


@dataclass(frozen=True)
class MotionFeatureLoss:
    """Features less their temporal mean, in the reference's motion channels: 1 - cosine at every frame and place.

    Motion channels have the largest absolute entries in the first right singular vector of the reference's features
    less their temporal mean, [F*P, D].
    """

    name: ClassVar[str] = "moft"
    captures: ClassVar[CaptureKind] = "features"
    reference_noise: ClassVar[float] = 0.0
    payload_axes: ClassVar[Mapping[str, str]] = {"channels": "k", "features": "F P k"}
    optional_axes: ClassVar[Mapping[str, str]] = {"weight": "F P"}
    revision: ClassVar[int] = 1

    def reference(
        self, capture: Features, grid: TokenGrid, weight: Float[Tensor, "frames patches"] | None = None
    ) -> Payload:
        """Return {"channels": int32 [k], "features": fp32 [F, P, k]}; StaticReferenceError if nothing changes.

        With a weight of every patch, {"weight": fp32 [F, P]} as well; the channels are those of the weighted features.
        """
        centred = _centred(capture.tokens.detach(), grid)
        counted = centred if weight is None else centred * weight.to(centred).sqrt()[..., None]
        if not counted.any():
            raise StaticReferenceError(
                "the reference's features are the same in every frame: there is no motion to transfer. Choose a "
                "longer range of frames or a larger stride."
            )
        channels = motion_channels(counted.flatten(0, 1))
        payload = {"channels": channels.int().cpu(), "features": centred[..., channels].contiguous().cpu()}
        return payload if weight is None else {**payload, "weight": weight.float().cpu()}

    def __call__(self, capture: Features, payload: Payload, grid: TokenGrid) -> Float[Tensor, ""]:
        """Return the (weighted) mean of 1 - cosine over frames and places, in [0, 2]."""
        wanted = payload["features"].to(capture.tokens.device)
        features = _centred(capture.tokens[:, payload["channels"].to(capture.tokens.device)], grid)
        return weighted_mean(1 - cosine_similarity(features, wanted, dim=-1), payload.get("weight"))


def motion_channels(centred: Float[Tensor, "samples inner"]) -> Int[Tensor, " channels"]:
    """Return the channels with the largest absolute entries in the first right singular vector, largest first.

    The vector is the last eigenvector of the channels' D x D Gram matrix: cheaper than a decomposition of all tokens.
    """
    gram = (centred.T @ centred).double()
    _, vectors = torch.linalg.eigh(gram)
    count = max(int(CHANNEL_SHARE * centred.shape[1]), 1)
    return vectors[:, -1].abs().topk(count).indices


def _centred(tokens: Float[Tensor, "tokens channels"], grid: TokenGrid) -> Float[Tensor, "frames patches channels"]:
    """Features less their temporal mean, in fp32."""
    grid.check_tokens(tokens.shape[0])
    features = tokens.float().unflatten(0, (grid.frames, grid.patches))
    return features - features.mean(dim=0)
