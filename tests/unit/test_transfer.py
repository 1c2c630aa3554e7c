"""From a prompt and a video to a video: seeds, inputs, guidance scales and records."""

import itertools
import math
import random
from dataclasses import replace
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest
import torch
from tiny import FRAMES, SIZE

from ditflow.backbones.cogvideox import CogVideoX, DiscreteSchedule
from ditflow.backbones.contract import NoiseLevel
from ditflow.losses import MOTION_LOSSES
from ditflow.motion.reference import extract_motion
from ditflow.sampling.guidance import optimise
from ditflow.settings import MethodSettings, ModelDefaults, SamplingSettings
from ditflow.transfer import Transferred, _seed_of_draft, learn_bank, transfer_latents, transfer_motion
from ditflow.types import NonFiniteError

PROMPT = "a red ball"
CLIP = (FRAMES, SIZE, SIZE)
SAMPLING = SamplingSettings(steps=2, guidance_scale=3.0, dynamic_guidance_scale=False)
METHOD = MethodSettings(blocks=(1,), guided_steps=1, iterations=2, learning_rate=(0.05, 0.05))
PLAIN = MethodSettings("none")


def generate(backbone, reference=None, method: MethodSettings = METHOD, **options) -> Transferred:
    given = {"sampling": SAMPLING, "seed": 1, "size": CLIP} | options
    return transfer_motion(backbone, PROMPT, reference=reference, method=method, **given)


# ---------------------------------------------------------------------- every loss


@pytest.mark.parametrize("optimize", ["latent", "position", "coordinates"])
@pytest.mark.parametrize("name", sorted(MOTION_LOSSES))
def test_every_loss_guides_by_everything_that_can_be_optimised(backbone, moving_video, name, optimize):
    method = replace(METHOD, name=name, optimize=optimize, iterations=6, learning_rate=(0.002, 0.002))
    guided, plain = generate(backbone, moving_video, method), generate(backbone, method=PLAIN)
    (losses,) = guided.losses
    assert losses[-1] < losses[0]
    assert not torch.equal(guided.latents, plain.latents)
    assert (guided.bank is not None) == (optimize != "latent")


def test_zero_shot_is_learning_a_bank_with_one_prompt_and_reusing_it_with_another(backbone, moving_video):
    method = replace(METHOD, optimize="position")
    zero_shot = generate(backbone, moving_video, replace(method, zero_shot=True, learn_with="a green star"))
    motion = extract_motion(backbone, moving_video, method)
    settings = {"size": CLIP, "method": method, "sampling": SAMPLING, "seed": 1}
    bank = learn_bank(backbone, "a green star", reference=motion, **settings).bank
    assert torch.equal(zero_shot.latents, generate(backbone, bank, method).latents)
    assert zero_shot.losses == []
    assert not torch.equal(zero_shot.latents, generate(backbone, moving_video, method).latents)


# ---------------------------------------------------------------------- values that are not finite


def overflows(monkeypatch, target, name: str, call: int) -> None:
    """From its `call`-th call on, what a method returns is infinite."""
    method, calls = getattr(target, name), itertools.count(1)

    def overflowing(*inputs, **options):
        came = method(*inputs, **options)
        return came if next(calls) < call else came * math.inf

    monkeypatch.setattr(target, name, overflowing)


def test_latents_that_overflow_end_the_run_in_their_step(backbone, monkeypatch):
    overflows(monkeypatch, DiscreteSchedule, "step", 3)
    with pytest.raises(NonFiniteError, match=r"^denoising step 3 \(timestep \d+\): the latents: \d+ of \d+ values"):
        generate(backbone, method=PLAIN, sampling=replace(SAMPLING, steps=4))


@pytest.mark.parametrize("optimize", ["latent", "position", "coordinates"])
def test_guidance_that_leaves_nothing_finite_ends_the_run_in_its_step(backbone, moving_video, monkeypatch, optimize):
    def diverging(variables, *rest):
        losses = optimise(variables := list(variables), *rest)
        for variable in variables if rest[1] == 2e-3 else ():
            variable.detach().fill_(math.inf)
        return losses

    monkeypatch.setattr("ditflow.sampling.guidance.optimise", diverging)
    method = replace(METHOD, optimize=optimize, guided_steps=2, learning_rate=(1e-3, 2e-3))
    with pytest.raises(NonFiniteError, match=r"^denoising step 2 .*what guidance optimised: \d+ of \d+ values"):
        generate(backbone, moving_video, method)


