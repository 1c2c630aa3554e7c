"""Motion transfer of one clip, from beginning to end. Read this first.

    reference video --encode--> latents --one pass, timestep 0--> motion reference (AMF)
    prompt + noise --guided steps: optimise z_t or rho until the AMF matches--> denoise --> decode --> new video

The paper is DiTFlow, arXiv 2412.07776.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ditflow.backbones.contract import Backbone, Condition
from ditflow.banks.bank import BankHeader, BankMismatchError, MotionBank
from ditflow.motion.reference import MotionReference, extract_motion, reference_from_latents
from ditflow.sampling.denoise import Denoised, OnStep, denoise
from ditflow.sampling.guidance import Generation, Guidance
from ditflow.sampling.positions import PositionVariable
from ditflow.settings import MethodSettings, ResolvedMethod, ResolvedSampling, SamplingSettings, settings_dict
from ditflow.types import LearnedPosition, PositionKind, StepRecord, TokenGrid


@dataclass(frozen=True)
class Transferred:
    """A generated clip with the records of its generation.

    latents: final latents, fp32 [1, F, C, h, w]; losses: one list per guided step; bank: the learned positions, when
    positions were optimised; video: uint8 [T, H, W, 3], when it was decoded; noise_losses: motion loss of every initial
    noise that was tried, when one was chosen.
    """

    latents: Tensor
    records: list[StepRecord]
    motion_reference: MotionReference | None
    bank: MotionBank | None
    video: np.ndarray | None = None
    noise_losses: list[float] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def losses(self) -> list[list[float]]:
        """The loss before each update of each guided step."""
        return [record.losses for record in self.records if record.losses]


def transfer_motion(
    backbone: Backbone,
    prompt: str,
    *,
    reference: np.ndarray | MotionReference | MotionBank | None = None,
    mask: np.ndarray | None = None,
    size: tuple[int, int, int] | None = None,
    method: MethodSettings | None = None,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Transferred:
    """Generate a video of `prompt` that moves like `reference`.

    reference: a uint8 RGB video [T, H, W, 3], a motion reference taken before, or a bank to reuse (nothing is
        optimised then, and as many steps are guided and injected as it says, if `method` does not say otherwise).
    mask: of a reference video, for `method.motion.filters`: the number of the object that every pixel belongs to, uint8
        [T, H, W], or [1, H, W] of the first frame alone.
    size: (frames, height, width) of the new video; a reference video's own if left out.
    Every random number comes from `seed`: the same call on the same machine gives the same bytes.
    """
    if size is None:
        if not isinstance(reference, np.ndarray):
            raise ValueError("size: (frames, height, width) is needed unless the reference is a video")
        size = (reference.shape[0], reference.shape[1], reference.shape[2])
    method = method or MethodSettings()
    if isinstance(reference, MotionBank):
        method = reference.with_bank_steps(method)
        _check_one_noise(method, "reuses a bank")
    resolved = method.resolve(backbone.defaults)
    resolved_sampling = (sampling or SamplingSettings()).resolve(backbone.defaults)
    started = time.perf_counter()
    if isinstance(reference, np.ndarray):
        reference = extract_motion(backbone, reference, resolved, mask) if resolved.needs_reference else None
    extracted = time.perf_counter()
    if resolved.zero_shot and isinstance(reference, MotionReference):
        reference = _learned(backbone, reference, size, resolved, resolved_sampling, seed)
    learned = time.perf_counter()
    conditions = _conditions_of(backbone, prompt, resolved_sampling)
    noise_losses: list[float] = []
    seconds_trying = 0.0
    if resolved.noise_candidates > 1:
        seed, noise_losses = _best_noise(backbone, conditions, size, reference, resolved, resolved_sampling, seed)
        seconds_trying = time.perf_counter() - learned
    generation = _generation_of(backbone, conditions, size, resolved_sampling, seed)
    result = generate_latents(
        backbone, [generation], reference=reference, method=resolved, sampling=resolved_sampling, on_step=on_step
    )
    sampled = time.perf_counter()
    video = backbone.decode_latents(result.latents, size[0])
    timings = {
        "extract": extracted - started,
        "learn": learned - extracted,
        "guidance": result.seconds["guidance"] + seconds_trying,
        "decode": time.perf_counter() - sampled,
    }
    bank = _signed(result.bank, prompt, size)
    return replace(result, video=video, bank=bank, noise_losses=noise_losses, seconds={**result.seconds, **timings})


def learn_bank(
    backbone: Backbone,
    prompt: str,
    *,
    reference: MotionReference,
    size: tuple[int, int, int],
    method: MethodSettings,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Transferred:
    """Learn a motion bank: only the guided steps of position optimisation are run. `size` as in `transfer_motion`.

    The first draft shows `prompt` and has the noise of `seed`; `method` says how many there are, and of what.
    """
    resolved = method.resolve(backbone.defaults)
    resolved_sampling = (sampling or SamplingSettings()).resolve(backbone.defaults)
    if not resolved.learns_positions:
        raise ValueError(
            "a motion bank needs a motion loss, and optimize: position or coordinates, "
            f"not {resolved.name}, {resolved.optimize}"
        )
    _check_one_noise(resolved, "learns a bank")
    conditions = [_conditions_of(backbone, text, resolved_sampling) for text in (prompt, *resolved.more_prompts)]
    generations = [
        _generation_of(
            backbone, conditions[number % len(conditions)], size, resolved_sampling, _seed_of_draft(seed, number)
        )
        for number in range(resolved.drafts)
    ]
    result = generate_latents(
        backbone,
        generations,
        reference=reference,
        method=resolved,
        sampling=resolved_sampling,
        on_step=on_step,
        last_step=resolved.count_guided_steps(resolved_sampling.steps),
    )
    return replace(result, bank=_signed(result.bank, prompt, size))


def transfer_latents(
    backbone: Backbone,
    *,
    reference_latents: Tensor | None,
    initial_latents: Tensor,
    prompt_embeds: Condition,
    negative_prompt_embeds: Condition | None,
    source_embeds: Condition | None,
    method: MethodSettings,
    sampling: SamplingSettings,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> Transferred:
    """Transfer motion between latents [1, F, C, h, w]: the algorithm itself, without VAE, text encoder or seeds.

    source_embeds: text embeddings of the reference's pass (the paper: of the empty prompt).
    """
    resolved, resolved_sampling = method.resolve(backbone.defaults), sampling.resolve(backbone.defaults)
    reference = None
    if resolved.needs_reference:
        if reference_latents is None or source_embeds is None:
            raise ValueError(f"method {resolved.name} needs reference_latents and source_embeds")
        reference = reference_from_latents(backbone, reference_latents, source_embeds, resolved)
    conditions = [prompt_embeds, *([] if negative_prompt_embeds is None else [negative_prompt_embeds])]
    schedule = backbone.schedule(resolved_sampling.steps, backbone.layout.grid(initial_latents.shape))
    generation = Generation(initial_latents, conditions, schedule, generator)
    return generate_latents(
        backbone,
        [generation],
        reference=reference,
        method=resolved,
        sampling=resolved_sampling,
        source=source_embeds,
        on_step=on_step,
    )


def generate_latents(
    backbone: Backbone,
    generations: Sequence[Generation],
    *,
    reference: MotionReference | MotionBank | None,
    method: ResolvedMethod,
    sampling: ResolvedSampling,
    source: Condition | None = None,
    on_step: OnStep | None = None,
    last_step: int | None = None,
) -> Transferred:
    """Sample generations that follow a motion reference or a bank; the result's latents are the first one's.

    Several generations share what is learned of positions. source: condition of the reference's
    pass; taken from the backbone if it is needed and left out. last_step: stop after this many steps.
    """
    if len(generations[0].conditions) == 1 and sampling.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale {sampling.guidance_scale} needs negative_prompt_embeds (of an empty text, if there is no "
            "negative prompt); guidance_scale 1 does without"
        )
    bank = reference if isinstance(reference, MotionBank) else None
    motion = _injection_only(reference, backbone) if isinstance(reference, MotionBank) else reference
    guidance = None
    if method.needs_reference:
        grid = backbone.layout.grid(generations[0].noise.shape)
        _check_reference(backbone, motion, bank, grid, method, sampling.steps)
        guided_steps = method.count_guided_steps(sampling.steps)
        injected_steps = method.count_injected_steps(sampling.steps)
        optimize = method.optimize if bank is None else bank.header.optimize
        kind: PositionKind = "coordinates" if optimize == "coordinates" else "position"
        variable = PositionVariable(backbone.positions(grid), kind, grid, method.stay, method.smooth)
        if bank is not None:
            _check_shapes(backbone, bank, grid, variable.zero())
        if source is None and method.measured == "prediction" and bank is None:
            source = backbone.condition("")
        guidance = Guidance(backbone, method, guided_steps, injected_steps, variable, motion, bank, source)
    denoised = denoise(backbone, generations, backbone.guider(sampling), guidance, last_step, on_step)
    learned = bank is None and method.learns_positions
    return Transferred(
        latents=denoised.latents[0],
        records=denoised.records,
        motion_reference=motion,
        bank=_bank_of(backbone, denoised, motion, method, sampling.steps) if learned and motion else None,
        seconds=_seconds_of(denoised.records),
    )


def _conditions_of(backbone: Backbone, prompt: str, sampling: ResolvedSampling) -> list[Condition]:
    """Conditions of the prompt and, for classifier-free guidance, of the negative prompt."""
    texts = [prompt] if sampling.guidance_scale == 1 else [prompt, sampling.negative_prompt]
    return [backbone.condition(text) for text in texts]


def _generation_of(
    backbone: Backbone,
    conditions: Sequence[Condition],
    size: tuple[int, int, int],
    sampling: ResolvedSampling,
    seed: int,
) -> Generation:
    """Set up a generation. Noise is drawn on the CPU, so that every device starts from the same."""
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(backbone.layout.latent_shape(*size), generator=generator)
    schedule = backbone.schedule(sampling.steps, backbone.layout.grid(noise.shape))
    return Generation(noise.to(backbone.device), conditions, schedule, generator)


def _seed_of_draft(seed: int, number: int) -> int:
    """Return the seed of a draft: that of the row for the first, one derived from it for every other."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}, draft {number}".encode()).digest()[:7], "big")


