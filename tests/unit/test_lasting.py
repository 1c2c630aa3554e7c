"""Learning positions that last: motion measured in what a pass predicts, over several drafts in turns."""

from dataclasses import replace

import pytest
import torch
from tiny import FRAMES, SIZE, own_position, tiny_backbone
from torch import Tensor

from ditflow.backbones.contract import NoiseLevel, Schedule
from ditflow.errors import SettingsError
from ditflow.losses import MOTION_LOSSES
from ditflow.motion.reference import capture_clean, extract_motion
from ditflow.sampling.guidance import Generation, Guidance, GuidanceResult
from ditflow.sampling.positions import PositionVariable
from ditflow.settings import ExecutionSettings, MethodSettings, SamplingSettings
from ditflow.transfer import learn_bank, transfer_motion

PROMPT, CLIP, STEPS = "a red ball", (FRAMES, SIZE, SIZE), 4
LEVEL = NoiseLevel(1, 749, 0.8)
SAMPLING = SamplingSettings(steps=STEPS, guidance_scale=3.0, dynamic_guidance_scale=False)
METHOD = MethodSettings(
    optimize="coordinates",
    preset="lasting",
    blocks=(1,),
    guided_steps=2,
    iterations=3,
    learning_rate=(0.3, 0.3),
    drafts=2,
)
ALONE = replace(METHOD, drafts=1)
OPTIMIZED = ("latent", "position", "coordinates")


def noise(backbone, seed: int) -> Tensor:
    return torch.randn(backbone.layout.latent_shape(*CLIP), generator=torch.Generator().manual_seed(seed))


def generation_of(backbone, prompt: str = PROMPT, seed: int = 1) -> Generation:
    conditions = [backbone.condition(prompt), backbone.condition("")]
    generator = torch.Generator().manual_seed(seed)
    return Generation(noise(backbone, seed), conditions, schedule_of(backbone), generator)


def schedule_of(backbone) -> Schedule:
    return backbone.schedule(STEPS, backbone.layout.grid(backbone.layout.latent_shape(*CLIP)))


def guide(guidance: Guidance, *generations: Generation) -> GuidanceResult:
    return guidance.guide(0, LEVEL, generations, [generation.noise for generation in generations], None)


def guidance_of(backbone, video, method: MethodSettings) -> Guidance:
    method = method.resolve(backbone.defaults)
    grid = backbone.layout.grid(noise(backbone, 1).shape)
    kind = "coordinates" if method.optimize == "coordinates" else "position"
    variable = PositionVariable(backbone.positions(grid), kind, grid)
    motion = extract_motion(backbone, video, method)
    return Guidance(backbone, method, 2, 2, variable, motion, source=backbone.condition(""))


# ---------------------------------------------------------------------- what a pass predicts


@pytest.mark.parametrize("timestep", [1, 500, 998])
def test_a_true_velocity_speaks_of_the_true_clean_latents(backbone, timestep):
    clean, grain = noise(backbone, 1), noise(backbone, 2)
    schedule, level = schedule_of(backbone), NoiseLevel(None, timestep, 0.5)
    noised = schedule.add_noise(clean, grain, level)
    share = backbone.pipeline.scheduler.alphas_cumprod[timestep]
    velocity = share.sqrt() * grain - (1 - share).sqrt() * clean
    torch.testing.assert_close(schedule.to_clean(velocity, level, noised), clean, rtol=1e-4, atol=1e-4)


def test_a_model_that_predicts_something_else_is_refused(rotary_backbone):
    schedule = schedule_of(rotary_backbone)
    schedule._scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(SettingsError, match="measured: 'prediction' .* this model predicts epsilon"):
        schedule.to_clean(noise(rotary_backbone, 1), LEVEL, noise(rotary_backbone, 2))


