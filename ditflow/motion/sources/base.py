"""What a motion source is."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from ditflow.layout import LatentLayout
from ditflow.motion.target import MotionTarget


@runtime_checkable
class MotionSource(Protocol):
    """A motion source, found by its `name`: a frozen dataclass whose fields are its settings (`ditflow.parts`).

    uses_model: whether the motion is what the loss itself sees in the model's blocks. Else it is a `VideoSource`.
    """

    name: ClassVar[str]
    uses_model: ClassVar[bool]


@runtime_checkable
class VideoSource(MotionSource, Protocol):
    """A source that takes the motion from the pixels of the reference."""

    def target(self, video: UInt8[np.ndarray, "time height width 3"], layout: LatentLayout) -> MotionTarget:
        """Return the motion of an RGB video, for a model of this layout.

        Raises SettingsError for a size that the model cannot do.
        """
        ...
