"""Masks of reference videos: which object every pixel belongs to.

Axis letters: T frames, H x W pixels.
"""

from __future__ import annotations

import io
from itertools import islice
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError

from ditflow.media.video import VideoError, read_video

_MOST_PIXELS = 8192 * 8192
_FORMATS = ("PNG", "GIF", "TIFF", "BMP", "JPEG")
_INSIDE = 128
"""Brightness from which a pixel of a mask video belongs to the object: video codecs leave no exact values."""


def read_mask(
    data: bytes,
    *,
    frames: int,
    height: int,
    width: int,
    start: int = 0,
    stride: int = 1,
    fit: Literal["crop", "stretch"] = "crop",
    name: str = "mask",
    **limits: Any,
) -> UInt8[np.ndarray, "time height width"]:
    """Read the mask of a reference video: uint8 [T, H, W], or [1, H, W] from a picture. 0 is no object.

    A picture (PNG, palette or grey) has the objects' numbers as its values, as DAVIS and YouTube-VOS have them; so has
    one of several frames (APNG, GIF, TIFF), which is a mask of every frame. In a video, white is the object 1. The
    other arguments are those of `read_video` for the reference, so that the mask is cropped and cut like it.

    Raises VideoError for a file that is neither, or too short.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        clip = read_video(
            data, frames=frames, height=height, width=width, start=start, stride=stride, fit=fit, name=name, **limits
        )
        return (clip.frames.mean(axis=-1) >= _INSIDE).astype(np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{name}: it cannot be read as a mask: {error}", code="mask-undecodable") from error
    if picture.width * picture.height > _MOST_PIXELS:
        raise VideoError(
            f"{name}: it has {picture.width}x{picture.height} pixels, more than the accepted 8192x8192",
            code="mask-too-large",
        )
    wanted = range(start, start + stride * (frames - 1) + 1, stride)
    try:
        count = getattr(picture, "n_frames", 1)
        shown = islice(ImageSequence.Iterator(picture), wanted.stop)
        numbers = [_numbers(frame) for number, frame in enumerate(shown) if count == 1 or number in wanted]
    except (OSError, ValueError, SyntaxError) as error:
        raise VideoError(f"{name}: it is damaged: {error}", code="mask-undecodable") from error
    if len(numbers) != (1 if count == 1 else frames):
        raise VideoError(
            f"{name}: it has {count} frames, too few for {frames} from {start} with stride {stride}: expected one "
            "frame, or as many as the reference has",
            code="mask-too-short",
        )
    return np.stack([_fitted(frame, height, width, fit) for frame in numbers])


def _numbers(frame: Image.Image) -> UInt8[np.ndarray, "height width"]:
    """The objects' numbers of a picture: palette indices, grey values, or of colours whether they are bright."""
    if frame.mode in ("P", "L"):
        return np.array(frame)
    if frame.mode in ("1", "I;16", "I"):
        return np.clip(np.array(frame, np.int64), 0, 255).astype(np.uint8)
    return (np.array(frame.convert("L")) >= _INSIDE).astype(np.uint8)


def _fitted(
    numbers: UInt8[np.ndarray, "_h _w"], height: int, width: int, fit: str
) -> UInt8[np.ndarray, "height width"]:
    """Crop the centre to the shape, if asked for, and resize without mixing numbers."""
    rows, columns = numbers.shape
    if fit == "crop":
        kept_rows = min(rows, round(columns * height / width))
        kept_columns = min(columns, round(rows * width / height))
        top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
        numbers = numbers[top : top + kept_rows, left : left + kept_columns]
    return cv2.resize(numbers, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
