"""Motion transfer works: on the embedded model, guided clips go where their references go, and plain ones do not."""

import numpy as np
import pytest

from ditflow import backbones, transfer_motion
from ditflow.mini.measure import detect_sprite, track_cosine
from ditflow.mini.world import prompt_of, render, sample_pair
from ditflow.settings import MethodSettings

PAIRS = range(3000, 3008)
GAIN = 0.3
"""Least gain of the mean track cosine over plain generation; `make bench-mini` measures how much it is."""


@pytest.fixture(scope="module")
def mini() -> backbones.Backbone:
    return backbones.load("mini", device="cpu")


def mean_track_cosine(mini: backbones.Backbone, method: MethodSettings) -> float:
    cosines = []
    for seed in PAIRS:
        reference, target = sample_pair(seed, "eval", sprites=1)
        clip = render(reference)
        made = transfer_motion(mini, prompt_of(target), reference=clip.frames, method=method, seed=seed)
        cosines.append(track_cosine(detect_sprite(made.video), clip.trajectories[0]))
    return float(np.mean(cosines))


def test_guided_sprites_follow_their_references_and_plain_ones_do_not(mini):
    plain = mean_track_cosine(mini, MethodSettings("none"))
    guided = mean_track_cosine(mini, MethodSettings("ditflow"))
    assert guided > plain + GAIN
