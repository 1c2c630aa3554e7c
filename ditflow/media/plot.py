"""Plots as PNG files: an attention motion flow over its reference, loss curves, contact sheets; no global state.

Axis letters: T frames, H rows, W columns of pixels; F latent frames of h x w patches, P = h*w.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from ditflow.errors import DitflowError

ARROWS_PER_SIDE = 24
"""Most arrows along one side of a panel: more hide the picture and each other."""

_DPI = 100
_PANEL = 2.9  # inches of a panel's longer side
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 0.45, 2.0, 0.85, 0.15, 0.32  # inches around and between panels
_THUMBNAIL = 200  # pixels of a contact sheet's cell, longer side
_LABEL, _MARGIN = 26, 6  # pixels of a contact sheet's label line, and between cells
_FLOW_COLUMNS = 6  # panels per row of consecutive flow
_EMPTY_GREY = 90  # of a panel without a picture, before it is dimmed
_BACKGROUND, _INK, _FAINT = "#101014", "#f2f2f2", "#9a9aa2"

Picture = UInt8[np.ndarray, "_ _ 3"]
Displacements = np.ndarray | Mapping[tuple[int, int], np.ndarray]
"""Displacements [P, 2] by pair of latent frames: all pairs of an array [F, F, P, 2], or some of them."""


class PlotError(DitflowError, ValueError):
    """The data of a plot are missing, inconsistent or of another type; the code says what of them."""

    default_code = "plot-input-invalid"


def plot_flow(
    frames: np.ndarray,
    displacement: np.ndarray,
    grid: tuple[int, int, int],
    path: str | Path,
    title: str = "",
) -> None:
    """Draw an attention motion flow over its reference, as a PNG at `path`.

    frames: the reference, uint8 [T, H, W, 3] RGB. displacement: integers [F, F, P, 2]; entry [i, j, p] is the
    displacement (dx, dy) in patches of patch p from latent frame i to latent frame j. grid: (F, h, w).

    Upper row: every latent frame to the next one. Lower row: the first to every other. Arrows start at the patch's
    centre, have their true length in pixels, and may leave the panel; dots mark no motion. Hue is the direction,
    saturation the length, as in the wheel. Large grids and irregular flows are subsampled, as the heading says. Raises
    PlotError if shapes, types and grid are inconsistent, OSError if `path` cannot be written.
    """
    displacement = _checked_displacement(displacement, grid)
    _check_frames("frames", frames)
    pairs = [[(i, i + 1) for i in range(grid[0] - 1)], [(0, j) for j in range(1, grid[0])]]
    drawn = _Flow.of(displacement, [pair for row in pairs for pair in row], grid)
    figure, panels = _panels(len(pairs), len(pairs[0]), frames.shape[1:3])
    for row, row_pairs in zip(panels, pairs, strict=True):
        for axes, pair in zip(row, row_pairs, strict=True):
            _draw_flow(axes, frames, drawn, pair)
    _write_headings(figure, title or "Attention motion flow", drawn)
    _label_rows(panels, ("to the next frame", "from the first frame"))
    _draw_wheel(figure, drawn.largest)
    _save(figure, path)


def plot_consecutive_flow(
    flow: np.ndarray, grid: tuple[int, int, int], size: tuple[int, int], path: str | Path, title: str = ""
) -> None:
    """Draw the flow from every latent frame to the next, as a bank stores it, on a grey background as a PNG at `path`.

    flow: integers [F-1, P, 2] as (dx, dy) in patches; grid: (F, h, w); size: height and width of the video in pixels.
    Panels run row by row; arrows, dots and colours as in `plot_flow`. Raises PlotError and OSError as it does.
    """
    expected = (grid[0] - 1, grid[1] * grid[2], 2)
    if flow.shape != expected or not flow.size or not np.issubdtype(flow.dtype, np.integer):
        raise PlotError(
            f"the flow is {flow.dtype} {list(flow.shape)}, expected integers {list(expected)} for a "
            f"{'x'.join(map(str, grid))} grid of 2 latent frames or more.",
            code="plot-flow-invalid",
        )
    pairs = list(pairwise(range(grid[0])))
    drawn = _Flow.of(dict(zip(pairs, flow.astype(np.int64), strict=True)), pairs, grid)
    columns = min(len(pairs), _FLOW_COLUMNS)
    figure, panels = _panels(math.ceil(len(pairs) / columns), columns, size)
    empty = np.full((1, *size, 3), _EMPTY_GREY, np.uint8)
    for axes, pair in zip(chain.from_iterable(panels), pairs, strict=False):
        _draw_flow(axes, empty, drawn, pair)
    _write_headings(figure, title or "Motion from frame to frame", drawn)
    _draw_wheel(figure, drawn.largest)
    _save(figure, path)


def plot_transfer(
    reference: np.ndarray | None,
    displacement: np.ndarray,
    grid: tuple[int, int, int],
    generated: np.ndarray,
    path: str | Path,
    title: str = "",
    columns: int = 6,
) -> None:
    """Draw a reference, its attention motion flow and the generated video, as a PNG at `path`.

    reference, generated: uint8 [T, H, W, 3] RGB; without a reference its row is left out. displacement and grid as in
    `plot_flow`. One column for each of up to `columns` evenly spaced latent frames; the flow is from a column's frame
    to the next column's, and in the last column from the first frame to the last. Raises PlotError and OSError as
    `plot_flow` does.
    """
    displacement = _checked_displacement(displacement, grid)
    _check_frames("generated", generated)
    if reference is not None:
        _check_frames("reference", reference)
    shown = _evenly_spaced(grid[0], columns)
    pairs = [*pairwise(shown), (shown[0], shown[-1])]
    drawn = _Flow.of(displacement, pairs, grid)
    figure, rows = _panels(2 if reference is None else 3, len(shown), generated.shape[1:3])
    for row, video in ((rows[0], reference), (rows[-1], generated)):
        if video is not None:
            for frame, axes in zip(shown, row, strict=True):
                number = pixel_frame(frame, len(video), grid[0])
                axes.set_title(f"frame {number}", color=_INK, fontsize=9, pad=4)
                axes.imshow(video[number], interpolation="nearest")
    for axes, pair in zip(rows[-2], pairs, strict=True):
        _draw_flow(axes, np.zeros_like(generated) if reference is None else reference, drawn, pair)
    _write_headings(figure, title or "Motion transfer", drawn)
    _label_rows(rows, ("reference", "its motion flow", "generated")[-len(rows) :])
    _draw_wheel(figure, drawn.largest)
    _save(figure, path)


def plot_losses(losses: Sequence[Sequence[float]], path: str | Path, title: str = "") -> None:
    """Draw the guidance loss over all optimiser iterations as a PNG: `losses` has one inner list per guided step.

    Steps are shaded alternately and numbered from 1; each step's first loss is circled. The scale is logarithmic if the
    losses span more than a factor of 10. Raises PlotError for no losses, an empty step, or losses that are not
    finite.
    """
    _check_losses(losses)
    figure = Figure(figsize=(9, 4.2), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    starts = np.cumsum([0, *map(len, losses)])
    for number, (step, start) in enumerate(zip(losses, starts[:-1], strict=True), start=1):
        _draw_step(axes, np.asarray(step, float), int(start), number)
    axes.set_xlim(-0.5, starts[-1] - 0.5)
    axes.set_xlabel("optimiser iteration, over all guided steps (shaded in turns, numbered on top)")
    axes.set_ylabel("guidance loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _number_steps(axes, starts)
    _scale_losses(axes, np.concatenate([np.asarray(step, float) for step in losses]))
    axes.legend(loc="upper right", fontsize=8)
    figure.suptitle(_truncate(title or "Guidance loss", 8.6, fontsize=11), fontsize=11, parse_math=False)
    _save(figure, path)


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], path: str | Path, columns: int = 6) -> None:
    """Write a PNG with a strip of evenly spaced frames per clip, under its label and frame numbers.

    rows: (label, frames uint8 [T, H, W, 3] RGB); clips may differ in length and size. First and last frames are
    always shown if `columns` > 1. Small frames are enlarged without smoothing, large ones shrunk by averaging. Raises
    PlotError for no rows, and frames of another type or shape.
    """
    if not rows or columns < 1:
        raise PlotError(
            f"{len(rows)} rows of {columns} columns came, expected at least one of each.", code="plot-empty"
        )
    for label, frames in rows:
        _check_frames(f"frames of {label!r}", frames)
    chosen = [_evenly_spaced(len(frames), columns) for _, frames in rows]
    strips = [_strip(frames, numbers) for (_, frames), numbers in zip(rows, chosen, strict=True)]
    width = max(max(strip.shape[1] for strip in strips), 3 * _THUMBNAIL) + 2 * _MARGIN
    height = sum(strip.shape[0] + _LABEL + _MARGIN for strip in strips) + _MARGIN
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=_BACKGROUND)
    top = height - _MARGIN
    for (label, _), numbers, strip in zip(rows, chosen, strips, strict=True):
        _write_label(figure, label, numbers, top - _LABEL / 2, (width, height))
        top -= _LABEL + strip.shape[0]
        figure.figimage(strip, xo=_MARGIN, yo=top, origin="upper")
        top -= _MARGIN
    _save(figure, path)


def plot_intervals(
    entries: Sequence[tuple[str, str, tuple[float, float, float]]], path: str | Path, title: str = ""
) -> None:
    """Draw means with their intervals as a PNG at `path`: a panel for each figure, a line for each label.

    entries: (figure, label, (mean, low, high)); panels and lines in the order of their first appearance. Raises
    PlotError for no entries.
    """
    if not entries:
        raise PlotError("no entries came, expected at least one mean. Was anything measured?", code="plot-empty")
    figures = list(dict.fromkeys(figure for figure, _, _ in entries))
    labels = list(dict.fromkeys(label for _, label, _ in entries))
    drawing = Figure(figsize=(1.6 + 2.6 * len(figures), 1.2 + 0.3 * len(labels)), dpi=_DPI, layout="constrained")
    panels = drawing.subplots(1, len(figures), sharey=True, squeeze=False)[0]
    for axes, figure in zip(panels, figures, strict=True):
        for _, label, (mean, low, high) in (entry for entry in entries if entry[0] == figure):
            place = labels.index(label)
            axes.errorbar([mean], [place], xerr=[[mean - low], [high - mean]], fmt="o", color="tab:blue", capsize=3)
        axes.set_title(_truncate(figure.replace("_", " "), 2.4, fontsize=9), fontsize=9, parse_math=False)
        axes.grid(axis="x", color="0.9")
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    if title:
        drawing.suptitle(_truncate(title, 1.4 + 2.6 * len(figures), fontsize=11), fontsize=11, parse_math=False)
    _save(drawing, path)


def pixel_frame(latent_frame: int, frames: int, latent_frames: int) -> int:
    """Return the pixel frame that represents a latent frame: first for first, last for last, evenly between."""
    return round(latent_frame * (frames - 1) / (latent_frames - 1)) if latent_frame else 0


def flow_colours(displacement: np.ndarray, largest: float | int) -> Float[np.ndarray, "*points 3"]:
    """Return RGB in 0..1 of displacements [..., 2]: hue by direction, saturation by length (full at `largest`).

    Right is red, down yellow-green, left cyan, up violet; no motion is white.
    """
    dx, dy = displacement[..., 0], displacement[..., 1]
    hue = np.arctan2(dy, dx) / (2 * math.pi) % 1
    length = np.clip(_length(displacement) / largest, 0, 1)
    # At least 0.3, so that the direction of a short arrow is visible.
    saturation = np.where(length > 0, 0.3 + 0.7 * length, 0)
    return hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], axis=-1))


def _length(displacement: np.ndarray) -> Float[np.ndarray, "*points"]:
    return np.asarray(np.hypot(displacement[..., 0].astype(float), displacement[..., 1].astype(float)))


@dataclass(frozen=True)
class _Flow:
    """A flow with its drawing options: every `step`-th patch per side, full saturation at the length `largest`."""

    displacement: Displacements
    grid: tuple[int, int, int]
    largest: float
    step: int

    @classmethod
    def of(cls, displacement: Displacements, pairs: Sequence[tuple[int, int]], grid: tuple[int, int, int]) -> _Flow:
        """Return the flow between these pairs of latent frames (i, j), with options for all of them."""
        drawn = np.stack([displacement[i, j] for i, j in pairs])
        return cls(displacement, grid, max(1.0, float(_length(drawn).max())), _subsampling(drawn, grid))


def _subsampling(drawn: Int[np.ndarray, "pairs patches 2"], grid: tuple[int, int, int]) -> int:
    """Return the spacing of arrows in patches.

    Long arrows in random directions (an untrained model's) cover each other, so a flow whose neighbours differ is drawn
    with half as many per side. Equally long arrows of a pan are parallel and need no more room.
    """
    _, h, w = grid
    step = math.ceil(max(h, w) / ARROWS_PER_SIDE)
    field = drawn.reshape(-1, h, w, 2).astype(float)
    jumps = [_length(np.diff(field, axis=axis)).ravel() for axis in (1, 2)]
    irregular = np.mean(np.concatenate(jumps) if max(h, w) > 1 else [0.0]) > 2 * step
    return 2 * step if irregular and max(h, w) // step > ARROWS_PER_SIDE // 2 else step


def _panels(rows: int, columns: int, size: tuple[int, ...]) -> tuple[Figure, list[list[Axes]]]:
    """Return an empty figure with rows of panels, and space for headings and, on the right, the wheel."""
    width, height = (_PANEL * side / max(size) for side in (size[1], size[0]))
    across, down = width + 0.08, height + _GAP
    # At least as wide as the headings and as high as the wheel.
    total_width = max(6.5, _LEFT + columns * across + _RIGHT)
    total_height = max(_TOP + 2.2, _TOP + height + (rows - 1) * down + _BOTTOM)
    figure = Figure(figsize=(total_width, total_height), dpi=_DPI, facecolor=_BACKGROUND)
    lefts, tops = [_LEFT + column * across for column in range(columns)], [_TOP + row * down for row in range(rows)]
    return figure, [[_axes(figure, left, top, width, height) for left in lefts] for top in tops]


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes without ticks, placed in inches from the upper left corner."""
    full_width, full_height = figure.get_size_inches()
    bottom = full_height - top - height
    box = (left / full_width, bottom / full_height, width / full_width, height / full_height)
    axes = figure.add_axes(box)
    axes.set_axis_off()
    return axes


def _dimmed(picture: Picture) -> Picture:
    """Return the picture darker and nearly grey, so that coloured arrows stand out."""
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.rint(0.38 * grey + 0.12 * picture).astype(np.uint8)


def _draw_flow(axes: Axes, frames: np.ndarray, flow: _Flow, pair: tuple[int, int]) -> None:
    """Draw the flow of one pair of latent frames (i, j) over the pixel frame of i."""
    latent_frames, _, _ = flow.grid
    axes.set_title(f"frame {pair[0]} → {pair[1]}", color=_INK, fontsize=9, pad=4)
    axes.imshow(_dimmed(frames[pixel_frame(pair[0], len(frames), latent_frames)]), interpolation="bilinear")
    _draw_arrows(axes, flow, pair, frames.shape[1:3])


def _draw_arrows(axes: Axes, flow: _Flow, pair: tuple[int, int], size: tuple[int, ...]) -> None:
    """Draw an arrow from the centre of every `step`-th patch, in pixels."""
    (_, h, w), step = flow.grid, flow.step
    patch = np.array([size[1] / w, size[0] / h])
    rows, columns = np.arange((step - 1) // 2, h, step), np.arange((step - 1) // 2, w, step)
    y, x = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    moves = flow.displacement[pair][y * w + x]
    centres = (np.stack([x, y], axis=-1) + 0.5) * patch - 0.5
    still: Bool[np.ndarray, " arrows"] = ~moves.any(axis=-1)
    axes.scatter(centres[still, 0], centres[still, 1], s=2.5, color=_INK, linewidths=0, alpha=0.8)
    _quiver(axes, centres[~still], moves[~still] * patch, flow_colours(moves[~still], flow.largest))
    axes.set_xlim(-0.5, size[1] - 0.5)
    axes.set_ylim(size[0] - 0.5, -0.5)


def _quiver(axes: Axes, centres: np.ndarray, arrows: np.ndarray, colours: np.ndarray) -> None:
    """Draw arrows [N, 2] in data units, long ones first, since they would hide short ones."""
    order = np.argsort(-_length(arrows), kind="stable")
    centres, arrows, colours = centres[order], arrows[order], colours[order]
    # One data unit of an arrow is one pixel of the picture: true lengths.
    scaling: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1}
    head: dict[str, Any] = {"headwidth": 4.5, "headlength": 5, "headaxislength": 4.2, "minlength": 0.5}
    axes.quiver(*centres.T, *arrows.T, color=colours, units="inches", width=0.012, **scaling, **head)


def _write_headings(figure: Figure, title: str, flow: _Flow) -> None:
    frames, h, w = flow.grid
    width, height = figure.get_size_inches()
    spacing = f"; every {_ordinal(flow.step)} patch is drawn" if flow.step > 1 else ""
    facts = f"{frames} latent frames of {h} x {w} patches{spacing}; dots: no motion"
    left = _LEFT / width
    heading = _truncate(title, width - _LEFT - 0.2, fontsize=12)
    style: dict[str, Any] = {"ha": "left", "va": "center", "parse_math": False}
    figure.text(left, 1 - 0.2 / height, heading, color=_INK, fontsize=12, **style)
    figure.text(left, 1 - 0.43 / height, facts, color=_FAINT, fontsize=9, **style)


def _label_rows(panels: Sequence[Sequence[Axes]], labels: Sequence[str]) -> None:
    style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "color": _FAINT, "fontsize": 9}
    for row, label in zip(panels, labels, strict=True):
        row[0].text(-0.03, 0.5, label, transform=row[0].transAxes, **style)


