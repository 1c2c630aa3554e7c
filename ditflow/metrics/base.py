"""What a metric is: figures of one finished clip, its reference and its prompt."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from ditflow.settings import SettingsError

Need = Literal["reference", "prompt"]


class NotMeasurableError(ValueError):
    """A clip has no value of a metric, because of what it shows; the message says why."""


_Found = TypeVar("_Found")


class Remembered(Generic[_Found]):
    """What was found in the latest clips, by their content: many generated clips share one reference."""

    def __init__(self, find: Callable[[np.ndarray], _Found], most: int = 8):
        self._find, self._most = find, most
        self._found: OrderedDict[str, _Found] = OrderedDict()

    def __call__(self, frames: np.ndarray) -> _Found:
        """Return what there is to find in frames [T, H, W, 3]."""
        content = f"{frames.shape} {hashlib.sha256(frames.tobytes()).hexdigest()}"
        if content not in self._found:
            self._found[content] = self._find(frames)
        self._found.move_to_end(content)
        while len(self._found) > self._most:
            self._found.popitem(last=False)
        return self._found[content]


@dataclass(frozen=True)
class EvaluatedClip:
    """A generated clip with what it is measured against, where that is known.

    generated, reference: uint8 [T, H, W, 3] RGB of the same length and size.
    """

    generated: np.ndarray
    reference: np.ndarray | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class MetricSettings:
    """Which metrics are taken, and how.

    names: metrics by name. tracker: `dis` or `lucas-kanade` (OpenCV, no weights), or `cotracker3` with the TorchScript
    file `tracker_weights`. variant and least_common: see `motion_fidelity`. clip: a CLIP folder, for the metrics that
    need one. device: for CLIP and CoTracker.
    """

    names: tuple[str, ...] = ("motion_fidelity", "warp_error")
    tracker: str = "dis"
    tracker_weights: str | None = None
    variant: Literal["symmetric", "official"] = "symmetric"
    least_common: float = 0.5
    clip: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        from ditflow.metrics import METRICS
        from ditflow.metrics.tracks import COTRACKER, TRACKERS

        checks = {
            "names": (bool(self.names) and set(self.names) <= set(METRICS), f"some of {', '.join(METRICS)}"),
            "tracker": (self.tracker in (*TRACKERS, COTRACKER), f"one of {', '.join((*TRACKERS, COTRACKER))}"),
            "tracker_weights": (
                (self.tracker == COTRACKER) == (self.tracker_weights is not None),
                f"a TorchScript file with tracker: {COTRACKER}, and nothing with the others",
            ),
            "variant": (self.variant in ("symmetric", "official"), "symmetric or official"),
            "least_common": (0 <= self.least_common <= 1, "a share of the steps, from 0 to 1"),
        }
        for key, (ok, expected) in checks.items():
            if not ok:
                raise SettingsError(key, getattr(self, key), expected)


@runtime_checkable
class Metric(Protocol):
    """A metric, found by its `name`. It is made once and then measures one clip after another.

    needs: what of a clip must be known beside the generated frames.
    settings: the fields of `MetricSettings` that matter to it.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    settings: ClassVar[tuple[str, ...]]

    @classmethod
    def from_settings(cls, settings: MetricSettings) -> Metric:
        """Return the metric that the settings describe; load what it needs."""
        ...

    def __call__(self, clip: EvaluatedClip) -> dict[str, float]:
        """Return finite figures by name; NotMeasurableError where there are none."""
        ...
