"""Dense optical flow between two frames, by OpenCV's inverse search (DIS), and points that follow it.

Coordinates are (x, y) in pixels; whole numbers are pixel centres.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

GreyFrame = UInt8[np.ndarray, "height width"]
FlowField = Float32[np.ndarray, "height width 2"]
"""Displacement of every pixel of a frame to another one."""
Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From two grey frames to the `FlowField` of the first one's pixels."""


def dis_flow(finest_scale: int = 0) -> Flow:
    """Return dense inverse search flow.

    finest_scale: how often the resolution is halved for the finest of the scales that are searched.
    """
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow.setFinestScale(finest_scale)
    return lambda before, after: flow.calc(before, after, None)


def follow(
    points: Float32[np.ndarray, "rows columns 2"], there: FlowField, back: FlowField
) -> tuple[Float32[np.ndarray, "rows columns 2"], Float32[np.ndarray, "rows columns"]]:
    """Move points along a flow; return where they arrive, and how far from their start the flow back ends."""
    arrived = points + sample_field(there, points)
    returned = arrived + sample_field(back, arrived)
    return arrived, np.hypot(returned[..., 0] - points[..., 0], returned[..., 1] - points[..., 1])


def sample_field(
    field: Float32[np.ndarray, "_height _width channels"], points: Float32[np.ndarray, "rows columns 2"]
) -> Float32[np.ndarray, "rows columns channels"]:
    """Return bilinear samples of a field at points; outside, those of the nearest edge."""
    return cv2.remap(field, points, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def is_inside(points: Float32[np.ndarray, "*many 2"], height: int, width: int) -> Bool[np.ndarray, "*many"]:
    """Return which points lie on a pixel of a frame of this size; points that are not finite do not."""
    x, y = points[..., 0], points[..., 1]
    return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
