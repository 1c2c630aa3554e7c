"""What every model family promises: runs over all of `tests/families`, on tiny random models of diffusers' classes."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import BUILDERS, MODULES
from torch import Tensor

from ditflow.backbones.contract import CLEAN, Backbone, NoiseLevel, Schedule
from ditflow.errors import SettingsError
from ditflow.settings import ExecutionSettings, MethodSettings, SamplingSettings
from ditflow.transfer import learn_bank, transfer_latents, transfer_motion
from ditflow.types import KeysValues, TokenGrid

FRAMES, HEIGHT, WIDTH = 9, 32, 64
STEPS = 4
SAMPLING = SamplingSettings(steps=STEPS, guidance_scale=3.0, dynamic_guidance_scale=False)


@pytest.fixture(scope="module", params=BUILDERS)
def model(request) -> Backbone:
    return BUILDERS[request.param]()


@pytest.fixture
def family(model, request):
    return next(module for name, module in MODULES.items() if request.node.callspec.params["model"].startswith(name))


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def noise(model: Backbone, seed: int = 0) -> Tensor:
    return torch.randn(model.layout.latent_shape(FRAMES, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed))


def grid_of(model: Backbone) -> TokenGrid:
    return model.layout.grid(model.layout.latent_shape(FRAMES, HEIGHT, WIDTH))


def schedule_of(model: Backbone, steps: int = STEPS) -> Schedule:
    return model.schedule(steps, grid_of(model))


def level_of(model: Backbone) -> NoiseLevel:
    return schedule_of(model).levels[1]


def own_position(model: Backbone) -> dict[str, Tensor]:
    scheme = model.positions(grid_of(model))
    return scheme.apply(scheme.zero("position"), "position")


def test_it_is_a_backbone(model):
    assert isinstance(model, Backbone)


# ---------------------------------------------------------------------- layout, pixels and words


def test_latents_fill_a_grid_and_pixels_come_back_in_their_size(model, video):
    latents = model.encode_video(video)
    assert latents.shape == model.layout.latent_shape(FRAMES, HEIGHT, WIDTH)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()
    grid = model.layout.grid(latents.shape)
    assert grid.frames * grid.height * grid.width == grid.tokens > 0
    assert grid.width / grid.height == WIDTH / HEIGHT
    decoded = model.decode_latents(latents, FRAMES)
    assert decoded.shape == video.shape
    assert decoded.dtype == np.uint8


def test_a_grid_of_half_a_patch_is_refused_with_the_nearest_size(model):
    multiple = model.layout.compression[1] * model.layout.patch[1]
    with pytest.raises(SettingsError, match=rf"height: {HEIGHT + 1} .*multiple of {multiple}.*nearest is {HEIGHT}"):
        model.layout.latent_shape(FRAMES, HEIGHT + 1, WIDTH)


def test_a_length_that_the_vae_would_change_is_refused_with_near_ones(model):
    temporal = model.layout.compression[0]
    with pytest.raises(SettingsError, match=rf"frames: {FRAMES + 1} is not valid: expected {temporal}k \+ 1.*near are"):
        model.layout.latent_shape(FRAMES + 1, HEIGHT, WIDTH)


def test_the_default_blocks_exist(model):
    model.layout.check_blocks(model.defaults.blocks)
    with pytest.raises(SettingsError, match="blocks: 99 is not valid"):
        model.capture(noise(model), CLEAN, model.condition(""), (99,))


# ---------------------------------------------------------------------- the untouched model


def state_of(model: Backbone) -> tuple:
    """Processors, hooks and switches of the transformer."""
    modules = list(model.transformer.modules())
    return (
        [getattr(module, "processor", None) for module in modules],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        [getattr(module, "gradient_checkpointing", None) for module in modules],
        getattr(getattr(model.transformer, "patch_embed", None), "use_positional_embeddings", None),
        [weight.requires_grad for weight in model.transformer.parameters()],
    )


def test_a_plain_generation_is_diffusers_own_pipeline(model, family):
    start = noise(model)
    prompt, empty = model.condition("a red ball"), model.condition("")
    result = transfer_latents(
        model,
        reference_latents=None,
        initial_latents=start,
        prompt_embeds=prompt,
        negative_prompt_embeds=empty,
        source_embeds=None,
        method=MethodSettings("none"),
        sampling=SAMPLING,
        generator=torch.Generator().manual_seed(3),
    )
    torch.manual_seed(3)
    expected = family.by_diffusers(model, start, "a red ball", STEPS, SAMPLING.guidance_scale)
    torch.testing.assert_close(result.latents, expected, rtol=1e-4, atol=1e-4)


def test_a_plain_prediction_runs_the_model_without_a_hook_or_a_processor_of_ours(model, monkeypatch):
    before, seen = state_of(model), []
    monkeypatch.setattr(
        model, "forward", lambda *inputs: seen.append(state_of(model)) or type(model).forward(model, *inputs)
    )
    with torch.no_grad():
        model.predict(noise(model), level_of(model), [model.condition("a red ball"), model.condition("")])
    assert seen == [before]


def test_the_models_own_position_given_by_hand_changes_nothing(model):
    latents, level, prompt = noise(model), level_of(model), model.condition("a red ball")
    with torch.no_grad():
        (plain,) = model.predict(latents, level, [prompt])
        (given,) = model.predict(latents, level, [prompt], own_position(model))
    torch.testing.assert_close(given, plain, rtol=1e-4, atol=1e-5)


def test_the_model_is_restored_whatever_happens(model):
    before, latents, level, prompt = state_of(model), noise(model), level_of(model), model.condition("")
    processor, calls = model.processor, []

    def failing(block, hooks):
        made = processor(block, hooks)

        def attend(*inputs, **options):
            calls.append(block)
            return made(*inputs, **options) if len(calls) < 2 else 1 / 0

        return attend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "processor", failing)
        with pytest.raises(ZeroDivisionError):
            model.predict(latents, level, [prompt], own_position(model))
    assert calls == [0, 1]
    assert state_of(model) == before
    captured = model.capture(latents.requires_grad_(), level, prompt, (1,))
    captured[1].key.sum().backward()
    assert state_of(model) == before
    assert all(weight.grad is None for weight in model.transformer.parameters())


# ---------------------------------------------------------------------- passes


def test_a_prediction_for_each_condition_has_the_latents_shape(model):
    latents, conditions = noise(model), [model.condition(prompt) for prompt in ("a red ball", "")]
    with torch.no_grad():
        predictions = model.predict(latents, level_of(model), conditions)
    assert len(predictions) == 2
    for prediction in predictions:
        assert prediction.shape == latents.shape
        assert prediction.dtype == torch.float32
    assert not torch.equal(*predictions)


def test_serial_and_batched_guidance_agree(model):
    latents, conditions = noise(model), [model.condition(prompt) for prompt in ("a red ball", "")]
    usual = model.execution
    with torch.no_grad():
        batched = model.predict(latents, level_of(model), conditions)
        model.set_execution(replace(usual, cfg="serial"))
        serial = model.predict(latents, level_of(model), conditions)
        model.set_execution(usual)
    torch.testing.assert_close(serial, batched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["queries_keys", "features"])
def test_a_capture_has_the_video_tokens_of_the_asked_blocks_with_their_gradient(model, what):
    latents = noise(model).requires_grad_()
    captured = model.capture(latents, CLEAN, model.condition(""), (2, 0), what=what)
    assert set(captured) == {0, 2}
    for capture in captured.values():
        tensors = [capture.query, capture.key] if what == "queries_keys" else [capture.tokens]
        assert all(tensor.shape[0] == grid_of(model).tokens for tensor in tensors)
        loss = sum(tensor.square().sum() * (number + 1) for number, tensor in enumerate(tensors))
        (gradient,) = torch.autograd.grad(loss, latents, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.any()


def attention_of(model: Backbone, block: int) -> dict[str, Tensor]:
    """Queries and keys [B, L, H, d] that a block's attention was called with, in a pass of diffusers' own processor."""
    import importlib

    seen: dict[str, Tensor] = {}
    attention = model.blocks[block].attn1
    module = importlib.import_module(type(attention.processor).__module__)

    def dispatch(query, key, value, *rest, **options):
        seen.setdefault("query", query), seen.setdefault("key", key)
        return torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (query, key, value)), attn_mask=options.get("attn_mask")
        ).transpose(1, 2)

    def sdpa(query, key, value, **options):
        seen.setdefault("query", query.transpose(1, 2)), seen.setdefault("key", key.transpose(1, 2))
        return original(query, key, value, **options)

    original = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:

        def begin(*_):
            if hasattr(module, "dispatch_attention_fn"):
                patch.setattr(module, "dispatch_attention_fn", dispatch)
            else:
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)

        handle = attention.register_forward_pre_hook(begin)
        with torch.no_grad():
            model.predict(noise(model), level_of(model), [model.condition("a red ball")])
        handle.remove()
    return seen


def test_captured_queries_and_keys_are_those_that_diffusers_attends_with(model):
    expected = attention_of(model, 1)
    with torch.no_grad():
        capture = model.capture(noise(model), level_of(model), model.condition("a red ball"), (1,))[1]
    tokens = grid_of(model).tokens
    for name in ("query", "key"):
        video = expected[name][0, -tokens:]
        assert capture.heads == video.shape[1]
        torch.testing.assert_close(getattr(capture, name), video.flatten(1), rtol=1e-4, atol=1e-4)


def test_nothing_after_the_captured_block_is_computed(model):
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(model.blocks)
    ]
    handles.append(model.blocks[1].attn1.to_v.register_forward_pre_hook(lambda *_: ran.append(-1)))
    try:
        model.capture(noise(model), CLEAN, model.condition(""), (1,))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1]


def test_first_keys_and_values_are_two_projections_of_block_0(model):
    ran: list[str] = []
    attention = model.blocks[0].attn1
    named = {name: getattr(attention, name) for name in ("to_q", "to_k", "to_v")}
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in named.items()]
    try:
        found = model.first_keys_values(noise(model), level_of(model), model.condition(""))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == ["to_k", "to_v"]
    assert found.key.shape == found.value.shape
    assert found.key.shape[:2] == (1, grid_of(model).tokens)
    assert not found.key.requires_grad


def test_injecting_a_videos_own_keys_and_values_changes_nothing_and_others_reach_every_condition(model):
    latents, level = noise(model), level_of(model)
    conditions = [model.condition(prompt) for prompt in ("a red ball", "")]
    own = model.first_keys_values(latents, level, conditions[0])
    with torch.no_grad():
        plain = model.predict(latents, level, conditions)
        same = model.predict(latents, level, conditions, injected=own)
        others = model.predict(latents, level, conditions, injected=KeysValues(own.key, own.value.flip(1)))
    torch.testing.assert_close(same[0], plain[0], rtol=1e-4, atol=1e-5)
    assert all((other - one).abs().max() > 1e-4 for other, one in zip(others, plain, strict=True))


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("kind", ["position", "coordinates"])
def test_a_learned_position_starts_as_the_models_own_and_has_a_row_for_every_token(model, kind):
    scheme = model.positions(grid_of(model))
    zero = scheme.zero(kind)
    assert all(len(value) == grid_of(model).tokens and not value.any() for value in zero.values())
    torch.testing.assert_close(scheme.apply(zero, kind), own_position(model), rtol=0, atol=0)


def test_tokens_that_move_by_one_patch_have_their_neighbours_position(model):
    grid, scheme = grid_of(model), model.positions(grid_of(model))
    sides, own = (grid.frames, grid.height, grid.width), own_position(model)
    for axis in range(3):
        moves = {part: value + torch.eye(3)[axis] for part, value in scheme.zero("coordinates").items()}
        for part, moved in scheme.apply(moves, "coordinates").items():
            here = moved.unflatten(0, sides).narrow(axis, 0, sides[axis] - 1)
            there = own[part].unflatten(0, sides).narrow(axis, 1, sides[axis] - 1)
            torch.testing.assert_close(here, there, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["position", "coordinates"])
def test_every_value_of_a_learned_position_gets_a_gradient_and_queries_another_than_keys(model, kind):
    scheme = model.positions(grid_of(model))
    learned = {part: value.requires_grad_() for part, value in scheme.zero(kind).items()}
    captured = model.capture(noise(model), CLEAN, model.condition(""), (1,), scheme.apply(learned, kind))
    (captured[1].query * captured[1].key.roll(3, 0)).sum().backward()
    gradients = {part: value.grad for part, value in learned.items()}
    for gradient in gradients.values():
        assert (gradient.abs().amax(dim=0) > 0).sum() >= (gradient.shape[1] - 2 if kind == "position" else 3)
    assert len({gradient.norm().item() for gradient in gradients.values()}) == len(gradients)


@pytest.mark.parametrize("what", ["queries_keys", "features"])
def test_checkpointing_changes_no_gradient(model, what):
    usual, gradients = model.execution, []
    for checkpointing in ("off", "on"):
        model.set_execution(ExecutionSettings(checkpointing=checkpointing))
        latents, position = noise(model).requires_grad_(), own_position(model)
        position = {part: value.requires_grad_() for part, value in position.items()}
        capture = model.capture(latents, CLEAN, model.condition(""), (2,), position, what=what)[2]
        tensor = capture.tokens if what == "features" else capture.query * capture.key.roll(3, 0)
        gradients.append(torch.autograd.grad(tensor.sum(), [latents, *position.values()]))
    model.set_execution(usual)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- the schedule


def test_levels_fall_from_noise_and_know_their_place(model):
    levels = schedule_of(model, 10).levels
    assert [level.index for level in levels] == list(range(10))
    assert levels[0].sigma > 0.97
    for one, other in pairwise(levels):
        assert one.sigma > other.sigma > 0
        assert one.timestep > other.timestep > 0


def test_an_edit_of_the_latents_survives_a_step(model):
    """A solver whose corrector rebuilds the latents from its own memory would drop what guidance wrote into them."""
    schedule, edited, other = schedule_of(model), noise(model, 1), schedule_of(model)
    start, edit = edited, 0.1 * noise(model, 2)
    for number, level in enumerate(schedule.levels[:3]):
        prediction = noise(model, 10 + number)
        if number == 2:
            edited = edited + edit
        start = other.step(prediction, level, start, torch.Generator().manual_seed(number))
        edited = schedule.step(prediction, level, edited, torch.Generator().manual_seed(number))
    kept = ((edited - start) * edit).sum() / edit.square().sum()
    assert kept > 0.4, "the share of the edit that is left after the step"


def test_steps_with_the_true_prediction_end_in_the_clean_latents(model):
    schedule = schedule_of(model)
    clean, grain = noise(model, 1), noise(model, 2)
    latents = schedule.add_noise(clean, grain, schedule.levels[0])
    for level in schedule.levels:
        prediction = true_prediction(schedule, clean, latents, level)
        torch.testing.assert_close(schedule.to_clean(prediction, level, latents), clean, rtol=1e-3, atol=1e-3)
        latents = schedule.step(prediction, level, latents, torch.Generator())
    torch.testing.assert_close(latents, clean, rtol=1e-3, atol=1e-3)


def true_prediction(schedule: Schedule, clean: Tensor, latents: Tensor, level: NoiseLevel) -> Tensor:
    """The prediction from which `to_clean`, which is linear in it, gives the clean latents."""
    zero, one = (schedule.to_clean(torch.full_like(latents, value), level, latents) for value in (0.0, 1.0))
    return (clean - zero) / (one - zero)


def test_noise_can_be_added_to_a_level_off_the_schedule(model):
    schedule, clean, grain = schedule_of(model), noise(model, 1), noise(model, 2)
    level = schedule.level_at(0.4)
    assert level.index is None
    noised = schedule.add_noise(clean, grain, level)
    signal = (noised - schedule.add_noise(torch.zeros_like(clean), grain, level)) / clean
    assert signal.std() < 1e-3
    grain_share = (noised - signal.mean() * clean).std() / grain.std()
    assert level.sigma == pytest.approx(float(grain_share / (grain_share + signal.mean())), abs=1e-2)


def test_a_new_schedule_remembers_nothing_of_another_run(model):
    prediction = noise(model, 1)

    def run() -> Tensor:
        schedule, latents, generator = schedule_of(model, 3), noise(model), torch.Generator().manual_seed(0)
        for level in schedule.levels:
            latents = schedule.step(prediction, level, latents, generator)
        return latents

    assert torch.equal(run(), run())


# ---------------------------------------------------------------------- the methods


@pytest.mark.parametrize("optimize", ["latent", "position", "coordinates"])
@pytest.mark.parametrize("name", ["ditflow", "smm"])
def test_motion_guidance_lowers_its_loss(model, video, name, optimize):
    rate = {"latent": 0.05, "position": 0.01, "coordinates": 0.002}[optimize]
    method = MethodSettings(
        name,
        optimize,
        blocks=(1,),
        guided_steps=2,
        iterations=3,
        learning_rate=(rate, rate),
        loss={"entries": "all"} if name == "ditflow" else {},
    )
    made = transfer_motion(model, "a red ball", reference=video, method=method, sampling=SAMPLING, seed=1)
    assert made.video.shape == video.shape
    assert [len(losses) for losses in made.losses] == [3, 3]
    assert all(losses[-1] < losses[0] for losses in made.losses)


def test_a_lasting_bank_is_learned_and_reused(model, video):
    from ditflow.banks.bank import MotionBank
    from ditflow.motion.reference import extract_motion

    method = MethodSettings(
        optimize="coordinates", preset="lasting", blocks=(1,), guided_steps=2, iterations=2, drafts=2
    )
    motion = extract_motion(model, video, method)
    settings = {"size": video.shape[:3], "method": method, "sampling": SAMPLING, "seed": 1}
    bank = MotionBank.from_bytes(learn_bank(model, "a red ball", reference=motion, **settings).bank.to_bytes())
    reused = transfer_motion(model, "a green star", reference=bank, **settings)
    assert reused.losses == []
    assert reused.video.shape == video.shape