def test_a_loss_that_is_not_finite_names_its_step(backbone, moving_video):
    method = replace(METHOD, guided_steps=2, learning_rate=(1e-3, 3e37))
    with pytest.raises(NonFiniteError, match=r"^denoising step 2 .*loss became nan in iteration 2"):
        generate(backbone, moving_video, method)


def test_a_decoder_that_overflows_makes_no_video(backbone, monkeypatch):
    with torch.no_grad():
        monkeypatch.setattr(backbone.vae.config, "scaling_factor", 1e-45)
        with pytest.raises(NonFiniteError, match="the decoded video: .* model.dtype: float32"):
            generate(backbone, method=PLAIN)


def test_a_reference_that_is_not_finite_is_refused(backbone, moving_video, monkeypatch):
    monkeypatch.setattr(backbone.vae.config, "scaling_factor", math.inf)
    with pytest.raises(NonFiniteError, match="^the reference's latents: "):
        generate(backbone, moving_video)


# ---------------------------------------------------------------------- noise candidates


@pytest.mark.parametrize("optimize", ["latent", "position"])
def test_the_noise_with_the_smallest_loss_after_two_fifths_of_the_guided_steps_is_used(
    backbone, moving_video, optimize
):
    method = replace(METHOD, optimize=optimize, guided_steps=3)
    sampling = replace(SAMPLING, steps=4)
    result = generate(backbone, moving_video, replace(method, noise_candidates=3), sampling=sampling)
    seeds = [_seed_of_draft(1, number) for number in range(3)]
    assert seeds[0] == 1, "the first candidate is the seed's own noise"
    each = [generate(backbone, moving_video, method, sampling=sampling, seed=seed) for seed in seeds]
    assert result.noise_losses == [one.losses[1][-1] for one in each]
    assert len(set(result.noise_losses)) == 3
    best = each[int(np.argmin(result.noise_losses))]
    assert result.video.tobytes() == best.video.tobytes()
    assert result.losses == best.losses


def test_without_candidates_no_losses_of_noises_are_recorded(backbone, moving_video):
    assert generate(backbone, moving_video).noise_losses == []


def test_candidates_are_refused_where_a_bank_is_learned_or_reused(backbone, moving_video):
    method = replace(METHOD, optimize="position")
    several = replace(method, noise_candidates=2)
    bank = generate(backbone, moving_video, method).bank
    with pytest.raises(ValueError, match=r"^noise_candidates: 2 .*reuses a bank: expected 1"):
        generate(backbone, bank, several)
    motion = extract_motion(backbone, moving_video, method)
    with pytest.raises(ValueError, match=r"^noise_candidates: 2 .*learns a bank: expected 1"):
        learn_bank(backbone, PROMPT, reference=motion, size=CLIP, method=several, sampling=SAMPLING)


# ---------------------------------------------------------------------- seeds


@pytest.mark.parametrize("optimize", ["latent", "position", "coordinates"])
def test_a_seed_decides_every_byte_of_the_video(backbone, moving_video, optimize):
    method = replace(METHOD, optimize=optimize)
    one, same, other = (generate(backbone, moving_video, method, seed=seed) for seed in (1, 1, 2))
    assert one.video.tobytes() == same.video.tobytes()
    assert one.losses == same.losses
    assert one.video.tobytes() != other.video.tobytes()


