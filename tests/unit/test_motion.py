"""Facts about the statistics of motion, against closed forms."""

import math

import pytest
import torch

from ditflow.motion import MotionStatistics, consecutive, motion_statistics, pixels_per_second
from ditflow.motion.amf import hard_displacement
from ditflow.types import QueriesKeys, TokenGrid

GRID = TokenGrid(4, 6, 8)


def uniform(dx: int, dy: int) -> torch.Tensor:
    return torch.tensor([dx, dy], dtype=torch.int8).expand(GRID.frames - 1, GRID.patches, 2)


@pytest.mark.parametrize(
    ("move", "degrees"),
    [
        ((2, 0), 0), ((2, -2), 45), ((0, -3), 90), ((-1, -1), 135), ((-5, 0), 180), ((-1, 1), 225), ((0, 1), 270),
        ((3, 3), 315), ((3, -4), math.degrees(math.atan2(4, 3))),
    ],
)  # fmt: skip
def test_motion_all_one_way_has_that_direction_and_a_concentration_of_1(move, degrees):
    found = motion_statistics(uniform(*move))
    length = math.hypot(*move)
    assert found.direction == pytest.approx(degrees)
    assert found.concentration == pytest.approx(1)
    assert (found.mean_displacement, found.largest_displacement) == (pytest.approx(length), pytest.approx(length))
    assert found.moving == 1


def test_a_static_flow_has_no_direction():
    assert motion_statistics(uniform(0, 0)) == MotionStatistics(0.0, 0.0, None, 0.0, 0.0)


def test_opposite_motions_cancel_out_and_are_motion_all_the_same():
    flow = uniform(3, 0).clone()
    flow[:, ::2] = -flow[:, ::2]
    assert motion_statistics(flow) == MotionStatistics(3.0, 1.0, None, 0.0, 3.0)


def test_two_ways_at_a_right_angle_have_the_direction_between_and_the_length_of_their_mean():
    flow = uniform(5, 0).clone()
    flow[:, ::2] = torch.tensor([0, -1], dtype=torch.int8)
    found = motion_statistics(flow)
    assert found.direction == pytest.approx(45), "every moving patch counts the same, however far it moves"
    assert found.concentration == pytest.approx(math.sqrt(0.5))
    assert found.mean_displacement == pytest.approx(3)


def test_patches_that_rest_count_for_the_mean_and_not_for_the_direction():
    flow = torch.zeros(GRID.frames - 1, GRID.patches, 2, dtype=torch.int8)
    flow[0, : GRID.patches // 2] = torch.tensor([-4, 0], dtype=torch.int8)
    share = 1 / 2 / (GRID.frames - 1)
    found = motion_statistics(flow)
    assert (found.moving, found.mean_displacement) == (pytest.approx(share), pytest.approx(4 * share))
    assert (found.direction, found.concentration, found.largest_displacement) == (180, 1, 4)


def test_a_texture_that_is_rolled_moves_by_the_roll():
    """One-hot features of a texture that wraps around: but for the seam, every patch moves by (1, 2)."""
    texture = torch.eye(GRID.patches).view(GRID.height, GRID.width, -1)
    tokens = torch.cat([texture.roll((2 * f, f), dims=(0, 1)).flatten(0, 1) for f in range(GRID.frames)])
    flow = consecutive(hard_displacement(QueriesKeys(tokens, tokens, heads=1), GRID))
    inner = flow.view(-1, GRID.height, GRID.width, 2)[:, :-2, :-1]
    found = motion_statistics(inner.reshape(len(flow), -1, 2))
    assert found.direction == pytest.approx(360 - math.degrees(math.atan2(2, 1)))
    assert found.mean_displacement == found.largest_displacement == pytest.approx(math.hypot(1, 2))


def test_consecutive_frames_are_those_beside_the_diagonal():
    displacement = torch.arange(4 * 4 * 3 * 2).view(4, 4, 3, 2)
    flow = consecutive(displacement)
    assert all(torch.equal(flow[i], displacement[i, i + 1]) for i in range(3))


def test_a_speed_is_in_pixels_of_the_video_and_seconds_of_its_play():
    # 17 frames at 8 a second last two seconds between the first and the last, in which 4 steps of 8 pixels are made.
    assert pixels_per_second(1.0, (5, 8, 8), (17, 64, 64), fps=8.0) == pytest.approx(16)


def test_statistics_that_differ_in_their_last_digits_are_close_and_others_are_not():
    found = motion_statistics(uniform(1, 2))
    assert found.close_to(MotionStatistics(**{**vars(found), "moving": found.moving + 1e-9}))
    assert not found.close_to(MotionStatistics(**{**vars(found), "moving": found.moving + 1e-3}))
    assert not found.close_to(MotionStatistics(**{**vars(found), "direction": None}))
