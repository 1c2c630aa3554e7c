"""Attention motion flow: closed forms, invariants and gradients."""

import math

import pytest
import torch

from ditflow.motion.amf import displacement_error, hard_displacement, soft_displacement
from ditflow.types import QueriesKeys, TokenGrid, TokenGridError

GRID = TokenGrid(frames=3, height=4, width=5)
HEADS, HEAD_DIM = 2, 8


def random_attention(grid: TokenGrid = GRID, dtype: torch.dtype = torch.float64) -> QueriesKeys:
    query, key = (torch.randn(grid.tokens, HEADS * HEAD_DIM, dtype=dtype) for _ in range(2))
    return QueriesKeys(query, key, HEADS)


def texture_attention(shifts: list[tuple[int, int]], grid: TokenGrid) -> QueriesKeys:
    """Unit vectors per patch, rolled by (dx, dy) in each frame: a patch matches itself and nothing else."""
    texture = torch.eye(grid.patches).view(grid.height, grid.width, grid.patches)
    frames = [texture.roll((dy, dx), dims=(0, 1)).flatten(0, 1) for dx, dy in shifts]
    tokens = torch.cat(frames)
    return QueriesKeys(tokens, tokens, heads=1)


def plain_soft_displacement(attention: QueriesKeys, grid: TokenGrid, temperature: float) -> torch.Tensor:
    """The definition, read aloud: H x S x S logits, mean over heads, softmax per key frame, expectation."""
    query, key = (
        tokens.view(grid.tokens, attention.heads, -1).transpose(0, 1) for tokens in (attention.query, attention.key)
    )
    logits = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).mean(dim=0) * temperature
    weights = logits.view(grid.frames, grid.patches, grid.frames, grid.patches).softmax(dim=-1)
    coordinates = grid.coordinates().to(logits.dtype)
    expected = torch.einsum("ipjq,qc->ijpc", weights, coordinates)
    return expected - coordinates


def test_flow_equals_the_shift_of_a_rolled_texture():
    grid = TokenGrid(3, 6, 7)
    shifts = [(0, 0), (1, 0), (2, 1)]
    flow = hard_displacement(texture_attention(shifts, grid), grid)
    x, y = grid.coordinates().unbind(-1)
    for i, (xi, yi) in enumerate(shifts):
        for j, (xj, yj) in enumerate(shifts):
            dx, dy = xj - xi, yj - yi
            stays = (0 <= x + dx) & (x + dx < grid.width) & (0 <= y + dy) & (y + dy < grid.height)
            assert (flow[i, j][stays] == torch.tensor([dx, dy])).all()


def test_soft_flow_of_a_sharp_texture_equals_its_hard_flow():
    grid = TokenGrid(2, 4, 4)
    attention = texture_attention([(0, 0), (1, 2)], grid)
    soft = soft_displacement(attention, grid, temperature=1e4)
    torch.testing.assert_close(soft, hard_displacement(attention, grid).float())


def test_identical_frames_give_zero_flow():
    grid = TokenGrid(4, 3, 3)
    assert not hard_displacement(texture_attention([(0, 0)] * 4, grid), grid).any()


def test_permuting_frames_permutes_pairs():
    attention, order = random_attention(), [2, 0, 1]
    permuted = QueriesKeys(
        *(t.view(GRID.frames, GRID.patches, -1)[order].flatten(0, 1) for t in (attention.query, attention.key)),
        HEADS,
    )
    for displacement in (hard_displacement, lambda a, g: soft_displacement(a, g, 2.0)):
        torch.testing.assert_close(displacement(permuted, GRID), displacement(attention, GRID)[order][:, order])


def test_ties_go_to_the_lowest_patch():
    grid = TokenGrid(2, 2, 2)
    same = QueriesKeys(torch.ones(grid.tokens, 4), torch.ones(grid.tokens, 4), heads=1)
    assert (hard_displacement(same, grid) == -grid.coordinates()).all()


