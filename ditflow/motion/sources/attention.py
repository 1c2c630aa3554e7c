"""The model's own attention as a source of motion: the paper's Attention Motion Flow (section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class AttentionSource:
    """What the motion loss sees of the reference in the guidance blocks; see the losses in `ditflow.losses`."""

    name: ClassVar[str] = "attention"
    uses_model: ClassVar[bool] = True
