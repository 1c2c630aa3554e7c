"""SMM's loss: how the mean features of frames differ from each other (Space-Time Diffusion Features, arXiv 2311.17009).

An adaptation: the original takes the features of a UNet's decoder, this one those of a transformer's block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ditflow.losses.base import Payload
from ditflow.parts import setting
from ditflow.types import CaptureKind, Features, StaticReferenceError, TokenGrid

_LEAST_WEIGHT = 1e-6
"""In place of the total weight of a frame of which nothing counts: its mean is zero then."""


@dataclass(frozen=True)
class SpaceTimeMeanLoss:
    """Pairwise differences of the spatial means m_i of frames, reference against generated: 1 - cosine.

    For every anchor i, m_j - m_i of both videos are compared over channels, and averaged over anchors and the other
    frames (an anchor's difference to itself is zero and has no direction).
    preset: of the method. With `official`, as in the released code, generated means too are taken relative to the
        reference's m_i, and the cosines run over time, channel by channel.
    """

    preset: str = setting("paper", shared=True)

    name: ClassVar[str] = "smm"
    captures: ClassVar[CaptureKind] = "features"
    reference_noise: ClassVar[float] = 0.0
    payload_axes: ClassVar[Mapping[str, str]] = {"means": "F D"}
    optional_axes: ClassVar[Mapping[str, str]] = {"weight": "F P"}
    revision: ClassVar[int] = 1

    def reference(
        self, capture: Features, grid: TokenGrid, weight: Float[Tensor, "frames patches"] | None = None
    ) -> Payload:
        """Return {"means": fp32 [F, D]}; StaticReferenceError if all frames have the same.

        With a weight of every patch the means are weighted, and {"weight": fp32 [F, P]} is returned as well.
        """
        means = _frame_means(capture, grid, weight)
        if torch.equal(means, means[:1].expand_as(means)):
            raise StaticReferenceError(
                "the reference's mean features are the same in every frame: there is no motion to transfer. Choose a "
                "longer range of frames or a larger stride."
            )
        payload = {"means": means.detach().cpu()}
        return payload if weight is None else {**payload, "weight": weight.float().cpu()}

    def __call__(self, capture: Features, payload: Payload, grid: TokenGrid) -> Float[Tensor, ""]:
        """Return the mean of 1 - cosine, in [0, 2]."""
        reference = payload["means"].to(capture.tokens.device)
        means = _frame_means(capture, grid, payload.get("weight"))
        wanted = reference[None] - reference[:, None]
        if self.preset == "official":
            return (1 - cosine_similarity(means[None] - reference[:, None], wanted, dim=1)).mean()
        cosines = cosine_similarity(means[None] - means[:, None], wanted, dim=2)
        others = ~torch.eye(grid.frames, dtype=torch.bool, device=cosines.device)
        return (1 - cosines[others]).mean()


def _frame_means(
    capture: Features, grid: TokenGrid, weight: Float[Tensor, "frames patches"] | None
) -> Float[Tensor, "frames inner"]:
    """Spatial means of the frames' features, in fp32, weighted if there are weights."""
    grid.check_tokens(capture.tokens.shape[0])
    features = capture.tokens.float().unflatten(0, (grid.frames, grid.patches))
    if weight is None:
        return features.mean(dim=1)
    shares = weight.to(features)[..., None]
    return (features * shares).sum(dim=1) / shares.sum(dim=1).clamp_min(_LEAST_WEIGHT)
