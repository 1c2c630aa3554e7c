"""Temporal consistency without weights: difference of neighbouring frames after motion compensation.

Axis letters: T frames, H rows, W columns of pixels.

The warping error of Lai et al. 2018 (arXiv 1808.00449), with three departures: DIS flow instead of a network's, all
neighbouring frames but no pairs with the first frame, and the absolute instead of the squared difference.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from ditflow.media.optical_flow import Flow, GreyFrame, dis_flow, follow, is_inside, sample_field
from ditflow.metrics.base import EvaluatedClip, MetricSettings, Need
from ditflow.metrics.tracks import MAX_FORWARD_BACKWARD_ERROR, check_trackable, finest_scale

MIN_CONSISTENT = 0.5
"""Fraction of a frame's pixels whose flow must be consistent for the others to be ignored.

Moving frames have above 0.8, even with much occlusion; cuts and noise below 0.3. Without this, noise would be measured
only where it happens to match.
"""

Colours = UInt8[np.ndarray, "height width 3"]
Levels = Float[np.ndarray, "height width"]
Positions = Float32[np.ndarray, "height width 2"]


def warp_error(frames: np.ndarray) -> float:
    """Return the warping error of frames, uint8 [T, H, W, 3] RGB: 0 for none, up to 255.

    The mean over neighbouring frames of the mean absolute difference, in levels of 0..255 averaged over the three
    colours, between a frame and the next one warped back by DIS flow. It is taken over the pixels whose flow is
    consistent: the forward-backward error is at most `MAX_FORWARD_BACKWARD_ERROR` pixels, and the position is inside
    the frame. If fewer than the fraction `MIN_CONSISTENT` of a frame's pixels are consistent, as at a cut, the other
    pixels count with their plain difference, so the metric is always defined.

    Static clips have 0, pure pans nearly 0 (interpolation blurs fine texture a little), and flicker, noise and melting
    shapes large values. It is no measure of quality: a blank clip has 0, too. Compare clips of one size.

    Raises MetricInputError as `check_trackable` does.
    """
    check_trackable(frames)
    flow = dis_flow(finest_scale(frames))
    return float(np.mean([_pair_error(before, after, flow) for before, after in pairwise(frames)]))


def _pair_error(before: Colours, after: Colours, flow: Flow) -> float:
    grey_before, grey_after = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after))
    positions, consistent = _match(grey_before, grey_after, flow)
    warped = _difference(sample_field(after.astype(np.float32), positions), before)
    if consistent.mean() >= MIN_CONSISTENT:
        return float(warped[consistent].mean())
    return float(np.where(consistent, warped, _difference(after, before)).mean())


def _match(before: GreyFrame, after: GreyFrame, flow: Flow) -> tuple[Positions, Bool[np.ndarray, "height width"]]:
    """Return the position of each pixel of a grey frame in the next one, and whether its flow is consistent."""
    height, width = before.shape
    start = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    positions, error = follow(start, flow(before, after), flow(after, before))
    return positions, (error <= MAX_FORWARD_BACKWARD_ERROR) & is_inside(positions, height, width)


def _difference(picture: np.ndarray, other: np.ndarray) -> Levels:
    return np.abs(picture.astype(float) - other).mean(axis=-1)


class WarpError:
    """Difference of neighbouring frames after motion compensation."""

    name: ClassVar[str] = "warp_error"
    needs: ClassVar[tuple[Need, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_settings(cls, settings: MetricSettings) -> WarpError:
        """Return the metric; it has no settings."""
        return cls()

    def __call__(self, clip: EvaluatedClip) -> dict[str, float]:
        """Return warp_error."""
        return {"warp_error": warp_error(clip.generated)}
