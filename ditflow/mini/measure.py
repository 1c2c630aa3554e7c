"""What a clip of the synthetic world shows, read from its pixels alone: a ruler for generated clips.

`look_at` finds the one sprite of a clip and names its colour, its shape and the background, without knowing the prompt;
`track_cosine` and `position_error` compare where two sprites went. How often it is right on clips whose truth is known
is measured by `benchmarks/mini.py`. `flow_score` holds an attention motion flow against the true motion.

Axes: T pixel frames, F latent frames, H and W pixels, P patches of a latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from numpy.typing import NDArray
from torch import Tensor

from ditflow.amf import hard_displacement
from ditflow.backbones.base import Backbone
from ditflow.mini.world import BACKGROUNDS, COLOURS, GROUNDS, REACH, SHAPES, TrueMotion, WorldClip, render, sample_scene

Array = NDArray[np.floating[Any]]

CLEAR = 0.5
"""From this clarity on (1: a flawless silhouette, 0: nothing), a frame counts as showing the sprite."""
RADII = tuple(range(9, 21))
"""Radii in pixels that are looked for, in clips of 64x64."""

_LEVELS = 16
_WINDOW = 1.15 * REACH


@dataclass(frozen=True, eq=False)
class Sighting:
    """What was seen in a clip of one sprite.

    colour, shape, background: words of the world. centres [T, 2]: the sprite's centre (x, y) in pixels; radii [T] in
    pixels; clarity [T] in [-1, 1]: how much more its silhouette looks like a sprite than what surrounds it.
    """

    colour: str
    shape: str
    background: str
    centres: Array
    radii: Array
    clarity: Array

    @property
    def found(self) -> NDArray[np.bool_]:
        """The frames [T] that show the sprite clearly."""
        return self.clarity >= CLEAR


def look_at(frames: NDArray[np.uint8]) -> Sighting:
    """Return what a clip of one sprite shows; frames uint8 [T, H, W, 3].

    The background is the one whose colours the pixels have most. Pixels that it is unlikely to have are the sprite's;
    the shape is the one whose silhouette fits them best, anywhere and at any size, summed over the frames; the colour
    is the likeliest of the pixels inside it.
    """
    colours, grounds = _palettes()
    levels = _levels(frames)
    background = max(BACKGROUNDS, key=lambda name: grounds[name][levels].mean())
    seen = [name for name in COLOURS if name not in GROUNDS[background].hidden_colours]
    sprite = np.logaddexp.reduce([colours[name] for name in seen]) - np.log(len(seen))
    evidence = torch.from_numpy((sprite - grounds[background])[levels] / 4).clamp(-1, 1).float()
    fits = {shape: _fit(evidence, shape) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name].clarity.sum())
    fit = fits[shape]
    inside = levels[_silhouettes(fit, shape, frames.shape[1:3])]
    colour = max(seen, key=lambda name: colours[name][inside].sum())
    return Sighting(colour, shape, background, fit.centres, fit.radii, fit.clarity)


def track_cosine(sighting: Sighting, trajectory: Array) -> float:
    """Return the cosine in [-1, 1] of a sprite's track and a true one [T, 2], each about its own middle.

    Only frames that show the sprite count; 0 if it is not found in half of them, or does not move.
    """
    found = sighting.found
    if found.mean() < 0.5:
        return 0.0
    one, other = (track[found] - track[found].mean(axis=0) for track in (sighting.centres, trajectory))
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float((one * other).sum() / lengths) if lengths else 0.0


def position_error(sighting: Sighting, trajectory: Array) -> float:
    """Return the mean distance in pixels of a sprite from a true trajectory [T, 2], wherever it is seen best."""
    return float(np.linalg.norm(sighting.centres - trajectory, axis=-1).mean())


# ---- colours


def _levels(frames: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Return the colour cell of every pixel of uint8 [..., 3]: its place in a palette."""
    red, green, blue = np.moveaxis(frames // (256 // _LEVELS), -1, 0).astype(np.intp)
    return (red * _LEVELS + green) * _LEVELS + blue


_Palette = dict[str, Array]


@cache
def _palettes(clips: int = 768) -> tuple[_Palette, _Palette]:
    """Return the log-likelihoods of colour cells [_LEVELS**3] for every sprite colour and every background.

    Counted on training clips, and blurred by one cell, for generated colours are never quite right.
    """
    colours = {name: np.zeros(_LEVELS**3) for name in COLOURS}
    grounds = {name: np.zeros(_LEVELS**3) for name in BACKGROUNDS}
    for seed in range(clips):
        clip = render(sample_scene(seed, sprites=1), frames=2)
        levels, mask = _levels(clip.frames), clip.masks[0]
        look, ground = clip.scene.sprites[0].appearance, clip.scene.background
        colours[look.colour] += np.bincount(levels[mask], minlength=_LEVELS**3)
        grounds[ground.name] += np.bincount(levels[~mask], minlength=_LEVELS**3)
    by_colour = {name: _log_share(counts) for name, counts in colours.items()}
    return by_colour, {name: _log_share(counts) for name, counts in grounds.items()}


def _log_share(counts: Array) -> Array:
    cube = counts.reshape(_LEVELS, _LEVELS, _LEVELS)
    for axis in range(3):
        cube = np.apply_along_axis(np.convolve, axis, cube, [0.25, 0.5, 0.25], "same")
    share = cube.ravel() / cube.sum()
    return np.log(0.98 * share + 0.02 / share.size)


# ---- silhouettes


@dataclass(frozen=True, eq=False)
class _Fit:
    centres: Array
    radii: Array
    clarity: Array


def _fit(evidence: Tensor, shape: str) -> _Fit:
    """Return the best place and size of a shape in every frame; evidence [T, H, W] in [-1, 1] is high on sprites."""
    maps = _correlations(evidence, shape).numpy()
    best = maps.reshape(len(maps), -1).argmax(axis=1)
    which, row, column = np.unravel_index(best, maps.shape[1:])
    centres = np.stack([column, row], axis=-1).astype(float)
    return _Fit(centres, np.array(RADII, float)[which], maps[np.arange(len(maps)), which, row, column])


def _correlations(evidence: Tensor, shape: str) -> Tensor:
    """Return the correlation [T, R, H, W] of every frame with the shape's template of every radius, at every place."""
    height, width = evidence.shape[1:]
    # Room for the half of a template that stands beyond one edge: what wraps around reaches no place that is returned.
    size = (max(height, _reach() + 1) + _reach(), max(width, _reach() + 1) + _reach())
    products = torch.fft.rfft2(evidence, s=size)[:, None] * _spectra(shape, size)
    return torch.fft.irfft2(products, s=size)[..., :height, :width]


@cache
def _spectra(shape: str, size: tuple[int, int]) -> Tensor:
    """Return the templates' spectra, of which a product with that of a frame is their correlation."""
    templates, reach = _templates(shape), _reach()
    placed = torch.zeros(len(templates), *size)
    placed[:, : 2 * reach + 1, : 2 * reach + 1] = templates
    return torch.fft.rfft2(placed.roll((-reach, -reach), dims=(1, 2))).conj()


def _reach() -> int:
    """Pixels from the middle of a template to its edge."""
    return int(np.ceil(_WINDOW * RADII[-1]))


@cache
def _templates(shape: str) -> Tensor:
    """Return for every radius the weights that take half the mean inside the shape less half the mean around it."""
    reach = _reach()
    row, column = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    weights = []
    for radius in RADII:
        x, y = column / radius, row / radius
        inside = SHAPES[shape](x, y) <= 0
        around = (np.hypot(x, y) <= _WINDOW) & ~inside
        weights.append(0.5 * inside / inside.sum() - 0.5 * around / around.sum())
    return torch.from_numpy(np.stack(weights)).float()


def _silhouettes(fit: _Fit, shape: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels [T, H, W] inside a fitted shape."""
    row, column = np.indices(size)
    x = (column - fit.centres[:, 0, None, None]) / fit.radii[:, None, None]
    y = (row - fit.centres[:, 1, None, None]) / fit.radii[:, None, None]
    return SHAPES[shape](x, y) <= 0


# ---- attention motion flow against the truth


@dataclass(frozen=True)
class FlowScore:
    """How well a displacement field tells a clip's true motion, in patches, over pairs of different frames.

    sprite_error: mean end-point error of points on sprites; sprite_within: their share with an error of at most 1.
    ground_error: mean end-point error of background points; ground_length: how far the field moves them on average.
    Only points that stay visible count; NaN where a clip has none.
    """

    sprite_error: float
    sprite_within: float
    ground_error: float
    ground_length: float


def flow_score(displacement: Num[np.ndarray, "frames frames patches 2"], truth: TrueMotion) -> FlowScore:
    """Score a displacement field [F, F, P, 2] in patches against the truth of the same grid."""
    others = ~np.eye(len(displacement), dtype=bool)[:, :, None]
    on_sprite = truth.owner[:, None] >= 0
    error = np.linalg.norm(displacement - truth.displacement, axis=-1)
    sprite, ground = (truth.visible & others & kind for kind in (on_sprite, ~on_sprite))
    return FlowScore(
        sprite_error=_mean(error[sprite]),
        sprite_within=_mean(error[sprite] <= 1),
        ground_error=_mean(error[ground]),
        ground_length=_mean(np.linalg.norm(displacement, axis=-1)[ground]),
    )


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if values.size else float("nan")


@torch.no_grad()
def block_scores(backbone: Backbone, clip: WorldClip) -> list[FlowScore]:
    """Score the attention motion flow that every block of a model sees in a clip (timestep 0, empty prompt)."""
    latents = backbone.encode_video(clip.frames)
    grid, words = backbone.grid(latents), backbone.encode_prompt("")
    truth = clip.displacement(grid.frames, grid.height, grid.width)
    blocks = range(backbone.geometry.blocks)
    captured = backbone.capture(latents, 0, words, blocks, backbone.default_position(grid))
    return [flow_score(hard_displacement(captured[block], grid).cpu().numpy(), truth) for block in blocks]