@pytest.mark.parametrize("name", sorted(MOTION_LOSSES))
@pytest.mark.parametrize("optimize", OPTIMIZED)
def test_the_loss_is_that_of_the_predicted_video_seen_as_the_reference_was(backbone, moving_video, name, optimize):
    guidance = guidance_of(backbone, moving_video, replace(ALONE, name=name, optimize=optimize, iterations=1))
    generation, method = generation_of(backbone), guidance.method
    latents, schedule, prompt = generation.noise, generation.schedule, generation.conditions[0]
    position = own_position(backbone, guidance.reference.grid)
    noised = schedule.add_noise(guidance.reference.latents, latents, LEVEL)
    injected = backbone.first_keys_values(noised, LEVEL, prompt)
    with torch.no_grad():
        velocity = backbone.predict(latents, LEVEL, [prompt], position, injected)[0]
        share = backbone.pipeline.scheduler.alphas_cumprod[LEVEL.timestep]
        clean = share.sqrt() * latents - (1 - share).sqrt() * velocity
        loss = method.make_loss()
        seen = capture_clean(backbone, schedule, clean, backbone.condition(""), loss, (1,))
        expected = loss(seen[1], guidance.reference.payloads[1], guidance.reference.grid).item()
    measured = guide(guidance, generation).losses[0]
    assert measured == pytest.approx(expected, rel=1e-4)
    in_the_pass = replace(guidance, method=replace(method, measured="pass"))
    assert guide(in_the_pass, generation).losses[0] != pytest.approx(expected, rel=1e-2)


def loss_at(guidance: Guidance, generation: Generation, moves: dict[str, Tensor]) -> Tensor:
    injected = guidance._injected(generation, LEVEL)
    return guidance._loss(LEVEL, generation, generation.noise, guidance.variable.embedding(moves), injected)


def test_its_gradient_is_that_of_finite_differences(backbone, moving_video):
    guidance, generation = guidance_of(backbone, moving_video, ALONE), generation_of(backbone)
    generator = torch.Generator().manual_seed(3)
    start = {part: torch.randn(v.shape, generator=generator) * 0.2 for part, v in guidance.variable.zero().items()}
    way = {part: torch.randn(v.shape, generator=generator) for part, v in start.items()}
    moves = {part: value.clone().requires_grad_() for part, value in start.items()}
    gradients = torch.autograd.grad(loss_at(guidance, generation, moves), list(moves.values()))
    slope = sum((g * w).sum() for g, w in zip(gradients, way.values(), strict=True)).item()
    step = 2e-2
    with torch.no_grad():
        ahead, behind = (
            loss_at(guidance, generation, {part: start[part] + sign * step * way[part] for part in start}).item()
            for sign in (1, -1)
        )
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=0.02)


def test_checkpointing_changes_no_gradient(backbone, moving_video):
    gradients = []
    for checkpointing in ("off", "on"):
        kind = backbone.name.removeprefix("tiny-")
        model = tiny_backbone(kind, execution=ExecutionSettings(checkpointing=checkpointing))
        guidance, generation = guidance_of(model, moving_video, ALONE), generation_of(model)
        moves = {part: value.requires_grad_() for part, value in guidance.variable.zero().items()}
        gradients.append(torch.autograd.grad(loss_at(guidance, generation, moves), list(moves.values())))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("optimize", OPTIMIZED)
def test_the_predicted_videos_motion_can_be_optimised(backbone, moving_video, optimize):
    rate = 0.002 if optimize == "position" else 0.05
    guidance = guidance_of(
        backbone, moving_video, replace(ALONE, optimize=optimize, iterations=6, learning_rate=(rate, rate))
    )
    losses = guide(guidance, generation_of(backbone)).losses
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------- drafts


def turns_of(backbone, video, drafts: int, monkeypatch) -> list[int]:
    """Learn a bank and return which draft each iteration worked on, by its noise."""
    seen: list[Tensor] = []
    original = Guidance._loss

    def loss(self, level, generation, *others):
        seen.append(generation.noise)
        return original(self, level, generation, *others)

    monkeypatch.setattr(Guidance, "_loss", loss)
    method = replace(METHOD, drafts=drafts)
    motion = extract_motion(backbone, video, method)
    learn_bank(backbone, PROMPT, reference=motion, size=CLIP, method=method, sampling=SAMPLING, seed=1)
    known = list(dict.fromkeys(map(id, seen)))
    return [known.index(id(one)) for one in seen]