def test_global_random_numbers_neither_matter_nor_are_drawn(backbone, moving_video, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # beartype picks items to check by `random`
    first = generate(backbone, moving_video)
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    second = generate(backbone, moving_video)
    assert second.video.tobytes() == first.video.tobytes()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize("optimize", ["latent", "position", "coordinates"])
def test_latents_alone_give_the_same_as_video_and_words(backbone, moving_video, optimize):
    method = replace(METHOD, optimize=optimize)
    generator = torch.Generator().manual_seed(1)
    initial_latents = torch.randn(backbone.layout.latent_shape(*CLIP), generator=generator)
    alone = transfer_latents(
        backbone,
        reference_latents=backbone.encode_video(moving_video),
        initial_latents=initial_latents,
        prompt_embeds=backbone.condition(PROMPT),
        negative_prompt_embeds=backbone.condition(""),
        source_embeds=backbone.condition(""),
        method=method,
        sampling=SAMPLING,
        generator=generator,
    )
    whole = generate(backbone, moving_video, method)
    assert torch.equal(alone.latents, whole.latents)
    assert alone.losses == whole.losses
    assert alone.video is None
    assert np.array_equal(backbone.decode_latents(alone.latents, FRAMES), whole.video)


def test_a_reference_taken_before_gives_the_same_as_the_video(rotary_backbone, moving_video):
    reference = extract_motion(rotary_backbone, moving_video, METHOD)
    from_reference, from_video = (generate(rotary_backbone, source) for source in (reference, moving_video))
    assert from_reference.video.tobytes() == from_video.video.tobytes()


def test_the_size_is_that_of_the_reference_video(rotary_backbone, moving_video):
    inferred = generate(rotary_backbone, moving_video[:5, :, 8:], PLAIN, size=None)
    assert inferred.video.shape == (5, SIZE, SIZE - 8, 3)
    assert inferred.video.dtype == np.uint8


def test_the_negative_prompt_is_used(rotary_backbone):
    plain, negative = (
        generate(rotary_backbone, method=PLAIN, sampling=replace(SAMPLING, negative_prompt=prompt))
        for prompt in ("", "a green star")
    )
    assert not np.array_equal(plain.video, negative.video)


def test_a_missing_size_is_refused(rotary_backbone, moving_video):
    reference = extract_motion(rotary_backbone, moving_video, METHOD)
    for source in (None, reference):
        with pytest.raises(ValueError, match=r"size: \(frames, height, width\) is needed unless.*video"):
            generate(rotary_backbone, source, size=None)


@pytest.mark.parametrize("name", ["ditflow", "injection"])
def test_a_missing_reference_is_refused_by_a_method_that_needs_it(rotary_backbone, name):
    with pytest.raises(ValueError, match=f"method {name} needs a reference video, a motion reference or a bank"):
        generate(rotary_backbone, method=replace(METHOD, name=name))


def test_missing_reference_latents_are_refused_by_a_method_that_needs_them(rotary_backbone):
    latents = torch.randn(rotary_backbone.layout.latent_shape(*CLIP))
    with pytest.raises(ValueError, match="method ditflow needs reference_latents and source_embeds"):
        transfer_latents(
            rotary_backbone,
            reference_latents=None,
            initial_latents=latents,
            prompt_embeds=rotary_backbone.condition(PROMPT),
            negative_prompt_embeds=None,
            source_embeds=None,
            method=METHOD,
            sampling=SAMPLING,
            generator=torch.Generator(),
        )


# ---------------------------------------------------------------------- classifier-free guidance


def guidance_scale(sampling: SamplingSettings, timestep: int) -> float:
    """The scale of CogVideoX's guider at a timestep."""
    guider = CogVideoX.guider(None, sampling.resolve(ModelDefaults(blocks=(0,))))
    return guider.scale(NoiseLevel(None, timestep, 0.5))


def dynamic(scale: float = 6.0, steps: int = 50) -> SamplingSettings:
    return SamplingSettings(steps=steps, guidance_scale=scale, dynamic_guidance_scale=True)


@pytest.mark.parametrize("timestep", [999, 979, 499, 199, 60, 25, 19])
def test_the_dynamic_scale_is_diffusers_formula(timestep):
    """cos(pi x) has period 2 in x: reduced exactly here, where x is -2.5 million at the first timestep."""
    turns = float(Fraction(50 - timestep, 50) ** 5 % 2)
    expected = 1 + 6 * (1 - math.cos(math.pi * turns)) / 2
    assert guidance_scale(dynamic(), timestep) == pytest.approx(expected, abs=1e-6)


def test_the_dynamic_scale_has_its_known_values():
    assert guidance_scale(dynamic(), 0) == 7.0
    assert guidance_scale(dynamic(), 50) == 1.0
    assert guidance_scale(dynamic(), 25) == pytest.approx(1 + 3 * (1 - math.cos(math.pi / 32)))
    assert guidance_scale(dynamic(), 100) == pytest.approx(7.0)
    assert guidance_scale(dynamic(), 999) == pytest.approx(1 + 3 * (1 - math.cos(math.pi * 18.98**5)), abs=1e-6)


def test_the_constant_scale_is_constant():
    sampling = replace(dynamic(), dynamic_guidance_scale=False)
    assert {guidance_scale(sampling, timestep) for timestep in (999, 499, 0)} == {6.0}


def test_a_scale_of_one_stays_one():
    assert guidance_scale(dynamic(scale=1.0), 499) == 1.0


@pytest.mark.parametrize(("scale", "predictions"), [(3.0, 2), (1.0, 1)], ids=["on", "off"])
def test_classifier_free_guidance_takes_two_predictions_a_step_and_off_takes_one(
    rotary_backbone, moving_video, scale, predictions
):
    batches = []
    handle = rotary_backbone.transformer.proj_out.register_forward_hook(lambda _, x, y: batches.append(len(y)))
    try:
        result = generate(rotary_backbone, moving_video, sampling=replace(SAMPLING, guidance_scale=scale))
    finally:
        handle.remove()
    assert batches == [predictions, predictions]
    assert [record.guidance_scale for record in result.records] == [scale, scale]


def test_guidance_moves_from_the_negative_prediction_through_the_prompts(backbone):
    """One step is linear in the prediction: scale 3 goes three times as far from scale 0 as scale 1."""
    embeds = {"prompt": backbone.condition(PROMPT), "negative": backbone.condition("")}
    initial = torch.randn(backbone.layout.latent_shape(*CLIP))

    def after_one_step(prompt: str, negative: str | None, scale: float) -> torch.Tensor:
        return transfer_latents(
            backbone,
            reference_latents=None,
            initial_latents=initial,
            prompt_embeds=embeds[prompt],
            negative_prompt_embeds=negative and embeds[negative],
            source_embeds=None,
            method=PLAIN,
            sampling=replace(SAMPLING, steps=1, guidance_scale=scale),
            generator=torch.Generator().manual_seed(0),
        ).latents

    prompted, unprompted = after_one_step("prompt", None, 1.0), after_one_step("negative", None, 1.0)
    assert (prompted - unprompted).abs().max() > 1e-3
    expected = unprompted + 3 * (prompted - unprompted)
    torch.testing.assert_close(after_one_step("prompt", "negative", 3.0), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- records


def test_every_step_leaves_a_record_and_tells_it_when_it_is_done(rotary_backbone, moving_video):
    told = []
    method = replace(METHOD, guided_steps=2, iterations=3, learning_rate=(0.05, 0.02))
    sampling = SamplingSettings(steps=4, guidance_scale=6.0, dynamic_guidance_scale=True)
    result = generate(rotary_backbone, moving_video, method, sampling=sampling, on_step=told.append)
    assert told == result.records
    assert [record.step for record in told] == [0, 1, 2, 3]
    assert [record.timestep for record in told] == [999, 749, 499, 249]
    assert [record.guidance_scale for record in told] == [guidance_scale(sampling, t) for t in (999, 749, 499, 249)]
    assert [record.learning_rate for record in told] == [0.05, 0.02, None, None]
    assert [len(record.losses) for record in told] == [3, 3, 0, 0]
    assert result.losses == [record.losses for record in told[:2]]
    assert all(record.seconds_guidance >= 0 and record.seconds_denoise > 0 for record in told)


def test_seconds_add_up_the_records(rotary_backbone, moving_video):
    result = generate(rotary_backbone, moving_video)
    assert set(result.seconds) == {"extract", "learn", "guidance", "denoise", "decode"}
    assert result.seconds["guidance"] == sum(record.seconds_guidance for record in result.records)
    assert result.seconds["denoise"] == sum(record.seconds_denoise for record in result.records)
