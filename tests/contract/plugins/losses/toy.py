"""A motion loss of one's own, in one file: how the features of every place change from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from ditflow.losses.base import Payload, weighted_mean
from ditflow.types import CaptureKind, Features, TokenGrid


@dataclass(frozen=True)
class FrameChangeLoss:
    """The changes from one frame to the next, in the reference and in the generated video: mean squared difference."""

    name: ClassVar[str] = "toy"
    captures: ClassVar[CaptureKind] = "features"
    reference_noise: ClassVar[float] = 0.0
    revision: ClassVar[int] = 1

    def reference(self, capture: Features, grid: TokenGrid, weight: Tensor | None = None) -> Payload:
        """Return {"changes": fp32 [F - 1, P, D]}, with the weights [F, P] if there are any."""
        payload = {"changes": _changes(capture, grid).detach().cpu()}
        return payload if weight is None else {**payload, "weight": weight.cpu()}

    def __call__(self, capture: Features, payload: Payload, grid: TokenGrid) -> Float[Tensor, ""]:
        wanted, weight = payload["changes"].to(capture.tokens.device), payload.get("weight")
        errors = mse_loss(_changes(capture, grid), wanted, reduction="none").mean(dim=-1)
        return weighted_mean(errors, None if weight is None else weight[1:])


def _changes(capture: Features, grid: TokenGrid) -> Float[Tensor, "changes patches inner"]:
    grid.check_tokens(capture.tokens.shape[0])
    return capture.tokens.float().unflatten(0, (grid.frames, grid.patches)).diff(dim=0)
