"""The losses of SMM, MOFT and MotionClone against their definitions, written out loop by loop in 64 bits."""

from itertools import product

import numpy as np
import pytest
import torch

from ditflow.losses.moft import MotionFeatureLoss, motion_channels
from ditflow.losses.motionclone import temporal_attention
from ditflow.losses.smm import SpaceTimeMeanLoss
from ditflow.settings import MethodSettings, ModelDefaults
from ditflow.types import Features, QueriesKeys, StaticReferenceError, TokenGrid, TokenGridError

GRID = TokenGrid(frames=4, height=2, width=3)
FRAMES, PATCHES = range(GRID.frames), range(GRID.patches)


def random_features(channels: int = 50) -> Features:
    return Features(torch.randn(GRID.tokens, channels))


def random_queries_keys(heads: int = 2, head_dim: int = 3) -> QueriesKeys:
    return QueriesKeys(*torch.randn(2, GRID.tokens, heads * head_dim), heads=heads)


def by_frame(features: Features) -> np.ndarray:
    """[F, P, D] in 64 bits."""
    return features.tokens.double().numpy().reshape(GRID.frames, GRID.patches, -1)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def moving_mean(*means: tuple[float, float]) -> Features:
    """Two channels whose spatial means are given, with a spread that averages out."""
    spread = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).repeat(GRID.patches // 2, 1)
    return Features(torch.cat([torch.tensor(mean) + spread for mean in means]))


# ---- SMM


@pytest.mark.parametrize(("way", "expected"), [((2.0, 0.0), 0.0), ((0.0, 0.5), 1.0), ((-1.0, 0.0), 2.0)])
def test_smm_is_one_minus_the_cosine_of_the_ways_of_the_mean(way, expected):
    loss = SpaceTimeMeanLoss()
    payload = loss.reference(moving_mean((5.0, 1.0), (6.0, 1.0), (7.0, 1.0), (8.0, 1.0)), GRID)
    generated = moving_mean(*[(step * way[0], step * way[1]) for step in FRAMES])
    assert loss(generated, payload, GRID).item() == pytest.approx(expected, abs=1e-6)


def test_smm_equals_its_definition():
    reference, generated = random_features(), random_features()
    m, g = by_frame(reference).mean(1), by_frame(generated).mean(1)
    expected = np.mean([1 - cosine(g[j] - g[i], m[j] - m[i]) for i, j in product(FRAMES, FRAMES) if i != j])
    loss = SpaceTimeMeanLoss()
    assert loss(generated, loss.reference(reference, GRID), GRID).item() == pytest.approx(expected, rel=1e-5)


def test_smm_official_takes_the_references_anchors_and_cosines_over_time():
    reference, generated = random_features(), random_features()
    m, g = by_frame(reference).mean(1), by_frame(generated).mean(1)
    terms = [1 - cosine(g[:, c] - m[i, c], m[:, c] - m[i, c]) for i in FRAMES for c in range(m.shape[1])]
    loss = MethodSettings("smm", preset="official").make_loss()
    assert loss(generated, loss.reference(reference, GRID), GRID).item() == pytest.approx(np.mean(terms), rel=1e-5)


# ---- MOFT


def test_moft_equals_its_definition():
    reference, generated = random_features(), random_features()
    r, g = (by_frame(part) - by_frame(part).mean(0) for part in (reference, generated))
    _, _, right = np.linalg.svd(r.reshape(GRID.tokens, -1))
    channels = np.argsort(-np.abs(right[0]))[:2]
    terms = [1 - cosine(g[f, p, channels], r[f, p, channels]) for f, p in product(FRAMES, PATCHES)]
    loss = MotionFeatureLoss()
    payload = loss.reference(reference, GRID)
    assert payload["channels"].tolist() == channels.tolist()
    assert loss(generated, payload, GRID).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_motion_channels_are_those_that_change_over_time():
    tokens = torch.randn(1, GRID.patches, 100).expand(GRID.frames, -1, -1) + 1e-3 * torch.randn(GRID.frames, 6, 100)
    moving = [7, 21, 60, 99]
    tokens[..., moving] += torch.randn(GRID.frames, 1, 1)
    payload = MotionFeatureLoss().reference(Features(tokens.flatten(0, 1)), GRID)
    assert sorted(payload["channels"].tolist()) == moving


@pytest.mark.parametrize(("channels", "expected"), [(1, 1), (24, 1), (50, 2), (1920, 76)])
def test_four_percent_of_the_channels_count(channels, expected):
    assert len(motion_channels(torch.randn(8, channels))) == expected


# ---- MotionClone


def attention_by_loops(capture: QueriesKeys) -> np.ndarray:
    """[H, P, F, F]."""
    d = capture.query.shape[1] // capture.heads
    q, k = (
        x.double().numpy().reshape(GRID.frames, GRID.patches, capture.heads, d) for x in (capture.query, capture.key)
    )
    attention = np.empty((capture.heads, GRID.patches, GRID.frames, GRID.frames))
    for h, p, i in product(range(capture.heads), PATCHES, FRAMES):
        weights = np.exp([q[i, p, h] @ k[j, p, h] / np.sqrt(d) for j in FRAMES])
        attention[h, p, i] = weights / weights.sum()
    return attention


def test_temporal_attention_equals_its_definition():
    capture = random_queries_keys()
    np.testing.assert_allclose(temporal_attention(capture, GRID).numpy(), attention_by_loops(capture), rtol=1e-4)


@pytest.mark.parametrize("other_frames", [False, True])
def test_motionclone_compares_the_largest_entry_of_every_row(other_frames):
    reference, generated = random_queries_keys(), random_queries_keys()
    a, b = attention_by_loops(reference), attention_by_loops(generated)
    terms = []
    for h, p, i in product(range(2), PATCHES, FRAMES):
        row = [-1.0 if other_frames and j == i else a[h, p, i, j] for j in FRAMES]
        j = int(np.argmax(row))
        terms.append((a[h, p, i, j] - b[h, p, i, j]) ** 2)
    loss = MethodSettings("motionclone", loss={"other_frames": other_frames}).make_loss()
    assert loss(generated, loss.reference(reference, GRID), GRID).item() == pytest.approx(np.mean(terms), rel=1e-4)


# ---- what cannot be done


@pytest.mark.parametrize("loss", [SpaceTimeMeanLoss(), MotionFeatureLoss()], ids=lambda loss: loss.name)
def test_a_reference_whose_features_never_change_is_refused(loss):
    still = torch.randn(1, GRID.patches, 50).expand(GRID.frames, -1, -1).flatten(0, 1)
    with pytest.raises(StaticReferenceError, match="no motion to transfer"):
        loss.reference(Features(still), GRID)


@pytest.mark.parametrize("loss", [SpaceTimeMeanLoss(), MotionFeatureLoss()], ids=lambda loss: loss.name)
def test_features_with_text_tokens_are_refused(loss):
    with pytest.raises(TokenGridError, match="text tokens"):
        loss.reference(Features(torch.randn(GRID.tokens + 5, 50)), GRID)


def test_every_method_of_the_comparison_has_its_settings():
    defaults = ModelDefaults(blocks=(1,))
    for name in ("smm", "moft", "motionclone", "ditflow"):
        method = MethodSettings(name).resolve(defaults)
        assert method.has_loss
        assert method.injects
