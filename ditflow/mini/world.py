"""A synthetic world of short clips with exact ground-truth motion: textured sprites over textured backgrounds.

`sample_scene` samples a `Scene`, `render` makes a `WorldClip` of it, and `WorldClip.displacement` has its true
motion. Needs numpy alone; a seed always gives the same bytes.

Axes: T pixel frames, F latent frames, H and W pixels, K sprites, P patches (row by row), N loose points,
S texels along a side of a background.

Scenes are in world units, 64 across the shorter side of the picture, with the origin in the centre, x to the right
and y down. Scene time runs from 0 (first frame) to 1 (last frame), so a scene can be rendered at any size and number
of frames. Clips are in pixels; whole coordinates are pixel centres. A sprite's path is relative to the picture: the
camera moves only the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ditflow.errors import DitflowError

Array = NDArray[np.floating[Any]]
Point = tuple[float, float]
Pixels = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]
Option = TypeVar("Option")

SPLITS = ("train", "eval")
SHOTS = ("rest", "rest", "pan", "pan", "zoom")
"""Camera moves, repeated by their frequency."""
PICTURE_UNITS = 64.0
"""World units across the shorter side of a picture."""

COLOURS = {
    "red": ((214, 32, 36), (255, 176, 170)),
    "orange": ((255, 132, 0), (255, 222, 160)),
    "yellow": ((255, 222, 30), (168, 118, 0)),
    "green": ((30, 165, 60), (180, 245, 180)),
    "blue": ((36, 76, 225), (170, 200, 255)),
    "purple": ((140, 42, 190), (232, 180, 250)),
    "white": ((248, 248, 248), (125, 125, 132)),
    "black": ((22, 22, 26), (130, 130, 136)),
}
"""By colour word: the RGB of the sprite and of its pattern."""
TEXTURES = ("plain", "striped", "dotted", "checkered")


# ---- the scene


class WorldError(DitflowError, ValueError):
    """A scene or clip of the synthetic world cannot be made; the code says why."""

    default_code = "world-option-invalid"


@dataclass(frozen=True)
class Appearance:
    """Appearance of a sprite, in words of `SHAPES`, `COLOURS` and `TEXTURES`; WorldError for others."""

    shape: str
    colour: str
    texture: str = "plain"

    def __post_init__(self) -> None:
        _check_word("shape", self.shape, SHAPES)
        _check_word("colour", self.colour, COLOURS)
        _check_word("texture", self.texture, TEXTURES)


@dataclass(frozen=True)
class Path:
    """Position and size of a sprite as a function of time.

    The centre moves from `start` to `start + travel` along a parabola whose middle lies `bend` units to the right
    of the straight line. `acceleration` in [-1, 1] is the change of speed over the clip relative to twice the mean
    speed: 1 starts from rest, -1 ends at rest. The radius changes from the first value of `radius` to the second.
    """

    start: Point
    travel: Point = (0.0, 0.0)
    bend: float = 0.0
    acceleration: float = 0.0
    radius: Point = (12.0, 12.0)

    def centre(self, time: Array) -> Array:
        """Return the centre [..., 2] in world units at scene times [...]."""
        way = time + self.acceleration * (time * time - time)
        travel = np.asarray(self.travel)
        right = np.array([-travel[1], travel[0]]) / (np.hypot(*travel) or 1.0)
        sideways = self.bend * 4 * way * (1 - way)
        return np.asarray(self.start) + way[..., None] * travel + sideways[..., None] * right

    def size(self, time: Array) -> Array:
        """Return the radius in world units at scene times of any shape."""
        first, last = self.radius
        return first * (last / first) ** time


@dataclass(frozen=True)
class Sprite:
    """One moving object: its appearance and path."""

    appearance: Appearance
    path: Path


@dataclass(frozen=True)
class Background:
    """The background: a word of `BACKGROUNDS` (WorldError for others) and its start.

    `origin` is the background point in the picture's centre at time 0.
    """

    name: str
    origin: Point = (0.0, 0.0)
    brightness: float = 1.0

    def __post_init__(self) -> None:
        _check_word("background", self.name, BACKGROUNDS)


@dataclass(frozen=True)
class Camera:
    """Camera motion over the clip: `pan` in world units, `zoom` as the magnification of the background."""

    pan: Point = (0.0, 0.0)
    zoom: float = 1.0

    def centre(self, time: Array) -> Array:
        """Return the background point [..., 2] in the picture's centre at times [...], relative to the origin."""
        return time[..., None] * np.asarray(self.pan)

    def magnification(self, time: Array) -> Array:
        """Return the magnification of the background at scene times of any shape."""
        return self.zoom**time


