"""Resizing of coordinate offsets and latents to another grid, in closed form."""

import pytest
import torch

from ditflow.banks.resizing import resize_field, resize_moves

GRID = (3, 4, 4)


def moves_of(t: float, y: float, x: float, steps: int = 2) -> torch.Tensor:
    """The same move for every token of GRID."""
    return torch.tensor([t, y, x]).expand(steps, 3 * 4 * 4, 3)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((3, 4, 4), (0.5, 1.0, -2.0)),
        ((3, 8, 4), (0.5, 2.0, -2.0)),
        ((3, 4, 6), (0.5, 1.0, -3.0)),
        ((5, 4, 4), (1.0, 1.0, -2.0)),
        ((2, 2, 2), (0.25, 0.5, -1.0)),
        ((1, 4, 4), (0.0, 1.0, -2.0)),
    ],
)
def test_moves_grow_as_the_grid_does(grid, expected):
    other = resize_moves(moves_of(0.5, 1.0, -2.0), GRID, grid)
    assert other.shape == (2, grid[0] * grid[1] * grid[2], 3)
    torch.testing.assert_close(other, torch.tensor(expected).expand_as(other))


def test_a_move_that_grows_from_frame_to_frame_still_does_with_both_ends_kept():
    field = torch.zeros(1, *GRID, 3)
    field[..., 2] = torch.tensor([0.0, 2.0, 4.0])[None, :, None, None]
    other = resize_moves(field.flatten(1, 3), GRID, (5, 4, 4)).unflatten(1, (5, 4, 4))
    torch.testing.assert_close(other[0, :, 1, 2, 2], torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))


def test_every_token_keeps_its_own_move_at_its_own_size():
    moves = torch.randn(2, 48, 3)
    torch.testing.assert_close(resize_moves(moves, GRID, GRID), moves)


def test_the_right_side_moves_on_the_right_side_of_a_larger_grid_and_steps_stay_apart():
    field = torch.zeros(2, *GRID, 3)
    field[1, :, :, 2:, 1] = 1.0
    other = resize_moves(field.flatten(1, 3), GRID, (3, 4, 8)).unflatten(1, (3, 4, 8))
    assert not other[0].any()
    assert (other[1, :, :, :3, 1] == 0).all()
    torch.testing.assert_close(other[1, :, :, 5:, 1], torch.ones(3, 4, 3))


def test_a_picture_shrinks_by_means_and_keeps_its_own_channels():
    picture = torch.zeros(2, 1, 4, 4)
    picture[0, 0, ::2] = 1.0
    small = resize_field(picture, (1, 2, 2))
    assert small.shape == (2, 1, 2, 2)
    torch.testing.assert_close(small[0].mean(), torch.tensor(0.5))
    assert (small[0] - 0.5).abs().max() < 0.2, "rows of 0 and 1 become grey, not one of them"
    assert not small[1].any()
