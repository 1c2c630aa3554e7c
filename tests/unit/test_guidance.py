"""Guided sampling: the optimiser against hand-written Adam, and what the guided steps hand to the backbone."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
import torch
from tiny import FRAMES, SIZE, own_position
from torch import Tensor

from ditflow.backbones.contract import NoiseLevel
from ditflow.losses.amf import AttentionMotionFlowLoss
from ditflow.motion.reference import MotionReference, reference_from_latents
from ditflow.sampling.guidance import Generation, Guidance, optimise
from ditflow.sampling.positions import PositionVariable
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import Transferred, generate_latents, transfer_latents
from ditflow.types import NonFiniteError, QueriesKeys, StaticReferenceError, TokenGrid

STEPS, GUIDED_STEPS, ITERATIONS = 4, 2, 3
RATES = (0.05, 0.02)
SAMPLING = SamplingSettings(steps=STEPS)


def method_of(name: str = "ditflow", **options) -> MethodSettings:
    given = {"guided_steps": GUIDED_STEPS, "iterations": ITERATIONS, "learning_rate": RATES}
    return MethodSettings(name, **(given | options))


# ---------------------------------------------------------------------- the optimiser

TARGET = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


def quadratic(variable: Tensor) -> Tensor:
    return (WEIGHT * (variable - TARGET).square()).sum()


def adam_by_hand(start: Tensor, learning_rate: float, iterations: int) -> tuple[Tensor, list[float]]:
    """Kingma and Ba's algorithm 1 on the quadratic, with its gradient in closed form."""
    value, first, second, losses = start.clone(), torch.zeros_like(start), torch.zeros_like(start), []
    for t in range(1, iterations + 1):
        losses.append(quadratic(value).item())
        gradient = 2 * WEIGHT * (value - TARGET)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        value = value - learning_rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return value, losses


def zeros() -> Tensor:
    return torch.zeros(3, dtype=torch.float64, requires_grad=True)


def test_optimising_is_adam_step_by_step():
    variable = zeros()
    losses = optimise([variable], lambda: quadratic(variable), 0.1, iterations=7)
    expected, expected_losses = adam_by_hand(torch.zeros(3, dtype=torch.float64), 0.1, 7)
    torch.testing.assert_close(variable.detach(), expected, rtol=1e-10, atol=0)
    assert losses == pytest.approx(expected_losses, rel=1e-10)


@pytest.mark.parametrize(("iterations", "kept"), [(1, [1]), (2, [2]), (5, [3, 4, 5]), (6, [4, 5, 6])])
def test_averaged_is_the_mean_over_the_last_half_of_the_updates(iterations, kept):
    variable = zeros()
    losses = optimise([variable], lambda: quadratic(variable), 0.1, iterations, averaged=True)
    start = torch.zeros(3, dtype=torch.float64)
    expected = torch.stack([adam_by_hand(start, 0.1, number)[0] for number in kept]).mean(dim=0)
    torch.testing.assert_close(variable.detach(), expected, rtol=1e-10, atol=0)
    assert losses == pytest.approx(adam_by_hand(start, 0.1, iterations)[1], rel=1e-10)


def test_there_is_one_loss_per_iteration_and_the_first_is_that_of_the_start():
    variable = zeros()
    losses = optimise([variable], lambda: quadratic(variable), 0.1, iterations=5)
    assert len(losses) == 5
    assert losses[0] == 1.0 + 0.5 * 4 + 2 * 9
    assert losses == sorted(losses, reverse=True)


def test_the_first_step_moves_every_entry_by_the_learning_rate_against_its_gradient():
    variable = zeros()
    optimise([variable], lambda: quadratic(variable), 0.1, iterations=1)
    torch.testing.assert_close(variable.detach(), 0.1 * TARGET.sign(), rtol=1e-7, atol=0)


def test_no_moment_is_carried_into_the_next_optimisation():
    """A new Adam's first step is sign descent, whatever came before; a carried-over one remembers."""
    variable = zeros()
    optimise([variable], lambda: quadratic(variable), 0.9, iterations=3)
    before = variable.detach().clone()
    optimise([variable], lambda: quadratic(variable), 0.1, iterations=1)
    torch.testing.assert_close(variable.detach() - before, 0.1 * (TARGET - before).sign(), rtol=1e-6, atol=0)
    carried, _ = adam_by_hand(torch.zeros(3, dtype=torch.float64), 0.9, 4)
    assert ((carried - before).abs() / 0.9 - 1).abs().max() > 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_optimisation_at_once(bad):
    variable, calls = zeros(), []

    def loss_of() -> Tensor:
        calls.append(variable.detach().clone())
        return quadratic(variable) * (bad if len(calls) == 3 else 1)

    with pytest.raises(NonFiniteError, match=f"{bad} in iteration 3.*smaller method.learning_rate"):
        optimise([variable], loss_of, 0.1, iterations=10)
    assert len(calls) == 3
    assert torch.equal(variable.detach(), calls[-1])