@dataclass(frozen=True)
class Scene:
    """The content of a clip; later sprites occlude earlier ones."""

    sprites: tuple[Sprite, ...]
    background: Background
    camera: Camera = Camera()


def swap_appearance(scene: Scene, other: Scene) -> Scene:
    """Return `scene`'s motion (paths, camera) with the appearance of `other` (sprites, background).

    Raises WorldError for different numbers of sprites.
    """
    if len(scene.sprites) != len(other.sprites):
        raise WorldError(
            f"the scene has {len(scene.sprites)} sprites, the one with the other appearance {len(other.sprites)}: "
            "sample both with the same `sprites`.",
            code="world-sprites-differ",
        )
    pairs = zip(scene.sprites, other.sprites, strict=True)
    sprites = tuple(replace(sprite, appearance=source.appearance) for sprite, source in pairs)
    return replace(scene, sprites=sprites, background=other.background)


def _check_word(kind: str, word: str, valid: Sequence[str] | dict[str, Any]) -> None:
    if word not in valid:
        raise WorldError(
            f"{word!r} is not a {kind} of this world: it has {', '.join(valid)}.", code="world-word-unknown"
        )


# ---- the prompts


def prompt_of(scene: Scene, motion: bool = False) -> str:
    """Return the scene in words of `VOCABULARY`, separated by spaces and commas.

    Without `motion` the prompt describes only the appearance; with it, also the directions of sprites and camera,
    growing and zooming.
    """
    names = [_name_of(sprite.appearance) for sprite in scene.sprites]
    ground = f"over the {scene.background.name}"
    if not motion:
        return f"{' and '.join(names)} moving {ground}"
    things = [f"{name} {_path_words(sprite.path)}" for name, sprite in zip(names, scene.sprites, strict=True)]
    return f"{' and '.join(things)} {ground}{_camera_words(scene.camera)}"


def _name_of(appearance: Appearance) -> str:
    article = "an" if appearance.colour[0] in "aeiou" else "a"
    words = [article, appearance.colour, appearance.texture, appearance.shape]
    return " ".join(word for word in words if word != "plain")


def _path_words(path: Path) -> str:
    growth = path.radius[1] / path.radius[0]
    change = ["growing"] if growth > 1.1 else ["shrinking"] if growth < 1 / 1.1 else []
    return " and ".join([" ".join(["moving", *_direction_words(path.travel)]), *change])


def _camera_words(camera: Camera) -> str:
    moves = [f"panning {' '.join(_direction_words(camera.pan))}"] if any(camera.pan) else []
    moves += [f"zooming {'in' if camera.zoom > 1 else 'out'}"] if camera.zoom != 1 else []
    return f", camera {' and '.join(moves)}" if moves else ""


def _direction_words(move: Point) -> list[str]:
    """Return the nearest of eight directions as one or two words, none for no move."""
    least = np.hypot(*move) * np.sin(np.pi / 8)
    down, across = ("down" if move[1] > 0 else "up"), ("right" if move[0] > 0 else "left")
    return [word for word, share in ((down, move[1]), (across, move[0])) if abs(share) > least]


# ---- sampling


def sample_scene(seed: int, split: str = "train", *, sprites: int | None = None, shot: str | None = None) -> Scene:
    """Return the scene of a seed; the same seed of another split is an unrelated scene.

    `sprites` (1 or 2) and `shot` are sampled if not given. Raises WorldError for an unknown split or shot.
    """
    rng = _generator(seed, split)
    drawn_count, drawn_shot = int(rng.choice([1, 2], p=[0.75, 0.25])), _pick(rng, SHOTS)
    background = _sample_background(rng)
    paths = _sample_paths(rng, drawn_count if sprites is None else sprites)
    looks = _sample_appearances(rng, background, len(paths))
    things = tuple(Sprite(look, path) for look, path in zip(looks, paths, strict=True))
    return Scene(things, background, _sample_camera(rng, shot or drawn_shot))


def sample_pair(
    seed: int,
    split: str = "train",
    *,
    sprites: int | None = None,
    shot: str | None = None,
    same_ground: bool = False,
) -> tuple[Scene, Scene]:
    """Return a reference scene and its motion with another appearance: every colour, shape and the background differ.

    With `same_ground` the background is the same.
    """
    reference = sample_scene(seed, split, sprites=sprites, shot=shot)
    rng = _generator(seed, split, purpose=1)
    while True:
        background = reference.background if same_ground else _sample_background(rng)
        looks = _sample_appearances(rng, background, len(reference.sprites))
        others = tuple(replace(s, appearance=look) for s, look in zip(reference.sprites, looks, strict=True))
        if not _looks_differ(reference.sprites, others):
            continue
        if same_ground or background.name != reference.background.name:
            return reference, replace(reference, sprites=others, background=background)


