"""Motion fidelity: the tracks it is made of, the score, and the intervals around its means."""

import jaxtyping
import numpy as np
import pytest

from ditflow.metrics.base import ClipCache, EvaluatedClip
from ditflow.metrics.errors import MetricInputError
from ditflow.metrics.motion_fidelity import MIN_STEP, MotionFidelity, NoMotionError, correlations, motion_fidelity
from ditflow.metrics.statistics import Interval, bootstrap_interval, paired_difference
from ditflow.metrics.trackers import track
from ditflow.metrics.tracks import TRACKERS, Tracks, query_grid
from ditflow.mini.world import WorldClip, render, sample_pair, sample_scene

RIGHT, LEFT, UP, DOWN, REST = (1, 0), (-1, 0), (0, -1), (0, 1), (0, 0)
trackers = pytest.mark.parametrize("tracker", TRACKERS)


def tracks_of(*steps, hidden=()) -> Tracks:
    """Tracklets by their steps; `hidden` are (tracklet, frame)."""
    moves = np.array(steps, float)
    points = np.concatenate([np.zeros((len(moves), 1, 2)), np.cumsum(moves, axis=1)], axis=1) + 30
    visible = np.ones(points.shape[:2], bool)
    for place in hidden:
        visible[place] = False
    return Tracks(points.astype(np.float32), visible)


def random_tracks(seed, count=12, frames=9) -> Tracks:
    rng = np.random.default_rng(seed)
    points = np.cumsum(rng.normal(size=(count, frames, 2)), axis=1)
    return Tracks(points.astype(np.float32), rng.random((count, frames)) < 0.9)


def pan_clip(seed) -> WorldClip:
    return render(sample_scene(seed, "eval", sprites=1, shot="pan"))