def test_nothing_but_the_variables_gets_a_gradient():
    variable, weight = zeros(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimise([variable], lambda: (weight * quadratic(variable)).sum(), 0.1, iterations=1)
    assert weight.grad is None


# ---------------------------------------------------------------------- guided sampling, written down


def copied(value: Any) -> Any:
    """Copy tensors, which the optimiser changes in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {part: copied(tensor) for part, tensor in value.items()} if isinstance(value, dict) else value


@contextmanager
def recording(backbone, *names: str) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Write down, in order, every call of these passes with its arguments; the real passes run."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def recorder(name: str):
        original = getattr(backbone, name)
        signature = inspect.signature(original)

        def record(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append((name, {key: copied(value) for key, value in bound.arguments.items()}))
            return original(*args, **kwargs)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(backbone, name, recorder(name))
        yield calls


@dataclass
class Inputs:
    """The tensors that a run starts from."""

    reference: Tensor
    initial: Tensor
    prompt: Tensor
    negative: Tensor
    empty: Tensor
    position: dict[str, Tensor]
    grid: TokenGrid


@dataclass
class Step:
    """The passes of one denoising step."""

    first_keys_values: list[dict[str, Any]] = field(default_factory=list)
    captures: list[dict[str, Any]] = field(default_factory=list)
    predict: dict[str, Any] = field(default_factory=dict)


def by_step(calls: list[tuple[str, dict[str, Any]]]) -> list[Step]:
    """Every step ends with its prediction."""
    steps = [Step()]
    for name, call in calls:
        if name == "predict":
            steps[-1].predict = call
            steps.append(Step())
        else:
            (steps[-1].captures if name == "capture" else steps[-1].first_keys_values).append(call)
    return steps[:-1]


def run_of(backbone, inputs: Inputs, method: MethodSettings) -> tuple[Transferred, list[Step]]:
    with recording(backbone, "predict", "capture", "first_keys_values") as calls:
        result = transfer_latents(
            backbone,
            reference_latents=inputs.reference,
            initial_latents=inputs.initial,
            prompt_embeds=inputs.prompt,
            negative_prompt_embeds=inputs.negative,
            source_embeds=inputs.empty,
            method=method,
            sampling=SAMPLING,
            generator=torch.Generator().manual_seed(2),
        )
    extraction = [] if not method.has_loss else [calls.pop(0)]
    assert all(name == "capture" and call["level"].timestep == 0 for name, call in extraction)
    return result, by_step(calls)


def same_position(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[part], other[part]) for part in one)


def same_keys_values(one, other) -> bool:
    return torch.equal(one.key, other.key) and torch.equal(one.value, other.value)


def inputs_of(backbone, moving_video) -> Inputs:
    initial = torch.randn(backbone.layout.latent_shape(FRAMES, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    grid = backbone.layout.grid(initial.shape)
    prompts = (backbone.condition(prompt) for prompt in ("a red ball", "a green star", ""))
    return Inputs(backbone.encode_video(moving_video), initial, *prompts, own_position(backbone, grid), grid)


@pytest.fixture(scope="module")
def inputs(backbone, moving_video) -> Inputs:
    return inputs_of(backbone, moving_video)


@dataclass
class Guided:
    """One guided run with all its passes, and the model's weights and processors before and after."""

    optimize: str
    result: Transferred
    steps: list[Step]
    weights: tuple[dict[str, Tensor], dict[str, Tensor]]
    processors: tuple[list[Any], list[Any]]


def guided_run(backbone, inputs: Inputs, optimize: str) -> Guided:
    def state() -> tuple[dict[str, Tensor], list[Any]]:
        weights = {name: weight.clone() for name, weight in backbone.transformer.state_dict().items()}
        return weights, [block.attn1.processor for block in backbone.transformer.transformer_blocks]

    weights, processors = state()
    result, steps = run_of(backbone, inputs, method_of(optimize=optimize))
    weights_after, processors_after = state()
    return Guided(optimize, result, steps, (weights, weights_after), (processors, processors_after))


@pytest.fixture(scope="module")
def guided_latents(backbone, inputs) -> Guided:
    return guided_run(backbone, inputs, "latent")


@pytest.fixture(scope="module")
def guided_position(backbone, inputs) -> Guided:
    return guided_run(backbone, inputs, "position")


@pytest.fixture(scope="module")
def guided_coordinates(backbone, inputs) -> Guided:
    return guided_run(backbone, inputs, "coordinates")


@pytest.fixture(params=["latent", "position", "coordinates"])
def guided(request, guided_latents, guided_position, guided_coordinates) -> Guided:
    return {run.optimize: run for run in (guided_latents, guided_position, guided_coordinates)}[request.param]


def test_the_loss_falls_within_every_guided_step(guided):
    assert len(guided.result.losses) == GUIDED_STEPS
    for losses in guided.result.losses:
        assert len(losses) == ITERATIONS
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < (0.99 if guided.optimize == "coordinates" else 0.95) * losses[0]


def test_only_the_first_steps_are_guided(guided):
    assert [len(step.captures) for step in guided.steps] == [ITERATIONS, ITERATIONS, 0, 0]


def test_the_model_is_left_as_it_was(guided, backbone):
    before, after = guided.weights
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.grad is None for weight in backbone.transformer.parameters())
    assert guided.processors[0] == guided.processors[1]


