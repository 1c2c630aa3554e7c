"""What every motion loss promises, whoever wrote it: each test runs for everything in the registry."""

import math
from dataclasses import fields
from typing import get_args

import pytest
import torch

from ditflow.losses import MOTION_LOSSES, MotionLoss
from ditflow.motion.reference import MotionReference
from ditflow.settings import METHODS, MethodSettings, ModelDefaults, MotionSettings
from ditflow.types import CaptureKind, Features, QueriesKeys, TokenGrid

GRID = TokenGrid(frames=3, height=4, width=5)
STILL, RIGHT, DOWN = [(0, 0)] * 3, [(0, 0), (1, 0), (2, 0)], [(0, 0), (0, 1), (0, 2)]
CHANNELS = 64
SHARPNESS = 0.8
"""Scale of the texture's tokens: a softmax prefers what is alike, and still weighs the rest."""


def textured_frames(shifts: list[tuple[int, int]]) -> torch.Tensor:
    """[F, h, w, D]: a window upon a texture that moves by (dx, dy), the same texture every time.

    Neighbouring patches are alike, so that a patch knows itself for a while; and what enters the window is new.
    """
    margin, generator = 2, torch.Generator().manual_seed(1)
    patches = torch.randn(GRID.height + 2 * margin + 1, GRID.width + 2 * margin + 1, CHANNELS, generator=generator)
    texture = SHARPNESS * (patches[1:, 1:] + 0.5 * patches[:-1, 1:] + 0.25 * patches[1:, :-1])
    return torch.stack([texture[margin - dy :, margin - dx :][: GRID.height, : GRID.width] for dx, dy in shifts])


def texture_queries_keys(shifts: list[tuple[int, int]]) -> QueriesKeys:
    tokens = textured_frames(shifts).flatten(0, 2)
    return QueriesKeys(tokens, tokens.clone(), heads=1)


def random_queries_keys() -> QueriesKeys:
    query, key = (torch.randn(GRID.tokens, CHANNELS) for _ in range(2))
    return QueriesKeys(query, key, heads=1)


def texture_features(shifts: list[tuple[int, int]]) -> Features:
    return Features(textured_frames(shifts).flatten(0, 2))


TEXTURES = {"queries_keys": texture_queries_keys, "features": texture_features}
"""For each kind of capture: what a block would hand out for a texture that moves so."""
RANDOM = {"queries_keys": random_queries_keys, "features": lambda: Features(torch.randn(GRID.tokens, CHANNELS))}
"""For each kind of capture: what a block would hand out for noise."""


@pytest.fixture(params=sorted(MOTION_LOSSES))
def loss(request) -> MotionLoss:
    method = MethodSettings(request.param).resolve(ModelDefaults(blocks=(1,)))
    return method.make_loss()


def texture(loss: MotionLoss, shifts: list[tuple[int, int]]):
    return TEXTURES[loss.captures](shifts)


def differentiable(capture) -> list[torch.Tensor]:
    """Make a capture's tensors ask for gradients, and return them."""
    parts = [getattr(capture, field.name) for field in fields(capture)]
    return [part.requires_grad_() for part in parts if torch.is_tensor(part)]


def test_a_loss_is_found_by_its_own_name(loss):
    assert isinstance(loss, MotionLoss)
    assert MOTION_LOSSES[loss.name] is type(loss)
    assert loss.name in METHODS
    assert loss.captures in get_args(CaptureKind)
    assert 0 <= loss.reference_noise < 1


def test_a_loss_is_a_finite_scalar(loss):
    value = loss(RANDOM[loss.captures](), loss.reference(texture(loss, RIGHT), GRID), GRID)
    assert value.shape == ()
    assert math.isfinite(value.item())
    assert value.item() > 0


def test_everything_that_a_loss_captures_gets_a_gradient(loss):
    payload = loss.reference(texture(loss, RIGHT), GRID)
    capture = RANDOM[loss.captures]()
    parts = differentiable(capture)
    loss(capture, payload, GRID).backward()
    assert parts
    for part in parts:
        assert part.grad is not None
        assert part.grad.isfinite().all()
        assert part.grad.any()