def test_equal_logits_point_to_the_centre_of_the_frame():
    grid = TokenGrid(2, 3, 5)
    same = QueriesKeys(torch.zeros(grid.tokens, 4), torch.zeros(grid.tokens, 4), heads=1)
    flow = soft_displacement(same, grid, temperature=2.0)
    torch.testing.assert_close(flow + grid.coordinates(), torch.tensor([2.0, 1.0]).expand_as(flow))


def test_one_product_equals_the_mean_over_heads():
    attention = random_attention()
    expected = plain_soft_displacement(attention, GRID, 2.0)
    torch.testing.assert_close(soft_displacement(attention, GRID, 2.0), expected, rtol=1e-12, atol=1e-12)


def test_gradients_equal_the_plain_form_to_1e_12():
    attention = random_attention()
    query, key = attention.query.requires_grad_(), attention.key.requires_grad_()
    weight = torch.randn(GRID.frames, GRID.frames, GRID.patches, 2, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((form(attention, GRID, 2.0) * weight).sum(), (query, key))
        for form in (soft_displacement, plain_soft_displacement)
    ]
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_gradients_pass_the_numerical_check():
    grid = TokenGrid(2, 2, 2)
    attention = random_attention(grid)
    inputs = (attention.query.requires_grad_(), attention.key.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: soft_displacement(QueriesKeys(q, k, HEADS), grid, 2.0), inputs)


def test_half_precision_is_computed_in_fp32():
    attention = random_attention(dtype=torch.bfloat16)
    wide = QueriesKeys(attention.query.float(), attention.key.float(), HEADS)
    assert torch.equal(soft_displacement(attention, GRID, 2.0), soft_displacement(wide, GRID, 2.0))
    assert torch.equal(hard_displacement(attention, GRID), hard_displacement(wide, GRID))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_error_and_its_gradients_equal_the_plain_form_to_1e_12(share):
    attention = random_attention()
    query, key = attention.query.requires_grad_(), attention.key.requires_grad_()
    target = torch.randint(-3, 4, (GRID.frames, GRID.frames, GRID.patches, 2), dtype=torch.int8)
    weight = (torch.rand(target.shape[:-1]) < share).double() * torch.rand(target.shape[:-1], dtype=torch.float64)
    error = displacement_error(attention, GRID, 2.0, target, weight)
    squares = (plain_soft_displacement(attention, GRID, 2.0) - target).square().mean(dim=-1)
    plain = (squares * weight).sum() / weight.sum()
    torch.testing.assert_close(error, plain, rtol=1e-12, atol=1e-12)
    # A factor in front: the upstream gradient must be used.
    ours, expected = (torch.autograd.grad(3 * value, (query, key)) for value in (error, plain))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_error_without_gradient_is_the_same_number():
    attention = random_attention()
    target = torch.ones(GRID.frames, GRID.frames, GRID.patches, 2)
    with torch.no_grad():
        error = displacement_error(attention, GRID, 2.0, target, (target[..., 0] != 0).float())
    torch.testing.assert_close(error, (plain_soft_displacement(attention, GRID, 2.0) - 1).square().mean())


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers of elements of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, tuple | list) else [out]
        self.seen.extend(tensor.numel() for tensor in outputs if torch.is_tensor(tensor))
        return out


@pytest.mark.parametrize("form", ["displacement", "error"])
def test_no_tensor_of_tokens_times_tokens_is_ever_made(form):
    grid = TokenGrid(4, 4, 4)
    attention = random_attention(grid, torch.float32)
    query, key = attention.query.requires_grad_(), attention.key.requires_grad_()
    target = torch.ones(grid.frames, grid.frames, grid.patches, 2)
    with Sizes() as sizes:
        if form == "error":
            value = displacement_error(attention, grid, 2.0, target, (target[..., 0] != 0).float())
        else:
            value = soft_displacement(attention, grid, 2.0).sum()
        torch.autograd.grad(value, (query, key))
    assert max(sizes.seen) == grid.tokens * grid.patches


def test_text_tokens_left_in_are_refused_with_the_likely_cause():
    attention = random_attention(TokenGrid(1, 1, GRID.tokens + 7))
    with pytest.raises(TokenGridError, match=r"67 tokens do not fill a 3x4x5 grid \(60\).*text tokens"):
        hard_displacement(attention, GRID)
