"""Motion fidelity as a job measures it, on clips of the synthetic world, whose motion is known."""

import math

import numpy as np
import pytest

from ditflow.media.video import encode_video, read_video
from ditflow.metrics import METRICS
from ditflow.metrics.base import EvaluatedClip, MetricSettings, NotMeasurableError
from ditflow.metrics.motion_fidelity import MotionFidelity, NoMotionError, motion_fidelity
from ditflow.metrics.tracks import TRACKERS
from ditflow.mini.world import Appearance, Background, Camera, Path, Scene, Sprite, render


def sprite(shape: str, colour: str, texture: str, travel=(0.0, 0.0), **path) -> Sprite:
    """Something that crosses the picture's middle halfway, or rests there."""
    return Sprite(Appearance(shape, colour, texture), Path((-travel[0] / 2, -travel[1] / 2), travel, **path))


def scene(moving: Sprite, ground: str, pan=(0.0, 0.0)) -> Scene:
    return Scene((moving,), Background(ground, origin=(100.0, 50.0)), Camera(pan))


SIDEWAYS = {
    "a ball to the right": scene(sprite("ball", "red", "striped", (30.0, 0.0)), "grass"),
    "a square to the left before a pan": scene(
        sprite("square", "white", "checkered", (-28.0, 0.0)), "bricks", (14.0, 0.0)
    ),
}
UPRIGHT = {
    "a star down": scene(sprite("star", "yellow", "dotted", (0.0, 30.0)), "stone"),
    "a square ever faster before a pan": scene(
        sprite("square", "purple", "striped", (0.0, 26.0), acceleration=0.6), "snow", (0.0, -12.0)
    ),
}
SLANTED = {"a ball up before a pan": scene(sprite("ball", "blue", "checkered", (24.0, -20.0)), "sand", (-10.0, 8.0))}
RESTING = {
    "a ring": scene(sprite("ring", "orange", "plain"), "water"),
    "a cross": scene(sprite("cross", "green", "striped"), "wood"),
}
HIGH, LOW = 0.75, 0.5
"""What the same directions reach at least, and opposite ones at most."""

left_right, upside_down, reversed_ = np.s_[:, :, ::-1], np.s_[:, ::-1], np.s_[::-1]


@pytest.fixture(scope="module", params=TRACKERS)
def metric(request) -> MotionFidelity:
    return METRICS["motion_fidelity"].from_settings(MetricSettings(tracker=request.param))


def frames_of(shown: Scene) -> np.ndarray:
    return render(shown).frames


def score(metric: MotionFidelity, generated: np.ndarray, reference: np.ndarray) -> float:
    (value,) = metric(EvaluatedClip(np.ascontiguousarray(generated), reference)).values()
    return value


def cases(*groups: dict) -> pytest.MarkDecorator:
    shown = {name: one for group in groups for name, one in group.items()}
    return pytest.mark.parametrize("shown", shown.values(), ids=shown.keys())


@cases(SIDEWAYS, UPRIGHT, SLANTED)
def test_an_identical_video_scores_one(metric, shown):
    frames = frames_of(shown)
    assert score(metric, frames, frames.copy()) == pytest.approx(1, abs=1e-9)


@cases(SIDEWAYS, UPRIGHT, SLANTED)
def test_a_video_played_backwards_scores_low(metric, shown):
    frames = frames_of(shown)
    assert score(metric, frames[reversed_], frames) < LOW


@cases(SIDEWAYS, SLANTED)
def test_motion_to_the_side_scores_low_in_a_mirror(metric, shown):
    frames = frames_of(shown)
    assert score(metric, frames[left_right], frames) < LOW


@cases(UPRIGHT, SLANTED)
def test_motion_up_or_down_scores_low_upside_down(metric, shown):
    frames = frames_of(shown)
    assert score(metric, frames[upside_down], frames) < LOW


@cases(SIDEWAYS, UPRIGHT)
def test_a_mirror_along_the_motion_changes_its_place_but_not_its_direction(metric, shown):
    frames = frames_of(shown)
    mirror = upside_down if shown in SIDEWAYS.values() else left_right
    assert score(metric, frames[mirror], frames) > HIGH


@cases(RESTING)
@pytest.mark.parametrize("coded", [False, True], ids=["as-rendered", "as-mp4"])
def test_a_static_video_is_refused_with_its_side(metric, shown, coded):
    """Also as a job finds it: the noise of the codec is no motion."""
    still, moving = frames_of(shown), frames_of(SIDEWAYS["a ball to the right"])
    if coded:
        still, moving = (through_mp4(frames) for frames in (still, moving))
    for generated, reference, side in (
        (still, moving, "the generated video moves"),
        (moving, still, "the reference moves"),
        (still, still.copy(), "the generated video and of the reference moves"),
    ):
        with pytest.raises(NoMotionError, match=f"no point of {side} 0.05 pixels or more.*it is static") as caught:
            score(metric, generated, reference)
        assert caught.value.code == "no-motion"


def through_mp4(frames: np.ndarray) -> np.ndarray:
    count, height, width = frames.shape[:3]
    return read_video(encode_video(frames, 8), frames=count, height=height, width=width).frames


def awkward(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Videos whose points are lost, rest, or jump about."""
    noise = np.random.default_rng(0).integers(0, 256, frames.shape, dtype=np.uint8)
    blank = np.full_like(frames, 90)
    half = len(frames) // 2
    return {
        "blank": blank,
        "black": np.zeros_like(frames),
        "noise": noise,
        "flicker": np.where(np.arange(len(frames))[:, None, None, None] % 2, frames, 255 - frames),
        "frozen in the first half": np.concatenate([np.repeat(frames[:1], half, 0), frames[: len(frames) - half]]),
        "frozen in the second half": np.concatenate(
            [frames[:half], np.repeat(frames[half:][:1], len(frames) - half, 0)]
        ),
        "one step alone": np.concatenate([np.repeat(frames[:1], len(frames) - 1, 0), frames[2:3]]),
        "cut to blank": np.concatenate([frames[:half], blank[half:]]),
        "a cut in every frame": frames[np.random.default_rng(1).permutation(len(frames))],
        "dim": frames // 64,
    }


@pytest.mark.parametrize("shown", ["a ball to the right", "a square to the left before a pan"])
def test_no_video_scores_anything_but_a_number(metric, shown):
    """In [-1, 1]; where there is none, the metric says why."""
    frames = frames_of(SIDEWAYS[shown])
    tracks, measured = metric.tracker(frames), 0
    for video in awkward(frames).values():
        other = metric.tracker(video)
        for generated, reference in ((other, tracks), (tracks, other), (other, other)):
            try:
                value = motion_fidelity(generated, reference, least_common=metric.least_common)
            except NotMeasurableError:
                continue
            assert math.isfinite(value) and -1 <= value <= 1 + 1e-9
            measured += 1
    assert measured >= 5
