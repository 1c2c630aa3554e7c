"""Temporal consistency without any weights: does each frame look like the next one, once the motion is undone?

Axis letters: T frames, H rows, W columns of pixels.

The warping error of Lai et al. 2018 (arXiv 1808.00449), with three departures: DIS flow instead of a network's, all
neighbouring frames instead of pairs with the first one, too, and the absolute instead of the squared difference.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from ditflow.metrics.base import EvaluatedClip, MetricSettings, Need
from ditflow.metrics.tracks import LARGEST_RETURN_ERROR, Flow, check_frames, dis_flow, inside

LEAST_AGREEING = 0.5
"""Share of a frame's pixels whose flow must agree for the others to be left out.

Moving pictures have above 0.8, even where much is hidden or leaves; cuts and noise below 0.3. Without this, noise
would be measured only where it happens to match.
"""

Colours = UInt8[np.ndarray, "height width 3"]
Levels = Float[np.ndarray, "height width"]
Places = Float32[np.ndarray, "height width 2"]


def warp_error(frames: np.ndarray) -> float:
    """Return how much neighbouring frames, uint8 [T, H, W, 3] RGB, differ beyond motion: 0 not at all, up to 255.

    The mean over neighbouring frames of the mean absolute difference, in levels of 0..255 averaged over the three
    colours, between a frame and the next one warped back by DIS flow. It is taken over the pixels whose flow agrees:
    the way there and back misses the start by at most `LARGEST_RETURN_ERROR` pixels, and the place is inside the
    picture. Where fewer than the share `LEAST_AGREEING` of a frame's pixels agree, as at a cut, the other pixels take
    part, too, with the plain difference at their place; so there is always a number.

    Static clips have 0, pure pans nearly 0 (fine texture is blurred a little between pixels), and flicker, noise and
    melting shapes large values. It says nothing about quality: a blank clip has 0, too. Compare clips of one size.

    Raises ValueError for another type or shape, fewer than 2 frames, or a side below 16 pixels.
    """
    check_frames(frames)
    flow = dis_flow(*frames.shape[1:3])
    return float(np.mean([_pair_error(before, after, flow) for before, after in pairwise(frames)]))


def _pair_error(before: Colours, after: Colours, flow: Flow) -> float:
    places, agrees = _matches(cv2.cvtColor(before, cv2.COLOR_RGB2GRAY), cv2.cvtColor(after, cv2.COLOR_RGB2GRAY), flow)
    warped = _difference(_at(after.astype(np.float32), places), before)
    if agrees.mean() >= LEAST_AGREEING:
        return float(warped[agrees].mean())
    return float(np.where(agrees, warped, _difference(after, before)).mean())


def _matches(
    before: UInt8[np.ndarray, "height width"], after: UInt8[np.ndarray, "height width"], flow: Flow
) -> tuple[Places, Bool[np.ndarray, "height width"]]:
    """Where each pixel of a grey picture is in the next one, and whether the way there and back agrees."""
    height, width = before.shape
    start = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    places = start + flow(before, after)
    returned = places + _at(flow(after, before), places)
    agrees = np.linalg.norm(returned - start, axis=-1) <= LARGEST_RETURN_ERROR
    return places, agrees & inside(places, height, width)


def _difference(picture: np.ndarray, other: np.ndarray) -> Levels:
    return np.abs(picture.astype(float) - other).mean(axis=-1)


def _at(field: Float32[np.ndarray, "height width channels"], places: Places) -> np.ndarray:
    """Bilinear values of a field at places; beyond its edge, the edge's."""
    return cv2.remap(field, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


class WarpError:
    """How much neighbouring frames differ beyond motion."""

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