def texture(height=64, width=64, seed=0):
    """Smooth random colours [H, W, 3] that can be rolled."""
    rng = np.random.default_rng(seed)
    waves = np.fft.fft2(rng.normal(size=(height, width, 3)), axes=(0, 1))
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    smooth = np.fft.ifft2(waves * np.exp(-((x**2 + y**2) / 0.01))[..., None], axes=(0, 1)).real
    return np.clip(128 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def sliding(dx, dy, frames=5, **size):
    return np.stack([np.roll(texture(**size), (t * dy, t * dx), axis=(0, 1)) for t in range(frames)])


def test_a_reference_is_tracked_once_for_all_clips_that_share_it():
    tracked = []
    metric = MotionFidelity(lambda frames: tracked.append(frames) or TRACKERS["dis"](frames))
    reference, other = sliding(2, 0), sliding(0, 2)
    scores = [metric(EvaluatedClip(made, its.copy())) for made, its in [(reference, reference), (other, reference)]]
    assert scores[0]["motion_fidelity"] == pytest.approx(1) and scores[1]["motion_fidelity"] < 0.5
    assert len(tracked) == 3  # two generated clips and one reference


def test_only_the_latest_clips_are_cached():
    computed = []
    cached = ClipCache(lambda frames: computed.append(frames) or frames.sum(), max_clips=2)
    clips = [np.full((2, 4, 4, 3), value, np.uint8) for value in range(3)]
    for number in (0, 1, 0, 2, 0, 1):
        assert cached(clips[number]) == clips[number].sum()
    assert [frames[0, 0, 0, 0] for frames in computed] == [0, 1, 2, 1]


# --- the score


@pytest.mark.parametrize("seed", range(3))
def test_identical_tracks_score_one(seed):
    tracks = random_tracks(seed)
    assert motion_fidelity(tracks, tracks) == pytest.approx(1, abs=1e-12)


def test_opposite_tracks_score_minus_one():
    steps = [[RIGHT, DOWN, (3, 1)]]
    assert motion_fidelity(tracks_of(*steps), tracks_of(*-np.array(steps))) == pytest.approx(-1, abs=1e-12)


MIXTURE_REFERENCE = tracks_of([RIGHT, RIGHT, DOWN], [LEFT, LEFT, LEFT], hidden=[(1, 3)])
MIXTURE = tracks_of([RIGHT, DOWN, DOWN], [UP, LEFT, LEFT], hidden=[(1, 0)])


def test_a_mixture_with_hidden_steps_has_the_correlations_found_by_hand():
    """Steps counted: all three of the first tracklets, 0 and 1 of the second reference, 1 and 2 of the second other."""
    expected = [[(1 + 0 + 1) / 3, (-1 + 0) / 2], [(-1 + 0) / 2, 1 / 1]]
    np.testing.assert_allclose(correlations(MIXTURE, MIXTURE_REFERENCE), expected, atol=1e-12)


def test_the_symmetric_score_is_the_mean_of_both_sides():
    """Best matches: 2/3, 1 and 1/3 of the three generated, 2/3 and 1 of the two in the reference."""
    generated = tracks_of([RIGHT, DOWN, DOWN], [UP, LEFT, LEFT], [DOWN, DOWN, DOWN], hidden=[(1, 0)])
    score = motion_fidelity(generated, MIXTURE_REFERENCE)
    assert score == pytest.approx(((2 / 3 + 1 + 1 / 3) / 3 + (2 / 3 + 1) / 2) / 2, abs=1e-12)


def test_the_official_score_is_one_sided_and_subtracts_the_identity():
    """Best of (2/3 - 1, -1/2) and of (-1/2, 1 - 1)."""
    score = motion_fidelity(MIXTURE, MIXTURE_REFERENCE, "official")
    assert score == pytest.approx((-1 / 3 + 0) / 2, abs=1e-12)
    one, other = tracks_of([RIGHT, RIGHT], [DOWN, DOWN]), tracks_of([RIGHT, RIGHT], [LEFT, LEFT])
    assert motion_fidelity(one, other, "official") == pytest.approx((0 + 0) / 2, abs=1e-12)
    assert motion_fidelity(other, one, "official") == pytest.approx((0 - 1) / 2, abs=1e-12)
    assert motion_fidelity(one, other) == pytest.approx(((1 + 0) / 2 + (1 + 0) / 2) / 2, abs=1e-12)


def test_the_identity_belongs_to_tracklets_even_if_earlier_ones_rest():
    steps = [[REST, REST], [RIGHT, DOWN]]
    assert motion_fidelity(tracks_of(*steps), tracks_of(*steps), "official") == pytest.approx(0, abs=1e-12)
    swapped = motion_fidelity(tracks_of(*steps), tracks_of(*steps[::-1]), "official")
    assert swapped == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_symmetric_score_does_not_depend_on_which_video_is_the_reference(seed):
    one, other = random_tracks(seed), random_tracks(seed + 10, count=7)
    assert motion_fidelity(one, other) == pytest.approx(motion_fidelity(other, one), abs=1e-12)
    assert abs(motion_fidelity(one, other)) < 0.99


def test_place_speed_and_order_do_not_count():
    one, other = random_tracks(0), random_tracks(1)
    moved = Tracks((4 * one.points + 100).astype(np.float32)[::-1].copy(), one.visible[::-1].copy())
    assert motion_fidelity(moved, other) == pytest.approx(motion_fidelity(one, other), abs=1e-4)


def test_what_rests_is_left_out():
    moving, reference = [RIGHT, DOWN, DOWN], tracks_of([RIGHT, RIGHT, DOWN])
    background = [[REST] * 3, [(0.6 * MIN_STEP, -0.6 * MIN_STEP)] * 3]
    score = motion_fidelity(tracks_of(moving, *background), reference)
    assert score == motion_fidelity(tracks_of(moving), reference) == pytest.approx(2 / 3, abs=1e-12)


def test_a_step_of_the_smallest_size_counts():
    just_enough = tracks_of([(1.01 * MIN_STEP, 0), DOWN])
    assert motion_fidelity(just_enough, tracks_of([LEFT, DOWN])) == pytest.approx(0, abs=1e-12)


def test_resting_steps_are_left_out_of_the_mean():
    assert motion_fidelity(tracks_of([RIGHT, REST, DOWN]), tracks_of([RIGHT, RIGHT, RIGHT])) == pytest.approx(0.5)


def test_a_point_hidden_at_either_end_hides_the_step():
    reference = tracks_of([RIGHT, RIGHT, RIGHT])
    for hidden, expected in (((), 1 / 3), ([(0, 0)], 0), ([(0, 1)], -1), ([(0, 3)], 1)):
        generated = tracks_of([RIGHT, RIGHT, LEFT], hidden=hidden)
        assert motion_fidelity(generated, reference) == pytest.approx(expected, abs=1e-12)


def test_pairs_with_too_few_common_steps_can_be_left_out():
    """The brief point matches in its only step; with half of the steps asked for, only the long pair is left."""
    generated = tracks_of([LEFT, REST, REST, REST], [RIGHT, RIGHT, UP, UP])
    reference = tracks_of([LEFT, RIGHT, UP, RIGHT])
    assert motion_fidelity(generated, reference) == pytest.approx(((1 + 0.25) / 2 + 1) / 2, abs=1e-12)
    assert motion_fidelity(generated, reference, least_common=0.5) == pytest.approx(0.25, abs=1e-12)
    with pytest.raises(NoMotionError, match="fraction 0.5 of all steps") as caught:
        motion_fidelity(tracks_of([LEFT, REST, REST, REST]), reference, least_common=0.5)
    assert caught.value.code == "no-common-motion"
    with pytest.raises(MetricInputError, match="least_common is 3") as refused:
        motion_fidelity(generated, reference, least_common=3.0)
    assert (refused.value.code, refused.value.key) == ("fraction-out-of-range", "metrics.least_common")


STILL, MOVING = tracks_of([REST, REST], [REST, REST]), tracks_of([RIGHT, REST], [REST, REST])


@pytest.mark.parametrize("variant", ["symmetric", "official"])
@pytest.mark.parametrize(
    ("generated", "reference", "message"),
    [
        (STILL, MOVING, "no point of the generated video moves"),
        (MOVING, STILL, "no point of the reference moves"),
        (STILL, STILL, "no point of the generated video and of the reference moves"),
        (MOVING, Tracks(MOVING.points, ~MOVING.visible), "no point of the reference moves"),
        (MOVING, tracks_of([REST, RIGHT], [REST, UP]), "do not move at the same time"),
    ],
)
def test_no_motion_is_an_error_that_names_the_side(generated, reference, message, variant):
    with pytest.raises(NoMotionError, match=message):
        motion_fidelity(generated, reference, variant)


def test_videos_of_different_length_are_refused():
    with pytest.raises(MetricInputError, match="generated video has 4 frames, the reference 3.*stride") as caught:
        motion_fidelity(tracks_of([RIGHT] * 3), tracks_of([RIGHT] * 2))
    assert caught.value.code == "lengths-differ"


def test_the_official_variant_needs_as_many_tracklets():
    with pytest.raises(MetricInputError, match="2 generated and 1 reference tracklets.*Resize") as caught:
        motion_fidelity(MOVING, tracks_of([RIGHT, UP]), "official")
    assert caught.value.code == "tracklet-counts-differ"


def test_an_unknown_variant_lists_the_variants(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(MetricInputError, match=r"'oficial' is not a variant.*symmetric, official") as caught:
        motion_fidelity(MOVING, MOVING, "oficial")
    assert (caught.value.code, caught.value.key) == ("unknown-variant", "metrics.variant")


# --- the tracks


def test_the_grid_is_even_and_the_smaller_side_decides():
    square, wide, tiny = query_grid(64, 64), query_grid(480, 720), query_grid(16, 40)
    assert (len(square), len(wide), len(tiny)) == (20 * 20, 20 * 30, 16 * 40)
    np.testing.assert_allclose(square[[0, 1, 20, -1]], [[1.1, 1.1], [4.3, 1.1], [1.1, 4.3], [61.9, 61.9]], atol=1e-5)
    np.testing.assert_allclose(wide[[0, 1, 30, -1]], [[11.5, 11.5], [35.5, 11.5], [11.5, 35.5], [707.5, 467.5]])


@trackers
@pytest.mark.parametrize("size", [{"height": 64, "width": 64}, {"height": 96, "width": 144}])
@pytest.mark.parametrize("shift", [(2, 0), (-1, 3), (6, 0)])
def test_points_follow_a_sliding_texture(tracker, size, shift):
    """Inside, where nothing rolls in, all points are kept to a quarter of a pixel, up to a tenth of the picture."""
    tracks = track(sliding(*shift, frames=3, **size), tracker)
    truth = tracks.points[:, :1] + np.arange(3)[:, None] * np.array(shift)
    inside = ((truth > 12) & (truth < np.array([size["width"], size["height"]]) - 13)).all(axis=(1, 2))
    assert tracks.visible[inside].mean() > 0.97
    assert np.linalg.norm(tracks.points - truth, axis=-1)[tracks.visible & inside[:, None]].max() < 0.25


@trackers
def test_a_still_clip_has_no_motion(tracker):
    tracks = track(sliding(0, 0), tracker)
    assert np.abs(np.diff(tracks.points, axis=1)).max() < MIN_STEP
    with pytest.raises(NoMotionError, match="generated video"):
        motion_fidelity(tracks, tracks_of([RIGHT] * 4))


def test_lucas_kanade_loses_points_without_texture():
    blank = np.full((3, 64, 64, 3), 90, np.uint8)
    assert not track(blank, "lucas-kanade").visible[:, 1:].any()


@trackers
def test_the_smallest_clip_can_be_tracked(tracker):
    tracks = track(sliding(1, 0, frames=3, height=16, width=16), tracker)
    assert np.median(np.diff(tracks.points, axis=1)[tracks.visible[:, 1:]], axis=0) == pytest.approx([1, 0], abs=0.1)


@trackers
@pytest.mark.parametrize("seed", [13, 22, 24])
def test_background_points_follow_the_pan(tracker, seed):
    """Points that the sprite comes nowhere near keep within a pixel of the camera's known way."""
    clip = pan_clip(seed)
    tracks = track(clip.frames, tracker)
    pan = -np.linspace(0, 1, len(clip.frames))[:, None] * np.array(clip.scene.camera.pan)
    truth = tracks.points[:, :1] + pan
    reach = 1.25 * max(clip.scene.sprites[0].path.radius) + 7
    from_sprite = np.linalg.norm(truth - clip.trajectories[0], axis=-1).min(axis=1)
    from_border = np.minimum(truth, 63 - truth).min(axis=(1, 2))
    free = (from_sprite > reach) & (from_border > 2)
    assert free.sum() >= 20
    assert tracks.visible[free].mean() > 0.9
    assert np.linalg.norm(tracks.points - truth, axis=-1)[free & tracks.visible[:, -1]].max() < 1


@trackers
@pytest.mark.parametrize("seed", [0, 2])
def test_sprite_points_follow_the_trajectory(tracker, seed):
    """Sprites of constant size: the points that start on one go its way, most of them within a pixel."""
    clip = pan_clip(seed)
    tracks = track(clip.frames, tracker)
    x, y = tracks.points[:, 0].round().astype(int).T
    on_sprite = clip.masks[0, 0, y, x]
    ways = tracks.points - tracks.points[:, :1]
    followed = np.array([np.median(ways[on_sprite & seen, t], axis=0) for t, seen in enumerate(tracks.visible.T)])
    error = np.linalg.norm(followed - (clip.trajectories[0] - clip.trajectories[0, 0]), axis=-1)
    assert np.ptp(clip.trajectories[0], axis=0).max() > 25
    assert (on_sprite & tracks.visible[:, -1]).sum() >= 10
    assert error.max() < 1


@trackers
def test_lost_points_stay_lost_where_they_were(tracker):
    tracks = track(sliding(7, 0, frames=6), tracker)
    lost = ~tracks.visible
    assert lost[:, 1:][lost[:, :-1]].all() and lost[:, -1].any() and not lost[:, 0].any()
    assert (np.diff(tracks.points, axis=1)[lost[:, 1:]] == 0).all()
    assert (tracks.points >= -0.5).all() and (tracks.points <= 63.5).all()
    assert lost[tracks.points[:, 0, 0] > 63.5 - 28, -1].all()  # they have left on the right by the last frame


@trackers
def test_points_are_lost_at_a_cut(tracker):
    cut = np.concatenate([sliding(1, 0, frames=2), texture(seed=9)[None]])
    visible = track(cut, tracker).visible
    assert visible[:, 1].mean() > 0.85 and visible[:, 2].mean() < 0.3


@trackers
def test_tracks_are_the_same_every_time(tracker):
    frames = sliding(2, 1)
    one, other = track(frames, tracker), track(frames, tracker)
    np.testing.assert_array_equal(one.points, other.points)
    np.testing.assert_array_equal(one.visible, other.visible)


def test_an_unknown_tracker_lists_the_trackers():
    with pytest.raises(
        MetricInputError, match=r"'cotracker' is not a tracker.*lucas-kanade, dis, cotracker3"
    ) as caught:
        track(sliding(1, 0), "cotracker")
    assert (caught.value.code, caught.value.key) == ("unknown-tracker", "metrics.tracker")


@trackers
@pytest.mark.parametrize(
    ("frames", "code", "message"),
    [
        (np.zeros((5, 64, 64, 3), np.float32), "frames-invalid", r"float32 \[5, 64, 64, 3\].*multiplied by 255"),
        (np.zeros((5, 3, 64, 64), np.uint8), "frames-invalid", r"uint8 \[5, 3, 64, 64\].*channels come last"),
        (np.zeros((64, 64, 3), np.uint8), "frames-invalid", r"uint8 \[64, 64, 3\], expected uint8 \[T, H, W, 3\]"),
        (np.zeros((1, 64, 64, 3), np.uint8), "frames-too-few", "1 frames of 64x64.*one frame has no motion"),
        (np.zeros((5, 64, 8, 3), np.uint8), "frames-too-small", "5 frames of 64x8.*at least 16x16"),
    ],
)
def test_frames_that_cannot_be_tracked_are_refused(tracker, frames, code, message):
    with pytest.raises(MetricInputError, match=message) as caught:
        TRACKERS[tracker](frames)
    assert caught.value.code == code


def test_tracks_must_fit_together_and_be_finite(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    points, visible = np.zeros((4, 9, 2), np.float32), np.ones((4, 9), bool)
    for wrong in ((points.transpose(1, 0, 2), visible), (points.astype(float), visible), (points, visible.astype(int))):
        with pytest.raises(MetricInputError, match=r"expected float32 \[N, T, 2\] and bool \[N, T\]") as caught:
            Tracks(*wrong)
        assert caught.value.code == "tracks-invalid"
    points[2, 3, 0] = np.nan
    with pytest.raises(MetricInputError, match="1 coordinates .* are not finite"):
        Tracks(points, visible)


# --- both together


@trackers
def test_the_same_clip_scores_one_and_its_mirror_and_reverse_clearly_less(tracker):
    """A pan to the side, with a sprite that moves to the side, too."""
    frames = pan_clip(4).frames
    mirrored, reversed_ = np.ascontiguousarray(frames[:, :, ::-1]), np.ascontiguousarray(frames[::-1])
    reference = track(frames, tracker)
    assert motion_fidelity(track(frames, tracker), reference) == pytest.approx(1, abs=1e-12)
    assert motion_fidelity(track(mirrored, tracker), reference) < 0.5
    assert motion_fidelity(track(reversed_, tracker), reference) < 0.5


@trackers
@pytest.mark.parametrize("seed", [0, 4, 7])
def test_the_same_motion_in_other_looks_scores_high_and_another_clip_clearly_less(tracker, seed):
    scene, same_motion = sample_pair(seed, "eval", sprites=1, shot="pan")
    reference = track(render(scene).frames, tracker)
    assert motion_fidelity(track(render(same_motion).frames, tracker), reference) > 0.95
    assert motion_fidelity(track(pan_clip(seed + 100).frames, tracker), reference) < 0.9


# --- statistics


def test_the_interval_of_two_values_is_known():
    """Means of two draws from 0 and 1: 0, 1/2, 1 with the shares 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0.0, 1.0], level=0.4) == Interval(mean=0.5, low=0.5, high=0.5, count=2)
    assert bootstrap_interval([0.0, 1.0], level=0.8) == Interval(mean=0.5, low=0.0, high=1.0, count=2)


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap_interval(values)
    error = values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )


def test_the_interval_covers_the_mean_as_often_as_its_level_says():
    rng = np.random.default_rng(1)
    samples = rng.exponential(size=(300, 40))
    for level in (0.95, 0.5):
        intervals = [bootstrap_interval(sample, resamples=300, level=level) for sample in samples]
        covered = np.mean([interval.low <= 1 <= interval.high for interval in intervals])
        assert covered == pytest.approx(level, abs=0.07)


def test_the_interval_is_the_same_every_time_and_moves_with_the_seed():
    values = np.random.default_rng(2).random(30)
    assert bootstrap_interval(values) == bootstrap_interval(list(values))
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_a_single_value_has_an_interval_without_width():
    assert bootstrap_interval([0.7]) == Interval(0.7, 0.7, 0.7, 1)


def test_a_paired_difference_is_narrower_than_what_the_pairs_share():
    rng = np.random.default_rng(3)
    clip = rng.normal(0, 5, 50)
    better = clip + 0.2 + rng.normal(0, 0.1, 50)
    difference = paired_difference(better, clip)
    assert difference == bootstrap_interval(better - clip)
    assert 0.1 < difference.low < difference.mean < difference.high < 0.3
    opposite = paired_difference(clip, better)
    assert opposite.mean == pytest.approx(-difference.mean)


@pytest.mark.parametrize("interval_of", [bootstrap_interval, lambda v, **k: paired_difference(v, v, **k)])
@pytest.mark.parametrize(
    ("values", "settings", "code", "message"),
    [
        ([], {}, "values-missing", r"shape \[0\], expected \[N\]"),
        (np.zeros((2, 3)), {}, "values-missing", r"shape \[2, 3\], expected \[N\]"),
        ([0.1, np.nan, np.inf], {}, "values-not-finite", "2 of 3 .* are not finite"),
        ([0.1], {"level": 95.0}, "interval-options-invalid", "the level 95.0 came"),
        ([0.1], {"resamples": 0}, "interval-options-invalid", "0 resamples"),
    ],
)
def test_values_without_an_interval_are_refused(interval_of, values, settings, code, message):
    with pytest.raises(MetricInputError, match=message) as caught:
        interval_of(values, **settings)
    assert caught.value.code == code


def test_pairs_must_be_complete():
    with pytest.raises(MetricInputError, match="3 values of a and 2 of b") as caught:
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    assert caught.value.code == "pairs-incomplete"
