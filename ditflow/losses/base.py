"""What a motion loss is: a signal taken once from the reference, compared with the video in the making."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from ditflow.types import CaptureKind, TokenGrid

if TYPE_CHECKING:
    from ditflow.settings import MethodSettings

Payload = dict[str, Tensor]
"""The reference's motion signal of one block, by name; stored as it is in a safetensors file."""


@runtime_checkable
class MotionLoss(Protocol):
    """A motion loss, found by its `name`. It says what it captures, and is computed block by block.

    captures: what it needs of a block, `queries_keys` or `features`; nothing else is computed.
    reference_noise: how far the reference is noised before its signal is taken, as a share t/T of all timesteps.
    payload_axes: may be left out. The axes of every tensor of its payload: F, P, a number, or other letters, each
    of which is as long wherever it stands. A file with other shapes is refused then.
    revision: raised when the same settings come to mean another loss, so that the rows it guides get new ids.
    """

    name: ClassVar[str]
    captures: ClassVar[CaptureKind]
    reference_noise: ClassVar[float]

    @property
    def revision(self) -> int:
        """Version of the loss under these settings; a class attribute will do."""
        ...

    @classmethod
    def from_settings(cls, method: MethodSettings) -> MotionLoss:
        """Return the loss that resolved settings describe."""
        ...

    def reference(self, capture: Any, grid: TokenGrid) -> Payload:
        """Return the reference's motion signal of one block, compact, on the CPU; `capture` is of its kind."""
        ...

    def __call__(self, capture: Any, payload: Payload, grid: TokenGrid) -> Tensor:
        """Return the loss of one block: a scalar with a gradient."""
        ...