def _best_noise(
    backbone: Backbone,
    conditions: Sequence[Condition],
    size: tuple[int, int, int],
    reference: MotionReference | MotionBank | None,
    method: ResolvedMethod,
    sampling: ResolvedSampling,
    seed: int,
) -> tuple[int, list[float]]:
    """Run the first guided steps from several noises; return the seed with the smallest loss, and all losses."""
    seeds = [_seed_of_draft(seed, number) for number in range(method.noise_candidates)]
    last_step, losses = method.count_trial_steps(sampling.steps), []
    for candidate in seeds:
        generation = _generation_of(backbone, conditions, size, sampling, candidate)
        trial = generate_latents(
            backbone, [generation], reference=reference, method=method, sampling=sampling, last_step=last_step
        )
        losses.append(trial.losses[-1][-1])
    return seeds[losses.index(min(losses))], losses


def _check_one_noise(method: MethodSettings, what: str) -> None:
    if method.noise_candidates > 1:
        raise ValueError(
            f"noise_candidates: {method.noise_candidates} came with a run that {what}: expected 1. Candidates are "
            "compared by the motion loss of the one video that is guided."
        )


def _learned(
    backbone: Backbone,
    reference: MotionReference,
    size: tuple[int, int, int],
    method: ResolvedMethod,
    sampling: ResolvedSampling,
    seed: int,
) -> MotionBank:
    """Learn a bank with the prompt `method.learn_with`, for zero-shot use with another."""
    own = replace(method, zero_shot=False)
    learned = learn_bank(
        backbone, method.learn_with, reference=reference, size=size, method=own, sampling=sampling, seed=seed
    )
    assert learned.bank is not None, "learn_bank returns one"
    return learned.bank