def test_every_guided_step_starts_with_a_new_adam_at_its_own_rate(guided):
    """Adam's first update moves every entry by the learning rate; a carried-over moment would change that."""
    for step, rate in zip(guided.steps[:GUIDED_STEPS], RATES, strict=True):
        first, second = step.captures[:2]
        if guided.optimize == "latent":
            moves = [second["latents"] - first["latents"]]
        elif guided.optimize == "coordinates":
            return  # its moves are looked at below
        else:
            moves = [second["position"][part] - value for part, value in first["position"].items()]
        for move in moves:
            torch.testing.assert_close(move.abs().median(), torch.tensor(rate), rtol=1e-3, atol=0)


def test_optimising_latents_leaves_the_position_alone(guided_latents):
    for step in guided_latents.steps:
        for call in (*step.captures, step.predict):
            assert call["position"] is None
    assert guided_latents.result.bank is None


def test_the_optimised_latents_are_those_that_are_denoised(guided_latents, inputs, backbone):
    first, second = guided_latents.steps[:GUIDED_STEPS]
    assert torch.equal(first.captures[0]["latents"], inputs.initial)
    for step in (first, second):
        seen = [call["latents"] for call in step.captures] + [step.predict["latents"]]
        assert not any(torch.equal(one, other) for one, other in combinations(seen, 2))
    prompted, unprompted = backbone.predict(**first.predict)
    prediction = unprompted + guided_latents.result.records[0].guidance_scale * (prompted - unprompted)
    generator = torch.Generator().manual_seed(2)
    denoised = backbone.schedule(STEPS, inputs.grid).step(
        prediction, first.predict["level"], first.predict["latents"], generator
    )
    torch.testing.assert_close(second.captures[0]["latents"], denoised, rtol=1e-4, atol=1e-4)


def test_optimising_the_position_leaves_the_latents_alone(guided_position, inputs):
    assert torch.equal(guided_position.steps[0].predict["latents"], inputs.initial)
    for step in guided_position.steps:
        assert all(torch.equal(call["latents"], step.predict["latents"]) for call in step.captures)


def test_the_position_is_warm_started_used_in_its_step_and_then_dropped(guided_position, inputs):
    first, second, *plain = guided_position.steps
    assert same_position(first.captures[0]["position"], inputs.position)
    assert not same_position(first.predict["position"], first.captures[-1]["position"])
    assert same_position(second.captures[0]["position"], first.predict["position"])
    assert not same_position(second.predict["position"], first.predict["position"])
    assert all(step.predict["position"] is None for step in plain)
    assert guided_position.result.bank is not None
    for number, step in enumerate((first, second)):
        change = guided_position.result.bank.offsets(number)
        learned = {part: own + change[part] for part, own in inputs.position.items()}
        assert same_position(step.predict["position"], learned)


