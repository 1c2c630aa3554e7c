"""The mask of an object: what counts of a motion target."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ditflow.layout import LatentLayout
from ditflow.motion.filters.base import ClipContext
from ditflow.motion.filters.mask import MaskFilter
from ditflow.motion.target import MotionTarget
from ditflow.types import MotionFilterError

LAYOUT = LatentLayout("test", 2, 4, (4, 8), (1, 2, 2), (9, 64, 80))
GRID = LAYOUT.grid(LAYOUT.latent_shape(9, 64, 80))
"""3 frames of 4 x 5 patches of 16 pixels."""
STILL = torch.zeros(GRID.frames, GRID.frames, GRID.patches, 2)
TARGET = MotionTarget(STILL, torch.ones(STILL.shape[:3]))


def context(mask: np.ndarray | None) -> ClipContext:
    return ClipContext(GRID, LAYOUT, 9, mask)


def shares(target: MotionTarget) -> torch.Tensor:
    """The weights of the patches [F, h, w]; they are the same for every other frame."""
    assert (target.weight == target.weight[:, :1]).all()
    return target.weight[:, 0].unflatten(1, (GRID.height, GRID.width))


def test_a_weight_is_the_share_of_the_patch_that_the_object_covers():
    mask = np.zeros((9, 64, 80), np.uint8)
    mask[:, 16:40, 32:48] = 7
    found = shares(MaskFilter()(TARGET, context(mask)))
    expected = torch.zeros(GRID.frames, GRID.height, GRID.width)
    expected[:, 1, 2], expected[:, 2, 2] = 1.0, 0.5
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(shares(MaskFilter(outside=0.2)(TARGET, context(mask))), 0.2 + 0.8 * expected)


def test_one_object_is_chosen_by_its_number():
    mask = np.zeros((9, 64, 80), np.uint8)
    mask[:, :16, :16], mask[:, 48:, 64:] = 1, 2
    for number, place in ((1, (0, 0)), (2, (3, 4))):
        found = shares(MaskFilter(number)(TARGET, context(mask)))
        assert found[:, *place].tolist() == [1.0] * GRID.frames
        assert found.sum() == GRID.frames
    assert shares(MaskFilter()(TARGET, context(mask))).sum() == 2 * GRID.frames


def test_a_token_frame_has_the_mean_of_its_video_frames():
    mask = np.zeros((9, 64, 80), np.uint8)
    mask[0, :16, :16] = mask[3:5, :16, :16] = 1
    assert shares(MaskFilter()(TARGET, context(mask)))[:, 0, 0].tolist() == [1.0, 0.5, 0.0]


def test_a_mask_of_the_first_frame_moves_along_the_displacement():
    """Every patch was one to the left a frame before: an object in column 1 is in column 2, then in column 3."""
    mask = np.zeros((1, 64, 80), np.uint8)
    mask[0, 16:32, 16:32] = 1
    i, j = torch.meshgrid(torch.arange(GRID.frames), torch.arange(GRID.frames), indexing="ij")
    displacement = STILL.clone()
    displacement[..., 0] = (j - i)[..., None]
    found = shares(MaskFilter()(MotionTarget(displacement.to(torch.int8), TARGET.weight), context(mask)))
    assert [frame.nonzero().tolist() for frame in found] == [[[1, 1]], [[1, 2]], [[1, 3]]]


def test_weights_of_a_source_are_kept():
    mask = np.ones((9, 64, 80), np.uint8)
    weighted = replace(TARGET, weight=torch.rand(TARGET.weight.shape))
    assert torch.equal(MaskFilter()(weighted, context(mask)).weight, weighted.weight)


@pytest.mark.parametrize(
    ("mask", "target", "code"),
    [
        (None, TARGET, "missing-mask"),
        (np.ones((4, 64, 80), np.uint8), TARGET, "mask-length"),
        (np.zeros((9, 64, 80), np.uint8), TARGET, "empty-mask"),
        (np.ones((1, 64, 80), np.uint8), MotionTarget(None, TARGET.weight), "mask-needs-displacement"),
    ],
)
def test_a_mask_that_cannot_serve_is_refused_with_its_reason(mask, target, code):
    with pytest.raises(MotionFilterError) as refused:
        MaskFilter()(target, context(mask))
    assert refused.value.code == code
    assert refused.value.key.startswith("motion.filters.mask")


@pytest.mark.parametrize(
    ("frames", "compression", "depth", "groups"),
    [
        (9, 4, 1, [[0], [1, 2, 3, 4], [5, 6, 7, 8]]),
        (5, 4, 2, [[0, 1, 2, 3, 4]]),
        (9, 4, 2, [[0], [1, 2, 3, 4, 5, 6, 7, 8]]),
        (8, 4, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (7, 6, 1, [[0], [1, 2, 3, 4, 5, 6]]),
    ],
)
def test_token_frames_stand_for_all_frames_in_order(frames, compression, depth, groups):
    layout = replace(LAYOUT, compression=(compression, 8), patch=(depth, 2, 2), also_multiples_of=compression)
    found = layout.frames_of_tokens(frames)
    assert found == groups
    assert len(found) == layout.grid(layout.latent_shape(frames, 64, 80)).frames
    assert sorted({frame for group in found for frame in group}) == [*range(frames)]
