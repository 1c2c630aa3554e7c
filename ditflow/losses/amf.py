"""DiTFlow's loss: mean squared difference of two attention motion flows (paper, equations 5 to 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ditflow.errors import SettingsError
from ditflow.losses.base import Payload
from ditflow.motion import amf
from ditflow.motion.target import MotionTarget
from ditflow.parts import setting
from ditflow.types import CaptureKind, QueriesKeys, StaticReferenceError, TokenGrid


@dataclass(frozen=True)
class AttentionMotionFlowLoss:
    """Mean squared error between the reference's displacement and the new video's soft one, in patches squared.

    entries: `nonzero` compares the displacement vectors (dx, dy) of the reference that are longer than `threshold`
        patches, both components of each (the paper's); `all` compares every vector, so that what rests in the reference
        is asked to rest.
    threshold: in patches, with `nonzero`.
    reference_flow: displacement to the best match (`hard`, the paper's), or expected displacement under the softmax at
        the same temperature (`soft`).
    temperature: of the method; multiplies the logits of the softmax.
    """

    entries: Literal["nonzero", "all"] = setting("nonzero", extraction=True)
    threshold: float = setting(0.0, extraction=True)
    reference_flow: Literal["hard", "soft"] = setting("hard", extraction=True)
    temperature: float = setting(2.0, shared=True, extraction=lambda loss: loss.reference_flow == "soft")

    name: ClassVar[str] = "ditflow"
    captures: ClassVar[CaptureKind] = "queries_keys"
    reference_noise: ClassVar[float] = 0.0
    revision: ClassVar[int] = 1
    payload_axes: ClassVar[Mapping[str, str]] = {"displacement": "F F P 2"}
    optional_axes: ClassVar[Mapping[str, str]] = {"weight": "F F P"}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lasting": {"entries": "all"}}

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise SettingsError("threshold", self.threshold, "a number of patches, 0 or more (paper: 0)")

    def reference(
        self, capture: QueriesKeys, grid: TokenGrid, weight: Float[Tensor, "frames patches"] | None = None
    ) -> Payload:
        """Return {"displacement": int8 or int16, soft fp16, [F, F, P, 2]}; StaticReferenceError if nothing moves.

        With a weight of every patch, {"weight": fp16 [F, F, P]} as well.
        """
        displacement = self.displacement(capture, grid)
        if weight is None:
            self._check_moves(displacement, None)
            return {"displacement": displacement}
        weights = weight.float().cpu()[:, None].expand(displacement.shape[:3])
        return self.from_target(MotionTarget(displacement, weights))

    def displacement(self, capture: QueriesKeys, grid: TokenGrid) -> Shaped[Tensor, "frames frames patches 2"]:
        """Return the reference's displacement as one block sees it, in patches, on the CPU."""
        if self.reference_flow == "soft":
            return amf.soft_displacement(capture, grid, self.temperature).detach().half().cpu()
        return amf.hard_displacement(capture, grid).cpu()

    def from_target(self, target: MotionTarget) -> Payload:
        """Return {"displacement": as in `reference`, fractions as fp16, "weight": fp16 [F, F, P]}.

        Raises StaticReferenceError if nothing that counts moves.
        """
        assert target.displacement is not None, "sources give one"
        displacement = target.displacement.half() if target.displacement.is_floating_point() else target.displacement
        weight = target.weight.half()
        self._check_moves(displacement, weight)
        return {"displacement": displacement.cpu().contiguous(), "weight": weight.cpu().contiguous()}

    def __call__(self, capture: QueriesKeys, payload: Payload, grid: TokenGrid) -> Float[Tensor, ""]:
        """Return the mean squared difference over both components of the chosen vectors."""
        self._check_moves(payload["displacement"], payload.get("weight"))
        parts = {name: tensor.to(capture.query.device) for name, tensor in payload.items()}
        weight = self._weight(parts["displacement"], parts.get("weight"))
        return amf.displacement_error(capture, grid, self.temperature, parts["displacement"], weight)

    def _weight(
        self,
        displacement: Shaped[Tensor, "frames frames patches 2"],
        weight: Float[Tensor, "frames frames patches"] | None,
    ) -> Float[Tensor, "frames frames patches"]:
        """Weight of every vector: 0 of those that are not compared.

        Vectors are chosen by their length. Choosing dx and dy separately would let a sideways motion drift up.
        """
        given = torch.ones_like(displacement[..., 0], dtype=torch.float32) if weight is None else weight.float()
        if self.entries == "all":
            return given
        return given * (torch.linalg.vector_norm(displacement.float(), dim=-1) > self.threshold)

    def _check_moves(self, displacement: Tensor, weight: Tensor | None) -> None:
        """Raise StaticReferenceError if there is no entry to compare: their mean would be NaN."""
        if not self._weight(displacement, weight).any():
            raise StaticReferenceError(
                f"the reference's attention motion flow is {self.threshold:g} patches or less everywhere: there is no "
                "motion to transfer. Choose a longer range of frames, a larger stride or a lower loss.threshold, or "
                "compare all entries (loss.entries: all)."
            )