def test_coordinates_are_warm_started_used_in_their_step_and_then_dropped(guided_coordinates, backbone, inputs):
    first, second, *plain = guided_coordinates.steps
    bank = guided_coordinates.result.bank
    assert bank is not None
    scheme = backbone.positions(inputs.grid)
    moved = [scheme.apply(bank.offsets(step), "coordinates") for step in range(GUIDED_STEPS)]
    assert same_position(first.captures[0]["position"], inputs.position)
    assert same_position(first.predict["position"], moved[0])
    assert same_position(second.captures[0]["position"], moved[0])
    assert same_position(second.predict["position"], moved[1])
    assert all(step.predict["position"] is None for step in plain)
    assert all((moves.abs().amax(dim=0) > 0).all() for moves in bank.offsets(0).values()), "t, y and x"


def test_the_first_moves_are_of_the_learning_rate(backbone, inputs):
    result, _ = run_of(backbone, inputs, method_of(optimize="coordinates", iterations=1))
    for moves in result.bank.offsets(0).values():
        torch.testing.assert_close(moves.abs().median(), torch.tensor(RATES[0]), rtol=1e-3, atol=0)


def test_moves_that_cost_are_smaller_and_smoother(backbone, inputs):
    def last_moves(**weights: float) -> Tensor:
        result, _ = run_of(backbone, inputs, method_of(optimize="coordinates", **weights))
        return next(iter(result.bank.offsets(GUIDED_STEPS - 1).values())).unflatten(
            0, (inputs.grid.frames, inputs.grid.height, inputs.grid.width)
        )

    free, held, smoothed = last_moves(), last_moves(stay=1e4), last_moves(smooth=1e4)
    assert held.square().mean() < 0.8 * free.square().mean()
    assert smoothed.diff(dim=2).square().mean() < 0.8 * free.diff(dim=2).square().mean()


def test_every_part_of_the_position_is_optimised(guided_position, inputs):
    learned = guided_position.steps[0].predict["position"]
    assert all(not torch.equal(learned[part], value) for part, value in inputs.position.items())


def test_the_optimiser_sees_only_the_prompt(guided, inputs):
    for step in guided.steps:
        assert all(torch.equal(call["condition"], inputs.prompt) for call in step.captures)
        prompted, unprompted = step.predict["conditions"]
        assert torch.equal(prompted, inputs.prompt)
        assert torch.equal(unprompted, inputs.negative)


def test_injection_is_the_reference_noised_to_the_steps_timestep_with_the_initial_noise(guided, backbone, inputs):
    signal = backbone.pipeline.scheduler.alphas_cumprod
    for step in guided.steps[:GUIDED_STEPS]:
        (call,) = step.first_keys_values
        level = step.predict["level"]
        timestep = level.timestep
        noised = signal[timestep].sqrt() * inputs.reference + (1 - signal[timestep]).sqrt() * inputs.initial
        assert call["level"] == level
        assert torch.equal(call["condition"], inputs.prompt)
        torch.testing.assert_close(call["latents"], noised, rtol=1e-5, atol=1e-6)
        expected = backbone.first_keys_values(call["latents"], level, inputs.prompt)
        for injected in (step.predict["injected"], *(capture["injected"] for capture in step.captures)):
            assert same_keys_values(injected, expected)


def test_injection_ends_with_the_guided_steps(guided):
    for step in guided.steps[GUIDED_STEPS:]:
        assert step.first_keys_values == []
        assert step.predict["injected"] is None


@pytest.mark.parametrize(("injected_steps", "expected"), [(1, 1), (3, 3), (0.75, 3), (STEPS, STEPS)])
def test_injection_lasts_as_many_steps_as_is_asked_for(backbone, inputs, injected_steps, expected):
    _, steps = run_of(backbone, inputs, method_of(injected_steps=injected_steps, iterations=1))
    assert [step.predict["injected"] is not None for step in steps] == [n < expected for n in range(STEPS)]
    assert all(
        (capture["injected"] is not None) == (number < expected)
        for number, step in enumerate(steps)
        for capture in step.captures
    )


# ---------------------------------------------------------------------- the other methods


def test_without_injection_nothing_of_the_reference_enters_block_0(backbone, inputs):
    result, steps = run_of(backbone, inputs, method_of(injection=False, iterations=1))
    assert all(step.first_keys_values == [] and step.predict["injected"] is None for step in steps)
    assert all(call["injected"] is None for step in steps for call in step.captures)
    assert len(result.losses) == GUIDED_STEPS


def test_injection_alone_optimises_nothing(backbone, inputs):
    result, steps = run_of(backbone, inputs, method_of("injection"))
    assert [step.predict["injected"] is not None for step in steps] == [True, True, False, False]
    assert all(step.captures == [] for step in steps)
    assert result.losses == []
    assert result.bank is None