def test_a_step_against_the_gradient_lowers_the_loss(loss):
    payload = loss.reference(texture(loss, RIGHT), GRID)
    capture = RANDOM[loss.captures]()
    parts = differentiable(capture)
    before = loss(capture, payload, GRID)
    before.backward()
    with torch.no_grad():
        for part in parts:
            part -= 1e-2 * part.grad / part.grad.norm()
    assert loss(capture, payload, GRID) < before


@pytest.mark.parametrize("reference", [RIGHT, DOWN], ids=["right", "down"])
def test_the_motion_of_the_reference_costs_less_than_any_other(loss, reference):
    payload = loss.reference(texture(loss, reference), GRID)
    costs = {name: loss(texture(loss, m), payload, GRID) for name, m in (("right", RIGHT), ("down", DOWN))}
    costs["still"] = loss(texture(loss, STILL), payload, GRID)
    own = costs.pop("right" if reference is RIGHT else "down")
    assert all(own < other - 1e-3 for other in costs.values())


def test_a_payload_is_on_the_cpu_without_gradient(loss):
    capture = texture(loss, RIGHT)
    differentiable(capture)
    payload = loss.reference(capture, GRID)
    assert payload
    for tensor in payload.values():
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad


def test_a_payload_survives_its_file_bit_by_bit(loss):
    payloads = {block: loss.reference(texture(loss, motion), GRID) for block, motion in ((3, RIGHT), (1, DOWN))}
    loaded = MotionReference.from_bytes(MotionReference(GRID, "model", loss.name, payloads, None).to_bytes())
    assert loaded.loss == loss.name
    assert list(loaded.payloads) == [3, 1]
    for block, payload in payloads.items():
        assert loaded.payloads[block].keys() == payload.keys()
        for part, tensor in payload.items():
            assert loaded.payloads[block][part].dtype == tensor.dtype
            assert torch.equal(loaded.payloads[block][part], tensor)


def test_a_payload_from_a_file_gives_the_same_loss(loss):
    payload = loss.reference(texture(loss, RIGHT), GRID)
    loaded = MotionReference.from_bytes(MotionReference(GRID, "model", loss.name, {0: payload}, None).to_bytes())
    capture = RANDOM[loss.captures]()
    assert loss(capture, payload, GRID) == loss(capture, loaded.payloads[0], GRID)


def test_patches_without_weight_do_not_count(loss):
    """Whatever they do: the loss is that of the others, and they get no gradient through their own features."""
    weight = torch.ones(GRID.frames, GRID.patches)
    weight[:, GRID.patches // 2 :] = 0
    payload = loss.reference(texture(loss, RIGHT), GRID, weight)
    whole = loss.reference(texture(loss, RIGHT), GRID)
    capture = RANDOM[loss.captures]()
    assert payload["weight"].shape[-1] == GRID.patches
    assert loss(capture, payload, GRID) != loss(capture, whole, GRID)


def test_equal_weights_are_no_weights(loss):
    payload = loss.reference(texture(loss, RIGHT), GRID, torch.full((GRID.frames, GRID.patches), 0.5))
    whole = loss.reference(texture(loss, RIGHT), GRID)
    capture = RANDOM[loss.captures]()
    torch.testing.assert_close(loss(capture, payload, GRID), loss(capture, whole, GRID))


def test_a_weighted_payload_survives_its_file(loss):
    payload = loss.reference(texture(loss, RIGHT), GRID, torch.rand(GRID.frames, GRID.patches))
    motion = MotionSettings(filters=({"mask": {"object": 2}},)).resolve()
    reference = MotionReference(GRID, "model", loss.name, {1: payload}, None, motion=motion)
    loaded = MotionReference.from_bytes(reference.to_bytes())
    assert loaded.motion == motion
    assert all(torch.equal(loaded.payloads[1][part], tensor) for part, tensor in payload.items())
