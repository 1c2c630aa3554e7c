"""Measurement of clips of the synthetic world from their pixels alone, without the prompt.

`detect_sprite` finds the sprite of a clip, its colour and shape, and the background; `track_cosine` and
`position_error` compare tracks; `flow_score` compares an attention motion flow with the ground truth.
`benchmarks/mini.py` measures the accuracy of the detection on rendered clips.

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

from ditflow.backbones.contract import CLEAN, Backbone
from ditflow.mini.world import BACKGROUNDS, COLOURS, GROUNDS, REACH, SHAPES, TrueMotion, WorldClip, render, sample_scene
from ditflow.motion.amf import hard_displacement

Array = NDArray[np.floating[Any]]

MIN_CONFIDENCE = 0.5
"""Confidence (1: a perfect silhouette, 0: none) from which a sprite counts as found in a frame."""
RADII = tuple(range(9, 21))
"""Candidate radii in pixels, in clips of 64x64."""

_LEVELS = 16
_WINDOW = 1.15 * REACH


@dataclass(frozen=True, eq=False)
class Detection:
    """The detected sprite and background of a clip of one sprite.

    colour, shape, background: words of the world. centres [T, 2]: the sprite's centre (x, y) in pixels; radii [T] in
    pixels; confidence [T] in [-1, 1]: contrast between the silhouette and its surroundings.
    """

    colour: str
    shape: str
    background: str
    centres: Array
    radii: Array
    confidence: Array

    @property
    def found(self) -> NDArray[np.bool_]:
        """The frames [T] in which the sprite is found."""
        return self.confidence >= MIN_CONFIDENCE


def detect_sprite(frames: NDArray[np.uint8]) -> Detection:
    """Detect the sprite of a clip of one sprite; frames uint8 [T, H, W, 3].

    The background is the one with the highest mean likelihood of all pixels. Pixels unlikely under it are evidence of
    the sprite; the shape is the template that matches the evidence best at any position and size, summed over the
    frames; the colour is the likeliest of the pixels inside it.
    """
    colours, grounds = _palettes()
    levels = _levels(frames)
    background = max(BACKGROUNDS, key=lambda name: grounds[name][levels].mean())
    seen = [name for name in COLOURS if name not in GROUNDS[background].hidden_colours]
    sprite = np.logaddexp.reduce([colours[name] for name in seen]) - np.log(len(seen))
    evidence = torch.from_numpy((sprite - grounds[background])[levels] / 4).clamp(-1, 1).float()
    fits = {shape: _fit(evidence, shape) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name].confidence.sum())
    fit = fits[shape]
    inside = levels[_silhouettes(fit, shape, frames.shape[1:3])]
    colour = max(seen, key=lambda name: colours[name][inside].sum())
    return Detection(colour, shape, background, fit.centres, fit.radii, fit.confidence)


def track_cosine(detection: Detection, trajectory: Array) -> float:
    """Return the cosine in [-1, 1] of a sprite's track and a true one [T, 2], both centred.

    Over the frames in which the sprite is found; 0 if these are fewer than half, or it does not move.
    """
    found = detection.found
    if found.mean() < 0.5:
        return 0.0
    one, other = (track[found] - track[found].mean(axis=0) for track in (detection.centres, trajectory))
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float((one * other).sum() / lengths) if lengths else 0.0


def position_error(detection: Detection, trajectory: Array) -> float:
    """Return the mean distance in pixels of the detected centres from a true trajectory [T, 2], in all frames."""
    return float(np.linalg.norm(detection.centres - trajectory, axis=-1).mean())


# ---- colours


def _levels(frames: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Return the colour cell of every pixel of uint8 [..., 3]: its index in a palette."""
    red, green, blue = np.moveaxis(frames // (256 // _LEVELS), -1, 0).astype(np.intp)
    return (red * _LEVELS + green) * _LEVELS + blue


_Palette = dict[str, Array]


@cache
def _palettes(clips: int = 768) -> tuple[_Palette, _Palette]:
    """Return the log-likelihoods of colour cells [_LEVELS**3] for every sprite colour and every background.

    Counted on training clips, and blurred by one cell, since generated colours deviate a little.
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
    confidence: Array


def _fit(evidence: Tensor, shape: str) -> _Fit:
    """Return the best position and size of a shape in every frame; evidence [T, H, W] in [-1, 1] is high on sprites."""
    maps = _correlations(evidence, shape).numpy()
    best = maps.reshape(len(maps), -1).argmax(axis=1)
    which, row, column = np.unravel_index(best, maps.shape[1:])
    centres = np.stack([column, row], axis=-1).astype(float)
    return _Fit(centres, np.array(RADII, float)[which], maps[np.arange(len(maps)), which, row, column])


def _correlations(evidence: Tensor, shape: str) -> Tensor:
    """Return the correlation [T, R, H, W] of every frame with the shape's template of every radius and position."""
    height, width = evidence.shape[1:]
    # Padding for the half of a template beyond one edge: what wraps around is cropped.
    size = (max(height, _reach() + 1) + _reach(), max(width, _reach() + 1) + _reach())
    products = torch.fft.rfft2(evidence, s=size)[:, None] * _spectra(shape, size)
    return torch.fft.irfft2(products, s=size)[..., :height, :width]


@cache
def _spectra(shape: str, size: tuple[int, int]) -> Tensor:
    """Return the conjugate spectra of the templates; times a frame's spectrum they are the correlation's."""
    templates, reach = _templates(shape), _reach()
    placed = torch.zeros(len(templates), *size)
    placed[:, : 2 * reach + 1, : 2 * reach + 1] = templates
    return torch.fft.rfft2(placed.roll((-reach, -reach), dims=(1, 2))).conj()


def _reach() -> int:
    """Return the pixels from the centre of a template to its edge."""
    return int(np.ceil(_WINDOW * RADII[-1]))


@cache
def _templates(shape: str) -> Tensor:
    """Return a template per radius: half the mean inside the shape minus half the mean around it."""
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
    """Return the mask [T, H, W] of a fitted shape."""
    row, column = np.indices(size)
    x = (column - fit.centres[:, 0, None, None]) / fit.radii[:, None, None]
    y = (row - fit.centres[:, 1, None, None]) / fit.radii[:, None, None]
    return SHAPES[shape](x, y) <= 0


# ---- attention motion flow against the ground truth


@dataclass(frozen=True)
class FlowScore:
    """Accuracy of a displacement field, in patches, over pairs of different frames.

    sprite_error: mean end-point error of points on sprites; sprite_within: their fraction with an error of at most 1.
    ground_error: mean end-point error of background points; ground_length: their mean displacement in the field.
    Over points visible in both frames; NaN if a clip has none.
    """

    sprite_error: float
    sprite_within: float
    ground_error: float
    ground_length: float


def flow_score(displacement: Num[np.ndarray, "frames frames patches 2"], truth: TrueMotion) -> FlowScore:
    """Score a displacement field [F, F, P, 2] in patches against the ground truth of the same grid."""
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
    """Score the attention motion flow of every block of a model for a clip (timestep 0, empty prompt)."""
    latents = backbone.encode_video(clip.frames)
    grid = backbone.layout.grid(latents.shape)
    truth = clip.displacement(grid.frames, grid.height, grid.width)
    blocks = range(backbone.layout.blocks)
    captured = backbone.capture(latents, CLEAN, backbone.condition(""), blocks)
    return [flow_score(hard_displacement(captured[block], grid).cpu().numpy(), truth) for block in blocks]