def _ordinal(number: int) -> str:
    return f"{number}{ {2: 'nd', 3: 'rd'}.get(number, 'th') }"


def _draw_wheel(figure: Figure, largest: float) -> None:
    """Draw the legend: the colour of every direction and length, no motion in the centre."""
    side, full_width = 1.0, figure.get_size_inches()[0]
    axes = _axes(figure, full_width - _RIGHT + 0.5, _TOP + 0.35, side, side)
    y, x = np.mgrid[-1:1:201j, -1:1:201j]
    colours = flow_colours(np.stack([x, y], axis=-1), largest=1)
    inside = np.clip((1 - np.hypot(x, y)) * 100, 0, 1)
    axes.imshow(np.dstack([colours, inside]), extent=(-1, 1, 1, -1), interpolation="bilinear")
    for text, place in {"right": (1.1, 0), "left": (-1.1, 0), "up": (0, -1.18), "down": (0, 1.18)}.items():
        alignment = {1.1: "left", -1.1: "right"}.get(place[0], "center")
        axes.text(*place, text, color=_INK, fontsize=8, ha=alignment, va="center")
    note = f"direction and length\nrim: {largest:.3g} patches"
    axes.text(0, 1.45, note, color=_FAINT, fontsize=8, ha="center", va="top")


def _draw_step(axes: Axes, losses: Float[np.ndarray, " iterations"], start: int, number: int) -> None:
    iterations = start + np.arange(len(losses))
    if number % 2 == 0:
        axes.axvspan(start - 0.5, start + len(losses) - 0.5, color="0.93", linewidth=0, zorder=0)
    axes.plot(iterations, losses, color="tab:blue", marker=".", markersize=4, linewidth=1.2)
    label = "first loss of a guided step" if number == 1 else None
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "tab:red", "linewidths": 1.3, "zorder": 3}
    axes.scatter(iterations[:1], losses[:1], s=42, label=label, **ring)