def _generator(seed: int, split: str, purpose: int = 0) -> np.random.Generator:
    _check_word("split", split, SPLITS)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), purpose)))


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _looks_differ(some: Sequence[Sprite], others: Sequence[Sprite]) -> bool:
    pairs = [(one.appearance, other.appearance) for one, other in zip(some, others, strict=True)]
    return all(one.colour != other.colour and one.shape != other.shape for one, other in pairs)


def _sample_background(rng: np.random.Generator) -> Background:
    origin = rng.uniform(0, GROUND_UNITS, 2)
    brightness = float(rng.uniform(0.92, 1.04))
    return Background(_pick(rng, BACKGROUNDS), (float(origin[0]), float(origin[1])), brightness)


def _sample_appearances(rng: np.random.Generator, background: Background, count: int) -> list[Appearance]:
    """Return appearances whose colours and shapes all differ, in colours that contrast with the background."""
    colours = [colour for colour in COLOURS if colour not in GROUNDS[background.name].hidden_colours]
    chosen = [colours[index] for index in rng.permutation(len(colours))[:count]]
    shapes = [tuple(SHAPES)[index] for index in rng.permutation(len(SHAPES))[:count]]
    return [Appearance(s, colour, _pick(rng, TEXTURES)) for s, colour in zip(shapes, chosen, strict=True)]


def _sample_paths(rng: np.random.Generator, count: int) -> list[Path]:
    """Return paths whose start and end points do not overlap; they may cross in between."""
    if count not in (1, 2):
        raise WorldError(f"{count} sprites came, expected 1 or 2.", code="world-sprites-invalid")
    radii = (12.0, 18.0) if count == 1 else (10.0, 13.0)
    while True:
        paths = [_sample_path(rng, *radii) for _ in range(count)]
        if count == 1 or _gap(paths[0], paths[1]) > 0:
            return paths


def _gap(one: Path, other: Path) -> float:
    """Return the smaller of the gaps between two sprites at the start and at the end, in world units."""
    ends = np.array([0.0, 1.0])
    apart = np.linalg.norm(one.centre(ends) - other.centre(ends), axis=-1)
    return float((apart - 0.9 * (one.size(ends) + other.size(ends))).min())


def _sample_path(rng: np.random.Generator, smallest: float, largest: float) -> Path:
    """Return a path of 15 to 40 units with both ends inside the picture, bent towards its centre."""
    grows, bends, speeds = rng.random(3) < (0.35, 0.4, 0.4)
    first, last = rng.uniform(smallest, largest, 2)
    radius = (float(first), float(last if grows else first))
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(15.0, 40.0)
    travel = length * np.array([np.cos(angle), np.sin(angle)])
    room = PICTURE_UNITS / 2 - 0.6 * max(radius)
    start = rng.uniform(-room - np.minimum(travel, 0), room - np.maximum(travel, 0))
    middle = start + travel / 2
    inward = -np.sign(middle[1] * travel[0] - middle[0] * travel[1])
    bend = inward * rng.uniform(0.2, 0.45) * length
    acceleration = rng.uniform(0.5, 0.95) * _pick(rng, (-1, 1))
    return Path(
        start=(float(start[0]), float(start[1])),
        travel=(float(travel[0]), float(travel[1])),
        bend=float(bend) if bends else 0.0,
        acceleration=float(acceleration) if speeds else 0.0,
        radius=radius,
    )


def _sample_camera(rng: np.random.Generator, shot: str) -> Camera:
    _check_word("shot", shot, tuple(dict.fromkeys(SHOTS)))
    direction = _pick(rng, ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)))
    length, factor = float(rng.uniform(12.0, 32.0)), float(rng.uniform(1.25, 1.6))
    if shot == "pan":
        return Camera(pan=(length * direction[0], length * direction[1]))
    if shot == "zoom":
        return Camera(zoom=factor if rng.random() < 0.5 else 1 / factor)
    return Camera()


# ---- the sprites
# Signed distances are in units of the radius, negative inside, for points measured from the sprite's centre.
# Every shape's centroid is its centre.


def _ball(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1.0


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86


def _triangle(x: Array, y: Array) -> Array:
    slope = np.sqrt(0.75) * np.abs(x) - 0.5 * y
    return np.maximum(slope, y) - 0.62


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.74) - 0.28


def _cross(x: Array, y: Array) -> Array:
    across, down = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(across, down) - 1.0, np.minimum(across, down) - 0.42)


