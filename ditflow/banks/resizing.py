"""Resizing of fields over a clip's tokens or latents to another number of frames, height and width."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

Size = tuple[int, int, int]
"""Frames, height and width, in tokens or in latent pixels."""


def resize_field(field: Float[Tensor, "channels frames height width"], size: Size) -> Float[Tensor, "channels ..."]:
    """Interpolate linearly: along time with both ends kept, in space as pictures are resized."""
    frames, height, width = size
    planes = interpolate(field, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    lines = interpolate(planes.flatten(2).transpose(1, 2), size=frames, mode="linear", align_corners=True)
    return lines.transpose(1, 2).unflatten(2, (height, width))


def resize_moves(moves: Float[Tensor, "steps tokens 3"], old: Size, new: Size) -> Float[Tensor, "steps other 3"]:
    """Resample coordinate offsets (t, y, x), in tokens, from one grid to another, and scale them with the grid.

    Along t they scale with the span from the first to the last frame: a motion takes the same share of the clip.
    """
    scale = moves.new_tensor([(new[0] - 1) / max(old[0] - 1, 1), new[1] / old[1], new[2] / old[2]])
    field = moves.transpose(1, 2).flatten(0, 1).unflatten(1, old)
    other = resize_field(field, new).flatten(1).unflatten(0, (len(moves), 3)).transpose(1, 2)
    return other * scale