def test_the_plain_backbone_does_nothing_but_predict(backbone, inputs):
    result, steps = run_of(backbone, inputs, method_of("none"))
    assert all(step.captures == [] and step.first_keys_values == [] for step in steps)
    assert all(step.predict["injected"] is None for step in steps)
    assert all(step.predict["position"] is None for step in steps)
    assert result.losses == []


def generation_of(backbone, inputs: Inputs) -> Generation:
    conditions = [inputs.prompt, inputs.prompt]
    return Generation(
        inputs.initial, conditions, backbone.schedule(STEPS, inputs.grid), torch.Generator().manual_seed(2)
    )


def first_loss(backbone, inputs: Inputs, method: MethodSettings) -> float:
    resolved = method.resolve(backbone.defaults)
    reference = reference_from_latents(backbone, inputs.reference, inputs.empty, resolved)
    variable = PositionVariable(backbone.positions(inputs.grid), "position", inputs.grid)
    guidance = Guidance(backbone, resolved, GUIDED_STEPS, GUIDED_STEPS, variable, reference)
    level, generation = NoiseLevel(1, 749, 0.8), generation_of(backbone, inputs)
    return guidance.guide(0, level, [generation], [generation.noise], None).losses[0]


def test_the_losses_of_two_blocks_are_averaged(backbone, inputs):
    one, other, both = (
        first_loss(backbone, inputs, method_of(blocks=blocks, iterations=1)) for blocks in ((0,), (1,), (0, 1))
    )
    assert abs(one - other) > 1e-3
    assert both == pytest.approx((one + other) / 2, rel=1e-5)


def test_the_official_preset_changes_the_learning_rates(rotary_backbone, moving_video):
    backbone, inputs = rotary_backbone, inputs_of(rotary_backbone, moving_video)
    rates = {}
    for preset in ("paper", "official"):
        result, _ = run_of(backbone, inputs, method_of(preset=preset, iterations=1))
        rates[preset] = [record.learning_rate for record in result.records]
    assert rates["paper"] == [0.05, 0.02, None, None]
    assert rates["official"] == [0.05, pytest.approx(0.035), None, None]


def test_the_official_preset_changes_nothing_but_the_learning_rates(rotary_backbone, moving_video):
    """With equal first and last rates both tables are the same, and so is everything else."""
    backbone, inputs = rotary_backbone, inputs_of(rotary_backbone, moving_video)
    paper, official = (
        run_of(backbone, inputs, method_of(preset=preset, iterations=1, learning_rate=(0.05, 0.05)))[0]
        for preset in ("paper", "official")
    )
    assert torch.equal(paper.latents, official.latents)
    assert paper.losses == official.losses


# ---------------------------------------------------------------------- the loss in closed form

ROW = TokenGrid(frames=2, height=1, width=3)
INDIFFERENT = QueriesKeys(torch.zeros(ROW.tokens, 4), torch.zeros(ROW.tokens, 4), heads=1)
"""Equal logits everywhere: the soft displacement is (1 - x, 0) for every pair of frames."""


def hand_made_flow() -> Tensor:
    """Two patches move: by (2, 0) where the soft displacement is (1, 0), and by (-1, 0) where it is (-1, 0)."""
    flow = torch.zeros(2, 2, 3, 2, dtype=torch.int8)
    flow[0, 1, 0, 0], flow[1, 0, 2, 0] = 2, -1
    return flow


def test_nonzero_entries_are_compared_where_the_reference_moves():
    loss = AttentionMotionFlowLoss(entries="nonzero")(INDIFFERENT, {"displacement": hand_made_flow()}, ROW)
    assert loss.item() == pytest.approx(((1 - 2) ** 2 + (-1 + 1) ** 2) / 4), "two vectors of two components"


def test_all_entries_are_compared_everywhere():
    """Four pairs of three patches: |1 - x| is 1, 0, 1 against 0, but for the two that move."""
    loss = AttentionMotionFlowLoss(entries="all")(INDIFFERENT, {"displacement": hand_made_flow()}, ROW)
    expected = (4 * (1 + 0 + 1) - 1) / (2 * 2 * 3 * 2)
    assert loss.item() == pytest.approx(expected)


def test_entries_up_to_the_threshold_are_left_out():
    loss = AttentionMotionFlowLoss(threshold=1.0)(INDIFFERENT, {"displacement": hand_made_flow()}, ROW)
    assert loss.item() == pytest.approx((1 - 2) ** 2 / 2)
    with pytest.raises(StaticReferenceError, match="2 patches or less everywhere"):
        AttentionMotionFlowLoss(threshold=2.0)(INDIFFERENT, {"displacement": hand_made_flow()}, ROW)