def _number_steps(axes: Axes, starts: Int[np.ndarray, " bounds"]) -> None:
    """Number the steps on the upper axis, at most about 25 of them."""
    middles = (starts[:-1] + starts[1:] - 1) / 2
    every = math.ceil(len(middles) / 25)
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(middles[::every], [str(1 + n) for n in range(0, len(middles), every)], fontsize=8)
    upper.tick_params(length=0)


def _scale_losses(axes: Axes, values: Float[np.ndarray, " iterations"]) -> None:
    smallest, largest = values.min(), values.max()
    if smallest > 0 and largest / smallest > 10:
        axes.set_yscale("log")
        axes.grid(axis="y", which="both", color="0.85", linewidth=0.5)
    else:
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.grid(axis="y", color="0.85", linewidth=0.5)


def _evenly_spaced(available: int, wanted: int) -> list[int]:
    count = min(available, wanted)
    return [round(n * (available - 1) / max(1, count - 1)) for n in range(count)]


def _strip(frames: UInt8[np.ndarray, "frames height width 3"], numbers: list[int]) -> Picture:
    """Return the chosen frames side by side, as thumbnails with gaps in the background's colour."""
    cells = [_thumbnail(frames[number]) for number in numbers]
    gap = np.full((cells[0].shape[0], _MARGIN, 3), int(_BACKGROUND[1:3], 16), np.uint8)
    return np.concatenate([part for cell in cells for part in (cell, gap)][:-1], axis=1)


