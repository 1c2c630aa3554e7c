"""What a clip of the embedded models' world shows: where its sprite goes, and whether it is the one asked for."""

from __future__ import annotations

from typing import ClassVar

from ditflow.metrics.base import EvaluatedClip, MetricSettings, Need, Remembered
from ditflow.mini.measure import look_at, position_error, track_cosine


class WorldScore:
    """Track cosine and position error (pixels) against the reference, and the words of the prompt that are seen.

    For clips of one sprite. The reference's track is read from its pixels, too: to half a pixel, see
    `benchmarks/mini.py`. colour, shape and background are 1 where what is seen is a word of the prompt, else 0.
    """

    name: ClassVar[str] = "world"
    needs: ClassVar[tuple[Need, ...]] = ("reference", "prompt")
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._of_reference = Remembered(look_at)

    @classmethod
    def from_settings(cls, settings: MetricSettings) -> WorldScore:
        """Return the metric; it has no settings."""
        return cls()

    def __call__(self, clip: EvaluatedClip) -> dict[str, float]:
        """Return track_cosine, position_error, colour, shape and background."""
        assert clip.reference is not None and clip.prompt is not None
        seen, track = look_at(clip.generated), self._of_reference(clip.reference).centres
        words = {"colour": seen.colour, "shape": seen.shape, "background": seen.background}
        return {
            "track_cosine": track_cosine(seen, track),
            "position_error": position_error(seen, track),
            **{word: float(shown in clip.prompt) for word, shown in words.items()},
        }
