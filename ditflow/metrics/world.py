"""Score of clips of the embedded models' synthetic world: the sprite's track, and the words of the prompt."""

from __future__ import annotations

from typing import ClassVar

from ditflow.metrics.base import ClipCache, EvaluatedClip, MetricSettings, Need
from ditflow.mini.measure import detect_sprite, position_error, track_cosine


class WorldScore:
    """Track cosine and position error (pixels) against the reference, and the detected words of the prompt.

    For clips of one sprite. The reference's track is detected in its pixels, too: to half a pixel, see
    `benchmarks/mini.py`.
    colour, shape and background are 1 if the detected word is in the prompt, else 0.
    """

    name: ClassVar[str] = "world"
    needs: ClassVar[tuple[Need, ...]] = ("reference", "prompt")
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._reference_detection = ClipCache(detect_sprite)

    @classmethod
    def from_settings(cls, settings: MetricSettings) -> WorldScore:
        """Return the metric; it has no settings."""
        return cls()

    def __call__(self, clip: EvaluatedClip) -> dict[str, float]:
        """Return track_cosine, position_error, colour, shape and background."""
        assert clip.reference is not None and clip.prompt is not None
        detected, track = detect_sprite(clip.generated), self._reference_detection(clip.reference).centres
        words = {"colour": detected.colour, "shape": detected.shape, "background": detected.background}
        return {
            "track_cosine": track_cosine(detected, track),
            "position_error": position_error(detected, track),
            **{kind: float(word in clip.prompt) for kind, word in words.items()},
        }