def _thumbnail(picture: Picture) -> Picture:
    scale = _THUMBNAIL / max(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    enlarging = cv2.INTER_NEAREST if scale >= 2 else cv2.INTER_CUBIC
    interpolation = cv2.INTER_AREA if scale < 1 else enlarging
    return cv2.resize(picture, (width, height), interpolation=interpolation)


def _write_label(figure: Figure, label: str, numbers: list[int], y: float, size: tuple[int, int]) -> None:
    """Write the label on the left and the frame numbers on the right of one line; a long label is truncated."""
    width, height = size
    note = "frames " + ", ".join(map(str, numbers))
    room = (width - 6 * _MARGIN) / _DPI - _text_width(note, fontsize=8)
    style: dict[str, Any] = {"va": "center", "parse_math": False}
    figure.text(
        _MARGIN / width, y / height, _truncate(label, room, fontsize=10), color=_INK, fontsize=10, ha="left", **style
    )
    figure.text(1 - _MARGIN / width, y / height, note, color=_FAINT, fontsize=8, ha="right", **style)


def _truncate(text: str, inches: float, fontsize: int) -> str:
    """Return the text as one line of at most this width; prompts can be long and have line breaks."""
    line = " ".join(text.split())[:1000]
    if _text_width(line, fontsize) <= inches:
        return line
    fitting = bisect_right(range(len(line)), inches, key=lambda n: _text_width(line[:n] + "…", fontsize))
    return line[: max(0, fitting - 1)].rstrip() + "…"


def _text_width(text: str, fontsize: int) -> float:
    """Return the width in inches plus 5 %, the most that rounding letters to whole pixels adds."""
    points, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=fontsize), ismath=False)
    return 1.05 * points / 72