def _injection_only(bank: MotionBank, backbone: Backbone) -> MotionReference | None:
    """Return the reference's latents of a bank, which injection needs, as a motion reference; None if not stored."""
    if bank.latents is None:
        return None
    return MotionReference(backbone.layout.grid(bank.latents.shape), backbone.revision, None, {}, bank.latents)


def _check_reference(
    backbone: Backbone,
    motion: MotionReference | None,
    bank: MotionBank | None,
    grid: TokenGrid,
    method: ResolvedMethod,
    steps: int,
) -> None:
    """Raise for a reference or bank that is missing, incomplete, or made for another model, grid or schedule."""
    if bank is not None:
        timesteps = [level.timestep for level in backbone.schedule(steps, grid).levels]
        positions = backbone.positions(grid).name
        bank.check_fits(backbone.revision, positions, grid, timesteps, method.count_guided_steps(steps))
    elif motion is None:
        raise ValueError(f"method {method.name} needs a reference video, a motion reference or a bank")
    else:
        motion.check_fits(backbone, grid, method)
    if method.injects and (motion is None or motion.latents is None):
        raise ValueError(
            "injection needs the reference's latents, and this reference was kept without: set method.injection: "
            "false, or extract it (or build the bank) with injection: true"
        )


def _check_shapes(backbone: Backbone, bank: MotionBank, grid: TokenGrid, start: LearnedPosition) -> None:
    """Raise BankMismatchError for a bank whose tensors contradict its header."""
    shapes = {part: tuple(value.shape) for part, value in start.items()}
    came = {part: values.shape[1:] for part, values in bank.parts.items()}
    if came != shapes:
        raise BankMismatchError(
            f"this motion bank has positions {came}, the model's are {shapes}: it is damaged",
            code="bank-parts",
        )
    if bank.latents is not None and backbone.layout.grid(bank.latents.shape) != grid:
        raise BankMismatchError(
            f"this motion bank has a reference's latents {list(bank.latents.shape)}, which make no {grid} grid: it is "
            "damaged",
            code="bank-latents",
        )


