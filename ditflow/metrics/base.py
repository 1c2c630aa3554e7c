"""The contract of a metric: named figures of one finished clip, its reference and its prompt."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from ditflow.errors import DitflowError, SettingsError
from ditflow.metrics.trackers import COTRACKER, TRACKER_NAMES

Need = Literal["reference", "prompt"]


class NotMeasurableError(DitflowError, ValueError):
    """A metric is undefined for what a clip shows; the message says why."""

    default_code = "not-measurable"


_Result = TypeVar("_Result")


class ClipCache(Generic[_Result]):
    """LRU cache of a function of a clip, keyed by the clip's content: many generated clips share one reference."""

    def __init__(self, function: Callable[[np.ndarray], _Result], max_clips: int = 8):
        self._function, self._max_clips = function, max_clips
        self._results: OrderedDict[str, _Result] = OrderedDict()

    def __call__(self, frames: np.ndarray) -> _Result:
        """Return the function's result for frames [T, H, W, 3]."""
        key = f"{frames.shape} {hashlib.sha256(frames.tobytes()).hexdigest()}"
        if key not in self._results:
            self._results[key] = self._function(frames)
        self._results.move_to_end(key)
        if len(self._results) > self._max_clips:
            self._results.popitem(last=False)
        return self._results[key]


@dataclass(frozen=True)
class EvaluatedClip:
    """A generated clip with its reference and prompt, where they are known.

    generated, reference: uint8 [T, H, W, 3] RGB of the same length and size.
    """

    generated: np.ndarray
    reference: np.ndarray | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class MetricSettings:
    """The metrics to compute, and their options.

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
        from ditflow.metrics import METRICS  # late: the registry imports the metrics, which import this module

        checks = {
            "names": (bool(self.names) and set(self.names) <= set(METRICS), f"some of {', '.join(METRICS)}"),
            "tracker": (self.tracker in TRACKER_NAMES, f"one of {', '.join(TRACKER_NAMES)}"),
            "tracker_weights": (
                (self.tracker == COTRACKER) == (self.tracker_weights is not None),
                f"a TorchScript file with tracker: {COTRACKER}, and nothing with the others",
            ),
            "variant": (self.variant in ("symmetric", "official"), "symmetric or official"),
            "least_common": (0 <= self.least_common <= 1, "a fraction of the steps, from 0 to 1"),
        }
        for key, (ok, expected) in checks.items():
            if not ok:
                raise SettingsError(key, getattr(self, key), expected)


@runtime_checkable
class Metric(Protocol):
    """A metric, registered by its `name`; created once and called for one clip after another.

    needs: fields of a clip that it needs beside the generated frames.
    settings: fields of `MetricSettings` that change its figures.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    settings: ClassVar[tuple[str, ...]]

    @classmethod
    def from_settings(cls, settings: MetricSettings) -> Metric:
        """Return the metric for these settings, with its model loaded."""
        ...

    def __call__(self, clip: EvaluatedClip) -> dict[str, float]:
        """Return finite figures by name; NotMeasurableError if they are undefined."""
        ...