def _save(figure: Figure, path: str | Path) -> None:
    # Without matplotlib's version the same plot is the same file.
    figure.savefig(path, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})


def _check_frames(name: str, frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise PlotError(
            f"{name} are {frames.dtype} {list(frames.shape)}, expected uint8 [T, H, W, 3] RGB with T >= 1. "
            "Pictures in 0..1 must be multiplied by 255 and rounded; channels come last.",
            code="plot-frames-invalid",
        )


def _checked_displacement(
    displacement: np.ndarray, grid: tuple[int, int, int]
) -> Int[np.ndarray, "frames frames patches 2"]:
    frames, h, w = grid
    if frames < 2 or h < 1 or w < 1:
        raise PlotError(
            f"grid is {frames}x{h}x{w}, expected 2 latent frames or more: one frame has no motion.",
            code="plot-flow-invalid",
        )
    if displacement.shape != (frames, frames, h * w, 2):
        raise PlotError(
            f"displacement has the shape {list(displacement.shape)}, expected [{frames}, {frames}, {h * w}, 2] for a "
            f"{frames}x{h}x{w} grid. Most likely the grid belongs to another clip or backbone; it is (frames, "
            "height, width) in patches, not in pixels.",
            code="plot-flow-invalid",
        )
    if not np.issubdtype(displacement.dtype, np.integer):
        raise PlotError(
            f"displacement is {displacement.dtype}, expected integers: whole patches. Draw the reference's hard "
            "flow, or round a soft one.",
            code="plot-flow-invalid",
        )
    return displacement.astype(np.int64)


def _check_losses(losses: Sequence[Sequence[float]]) -> None:
    if not losses:
        raise PlotError(
            "no losses came, expected one list per guided step. Was guidance off (guided_steps 0)?", code="plot-empty"
        )
    for number, step in enumerate(losses, start=1):
        if not len(step):
            raise PlotError(
                f"guided step {number} has no losses, expected one per optimiser iteration.", code="plot-losses-invalid"
            )
        if not np.isfinite(step).all():
            raise PlotError(
                f"guided step {number} has losses that are not finite: {list(step)}. The optimisation diverged: lower "
                "method.learning_rate.",
                code="plot-losses-invalid",
                key="method.learning_rate",
            )
