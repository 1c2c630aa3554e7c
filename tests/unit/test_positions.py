"""Position embeddings of moved tokens against the model's own embedding of the places that they move to."""

import pytest
import torch
from tiny import own_position, tiny_backbone

from ditflow.backbones.positions import Sinusoids
from ditflow.errors import SettingsError
from ditflow.sampling.positions import PositionVariable
from ditflow.types import TokenGrid

GRIDS = [TokenGrid(3, 4, 4), TokenGrid(2, 3, 5), TokenGrid(1, 1, 4), TokenGrid(6, 30, 45)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_unmoved_tokens_have_the_models_own_embedding(backbone, grid):
    scheme = backbone.positions(grid)
    moved = scheme.apply(scheme.zero("coordinates"), "coordinates")
    torch.testing.assert_close(moved, own_position(backbone, grid), rtol=0, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_move_by_a_whole_patch_gives_the_next_tokens_embedding(backbone, grid, axis):
    sides = (grid.frames, grid.height, grid.width)
    if sides[axis] == 1:
        pytest.skip("there is no next token")
    scheme, own = backbone.positions(grid), own_position(backbone, grid)
    moves = {part: move + torch.eye(3)[axis] for part, move in scheme.zero("coordinates").items()}
    for part, moved in scheme.apply(moves, "coordinates").items():
        here = moved.unflatten(0, sides).narrow(axis, 0, sides[axis] - 1)
        there = own[part].unflatten(0, sides).narrow(axis, 1, sides[axis] - 1)
        torch.testing.assert_close(here, there, rtol=0, atol=1e-4)


def test_parts_move_apart_and_only_where_they_are_moved(backbone):
    grid = TokenGrid(3, 4, 4)
    scheme, own = backbone.positions(grid), own_position(backbone, grid)
    for moved_part in scheme.zero("coordinates"):
        moves = scheme.zero("coordinates")
        moves[moved_part][5] = torch.tensor([0.0, 0.3, -0.2])
        for name, value in scheme.apply(moves, "coordinates").items():
            changed = (value != own[name]).any(dim=1).nonzero().flatten().tolist()
            assert changed == ([5] if name.startswith(moved_part) or moved_part == "token" else [])


def test_moves_are_differentiable(backbone):
    grid = TokenGrid(2, 2, 3)
    scheme = backbone.positions(grid)
    unmoved = scheme.zero("coordinates")
    moves = [move.double().requires_grad_() for move in unmoved.values()]
    weights = [torch.randn_like(value) for value in scheme.apply(unmoved, "coordinates").values()]

    def total(*moves: torch.Tensor) -> torch.Tensor:
        learned = {part: move.float() for part, move in zip(unmoved, moves, strict=True)}
        parts = scheme.apply(learned, "coordinates")
        return sum((weight * value).sum() for weight, value in zip(weights, parts.values(), strict=True))

    assert torch.autograd.gradcheck(total, moves, eps=1e-2, atol=2e-2, rtol=2e-2)


def test_moves_cost_their_mean_squared_length_and_the_squared_differences_of_neighbours():
    grid = TokenGrid(2, 1, 3)
    scheme = tiny_backbone("rotary").positions(grid)
    moves = torch.zeros(6, 3)
    moves[1] = torch.tensor([0.0, 3.0, 4.0])
    parts = {"query": moves, "key": torch.zeros(6, 3)}
    # One token of six moves by 5 patches; two of its four neighbours across and one of three in time see it.

    def penalty(stay: float, smooth: float, parts: dict[str, torch.Tensor]) -> torch.Tensor | float:
        return PositionVariable(scheme, "coordinates", grid, stay, smooth).penalty(parts)

    assert penalty(1.0, 0.0, parts) == pytest.approx(25 / 6 / 2)
    assert penalty(0.0, 1.0, parts) == pytest.approx((2 * 25 / 4 + 25 / 3) / 2)
    assert penalty(1.0, 1.0, scheme.zero("coordinates")) == 0


def test_learned_embeddings_have_no_coordinates():
    cos, sin = torch.randn(2, 8, 16)
    with pytest.raises(SettingsError, match="optimize.*learned"):
        Sinusoids.from_embedding(cos, sin, ((0, 4), (1, 6), (2, 6)), TokenGrid(2, 2, 2))