@pytest.mark.parametrize(("drafts", "expected"), [(1, [0] * 6), (2, [0, 1, 0, 1, 0, 1]), (4, [0, 1, 2, 3, 0, 1])])
def test_drafts_take_turns_over_all_guided_steps(rotary_backbone, moving_video, monkeypatch, drafts, expected):
    assert turns_of(rotary_backbone, moving_video, drafts, monkeypatch) == expected


def bank_of(backbone, motion, **changes):
    prompt, seed = changes.pop("prompt", PROMPT), changes.pop("seed", 1)
    method = replace(METHOD, **changes)
    return learn_bank(backbone, prompt, reference=motion, size=CLIP, method=method, sampling=SAMPLING, seed=seed).bank


def test_a_bank_depends_on_its_seed_its_drafts_and_what_they_show(rotary_backbone, moving_video):
    motion = extract_motion(rotary_backbone, moving_video, METHOD)
    bank = bank_of(rotary_backbone, motion)
    assert bank.to_bytes() == bank_of(rotary_backbone, motion).to_bytes()
    others = [{"seed": 2}, {"drafts": 3}, {"more_prompts": ("a green star",)}, {"prompt": "a green star"}]
    changes = [bank.offsets(1)["query"], *(bank_of(rotary_backbone, motion, **o).offsets(1)["query"] for o in others)]
    assert len({value.numpy().tobytes() for value in changes}) == len(changes)


def test_adam_moves_every_token_by_the_rate_and_adam_mini_all_of_them_together(backbone, moving_video):
    motion, largest = extract_motion(backbone, moving_video, METHOD), {}
    for optimizer in ("adam", "adam-mini"):
        bank = bank_of(backbone, motion, optimizer=optimizer, iterations=1, averaged=False)
        moves = torch.stack(list(bank.offsets(0).values()))
        torch.testing.assert_close(
            moves.square().mean(dim=1).sqrt(), torch.full(moves.shape[::2], 0.3), rtol=1e-2, atol=0
        )
        largest[optimizer] = moves.abs().max().item()
    assert largest["adam"] == pytest.approx(0.3, rel=1e-3)
    assert largest["adam-mini"] > 0.5


def test_one_draft_measured_in_its_pass_is_the_papers_way(rotary_backbone, moving_video):
    """The positions that guidance itself finds on its way to a video."""
    own = {"drafts": 1, "measured": "pass", "averaged": False, "loss": {"entries": "nonzero"}, "optimizer": "adam"}
    method = replace(METHOD, **own)
    motion = extract_motion(rotary_backbone, moving_video, method)
    bank = bank_of(rotary_backbone, motion, **own)
    options = {"reference": motion, "size": CLIP, "sampling": SAMPLING, "seed": 1}
    made = transfer_motion(rotary_backbone, PROMPT, method=replace(method, preset="paper"), **options)
    for step in range(2):
        for part, value in made.bank.offsets(step).items():
            assert torch.equal(value, bank.offsets(step)[part])


def test_only_what_learns_positions_has_drafts():
    with pytest.raises(SettingsError, match="drafts: 2 .* 1 unless positions are learned"):
        MethodSettings(optimize="latent", drafts=2)


@pytest.mark.parametrize(("asked", "guided"), [(None, 2), (1, 1)])
def test_a_bank_guides_as_many_steps_as_it_has_unless_fewer_are_asked_for(rotary_backbone, moving_video, asked, guided):
    """The model's own default is 10, more than the bank has."""
    bank = bank_of(rotary_backbone, extract_motion(rotary_backbone, moving_video, METHOD))
    positions, original = [], rotary_backbone.predict

    def predict(latents, level, conditions, position=None, injected=None):
        positions.append(position)
        return original(latents, level, conditions, position, injected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary_backbone, "predict", predict)
        method = MethodSettings(optimize="coordinates", guided_steps=asked)
        transfer_motion(rotary_backbone, PROMPT, reference=bank, size=CLIP, method=method, sampling=SAMPLING, seed=1)
    own = own_position(rotary_backbone, rotary_backbone.layout.grid(noise(rotary_backbone, 1).shape))
    moved = [
        position is not None and not torch.equal(position["query_cos"], own["query_cos"]) for position in positions
    ]
    assert moved == [True] * guided + [False] * (STEPS - guided)
