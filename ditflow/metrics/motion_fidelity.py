"""Motion fidelity: similarity of the motion of two videos, wherever in the frame it occurs.

Axis letters: N generated and M reference tracklets, T frames, S = T - 1 steps from frame to frame.

Introduced by SMM (arXiv 2311.17009) and used by DiTFlow (arXiv 2412.07776). Two tracklets are compared by the
directions of their steps; every tracklet is scored by its best match in the other video.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float

from ditflow.metrics.base import ClipCache, EvaluatedClip, MetricSettings, Need, NotMeasurableError
from ditflow.metrics.errors import MetricInputError
from ditflow.metrics.trackers import load_tracker
from ditflow.metrics.tracks import Tracker, Tracks

MIN_STEP = 0.05
"""Pixels below which a frame-to-frame displacement counts as zero.

Sub-pixel trackers never report exactly 0: one grey level of noise (8 bits, a video codec) moves a static point by 0.01
to 0.07 pixels a frame in random directions, and the best of many matches would turn that into a score. The threshold
is 2.4 pixels in 49 frames.
"""


class NoMotionError(NotMeasurableError):
    """A video shows no motion to compare; the message names which one."""

    default_code = "no-motion"


def motion_fidelity(
    generated: Tracks,
    reference: Tracks,
    variant: Literal["symmetric", "official"] = "symmetric",
    *,
    least_common: float = 0.0,
) -> float:
    """Return the similarity of the motion of two videos: 1 for the same directions, -1 for opposite ones only.

    The correlation of two tracklets is the mean over time of the cosine of their frame-to-frame displacements, without
    the steps in which either moves less than `MIN_STEP` pixels or is invisible at either end. A pair without a common
    step, or with less than the fraction `least_common` of all T - 1 steps in common, has no correlation and is ignored;
    so is a tracklet without any pair.

    symmetric: the mean over generated tracklets of their best correlation with a reference tracklet, plus the mean
    over reference tracklets of their best correlation with a generated one, over 2.

    official: as in the scripts released with SMM and DiTFlow. One-sided: only the mean over generated tracklets. The
    identity is first subtracted from the matrix of correlations (rows generated, columns reference), which lowers
    tracklet i's match with reference tracklet i, the one that starts at the same position, by 1; so a video scores
    less than 1 against itself unless its tracklets move alike. Both videos need the same number of tracklets.
    Departures: those scripts divide 0 by 0 for static points, ignore visibility, and cut the longer video.

    Unrelated motion scores above 0, the more so the more tracklets there are and the fewer steps they have in common: a
    point that moves in one step only, such as one that an object passes, has a perfect match anywhere. `least_common`
    excludes such pairs. Compare only scores of the same tracker, grid and length.

    Static points are ignored: the score measures what moves, not whether the background is static. Since matching is
    unconstrained and only directions count, it measures neither where something moves nor how fast.

    Raises NoMotionError if a video has no visible motion, or the two never move at the same time; MetricInputError for
    an unknown variant, a fraction outside 0 to 1, videos of different length, or, for `official`, different numbers of
    tracklets.
    """
    _check_options(variant, least_common)
    _check_sizes(generated, reference, variant)
    _check_motion(generated, reference)
    matrix = correlations(generated, reference, least_common)
    if np.isneginf(matrix).all():
        raise NoMotionError(
            "the generated video and the reference do not move at the same time: no pair of points has a step, or the "
            f"fraction {least_common:g} of all steps, in which both move and are visible. Most likely one of the two "
            "loses its points early, as at a cut; look at its tracks.",
            code="no-common-motion",
        )
    if variant == "official":
        return _mean_best(matrix - np.eye(len(matrix)))
    return (_mean_best(matrix) + _mean_best(matrix.T)) / 2


def correlations(
    generated: Tracks, reference: Tracks, least_common: float = 0.0
) -> Float[np.ndarray, "generated reference"]:
    """Return the correlation [N, M] of all pairs of tracklets, in [-1, 1]; -inf for pairs without one.

    See `motion_fidelity` for which those are. Both videos must have the same number of frames.
    """
    (directions, moves), (other_directions, other_moves) = _directions(generated), _directions(reference)
    cosines = np.einsum("nsc,msc->nm", directions, other_directions, optimize=True)
    steps = moves.astype(float) @ other_moves.T
    enough = (steps > 0) & (steps / max(moves.shape[1], 1) >= least_common)
    return np.where(enough, np.clip(cosines / np.maximum(steps, 1), -1, 1), -np.inf)


def _directions(tracks: Tracks) -> tuple[Float[np.ndarray, "points steps 2"], Bool[np.ndarray, "points steps"]]:
    """Return unit vectors of the frame-to-frame displacements, (0, 0) for ignored steps, and which steps count."""
    displacement = np.diff(tracks.points.astype(float), axis=1)
    length = np.linalg.norm(displacement, axis=-1)
    moves = tracks.visible[:, 1:] & tracks.visible[:, :-1] & (length >= MIN_STEP)
    return displacement * (moves / np.where(moves, length, 1))[..., None], moves


def _mean_best(matrix: Float[np.ndarray, "rows columns"]) -> float:
    """Return the mean over rows of the largest entry, without rows that have none."""
    best = matrix.max(axis=1)
    return float(best[np.isfinite(best)].mean())


def _check_options(variant: str, least_common: float) -> None:
    if variant not in ("symmetric", "official"):
        raise MetricInputError(
            f"{variant!r} is not a variant of motion fidelity. The variants are: symmetric, official.",
            code="unknown-variant",
            key="metrics.variant",
        )
    if not 0 <= least_common <= 1:
        raise MetricInputError(
            f"least_common is {least_common}, expected a fraction of the steps, from 0 to 1, not a count.",
            code="fraction-out-of-range",
            key="metrics.least_common",
        )


def _check_sizes(generated: Tracks, reference: Tracks, variant: str) -> None:
    (count, frames), (other_count, other_frames) = generated.visible.shape, reference.visible.shape
    if frames != other_frames:
        raise MetricInputError(
            f"the generated video has {frames} frames, the reference {other_frames}: expected as many. Most likely the "
            "reference was read with another start or stride than it was transferred with; read it so, or cut both.",
            code="lengths-differ",
        )
    if variant == "official" and count != other_count:
        raise MetricInputError(
            f"{count} generated and {other_count} reference tracklets came, expected as many for the official variant, "
            "which pairs those that start at the same position. Resize both videos to one size before tracking.",
            code="tracklet-counts-differ",
        )


def _check_motion(generated: Tracks, reference: Tracks) -> None:
    sides = (("generated video", generated), ("reference", reference))
    if still := [name for name, tracks in sides if not _directions(tracks)[1].any()]:
        raise NoMotionError(
            f"no point of the {' and of the '.join(still)} moves {MIN_STEP} pixels or more between two frames in "
            "which it is visible, so there is nothing to compare. Either it is static, or the tracker lost its points "
            "at once, as it does on blank or flickering frames."
        )


@dataclass(frozen=True)
class MotionFidelity:
    """Motion fidelity between a generated clip and its reference."""

    tracker: Tracker
    variant: Literal["symmetric", "official"] = "symmetric"
    least_common: float = 0.0

    name: ClassVar[str] = "motion_fidelity"
    needs: ClassVar[tuple[Need, ...]] = ("reference",)
    settings: ClassVar[tuple[str, ...]] = ("tracker", "tracker_weights", "variant", "least_common")

    @classmethod
    def from_settings(cls, settings: MetricSettings) -> MotionFidelity:
        """Return the metric with its tracker loaded."""
        tracker = load_tracker(settings.tracker, settings.tracker_weights, device=settings.device)
        return cls(tracker, settings.variant, settings.least_common)

    @cached_property
    def _reference_tracks(self) -> ClipCache[Tracks]:
        return ClipCache(self.tracker)

    def __call__(self, clip: EvaluatedClip) -> dict[str, float]:
        """Return motion_fidelity; NoMotionError for a static clip."""
        assert clip.reference is not None
        tracks = (self.tracker(clip.generated), self._reference_tracks(clip.reference))
        return {"motion_fidelity": motion_fidelity(*tracks, self.variant, least_common=self.least_common)}
