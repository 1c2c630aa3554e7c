"""What a motion loss is: a signal taken once from the reference, compared with the video in the making."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from ditflow.types import QueriesKeys, TokenGrid

if TYPE_CHECKING:
    from ditflow.settings import MethodSettings

Payload = dict[str, Tensor]
"""The reference's motion signal of one block, by name; stored as it is in a safetensors file."""


@runtime_checkable
class MotionLoss(Protocol):
    """A motion loss, found by its `name`. It says what it captures, and is computed block by block.

    captures: what it needs of a block; nothing else is computed.
    """

    name: ClassVar[str]
    captures: ClassVar[Literal["queries_keys"]]

    @classmethod
    def from_settings(cls, method: MethodSettings) -> MotionLoss:
        """Return the loss that resolved settings describe."""
        ...

    def reference(self, capture: QueriesKeys, grid: TokenGrid) -> Payload:
        """Return the reference's motion signal of one block, compact, on the CPU."""
        ...

    def __call__(self, capture: QueriesKeys, payload: Payload, grid: TokenGrid) -> Tensor:
        """Return the loss of one block: a scalar with a gradient."""
        ...