def _bank_of(
    backbone: Backbone, denoised: Denoised, motion: MotionReference, method: ResolvedMethod, steps: int
) -> MotionBank:
    header = BankHeader(
        model=backbone.name,
        model_revision=backbone.revision,
        grid=(motion.grid.frames, motion.grid.height, motion.grid.width),
        steps=steps,
        timesteps=tuple(denoised.timesteps[: len(denoised.positions)]),
        positions=backbone.positions(motion.grid).name,
        optimize="coordinates" if method.optimize == "coordinates" else "position",
        method=settings_dict(method),
        injected_steps=method.count_injected_steps(steps),
        losses=tuple(tuple(record.losses) for record in denoised.records if record.losses),
    )
    return MotionBank.from_steps(header, denoised.positions, motion.latents, motion.flow)


def _signed(bank: MotionBank | None, prompt: str, size: tuple[int, int, int]) -> MotionBank | None:
    """Return the bank with its prompt and size (frames, height, width) in the header."""
    return bank and replace(bank, header=replace(bank.header, prompt=prompt, provenance={"size": list(size)}))


def _seconds_of(records: Sequence[StepRecord]) -> dict[str, float]:
    return {
        "guidance": sum(record.seconds_guidance for record in records),
        "denoise": sum(record.seconds_denoise for record in records),
    }
