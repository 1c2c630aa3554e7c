"""DiTFlow's loss: mean squared difference of two attention motion flows (paper, equations 5 to 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ditflow import amf
from ditflow.losses.base import Payload
from ditflow.types import CaptureKind, QueriesKeys, StaticReferenceError, TokenGrid

if TYPE_CHECKING:
    from ditflow.settings import MethodSettings


@dataclass(frozen=True)
class AttentionMotionFlowLoss:
    """Mean squared error between the reference's displacement and the new video's soft one, in patches squared.

    entries: `nonzero` compares the displacement vectors (dx, dy) of the reference that are longer than `threshold`
        patches, both components of each; `all` compares every vector.
    reference_flow: displacement to the best match (`hard`, the paper's), or expected displacement under the softmax at
        the same temperature (`soft`).
    """

    temperature: float = 2.0
    entries: Literal["nonzero", "all"] = "nonzero"
    threshold: float = 0.0
    reference_flow: Literal["hard", "soft"] = "hard"

    name: ClassVar[str] = "ditflow"
    captures: ClassVar[CaptureKind] = "queries_keys"
    reference_noise: ClassVar[float] = 0.0
    payload_axes: ClassVar[Mapping[str, str]] = {"displacement": "F F P 2"}

    @property
    def revision(self) -> int:
        """2 for `nonzero`, whose entries were chosen component by component in revision 1; `all` never changed."""
        return 2 if self.entries == "nonzero" else 1

    @classmethod
    def from_settings(cls, method: MethodSettings) -> AttentionMotionFlowLoss:
        """Return the loss that resolved settings describe."""
        assert method.temperature is not None and method.loss_entries is not None, "resolve() first"
        return cls(method.temperature, method.loss_entries, method.loss_threshold, method.reference_flow)

    def reference(self, capture: QueriesKeys, grid: TokenGrid) -> Payload:
        """Return {"displacement": int8 or int16, soft fp16, [F, F, P, 2]}; StaticReferenceError if nothing moves."""
        if self.reference_flow == "soft":
            displacement = amf.soft_displacement(capture, grid, self.temperature).detach().half()
        else:
            displacement = amf.hard_displacement(capture, grid)
        self._check_moves(displacement)
        return {"displacement": displacement.cpu()}

    def __call__(self, capture: QueriesKeys, payload: Payload, grid: TokenGrid) -> Float[Tensor, ""]:
        """Return the mean squared difference over both components of the chosen vectors."""
        self._check_moves(payload["displacement"])
        target = payload["displacement"].to(capture.query.device)
        return amf.displacement_error(capture, grid, self.temperature, target, self._chosen(target))

    def _chosen(self, displacement: Shaped[Tensor, "frames frames patches 2"]) -> Bool[Tensor, "frames frames patches"]:
        """Choose vectors by their length. Choosing dx and dy separately would let a sideways motion drift up."""
        if self.entries == "all":
            return torch.ones_like(displacement[..., 0], dtype=torch.bool)
        return torch.linalg.vector_norm(displacement.float(), dim=-1) > self.threshold

    def _check_moves(self, displacement: Tensor) -> None:
        """Raise StaticReferenceError if there is no entry to compare: their mean would be NaN."""
        if not self._chosen(displacement).any():
            raise StaticReferenceError(
                f"the reference's attention motion flow is {self.threshold:g} patches or less everywhere: there is no "
                "motion to transfer. Choose a longer range of frames, a larger stride or a lower loss_threshold, or "
                "compare all entries (loss_entries: all)."
            )
