"""Pictures: what the pixels of the written PNG files show, and what is refused."""

from __future__ import annotations

import colorsys
import math
import warnings

import cv2
import matplotlib
import numpy as np
import pytest

from ditflow.media import plot
from ditflow.media.plot import (
    PlotError,
    contact_sheet,
    flow_colours,
    pixel_frame,
    plot_consecutive_flow,
    plot_flow,
    plot_losses,
)

GRID = (3, 8, 8)
SIDE = 290
"""Pixels of a panel's longer side."""
LEFT, TOP = 45, 85
"""Where the first panel begins."""


def still(grid=GRID):
    frames, h, w = grid
    return np.zeros((frames, frames, h * w, 2), np.int8)


def black(frames=9, height=64, width=64):
    return np.zeros((frames, height, width, 3), np.uint8)


def load(path):
    """RGB [H, W, 3] of a PNG."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def panel(picture, row, column, height=SIDE, width=SIDE):
    top, left = TOP + row * (height + 32), LEFT + column * (width + 8)
    return picture[top : top + height, left : left + width].astype(int)


def drawn(pixels):
    """Extent (top, bottom, left, right) of what is not black."""
    rows, columns = np.nonzero(pixels.max(-1) > 90)
    return rows.min(), rows.max(), columns.min(), columns.max()


def is_red(pixels):
    return pixels[..., 0] - pixels[..., 1:].max(-1) > 80


# --- the flow


def test_an_arrow_has_its_place_length_and_colour(tmp_path):
    """Patch (1, 2) moves 4 patches to the right: from column 1.5/8 of the panel to 5.5/8, red, in the row 2.5/8."""
    flow = still()
    flow[0, 1, 2 * 8 + 1] = (4, 0)
    plot_flow(black(), flow, GRID, tmp_path / "a.png")
    red = is_red(panel(load(tmp_path / "a.png"), 0, 0))
    rows, columns = np.nonzero(red)
    assert rows.mean() == pytest.approx(SIDE * 2.5 / 8, abs=1.5)
    assert columns.min() == pytest.approx(SIDE * 1.5 / 8, abs=2.5)
    assert columns.max() == pytest.approx(SIDE * 5.5 / 8, abs=2.5)


def test_positive_dy_points_down(tmp_path):
    flow = still((2, 1, 1))
    flow[0, 1, 0] = (0, 1)
    plot_flow(black(), flow, (2, 1, 1), tmp_path / "a.png")
    top, bottom, left, right = drawn(panel(load(tmp_path / "a.png"), 0, 0))
    assert top == pytest.approx(SIDE / 2, abs=2)
    assert bottom == SIDE - 1
    assert (left + right) / 2 == pytest.approx(SIDE / 2, abs=2)


def test_panels_show_the_pairs_to_the_next_and_from_the_first(tmp_path):
    """Only the drawn pair [i, j] has an arrow, one at a time, and it shows up in its own panel only."""
    places = {(0, 1): {(0, 0), (1, 0)}, (1, 2): {(0, 1)}, (0, 2): {(1, 1)}, (2, 0): set(), (1, 0): set()}
    for (i, j), expected in places.items():
        flow = still()
        flow[i, j, 3 * 8] = (7, 0)
        plot_flow(black(), flow, GRID, tmp_path / "a.png")
        picture = load(tmp_path / "a.png")
        cells = [(row, column) for row in range(2) for column in range(2)]
        # Full colour at the wheel's rim needs the longest arrow; 7 patches are it.
        assert {cell for cell in cells if is_red(panel(picture, *cell)).sum() > 50} == expected


def test_no_motion_is_drawn_as_small_white_dots(tmp_path):
    plot_flow(black(), still(), GRID, tmp_path / "a.png")
    pixels = panel(load(tmp_path / "a.png"), 0, 0)
    spots, _, boxes, _ = cv2.connectedComponentsWithStats((pixels.max(-1) > 90).astype(np.uint8))
    assert spots - 1 == 64
    assert boxes[1:, cv2.CC_STAT_AREA].max() <= 12
    assert pixels.std(-1).max() < 5


def test_the_picture_is_the_reference_s_frame_dimmed(tmp_path):
    frames = black(9)
    frames[:, :, :32] = np.arange(9)[:, None, None, None] * 30
    plot_flow(frames, still(), GRID, tmp_path / "a.png")
    picture = load(tmp_path / "a.png")
    spot = (slice(66, 80), slice(66, 80))  # between the dots
    brightness = [panel(picture, 0, column)[spot].mean() for column in range(2)]
    assert brightness[0] == 0
    assert brightness[1] == pytest.approx(4 * 30 / 2, abs=2)  # frame 4 of 0..8 is the middle one of three
    assert panel(picture, 0, 1)[66:80, 211:225].max() == 0


def test_a_flow_of_consecutive_frames_has_a_panel_for_each_pair_six_in_a_row(tmp_path):
    """Patch (3, 0) moves 7 patches to the right, from one frame to the next alone."""
    grid = (9, 8, 8)
    for pair, cell in {0: (0, 0), 5: (0, 5), 6: (1, 0), 7: (1, 1)}.items():
        flow = np.zeros((8, 64, 2), np.int8)
        flow[pair, 3 * 8] = (7, 0)
        plot_consecutive_flow(flow, grid, (64, 64), tmp_path / "a.png")
        picture = load(tmp_path / "a.png")
        cells = [(row, column) for row in range(2) for column in range(6)]
        assert {cell for cell in cells if is_red(panel(picture, *cell)).sum() > 50} == {cell}
        rows, columns = np.nonzero(is_red(panel(picture, *cell)))
        assert rows.mean() == pytest.approx(SIDE * 3.5 / 8, abs=1.5)
        assert columns.max() == pytest.approx(SIDE * 7.5 / 8, abs=2.5)


@pytest.mark.parametrize(
    "flow", [np.zeros((2, 64, 2)), np.zeros((3, 64, 2), np.int8), np.zeros((2, 63, 2), np.int8)],
    ids=["no whole patches", "a pair too many", "another grid"],
)  # fmt: skip
def test_a_flow_of_consecutive_frames_that_does_not_fit_its_grid_is_refused(tmp_path, flow):
    with pytest.raises(PlotError, match=r"expected integers \[2, 64, 2\] for a 3x8x8 grid"):
        plot_consecutive_flow(flow, GRID, (64, 64), tmp_path / "a.png")


@pytest.mark.parametrize(
    ("grid", "frames", "size"),
    [
        ((5, 8, 8), black(17), (1437, 712)),
        ((6, 30, 45), black(24, 480, 720), (1735, 518)),
        ((2, 30, 17), black(5, 96, 54), (650, 712)),
    ],
)
def test_the_file_is_a_png_of_the_size_that_the_panels_need(tmp_path, grid, frames, size):
    plot_flow(frames, still(grid), grid, tmp_path / "a.png", title="block 15, timestep 0")
    height, width = load(tmp_path / "a.png").shape[:2]
    assert (width, height) == size


def test_the_same_flow_gives_the_same_file(tmp_path):
    for name in ("a.png", "b.png"):
        plot_flow(black(), still(), GRID, tmp_path / name, title="once")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_title_changes_the_heading_only(tmp_path):
    plot_flow(black(), still(), GRID, tmp_path / "a.png")
    plot_flow(black(), still(), GRID, tmp_path / "b.png", title="$ no \\formula{ $\n" + "and a very long prompt " * 20)
    plain, titled = load(tmp_path / "a.png"), load(tmp_path / "b.png")
    np.testing.assert_array_equal(plain[40:], titled[40:])
    assert (plain[:40] != titled[:40]).any()
    assert (titled[:, -2:] == titled[0, 0]).all()  # cut before the edge


def uniform(grid, move):
    return np.broadcast_to(np.array(move), (1, grid[1] * grid[2], 2))


def test_arrows_are_thinned_to_24_per_side_and_further_when_neighbours_disagree():
    small, large = (5, 8, 8), (6, 30, 45)
    wild = np.random.default_rng(0).integers(-20, 20, (1, 30 * 45, 2))
    assert plot._subsampling(uniform(small, (1, 0)), small) == 1
    assert plot._subsampling(np.random.default_rng(0).integers(-8, 8, (1, 64, 2)), small) == 1
    assert plot._subsampling(uniform(large, (1, 0)), large) == 2
    assert plot._subsampling(uniform(large, (20, 9)), large) == 2
    assert plot._subsampling(wild, large) == 4
    assert plot._subsampling(uniform((2, 1, 1), (0, 0)), (2, 1, 1)) == 1


def test_a_thinned_flow_draws_every_second_patch_and_says_so(tmp_path, monkeypatch):
    grid, texts = (2, 30, 45), []
    original = plot.Figure.text
    monkeypatch.setattr(plot.Figure, "text", lambda s, x, y, t, **k: texts.append(t) or original(s, x, y, t, **k))
    plot_flow(black(2, 480, 720), still(grid), grid, tmp_path / "a.png")
    pixels = panel(load(tmp_path / "a.png"), 0, 0, height=193)
    spots, _ = cv2.connectedComponents((pixels.max(-1) > 90).astype(np.uint8))
    assert spots - 1 == 15 * 23
    assert any("every 2nd patch" in text for text in texts)


@pytest.mark.parametrize(
    ("move", "degrees"), [((1, 0), 0), ((0, 1), 90), ((-1, 0), 180), ((0, -1), 270), ((1, 1), 45), ((-2, -2), 225)]
)
def test_hue_is_the_direction(move, degrees):
    hue, _, value = colorsys.rgb_to_hsv(*flow_colours(np.array(move), largest=3))
    assert hue * 360 == pytest.approx(degrees, abs=1e-6)
    assert value == 1


def test_saturation_grows_with_the_length_and_no_motion_is_white():
    colours = flow_colours(np.array([[0, 0], [1, 0], [2, 0], [4, 0], [9, 0]]), largest=4)
    saturation = [colorsys.rgb_to_hsv(*colour)[1] for colour in colours]
    assert saturation[0] == 0
    assert saturation[1] < saturation[2] < saturation[3] == saturation[4] == 1
    np.testing.assert_array_equal(colours[0], 1)
    np.testing.assert_allclose(colours[3], [1, 0, 0], atol=1e-12)


def test_the_wheel_shows_the_four_directions(tmp_path):
    plot_flow(black(), still(), GRID, tmp_path / "a.png")
    picture = load(tmp_path / "a.png")
    x, y, radius = picture.shape[1] - 100, TOP + 35 + 50, 40
    for move in [(1, 0), (0, 1), (-1, 0), (0, -1)]:
        spot = picture[y + radius * move[1], x + radius * move[0]] / 255
        hue, saturation, _ = colorsys.rgb_to_hsv(*spot)
        expected = math.atan2(move[1], move[0]) / (2 * math.pi)
        assert math.cos(2 * math.pi * (hue - expected)) > 0.98
        assert saturation > 0.7


def test_the_wheel_s_words_stand_at_their_sides():
    figure = plot.Figure()
    plot._draw_wheel(figure, 3.0)
    words = {text.get_text(): text.get_transform().transform(text.get_position()) for text in figure.axes[0].texts}
    assert words["left"][0] < words["up"][0] < words["right"][0]
    assert words["down"][1] < words["left"][1] < words["up"][1]  # display coordinates count from below


@pytest.mark.parametrize(
    ("frames", "latent_frames", "expected"),
    [(17, 5, [0, 4, 8, 12, 16]), (24, 6, [0, 5, 9, 14, 18, 23]), (1, 3, [0, 0, 0]), (49, 13, list(range(0, 49, 4)))],
)
def test_latent_frames_are_shown_by_evenly_spaced_frames(frames, latent_frames, expected):
    assert [pixel_frame(f, frames, latent_frames) for f in range(latent_frames)] == expected


FLOW, FRAMES = "plot-flow-invalid", "plot-frames-invalid"


@pytest.mark.parametrize(
    ("frames", "flow", "grid", "code", "message"),
    [
        (
            black(),
            still(),
            (3, 8, 9),
            FLOW,
            r"\[3, 3, 64, 2\], expected \[3, 3, 72, 2\] for a 3x8x9 grid.*not in pixels",
        ),
        (black(), still(), (4, 8, 8), FLOW, r"expected \[4, 4, 64, 2\]"),
        (black(), still()[:1, :1], (1, 8, 8), FLOW, "1x8x8.*2 latent frames"),
        (black(), still().astype(np.float32), GRID, FLOW, "float32, expected integers"),
        (black().astype(np.float32), still(), GRID, FRAMES, r"float32 \[9, 64, 64, 3\]"),
        (black().transpose(0, 3, 1, 2), still(), GRID, FRAMES, "channels come last"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, frames, flow, grid, code, message):
    with pytest.raises(PlotError, match=message) as caught:
        plot_flow(frames, flow, grid, tmp_path / "a.png")
    assert caught.value.code == code
    assert not (tmp_path / "a.png").exists()


# --- losses


def loss_axes(monkeypatch):
    """The axes that plot_losses draws on."""
    kept = []
    original = plot._scale_losses
    monkeypatch.setattr(plot, "_scale_losses", lambda axes, values: kept.append(axes) or original(axes, values))
    return kept


def test_losses_are_drawn_step_by_step_with_their_first_value_ringed(tmp_path, monkeypatch):
    kept = loss_axes(monkeypatch)
    plot_losses([[3.0, 2.0], [2.5, 1.5, 1.0], [1.2]], tmp_path / "a.png", title="costs $5 or $6")
    height, width = load(tmp_path / "a.png").shape[:2]
    assert (width, height) == (900, 420)
    axes = kept[0]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert lines == [([0, 1], [3.0, 2.0]), ([2, 3, 4], [2.5, 1.5, 1.0]), ([5], [1.2])]
    rings = np.concatenate([ring.get_offsets() for ring in axes.collections])
    np.testing.assert_array_equal(rings, [[0, 3.0], [2, 2.5], [5, 1.2]])
    shaded = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert shaded == [(1.5, 4.5)]
    assert [tick.get_text() for tick in axes.child_axes[0].get_xticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([[5.0, 1.0]], "linear"), ([[10.5, 1.0]], "log"), ([[10.5], [1.0]], "log"), ([[10.5, 0.0]], "linear")],
)
def test_the_scale_is_logarithmic_over_a_factor_of_ten(tmp_path, monkeypatch, losses, scale):
    kept = loss_axes(monkeypatch)
    plot_losses(losses, tmp_path / "a.png")
    assert kept[0].get_yscale() == scale


@pytest.mark.parametrize(
    ("losses", "message"),
    [([], "no losses came"), ([[1.0], []], "step 2 has no losses"), ([[1.0, math.nan]], "step 1.*not finite.*nan")],
)
def test_losses_that_cannot_be_drawn_are_refused(tmp_path, losses, message):
    with pytest.raises(PlotError, match=message) as caught:
        plot_losses(losses, tmp_path / "a.png")
    assert caught.value.code == ("plot-losses-invalid" if losses else "plot-empty")


# --- contact sheets


def grey_steps(frames, height, width):
    return np.broadcast_to((100 + np.arange(frames, dtype=np.uint8))[:, None, None, None], (frames, height, width, 3))


def test_a_sheet_shows_evenly_spaced_frames_of_every_clip(tmp_path):
    clips = [("reference", grey_steps(24, 480, 720)), ("result", grey_steps(7, 64, 64))]
    contact_sheet(clips, tmp_path / "a.png", columns=4)
    picture = load(tmp_path / "a.png")
    assert picture.shape[:2] == (6 + (26 + 133 + 6) + (26 + 200 + 6), 4 * 200 + 3 * 6 + 12)
    first, second = 6 + 26 + 66, 6 + 26 + 133 + 6 + 26 + 100
    middles = [6 + 100 + n * 206 for n in range(4)]
    np.testing.assert_array_equal(picture[first, middles, 0], 100 + np.array([0, 8, 15, 23]))
    np.testing.assert_array_equal(picture[second, middles, 0], 100 + np.array([0, 2, 4, 6]))
    assert picture[6:32, :300].max() > 200  # a label


def test_the_right_way_up_and_tiny_frames_keep_sharp_pixels(tmp_path):
    clip = black(1, 4, 4)
    clip[0, 0, 3] = 255
    contact_sheet([("tiny", clip)], tmp_path / "a.png")
    strip = load(tmp_path / "a.png")[32 : 32 + 200, 6 : 6 + 200]
    assert (strip[:50, 150:] == 255).all()
    assert strip[50:].max() == 0
    assert strip[:, :150].max() == 0


def test_a_clip_shorter_than_the_columns_shows_all_its_frames(tmp_path):
    assert plot._evenly_spaced(3, 6) == [0, 1, 2]
    assert plot._evenly_spaced(24, 6) == [0, 5, 9, 14, 18, 23]
    assert plot._evenly_spaced(24, 1) == [0]
    contact_sheet([("short", grey_steps(1, 64, 64))], tmp_path / "a.png", columns=6)
    assert load(tmp_path / "a.png").shape[:2] == (6 + 26 + 200 + 6, 3 * 200 + 12)


def test_long_labels_are_cut_and_dollars_are_text(tmp_path):
    label = "a $5 leopard $\\bad{ running\nuphill " * 20
    contact_sheet([(label, grey_steps(6, 64, 64))], tmp_path / "a.png")
    contact_sheet([("W" * 500, grey_steps(6, 64, 64))], tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        line = load(tmp_path / name)[6:32]
        gap = slice(-155, -140)  # the frame numbers, "frames 0, 1, 2, 3, 4, 5", take the last 132 pixels
        assert line[:, gap].max() < 100 < line[:, -220:-155].max()
    contact_sheet([("$ no \\formula{ $", grey_steps(6, 64, 64))], tmp_path / "c.png")
    assert plot._truncate("one\ntwo  three", inches=3.0, fontsize=10) == "one two three"
    assert plot._truncate("W" * 50, inches=1.0, fontsize=10) == "WWWWW…"


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], 6, "0 rows"),
        ([("a", black())], 0, "0 columns"),
        ([("b", black()[0])], 6, r"frames of 'b' are uint8 \[64, 64, 3\]"),
        ([("c", black()[:0])], 6, r"T >= 1"),
    ],
)
def test_sheets_of_nothing_are_refused(tmp_path, rows, columns, message):
    with pytest.raises(PlotError, match=message) as caught:
        contact_sheet(rows, tmp_path / "a.png", columns)
    assert caught.value.code == ("plot-frames-invalid" if rows and columns else "plot-empty")


def test_drawing_leaves_no_global_state(tmp_path):
    settings = matplotlib.rcParams.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_flow(black(), still(), GRID, tmp_path / "a.png")
        plot_losses([[1.0]], tmp_path / "b.png")
        contact_sheet([("a", black())], tmp_path / "c.png")
    assert matplotlib.rcParams.copy() == settings


# --- the transfer


def test_a_transfer_shows_the_reference_its_flow_and_the_result(tmp_path):
    flow = still()
    flow[1, 2, 2 * 8 + 1] = (4, 0)
    reference, generated = black(), black()
    reference[4, :, :, 2] = 200
    generated[8, :, :, 1] = 200
    plot.plot_transfer(reference, flow, GRID, generated, tmp_path / "transfer.png")
    picture = load(tmp_path / "transfer.png")
    means = np.array([[panel(picture, row, column).mean((0, 1)) for column in range(3)] for row in (0, 2)])
    expected = np.zeros((2, 3, 3))
    expected[0, 1, 2], expected[1, 2, 1] = 200, 200
    np.testing.assert_allclose(means, expected, atol=6)
    arrows = [is_red(panel(picture, 1, column)).any() for column in range(3)]
    assert arrows == [False, True, False], "the flow from the second latent frame to the third"


def test_a_transfer_without_its_reference_has_two_rows(tmp_path):
    flow = still()
    flow[1, 2, 2 * 8 + 1] = (4, 0)
    generated = black()
    generated[8, :, :, 1] = 200
    plot.plot_transfer(None, flow, GRID, generated, tmp_path / "transfer.png")
    picture = load(tmp_path / "transfer.png")
    assert [is_red(panel(picture, 0, column)).any() for column in range(3)] == [False, True, False]
    np.testing.assert_allclose(panel(picture, 1, 2).mean((0, 1)), [0, 200, 0], atol=6)


def test_the_last_column_shows_the_flow_from_the_first_frame_to_the_last(tmp_path):
    flow = still((5, 8, 8))
    flow[0, 4, 0] = (4, 0)
    plot.plot_transfer(black(17), flow, (5, 8, 8), black(17), tmp_path / "transfer.png", columns=3)
    picture = load(tmp_path / "transfer.png")
    assert [is_red(panel(picture, 1, column)).any() for column in range(3)] == [False, False, True]


def test_a_generated_clip_of_another_kind_is_refused(tmp_path):
    with pytest.raises(PlotError) as caught:
        plot.plot_transfer(black(), still(), GRID, np.zeros((9, 64, 64, 3)), tmp_path / "transfer.png")
    assert caught.value.code == "plot-frames-invalid"
