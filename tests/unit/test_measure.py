"""The detection of sprites, on clips whose ground truth is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from ditflow.mini import measure
from ditflow.mini.measure import (
    Detection,
    detect_sprite,
    flow_score,
    position_error,
    track_cosine,
)
from ditflow.mini.world import BACKGROUNDS, COLOURS, SHAPES, Camera, render, sample_scene

GRID = (5, 8, 8)


def detection_at(centres: np.ndarray, confidence: np.ndarray | None = None) -> Detection:
    count = len(centres)
    return Detection(
        "red", "ball", "grass", centres, np.full(count, 9.0), np.ones(count) if confidence is None else confidence
    )


def test_held_out_clips_are_named_and_tracked():
    for seed in range(24):
        clip = render(sample_scene(seed, "eval", sprites=1))
        detected, look = detect_sprite(clip.frames), clip.scene.sprites[0].appearance
        named = (detected.colour, detected.shape, detected.background)
        assert named == (look.colour, look.shape, clip.scene.background.name), f"seed {seed}"
        assert detected.found.all()
        assert track_cosine(detected, clip.trajectories[0]) > 0.99
        assert position_error(detected, clip.trajectories[0]) < 1


def test_radii_are_those_of_the_sprite():
    scene = sample_scene(3, "eval", sprites=1)
    sprite = scene.sprites[0]
    for radius in (10.0, 18.0):
        path = replace(sprite.path, start=(0.0, 0.0), travel=(4.0, 0.0), bend=0.0, radius=(radius, radius))
        clip = render(replace(scene, sprites=(replace(sprite, path=path),)))
        assert detect_sprite(clip.frames).radii.mean() == pytest.approx(radius, abs=1)


def test_words_are_the_worlds():
    detected = detect_sprite(render(sample_scene(1, "eval", sprites=1)).frames)
    assert detected.colour in COLOURS
    assert detected.shape in SHAPES
    assert detected.background in BACKGROUNDS


def test_an_empty_ground_shows_no_sprite():
    for seed in range(8):
        detected = detect_sprite(render(replace(sample_scene(seed, "eval"), sprites=())).frames)
        assert not detected.found.any()
        assert track_cosine(detected, detected.centres) == 0


def test_track_cosine_in_closed_form():
    right = np.stack([np.arange(5.0), np.zeros(5)], axis=-1)
    down = right[:, ::-1]
    assert track_cosine(detection_at(3 * right + 7), right) == pytest.approx(1)
    assert track_cosine(detection_at(-right), right) == pytest.approx(-1)
    assert track_cosine(detection_at(down), right) == pytest.approx(0)
    assert track_cosine(detection_at(right + down), right) == pytest.approx(np.sqrt(0.5))
    assert track_cosine(detection_at(0 * right), right) == 0


def test_frames_without_the_sprite_do_not_count():
    right = np.stack([np.arange(6.0), np.zeros(6)], axis=-1)
    strayed = right.copy()
    strayed[:2] = 50
    assert track_cosine(detection_at(strayed, np.array([0.1, 0.1, 1, 1, 1, 1])), right) == pytest.approx(1)
    assert track_cosine(detection_at(strayed, np.array([0.1, 0.1, 0.1, 0.1, 1, 1])), right) == 0
    assert track_cosine(detection_at(strayed), right) < 0.9


def test_position_error_is_a_mean_distance():
    centres = np.zeros((4, 2))
    assert position_error(detection_at(centres), np.array([[3.0, 4.0]] * 2 + [[0.0, 1.0]] * 2)) == pytest.approx(3)


def test_the_truth_scores_no_error_and_rounding_it_about_two_fifths_of_a_patch():
    truth = render(sample_scene(5, "eval", shot="pan")).displacement(*GRID)
    score = flow_score(truth.displacement, truth)
    assert (score.sprite_error, score.sprite_within, score.ground_error) == (0, 1, 0)
    assert 0.25 < flow_score(np.rint(truth.displacement), truth).sprite_error < 0.5


def test_a_field_that_is_off_by_a_known_step_scores_its_length():
    truth = render(sample_scene(6, "eval", shot="rest")).displacement(*GRID)
    score = flow_score(truth.displacement + np.float32([0.0, 1.5]), truth)
    assert score.sprite_error == pytest.approx(1.5)
    assert score.sprite_within == 0
    assert score.ground_error == pytest.approx(1.5)
    assert score.ground_length == pytest.approx(1.5), "the camera rests"


def test_only_visible_points_and_different_frames_count():
    truth = render(sample_scene(7, "eval", shot="pan")).displacement(*GRID)
    wrong = truth.displacement.copy()
    wrong[~truth.visible] = 99
    frames = np.arange(len(wrong))
    wrong[frames, frames] = 99
    score = flow_score(wrong, truth)
    assert (score.sprite_error, score.ground_error) == (0, 0)


def test_a_clip_without_sprites_has_no_score_on_sprites():
    scene = replace(sample_scene(8, "eval"), sprites=(), camera=Camera())
    score = flow_score(np.zeros((5, 5, 64, 2)), render(scene).displacement(*GRID))
    assert np.isnan(score.sprite_error)
    assert score.ground_length == 0


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (32, 32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_silhouettes_are_looked_for_by_plain_correlation(shape, size):
    evidence = torch.rand(3, *size) * 2 - 1
    templates = measure._templates(shape)
    plain = conv2d(evidence[:, None], templates[:, None], padding=templates.shape[-1] // 2)
    torch.testing.assert_close(measure._correlations(evidence, shape), plain, rtol=1e-4, atol=1e-5)
