"""What a motion loss is: a signal taken once from the reference, compared with the video in the making."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ditflow.motion.target import MotionTarget
from ditflow.types import CaptureKind, TokenGrid

Payload = dict[str, Tensor]
"""The reference's motion signal of one block, by name; stored as it is in a safetensors file."""


@runtime_checkable
class MotionLoss(Protocol):
    """A motion loss, found by its `name`: a frozen dataclass whose fields are its settings (`ditflow.parts`).

    captures: what it needs of a block, `queries_keys` or `features`; nothing else is computed.
    reference_noise: how far the reference is noised before its signal is taken, as a share t/T of all timesteps.

    A class may also have:
    payload_axes: the axes of every tensor of its payload: F, P, a number, or other letters, each of which is as long
        wherever it stands. A file with other shapes is refused then. optional_axes: the same of tensors that are there
        only with filters.
    presets: settings that a preset of the method implies, by its name.
    from_target: see `DisplacementLoss`.
    """

    name: ClassVar[str]
    captures: ClassVar[CaptureKind]
    reference_noise: ClassVar[float]

    @property
    def revision(self) -> int:
        """Version of the loss under these settings; a class attribute will do.

        Raised when the same settings come to mean another loss, so that the rows it guides get new ids.
        """
        ...

    def reference(
        self, capture: Any, grid: TokenGrid, weight: Float[Tensor, "frames patches"] | None = None
    ) -> Payload:
        """Return the reference's motion signal of one block, compact, on the CPU; `capture` is of its kind.

        weight: what every patch counts, 0 or more, if a filter says so.
        """
        ...

    def __call__(self, capture: Any, payload: Payload, grid: TokenGrid) -> Tensor:
        """Return the loss of one block: a scalar with a gradient."""
        ...


@runtime_checkable
class DisplacementLoss(MotionLoss, Protocol):
    """A motion loss that compares displacements, so that any motion source can set its target."""

    def displacement(self, capture: Any, grid: TokenGrid) -> Tensor:
        """Return the reference's displacement [F, F, P, 2] as one block sees it, in patches, on the CPU."""
        ...

    def from_target(self, target: MotionTarget) -> Payload:
        """Return the payload that makes the loss follow a target; StaticReferenceError if nothing moves."""
        ...


def weighted_mean(values: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"] | None) -> Float[Tensor, ""]:
    """Return the mean of values, weighted if there are weights of the same shape."""
    if weight is None:
        return values.mean()
    shares = weight.to(values)
    return (values * shares).sum() / shares.sum()
