"""DiTFlow's loss: mean squared difference of two attention motion flows (paper, equations 5 to 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ditflow import amf
from ditflow.losses.base import Payload
from ditflow.types import CaptureKind, QueriesKeys, StaticReferenceError, TokenGrid

if TYPE_CHECKING:
    from ditflow.settings import MethodSettings


@dataclass(frozen=True)
class AttentionMotionFlowLoss:
    """The reference's displacement against the generated video's soft displacement, in patches squared.

    entries: `nonzero` compares the entries in which the reference moves by more than `threshold` patches, `all`
    compares every entry. reference_flow: the reference's displacement is that of the best match (`hard`, the paper's),
    or the expected one (`soft`, at the same temperature).
    """

    temperature: float = 2.0
    entries: Literal["nonzero", "all"] = "nonzero"
    threshold: float = 0.0
    reference_flow: Literal["hard", "soft"] = "hard"

    name: ClassVar[str] = "ditflow"
    captures: ClassVar[CaptureKind] = "queries_keys"
    reference_noise: ClassVar[float] = 0.0

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
        """Return the mean squared difference over the chosen entries."""
        self._check_moves(payload["displacement"])
        target = payload["displacement"].to(capture.query.device)
        chosen = torch.ones_like(target, dtype=torch.bool) if self.entries == "all" else self._moving(target)
        return amf.displacement_error(capture, grid, self.temperature, target, chosen)

    def _moving(self, displacement: Tensor) -> Tensor:
        return displacement.abs() > self.threshold

    def _check_moves(self, displacement: Tensor) -> None:
        """Raise StaticReferenceError if there is no entry to compare: their mean would be NaN."""
        if self.entries == "nonzero" and not self._moving(displacement).any():
            raise StaticReferenceError(
                f"the reference's attention motion flow is {self.threshold:g} patches or less everywhere: there is no "
                "motion to transfer. Choose a longer range of frames, a larger stride or a lower loss_threshold, or "
                "compare all entries (loss_entries: all)."
            )