def _star(x: Array, y: Array) -> Array:
    """Fold the plane onto half of the upper tip (angles clockwise from up), then measure the distance to its edge."""
    up = -y
    for mirror in (0.4 * np.pi, 0.2 * np.pi):
        x = np.abs(x)
        beyond = 2 * np.maximum(x * np.cos(mirror) - up * np.sin(mirror), 0)
        x, up = x - beyond * np.cos(mirror), up + beyond * np.sin(mirror)
    tip, notch = np.array([0.0, 1.18]), 0.56 * np.array([np.sin(0.2 * np.pi), np.cos(0.2 * np.pi)])
    outward = np.array([tip[1] - notch[1], notch[0]]) / np.hypot(*(tip - notch))
    return outward[0] * x + outward[1] * (up - tip[1])


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "ball": _ball,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
"""Signed distance functions by shape word. All shapes fit in a circle of `REACH` radii."""
REACH = 1.25


PATTERN_STRENGTH = 0.6
"""Opacity of a texture's second colour: low enough not to hide the shape."""


def _pattern(texture: str, x: Array, y: Array, radius: Array) -> Array:
    """Return the opacity of the pattern at each point [N], in [0, 1]; `radius` [N] in pixels.

    Edges are one pixel wide. Stripes are diagonal, so that they show motion along both axes.
    """
    if texture == "striped":
        return np.clip(0.5 + np.sin((x + y) * 7.2) * radius / 10.2, 0, 1)
    if texture == "checkered":
        return np.clip(0.5 + np.sin(x * 6.3) * np.sin(y * 6.3) * radius / 6.3, 0, 1)
    if texture == "dotted":
        x, y = x % 0.46 - 0.23, y % 0.46 - 0.23
        return np.clip(0.5 + (0.14 - np.sqrt(x * x + y * y)) * radius, 0, 1)
    return np.zeros_like(x)


def _sprite_colours(look: Appearance, x: Array, y: Array, depth: Array, radius: Array) -> Array:
    """Return the RGB [N, 3] of points: pattern, strong light from the upper left, a dark rim one pixel wide.

    The shading makes every part of a sprite distinguishable, so that its motion is visible. `depth` [N] and
    `radius` [N] are in pixels.
    """
    colour, accent = np.array(COLOURS[look.colour], np.float32)
    light = np.clip(0.88 - 0.32 * (x + y), 0.45, 1.15) * np.clip(0.25 + 0.5 * depth, 0.45, 1)
    share = PATTERN_STRENGTH * _pattern(look.texture, x, y, radius)
    return (colour + share[:, None] * (accent - colour)) * light[:, None]


# ---- the backgrounds
# Textures are [S, S, 3] RGB with S = GROUND_UNITS * TEXELS, and tile seamlessly.

GROUND_UNITS = 256
"""Period of a background in world units."""
TEXELS = 2
"""Texels per world unit."""


def _rgb(red: int, green: int, blue: int) -> Array:
    return np.array([red, green, blue], np.float32)


def _mix(dark: Array, light: Array, share: Array) -> Array:
    return dark + np.clip(share, 0, 1)[..., None] * (light - dark)


def _blur(plane: Array, wide: float, tall: float) -> Array:
    """Blur [S, S] around the torus by Gaussians of these standard deviations in world units."""
    down = np.fft.fftfreq(plane.shape[0], 1 / TEXELS)[:, None]
    across = np.fft.rfftfreq(plane.shape[1], 1 / TEXELS)[None]
    keep = np.exp(-2 * np.pi**2 * ((down * tall) ** 2 + (across * wide) ** 2))
    return np.fft.irfft2(np.fft.rfft2(plane) * keep, plane.shape)


def _noise(rng: np.random.Generator, wide: float, tall: float) -> Array:
    """Return smooth noise [S, S] of mean 0 and standard deviation 1, with grains of these sizes in world units."""
    size = GROUND_UNITS * TEXELS
    grains = _blur(rng.standard_normal((size, size)), wide, tall)
    return (grains - grains.mean()) / grains.std()


def _plane() -> tuple[Array, Array]:
    """Return x [1, S] and y [S, 1] in world units."""
    axis = np.arange(GROUND_UNITS * TEXELS) / TEXELS
    return axis[None], axis[:, None]


def _grass(rng: np.random.Generator) -> Array:
    blades = 0.5 + 0.3 * _noise(rng, 0.6, 2.6) + 0.12 * _noise(rng, 6.0, 6.0)
    return _mix(_rgb(28, 88, 26), _rgb(138, 196, 74), blades)


def _sand(rng: np.random.Generator) -> Array:
    x, y = _plane()
    phase = 2 * np.pi * (32 * y + 8 * x) / GROUND_UNITS + 0.9 * _noise(rng, 9.0, 9.0)
    ripples = 0.5 + 0.35 * np.sin(phase) + 0.13 * _noise(rng, 0.7, 0.7)
    return _mix(_rgb(196, 158, 100), _rgb(240, 212, 156), ripples)


