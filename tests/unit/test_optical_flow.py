"""Motion targets by optical flow, against motion that is known in closed form."""

import cv2
import numpy as np
import pytest
import torch

from ditflow.errors import SettingsError
from ditflow.layout import LatentLayout
from ditflow.mini.world import render, sample_scene
from ditflow.motion.sources.optical_flow import OpticalFlowSource

LAYOUT = LatentLayout("test", 2, 4, (4, 8), (1, 2, 2), (17, 64, 64))


def panned(frames: int, height: int, width: int, right: float, down: float) -> np.ndarray:
    """A texture that moves by so many pixels a frame."""
    noise = np.random.default_rng(0).random((height + 200, width + 200)).astype(np.float32)
    texture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)
    shots = []
    for t in range(frames):
        move = np.float32([[1, 0, right * t - 100], [0, 1, down * t - 100]])
        shots.append(cv2.warpAffine(texture, move, (width, height), flags=cv2.INTER_CUBIC))
    return np.repeat(np.stack(shots).clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize(("right", "down"), [(1.0, 0.0), (-0.5, 1.5), (0.0, 0.0)])
@pytest.mark.parametrize("frame", ["first", "middle", "last"])
def test_a_pan_displaces_every_visible_patch_by_its_pixels(right, down, frame):
    target = OpticalFlowSource(frame=frame, rest=0.0).target(panned(9, 64, 96, right, down), LAYOUT)
    shown = [{"first": group[0], "middle": group[len(group) // 2], "last": group[-1]}[frame] for group in
             LAYOUT.frames_of_tokens(9)]  # fmt: skip
    for i in range(3):
        for j in range(3):
            moved = torch.tensor([right, down]) * (shown[j] - shown[i]) / 16
            seen = target.weight[i, j] > 0
            assert seen.float().mean() > 0.5
            errors = (target.displacement[i, j][seen] - moved).norm(dim=-1)
            assert errors.median() < 0.03
            assert errors.quantile(0.9) < 0.15


def test_patches_that_leave_the_picture_do_not_count():
    target = OpticalFlowSource(frame="last").target(panned(9, 64, 96, 3.0, 0.0), LAYOUT)
    columns = target.weight[0, 2].view(4, 6)
    assert columns[:, :4].mean() == 1
    assert columns[:, 5].sum() == 0, "8 frames of 3 pixels carry the last 16 pixels out"
    kept = OpticalFlowSource(frame="last", lost=0.25).target(panned(9, 64, 96, 3.0, 0.0), LAYOUT)
    assert kept.weight[0, 2].view(4, 6)[:, 5].unique().tolist() == [0.25]
    assert torch.equal(kept.displacement, target.displacement)


def test_what_moves_by_less_than_half_a_patch_rests():
    """4 frames of 1 pixel are a quarter of a patch, 8 frames half of one."""
    target = OpticalFlowSource(frame="last", rest=0.45).target(panned(9, 64, 96, 1.0, 0.0), LAYOUT)
    assert not target.displacement[0, 1].any()
    assert target.displacement[0, 2][target.weight[0, 2] > 0].norm(dim=-1).median() > 0.45


def test_a_frame_is_not_displaced_against_itself():
    target = OpticalFlowSource().target(panned(9, 64, 96, 2.0, 1.0), LAYOUT)
    frames = torch.arange(3)
    assert not target.displacement[frames, frames].any()
    assert target.weight[frames, frames].all()


def test_the_end_point_error_on_the_world_is_a_third_of_a_patch():
    """On what moves by more than half a patch."""
    errors = []
    for seed in range(6):
        clip = render(sample_scene(seed, split="eval", sprites=1), 17, 64, 64)
        target = OpticalFlowSource().target(clip.frames, LAYOUT)
        truth = clip.displacement(*target_grid(target))
        moving = torch.from_numpy(truth.visible & (np.linalg.norm(truth.displacement, axis=-1) > 0.5))
        error = (target.displacement - torch.from_numpy(truth.displacement)).norm(dim=-1)
        errors.append(error[moving].mean().item())
    assert np.mean(errors) < 0.5


def target_grid(target) -> tuple[int, int, int]:
    frames, _, patches = target.weight.shape
    return frames, round(patches**0.5), round(patches**0.5)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"enlarged": 0.0}, "enlarged"),
        ({"points_per_side": 0}, "points_per_side"),
        ({"lost_from": 0.0}, "lost_from"),
        ({"lost": 1.5}, "lost"),
        ({"rest": -0.5}, "rest"),
    ],
)
def test_values_that_it_cannot_have_are_refused(options, key):
    with pytest.raises(SettingsError) as refused:
        OpticalFlowSource(**options)
    assert refused.value.key == key


def test_a_size_that_the_model_cannot_do_is_refused():
    with pytest.raises(SettingsError):
        OpticalFlowSource().target(panned(9, 60, 96, 0.0, 0.0), LAYOUT)
