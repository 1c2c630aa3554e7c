"""The warping error: what a clip changes beyond its motion."""

import numpy as np
import pytest

from ditflow.metrics import temporal_consistency
from ditflow.metrics.errors import MetricInputError
from ditflow.metrics.temporal_consistency import warp_error


def texture(height=64, width=64, seed=0):
    """Smooth random colours [H, W, 3] that can be rolled, within 28..228."""
    rng = np.random.default_rng(seed)
    waves = np.fft.fft2(rng.normal(size=(height, width, 3)), axes=(0, 1))
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    smooth = np.fft.ifft2(waves * np.exp(-((x**2 + y**2) / 0.01))[..., None], axes=(0, 1)).real
    return (128 + 100 * smooth / np.abs(smooth).max()).astype(np.uint8)


def sliding(dx, dy, frames=4, **size):
    return np.stack([np.roll(texture(**size), (t * dy, t * dx), axis=(0, 1)) for t in range(frames)])


def plain_difference(frames):
    return np.abs(np.diff(frames.astype(float), axis=0)).mean()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("picture", [texture(), noise(64, 64, 3), noise(16, 20, 3), np.full((64, 64, 3), 90, np.uint8)])
def test_a_static_clip_has_no_error(picture):
    assert warp_error(np.stack([picture] * 3)) == 0


@pytest.mark.parametrize("shift", [(2, 0), (-1, 3), (6, 3)])
@pytest.mark.parametrize("size", [{"height": 64, "width": 64}, {"height": 64, "width": 96}])
def test_a_pan_has_nearly_none(shift, size):
    frames = sliding(*shift, **size)
    assert plain_difference(frames) > 10
    assert warp_error(frames) < 0.2


def test_a_pan_at_half_resolution_has_nearly_none():
    """From 256 pixels on the flow is found so."""
    frames = sliding(5, 0, frames=2, height=256, width=320)
    assert plain_difference(frames) > 10
    assert warp_error(frames) < 0.2


def test_a_change_of_brightness_counts_in_full():
    """Blank pictures move nowhere: steps of 30, 30 and 0 levels, and one of 30 in a single colour."""
    levels = [(100, 100, 100), (130, 130, 130), (100, 100, 100), (100, 100, 100), (100, 130, 100)]
    frames = np.array(levels, np.uint8)[:, None, None].repeat(32, axis=1).repeat(48, axis=2)
    assert warp_error(frames) == pytest.approx((30 + 30 + 0 + 10) / 4, abs=1e-9)


def test_a_brighter_texture_still_matches():
    assert warp_error(np.stack([texture(), texture() + 20])) == pytest.approx(20, abs=0.5)


def test_noise_has_nearly_its_plain_difference():
    """Independent levels of 0..255 differ by (256^2 - 1) / (3 * 256) = 85.3; flow finds some that match."""
    error = warp_error(noise(4, 64, 64, 3))
    assert 75 < error < 85.4


@pytest.mark.parametrize("shift", [(0, 0), (2, 0)])
def test_flicker_is_seen_with_and_without_motion(shift):
    """Two values of normal noise differ by 2 / sqrt(pi) times its spread, less what flow and blur take off."""
    frames = sliding(*shift)
    spread = 8
    flickering = (frames + np.random.default_rng(1).normal(0, spread, frames.shape)).astype(np.uint8)
    expected = 2 / np.sqrt(np.pi) * spread
    assert 0.7 * expected < warp_error(flickering) < 1.05 * expected


def test_a_cut_counts_and_a_patch_that_appears_does_not():
    cut = np.stack([texture(seed=0), texture(seed=1)])
    assert warp_error(cut) == pytest.approx(plain_difference(cut), rel=0.1)
    patched = np.stack([texture(), texture()])
    patched[1, 20:40, 20:40] = noise(20, 20, 3)
    assert plain_difference(patched) > 5
    assert warp_error(patched) < 0.35 * plain_difference(patched)


def test_where_nothing_agrees_the_error_is_the_plain_difference(monkeypatch):
    """No forward-backward error is below 0."""
    monkeypatch.setattr(temporal_consistency, "MAX_FORWARD_BACKWARD_ERROR", -1)
    frames = sliding(3, 0)
    assert warp_error(frames) == pytest.approx(plain_difference(frames), abs=1e-9)


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (np.zeros((1, 64, 64, 3), np.uint8), "frames-too-few"),
        (np.zeros((0, 64, 64, 3), np.uint8), "frames-too-few"),
        (np.zeros((5, 64, 64, 3), np.float32), "frames-invalid"),
        (np.zeros((5, 3, 64, 64), np.uint8), "frames-invalid"),
        (np.zeros((5, 64, 8, 3), np.uint8), "frames-too-small"),
    ],
)
def test_frames_without_neighbours_are_refused(frames, code):
    with pytest.raises(MetricInputError) as caught:
        warp_error(frames)
    assert caught.value.code == code