def _water(rng: np.random.Generator) -> Array:
    crests = 1 - 1.6 * np.abs(_noise(rng, 5.0, 1.5))
    return _mix(_rgb(18, 108, 168), _rgb(128, 216, 236), crests + 0.1 * _noise(rng, 12.0, 5.0))


def _snow(rng: np.random.Generator) -> Array:
    drifts, glitter = _noise(rng, 5.0, 3.5), _noise(rng, 0.7, 0.7)
    return _mix(_rgb(186, 204, 230), _rgb(252, 253, 255), 0.62 + 0.3 * drifts + 0.16 * glitter)


def _bricks(rng: np.random.Generator) -> Array:
    tone, past_joint = _courses(rng, 28, 16)
    wall = _mix(_rgb(112, 46, 36), _rgb(204, 118, 90), tone + 0.12 * _noise(rng, 0.9, 0.9))
    return _mix(wall, _rgb(214, 204, 190), (past_joint < 1.6).astype(float))


def _courses(rng: np.random.Generator, rows: int, columns: int) -> tuple[Array, Array]:
    """Lay rows of pieces with irregular joints, so that no two places look alike.

    Returns for every texel its piece's tone in [0, 1], and its distance in world units to the nearer of the vertical
    joint on its left and the horizontal joint above.
    """
    x, y = _plane()
    tall, long = GROUND_UNITS / rows, GROUND_UNITS / columns
    row, cell = (y // tall).astype(int), (x // long).astype(int)
    joints = (np.arange(columns) + rng.uniform(0.2, 0.8, (rows, columns))) * long
    past = x - joints[row, cell]
    tone = rng.uniform(0, 1, (rows, columns))[row, (cell + (past >= 0)) % columns]
    return tone, np.minimum(np.where(past >= 0, past, np.inf), y % tall)


def _night_sky(rng: np.random.Generator) -> Array:
    sky = _mix(_rgb(8, 10, 34), _rgb(44, 38, 92), 0.4 + 0.35 * _noise(rng, 9.0, 6.0))
    size = GROUND_UNITS * TEXELS
    lights = np.zeros((size, size))
    lights[tuple(rng.integers(size, size=(2, 1300)))] = rng.uniform(3, 18, 1300)
    return _mix(sky, _rgb(255, 250, 225), _blur(lights, 0.55, 0.55))


def _stone(rng: np.random.Generator) -> Array:
    nearest, second, tone = _cobbles(rng.uniform(0.15, 0.85, (20, 20, 2)), rng.uniform(0.2, 0.9, (20, 20)))
    slab = _mix(_rgb(104, 106, 112), _rgb(176, 176, 178), tone + 0.14 * _noise(rng, 0.8, 0.8))
    return _mix(_rgb(58, 58, 64), slab, (second - nearest) * 7)


def _cobbles(sites: Array, tones: Array) -> tuple[Array, Array, Array]:
    """Return for every texel the distances to its two nearest sites, in cells, and the nearest site's tone.

    `sites` [C, C, 2] are positions (y, x) within the cells of a torus of C x C cells.
    """
    x, y = (axis * len(sites) / GROUND_UNITS for axis in _plane())
    nearest = second = np.full((y.size, x.size), np.inf)
    tone = np.zeros_like(nearest)
    for row, column in np.ndindex(3, 3):
        cell_y, cell_x = np.floor(y).astype(int) + row - 1, np.floor(x).astype(int) + column - 1
        cell = (cell_y % len(sites), cell_x % len(sites))
        distance = np.hypot(cell_y + sites[cell][..., 0] - y, cell_x + sites[cell][..., 1] - x)
        tone = np.where(distance < nearest, tones[cell], tone)
        nearest, second = np.minimum(nearest, distance), np.minimum(second, np.maximum(nearest, distance))
    return nearest, second, tone


def _wood(rng: np.random.Generator) -> Array:
    tone, past_joint = _courses(rng, 16, 6)
    grain = 0.2 * _noise(rng, 6.0, 0.8) + 0.15 * _noise(rng, 3.0, 3.0)
    floor = _mix(_rgb(92, 52, 22), _rgb(186, 122, 66), 0.15 + 0.7 * tone + grain)
    return _mix(floor, _rgb(42, 22, 10), (past_joint < 1.3).astype(float))


@dataclass(frozen=True)
class Ground:
    """A background's painter, and the sprite colours that are not sampled on it for lack of contrast."""

    paint: Callable[[np.random.Generator], Array]
    hidden_colours: tuple[str, ...] = ()


GROUNDS = {
    "grass": Ground(_grass, ("green",)),
    "sand": Ground(_sand, ("yellow", "orange")),
    "water": Ground(_water, ("blue",)),
    "snow": Ground(_snow, ("white",)),
    "bricks": Ground(_bricks, ("red", "orange")),
    "night sky": Ground(_night_sky, ("black", "blue", "purple")),
    "stone": Ground(_stone, ("black", "white")),
    "wood": Ground(_wood, ("orange",)),
}
BACKGROUNDS = tuple(GROUNDS)


@cache
def ground_texture(name: str) -> Array:
    """Return the texture [S, S, 3] float32 RGB in 0..255, smooth enough for bilinear sampling."""
    rng = np.random.default_rng(np.random.SeedSequence(BACKGROUNDS.index(name), spawn_key=(len(SPLITS),)))
    painted = np.moveaxis(GROUNDS[name].paint(rng), -1, 0)
    return np.stack([_blur(plane, 0.4, 0.4) for plane in painted], axis=-1).astype(np.float32)


# ---- rendering


@dataclass(frozen=True)
class _View:
    """Resolution of a rendering: frames, height and width in pixels."""

    frames: int
    height: int
    width: int

    @property
    def scale(self) -> float:
        """Pixels per world unit."""
        return min(self.height, self.width) / PICTURE_UNITS

    @property
    def centre(self) -> Array:
        """The pixel coordinates (x, y) of the picture's centre."""
        return np.array([self.width - 1, self.height - 1]) / 2

    def scene_time(self, frame: Array) -> Array:
        """Return scene times of pixel frames, which may be fractional."""
        return frame / max(self.frames - 1, 1)

    def axes(self) -> tuple[Array, Array, Array]:
        """Return the scene times [T], the pixel columns' x [W] and the pixel rows' y [H] in world units."""
        x, y = ((np.arange(n) - (n - 1) / 2) / self.scale for n in (self.width, self.height))
        return self.scene_time(np.arange(self.frames, dtype=float)), x, y


@dataclass(frozen=True, eq=False)
class WorldClip:
    """A rendered scene with its ground truth.

    `frames` [T, H, W, 3] uint8 RGB; `prompt` describes the appearance, not the motion; `masks` [K, T, H, W] bool
    are the visible pixels of each sprite; `trajectories` [K, T, 2] float32 are the sprites' centres (x, y) in
    pixels, visible or not.
    """

    frames: NDArray[np.uint8]
    prompt: str
    masks: NDArray[np.bool_]
    trajectories: NDArray[np.float32]
    scene: Scene

    def displacement(
        self, grid_frames: int, grid_height: int, grid_width: int, temporal_compression: int = 4
    ) -> TrueMotion:
        """Return the true motion on a grid, see `true_motion`."""
        grid = (grid_frames, grid_height, grid_width)
        return true_motion(self.scene, self.frames.shape[:3], grid, temporal_compression)


@dataclass(frozen=True, eq=False)
class TrueMotion:
    """The true motion of a clip on a grid of F latent frames of P patches (row by row).

    `displacement` [F, F, P, 2] float32: at index [i, j, p] the displacement (dx, dy), in patches, from frame i to
    frame j of the surface point at the centre of patch p. `owner` [F, P]: the sprite at that centre in frame i, -1
    for background. `visible` [F, F, P] bool: whether the point is inside the picture and unoccluded in frame j.
    """

    displacement: NDArray[np.float32]
    owner: NDArray[np.int64]
    visible: NDArray[np.bool_]


def render(scene: Scene, frames: int = 17, height: int = 64, width: int = 64) -> WorldClip:
    """Render a scene: `frames` pictures evenly spaced over the scene's time."""
    view = _View(frames, height, width)
    picture = _render_ground(scene, view)
    masks = np.zeros((len(scene.sprites), frames, height, width), bool)
    for index, sprite in enumerate(scene.sprites):
        where, coverage, colours = _render_sprite(sprite, view)
        picture[where] += coverage[:, None] * (colours - picture[where])
        frame, row, column = where
        masks[:index, frame, row, column] &= coverage <= 0.5
        masks[index, frame, row, column] = coverage > 0.5
    centres = [sprite.path.centre(view.axes()[0]) * view.scale + view.centre for sprite in scene.sprites]
    trajectories = np.array(centres, np.float32).reshape(-1, frames, 2)
    pixels = (np.clip(picture, 0, 255) + 0.5).astype(np.uint8)
    return WorldClip(pixels, prompt_of(scene), masks, trajectories, scene)


def _render_ground(scene: Scene, view: _View) -> Array:
    """Return the background [T, H, W, 3] in RGB; for a static camera it is rendered once."""
    time, x, y = view.axes()
    if scene.camera == Camera():
        time = time[:1]
    enlarged = scene.camera.magnification(time)[:, None]
    origin = scene.camera.centre(time) + np.asarray(scene.background.origin)
    picture = _bilinear(
        ground_texture(scene.background.name), origin[:, :1] + x / enlarged, origin[:, 1:] + y / enlarged
    )
    return np.repeat(picture * np.float32(scene.background.brightness), view.frames // len(time), axis=0)


def _bilinear(texture: Array, x: Array, y: Array) -> Array:
    """Return the torus texture [S, S, 3] at world coordinates x [T, W] by y [T, H], as [T, H, W, 3]."""
    (left, right, share_x), (top, bottom, share_y) = _neighbours(x), _neighbours(y)
    size, flat = len(texture), texture.reshape(-1, 3)
    top, bottom = top[:, :, None] * size, bottom[:, :, None] * size
    left, right = left[:, None], right[:, None]
    share_x, share_y = share_x[:, None, :, None], share_y[:, :, None, None]
    upper = flat[top + left] * (1 - share_x) + flat[top + right] * share_x
    lower = flat[bottom + left] * (1 - share_x) + flat[bottom + right] * share_x
    return upper + share_y * (lower - upper)


def _neighbours(place: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Return the texels before and after world coordinates of any shape, and the weight of the latter."""
    texel = place * TEXELS
    before = np.floor(texel)
    first, size = before.astype(np.int64), GROUND_UNITS * TEXELS
    return first % size, (first + 1) % size, (texel - before).astype(np.float32)


def _render_sprite(sprite: Sprite, view: _View) -> tuple[Pixels, Array, Array]:
    """Return the pixels near a sprite as (frame, row, column) [N], their coverage [N], their RGB [N, 3]."""
    time, x, y = view.axes()
    size, centre = sprite.path.size(time)[:, None], sprite.path.centre(time)
    x, y = ((x - centre[:, :1]) / size).astype(np.float32), ((y - centre[:, 1:]) / size).astype(np.float32)
    frame, row, column = np.nonzero((np.abs(y) < REACH)[:, :, None] & (np.abs(x) < REACH)[:, None, :])
    x, y, radius = x[frame, column], y[frame, row], (size[frame, 0] * view.scale).astype(np.float32)
    depth = -SHAPES[sprite.appearance.shape](x, y) * radius
    colours = _sprite_colours(sprite.appearance, x, y, depth, radius)
    return (frame, row, column), np.clip(0.5 + depth, 0, 1), colours


# ---- true motion


def latent_frame_times(latent_frames: int, temporal_compression: int = 4) -> Array:
    """Return for each latent frame [F] the mean of its pixel frames, in pixel frames.

    CogVideoX' causal autoencoder encodes pixel frame 0 alone and frames 4(f-1)+1 .. 4f as latent frame f, so
    the times of compression 4 are 0, 2.5, 6.5, 10.5 ...
    """
    later = temporal_compression * (np.arange(latent_frames) - 1) + (temporal_compression + 1) / 2
    return np.maximum(later, 0.0)


def true_motion(
    scene: Scene, size: tuple[int, int, int], grid: tuple[int, int, int], temporal_compression: int = 4
) -> TrueMotion:
    """Return the displacement of the point at each patch centre of each latent frame to every latent frame.

    size: frames, height and width of the clip in pixels; grid: latent frames and patches along height and width.
    A latent frame is at the mean time of its pixel frames, see `latent_frame_times`. Raises WorldError if the latent
    frames do not span the clip.
    """
    (frames, height, width), (grid_frames, grid_height, grid_width) = size, grid
    if (grid_frames - 1) * temporal_compression + 1 != frames:
        expected = (frames - 1) / temporal_compression + 1
        raise WorldError(
            f"{grid_frames} latent frames at temporal compression {temporal_compression} do not span "
            f"a clip of {frames} frames: expected {expected:g} latent frames.",
            code="world-grid-mismatch",
        )
    view = _View(frames, height, width)
    time = view.scene_time(latent_frame_times(grid_frames, temporal_compression))
    patch = np.array([width / grid_width, height / grid_height])
    rows, columns = np.divmod(np.arange(grid_height * grid_width), grid_width)
    centres = (np.stack([columns, rows], axis=-1) + 0.5) * patch - 0.5
    return _true_motion(scene, (centres - view.centre) / view.scale, time, view, patch)


def _true_motion(scene: Scene, points: Array, time: Array, view: _View, patch: Array) -> TrueMotion:
    """Return the motion of points [P, 2], in world units, between scene times [F].

    `patch` is (width, height) in pixels.
    """
    before, after = time[:, None, None], time[None, :, None]
    start = points[None, None]
    owner = owner_at(scene, start, before)
    displacement = _ground_displacement(scene.camera, start, before, after)
    for index, sprite in enumerate(scene.sprites):
        of_sprite = _sprite_displacement(sprite.path, start, before, after)
        displacement = np.where((owner == index)[..., None], of_sprite, displacement)
    arrival = start + displacement
    inside = (np.abs(arrival) * view.scale <= np.array([view.width, view.height]) / 2).all(axis=-1)
    visible = inside & (owner_at(scene, arrival, after) == owner)
    return TrueMotion((displacement * view.scale / patch).astype(np.float32), owner[:, 0], visible)


def owner_at(scene: Scene, points: Array, time: Array) -> NDArray[np.int64]:
    """Return the topmost sprite [...] at points [..., 2] in world units at times [...], -1 for background."""
    owner = np.full(np.broadcast_shapes(points.shape[:-1], time.shape), -1)
    for index, sprite in enumerate(scene.sprites):
        local = (points - sprite.path.centre(time)) / sprite.path.size(time)[..., None]
        owner[SHAPES[sprite.appearance.shape](local[..., 0], local[..., 1]) <= 0] = index
    return owner


def signed_distance(
    scene: Scene, size: tuple[int, int, int], grid: tuple[int, int, int], temporal_compression: int = 4
) -> NDArray[np.float32]:
    """Return the distance [F, H, W] in pixels from a grid's cells to the nearest silhouette, negative inside it.

    size and grid as in `near_sprites`; a latent frame is at its mean time, see `latent_frame_times`.
    """
    view = _View(*size)
    time = view.scene_time(latent_frame_times(grid[0], temporal_compression))
    points = _cell_centres(view, grid)[None]
    nearest = np.full(grid, np.inf)
    for sprite in scene.sprites:
        radius = sprite.path.size(time)[:, None, None]
        local = (points - sprite.path.centre(time)[:, None, None]) / radius[..., None]
        distance = SHAPES[sprite.appearance.shape](local[..., 0], local[..., 1]) * radius * view.scale
        nearest = np.minimum(nearest, distance)
    return nearest.astype(np.float32)


def _cell_centres(view: _View, grid: tuple[int, int, int]) -> Array:
    """Return the centres [H, W, 2] of a grid's cells in world units."""
    sizes = ((grid[2], view.width), (grid[1], view.height))
    x, y = (((np.arange(cells) + 0.5) / cells - 0.5) * pixels / view.scale for cells, pixels in sizes)
    return np.stack(np.meshgrid(x, y), axis=-1)


def near_sprites(
    scene: Scene, size: tuple[int, int, int], grid: tuple[int, int, int], temporal_compression: int = 4
) -> NDArray[np.bool_]:
    """Return which cells [F, H, W] of a grid lie inside the circle around a sprite, holes and rim included.

    size: frames, height and width of the clip in pixels; grid: latent frames, and cells along height and width. A
    latent frame covers all its pixel frames: a cell counts if it is inside in one of them.
    """
    view, frames = _View(*size), size[0]
    time = view.scene_time(np.arange(frames, dtype=float))
    points = _cell_centres(view, grid)[None]
    inside = np.zeros((frames, *grid[1:]), bool)
    for sprite in scene.sprites:
        distance = np.linalg.norm(points - sprite.path.centre(time)[:, None, None], axis=-1)
        inside |= distance <= REACH * sprite.path.size(time)[:, None, None]
    latent_frame = -(-np.arange(frames) // temporal_compression)
    return np.stack([inside[latent_frame == frame].any(axis=0) for frame in range(grid[0])])


def _sprite_displacement(path: Path, start: Array, before: Array, after: Array) -> Array:
    growth = (path.size(after) / path.size(before) - 1)[..., None]
    return path.centre(after) - path.centre(before) + growth * (start - path.centre(before))


def _ground_displacement(camera: Camera, start: Array, before: Array, after: Array) -> Array:
    enlarged = camera.magnification(after)[..., None]
    growth = enlarged / camera.magnification(before)[..., None] - 1
    return (camera.centre(before) - camera.centre(after)) * enlarged + growth * start


# ---- the vocabulary


def _words() -> Iterator[str]:
    yield from (",", "a", "an", "and", "the", "over", "moving", "growing", "shrinking")
    yield from ("camera", "panning", "zooming", "in", "out", "left", "right", "up", "down")
    yield from (*COLOURS, *SHAPES, *(texture for texture in TEXTURES if texture != "plain"))
    yield from " ".join(BACKGROUNDS).split()


VOCABULARY = tuple(_words())
"""Every word of every prompt, and the comma. Append only: tokenizers may number words by their index."""