def test_the_threshold_is_a_length():
    """(1, 1) is longer than 1.4 patches though neither component is; both components count, also the one at rest."""
    flow = torch.zeros(2, 2, 3, 2, dtype=torch.int8)
    flow[0, 1, 0] = torch.tensor([1, 1])
    loss = AttentionMotionFlowLoss(threshold=1.4)
    assert loss(INDIFFERENT, {"displacement": flow}, ROW).item() == pytest.approx((0**2 + 1**2) / 2)
    with pytest.raises(StaticReferenceError, match=r"1\.5 patches or less everywhere"):
        AttentionMotionFlowLoss(threshold=1.5)(INDIFFERENT, {"displacement": flow}, ROW)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16], ids=["hard", "soft"])
@pytest.mark.parametrize("drift", [0.3, 0.6])
def test_a_sideways_motion_that_drifts_up_costs_the_drift_and_has_a_gradient_against_it(drift, dtype):
    """Of a 2x2 grid, the lower left patch moves right; its attention gives the share w to the patch above that.

    The soft displacement is (1, -w), so the loss is w^2 / 2; with w = sigmoid(u), its derivative in u is w^2 (1 - w).
    """
    grid = TokenGrid(frames=2, height=2, width=2)
    flow = torch.zeros(2, 2, 4, 2, dtype=dtype)
    flow[0, 1, 2, 0] = 1
    logit = torch.tensor(drift, dtype=torch.float64).logit().requires_grad_()
    far = torch.tensor(-60.0, dtype=torch.float64)
    lower_left = torch.stack([far, logit, far, torch.zeros_like(far)])  # the other three patches, row by row: 0, 1, 3
    query = torch.zeros(grid.tokens, 4, dtype=torch.float64).index_put((torch.tensor(2),), lower_left)
    key = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    loss = AttentionMotionFlowLoss()(QueriesKeys(query, key, heads=1), {"displacement": flow}, grid)
    assert loss.item() == pytest.approx(drift**2 / 2)
    (gradient,) = torch.autograd.grad(loss, logit)
    assert gradient.item() == pytest.approx(drift**2 * (1 - drift))


def test_a_soft_reference_is_the_expectation_and_what_it_was_taken_from_fits_it():
    soft = AttentionMotionFlowLoss(reference_flow="soft")
    payload = soft.reference(INDIFFERENT, ROW)
    assert payload["displacement"].dtype == torch.float16
    assert payload["displacement"][0, 1, :, 0].tolist() == [1, 0, -1]
    assert soft(INDIFFERENT, payload, ROW).item() == pytest.approx(0, abs=1e-5)
    hard = AttentionMotionFlowLoss().reference(INDIFFERENT, ROW)
    assert hard["displacement"][0, 1, :, 0].tolist() == [0, -1, -2], "ties go to the first patch"


def still_attention() -> QueriesKeys:
    tokens = torch.eye(ROW.patches).repeat(ROW.frames, 1)
    return QueriesKeys(tokens, tokens, heads=1)


def test_a_reference_without_motion_is_refused():
    with pytest.raises(StaticReferenceError, match="no motion to transfer.*loss.entries: all"):
        AttentionMotionFlowLoss(entries="nonzero").reference(still_attention(), ROW)


def test_a_reference_without_motion_serves_when_all_entries_count():
    payload = AttentionMotionFlowLoss(entries="all").reference(still_attention(), ROW)
    assert not payload["displacement"].any()
    assert AttentionMotionFlowLoss(entries="all")(INDIFFERENT, payload, ROW).item() == pytest.approx(8 / 24)


def test_a_motionless_reference_that_was_taken_for_all_entries_is_refused_not_nan(backbone, inputs):
    still = torch.zeros(inputs.grid.frames, inputs.grid.frames, inputs.grid.patches, 2, dtype=torch.int8)
    reference = MotionReference(inputs.grid, backbone.revision, "ditflow", {1: {"displacement": still}}, None)
    with pytest.raises(StaticReferenceError, match="no motion to transfer"):
        generate_latents(
            backbone,
            [generation_of(backbone, inputs)],
            reference=reference,
            method=method_of(injection=False, loss={"entries": "nonzero"}).resolve(backbone.defaults),
            sampling=SAMPLING.resolve(backbone.defaults),
        )
