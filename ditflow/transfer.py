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

from ditflow.backbones.base import Backbone
from ditflow.bank import BankHeader, BankMismatchError, MotionBank
from ditflow.denoise import Denoised, OnStep, denoise
from ditflow.guidance import Draft, Guidance
from ditflow.positions import positions_of
from ditflow.reference import MotionReference, extract_motion, reference_from_latents
from ditflow.settings import MethodSettings, SamplingSettings, settings_dict
from ditflow.types import LearnedPosition, StepRecord, TokenGrid


@dataclass(frozen=True)
class Transferred:
    """A generated clip with all that is known of its making.

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
    size: tuple[int, int, int] | None = None,
    method: MethodSettings | None = None,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Transferred:
    """Generate a video of `prompt` that moves like `reference`.

    reference: a uint8 RGB video [T, H, W, 3], a motion reference taken before, or a bank to reuse (nothing is
        optimised then, and as many steps are guided and injected as it says, if `method` does not say otherwise).
    size: (frames, height, width) of the new video; a reference video's own if left out.
    Every random number comes from `seed`: the same call on the same machine gives the same bytes.
    """
    if size is None:
        if not isinstance(reference, np.ndarray):
            raise ValueError("size: (frames, height, width) is needed unless the reference is a video")
        size = (reference.shape[0], reference.shape[1], reference.shape[2])
    method = method or MethodSettings()
    if isinstance(reference, MotionBank):
        method = reference.as_learned(method)
        _check_one_noise(method, "reuses a bank")
    method = method.resolve(backbone.defaults)
    sampling = (sampling or SamplingSettings()).resolve(backbone.defaults)
    started = time.perf_counter()
    if isinstance(reference, np.ndarray):
        reference = extract_motion(backbone, reference, method) if method.needs_reference else None
    extracted = time.perf_counter()
    if method.zero_shot and isinstance(reference, MotionReference):
        reference = _learned(backbone, reference, size, method, sampling, seed)
    learned = time.perf_counter()
    embeds = _embeds_of(backbone, prompt, sampling)
    noise_losses: list[float] = []
    seconds_trying = 0.0
    if method.noise_candidates > 1:
        seed, noise_losses = _best_noise(backbone, embeds, size, reference, method, sampling, seed)
        seconds_trying = time.perf_counter() - learned
    draft = _draft_of(backbone, embeds, size, sampling, seed)
    result = generate_latents(backbone, [draft], reference=reference, method=method, sampling=sampling, on_step=on_step)
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
    """Learn a motion bank: the guided steps of position optimisation and no more. `size` as in `transfer_motion`.

    The first draft shows `prompt` and has the noise of `seed`; `method` says how many there are, and of what.
    """
    method = method.resolve(backbone.defaults)
    sampling = (sampling or SamplingSettings()).resolve(backbone.defaults)
    if not method.learns_positions:
        raise ValueError(
            "a motion bank needs a motion loss, and optimize: position or coordinates, "
            f"not {method.name}, {method.optimize}"
        )
    _check_one_noise(method, "learns a bank")
    assert method.drafts is not None and sampling.steps is not None, "resolve() has filled it"
    embeds = [_embeds_of(backbone, text, sampling) for text in (prompt, *method.more_prompts)]
    drafts = [
        _draft_of(backbone, embeds[number % len(embeds)], size, sampling, _seed_of_draft(seed, number))
        for number in range(method.drafts)
    ]
    result = generate_latents(
        backbone,
        drafts,
        reference=reference,
        method=method,
        sampling=sampling,
        on_step=on_step,
        last_step=method.count_guided_steps(sampling.steps),
    )
    return replace(result, bank=_signed(result.bank, prompt, size))


def transfer_latents(
    backbone: Backbone,
    *,
    reference_latents: Tensor | None,
    initial_latents: Tensor,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    source_embeds: Tensor | None,
    method: MethodSettings,
    sampling: SamplingSettings,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> Transferred:
    """Transfer motion between latents [1, F, C, h, w]: the algorithm itself, without VAE, text encoder or seeds.

    source_embeds: text embeddings of the reference's pass (the paper: of the empty prompt).
    """
    method, sampling = method.resolve(backbone.defaults), sampling.resolve(backbone.defaults)
    reference = None
    if method.needs_reference:
        if reference_latents is None or source_embeds is None:
            raise ValueError(f"method {method.name} needs reference_latents and source_embeds")
        reference = reference_from_latents(backbone, reference_latents, source_embeds, method)
    assert sampling.steps is not None, "resolve() has filled it"
    embeds = [prompt_embeds, *([] if negative_prompt_embeds is None else [negative_prompt_embeds])]
    draft = Draft.begin(initial_latents, embeds, backbone.solver(sampling.steps), generator)
    return generate_latents(
        backbone,
        [draft],
        reference=reference,
        method=method,
        sampling=sampling,
        source_embeds=source_embeds,
        on_step=on_step,
    )


def generate_latents(
    backbone: Backbone,
    drafts: Sequence[Draft],
    *,
    reference: MotionReference | MotionBank | None,
    method: MethodSettings,
    sampling: SamplingSettings,
    source_embeds: Tensor | None = None,
    on_step: OnStep | None = None,
    last_step: int | None = None,
) -> Transferred:
    """Sample drafts that follow a motion reference or a bank; the result's latents are the first one's.

    Settings are resolved. Several drafts share what is learned of positions. source_embeds: as in `transfer_latents`;
    taken from the backbone if they are needed and left out. last_step: stop after this many steps.
    """
    assert sampling.steps is not None, "resolve() first"
    if len(drafts[0].embeds) == 1 and sampling.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale {sampling.guidance_scale} needs negative_prompt_embeds (of an empty text, if there is no "
            "negative prompt); guidance_scale 1 does without"
        )
    bank = reference if isinstance(reference, MotionBank) else None
    motion = _injection_only(reference, backbone) if isinstance(reference, MotionBank) else reference
    guidance = None
    if method.needs_reference:
        grid = backbone.grid(drafts[0].latents)
        _check_reference(backbone, motion, bank, grid, method, sampling.steps)
        guided_steps = method.count_guided_steps(sampling.steps)
        injected_steps = method.count_injected_steps(sampling.steps)
        optimize = method.optimize if bank is None else bank.optimize
        positions = positions_of(backbone, grid, optimize, method.stay, method.smooth)
        if bank is not None:
            _check_shapes(backbone, bank, grid, positions.start())
        if source_embeds is None and method.measured == "prediction" and bank is None:
            source_embeds = backbone.encode_prompt("")
        guidance = Guidance(backbone, method, guided_steps, injected_steps, positions, motion, bank, source_embeds)
    denoised = denoise(backbone, drafts, sampling, guidance, last_step, on_step)
    learned = bank is None and method.learns_positions
    return Transferred(
        latents=drafts[0].latents,
        records=denoised.records,
        motion_reference=motion,
        bank=_bank_of(backbone, denoised, motion, method, sampling.steps) if learned and motion else None,
        seconds=_seconds_of(denoised.records),
    )


def _embeds_of(backbone: Backbone, prompt: str, sampling: SamplingSettings) -> list[Tensor]:
    """Text embeddings of the prompt and, for classifier-free guidance, of the negative prompt."""
    texts = [prompt] if sampling.guidance_scale == 1 else [prompt, sampling.negative_prompt]
    return [backbone.encode_prompt(text) for text in texts]


def _draft_of(
    backbone: Backbone, embeds: Sequence[Tensor], size: tuple[int, int, int], sampling: SamplingSettings, seed: int
) -> Draft:
    """Begin a generation. Noise is drawn on the CPU, so that every device starts from the same."""
    assert sampling.steps is not None, "resolve() first"
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(backbone.latent_shape(*size), generator=generator)
    return Draft.begin(noise.to(backbone.device), embeds, backbone.solver(sampling.steps), generator)


def _seed_of_draft(seed: int, number: int) -> int:
    """The first draft has the row's seed, each other one of its own that follows from it."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}, draft {number}".encode()).digest()[:7], "big")


def _best_noise(
    backbone: Backbone,
    embeds: Sequence[Tensor],
    size: tuple[int, int, int],
    reference: MotionReference | MotionBank | None,
    method: MethodSettings,
    sampling: SamplingSettings,
    seed: int,
) -> tuple[int, list[float]]:
    """Try several noises by the first guided steps; return the seed with the smallest loss, and the losses."""
    assert sampling.steps is not None, "resolve() first"
    seeds = [_seed_of_draft(seed, number) for number in range(method.noise_candidates)]
    last_step, losses = method.count_trial_steps(sampling.steps), []
    for candidate in seeds:
        draft = _draft_of(backbone, embeds, size, sampling, candidate)
        trial = generate_latents(
            backbone, [draft], reference=reference, method=method, sampling=sampling, last_step=last_step
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
    method: MethodSettings,
    sampling: SamplingSettings,
    seed: int,
) -> MotionBank:
    """Learn a bank with the prompt `method.learn_with`, to be used at once with another."""
    own = replace(method, zero_shot=False)
    learned = learn_bank(
        backbone, method.learn_with, reference=reference, size=size, method=own, sampling=sampling, seed=seed
    )
    assert learned.bank is not None, "learn_bank returns one"
    return learned.bank


def _injection_only(bank: MotionBank, backbone: Backbone) -> MotionReference | None:
    """What injection needs of a bank: the reference's latents, when they were kept."""
    if bank.latents is None:
        return None
    return MotionReference(backbone.grid(bank.latents), backbone.revision, None, {}, bank.latents)


def _check_reference(
    backbone: Backbone,
    motion: MotionReference | None,
    bank: MotionBank | None,
    grid: TokenGrid,
    method: MethodSettings,
    steps: int,
) -> None:
    """Refuse a reference or bank that is missing, incomplete, or made for something else."""
    if bank is not None:
        timesteps = backbone.solver(steps).timesteps.tolist()
        bank.check_fits(backbone.revision, grid, timesteps, method.count_guided_steps(steps))
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
    """Refuse a bank whose tensors are not those of its own header: somebody has changed it."""
    shapes = {part: tuple(value.shape) for part, value in start.items()}
    came = {part: values.shape[1:] for part, values in bank.parts.items()}
    if came != shapes:
        raise BankMismatchError(f"this motion bank has positions {came}, the model's are {shapes}: it is damaged")
    if bank.latents is not None and backbone.grid(bank.latents) != grid:
        raise BankMismatchError(
            f"this motion bank has a reference's latents {list(bank.latents.shape)}, which make no {grid} grid: it is "
            "damaged"
        )


def _bank_of(
    backbone: Backbone, denoised: Denoised, motion: MotionReference, method: MethodSettings, steps: int
) -> MotionBank:
    header = BankHeader(
        model=backbone.name,
        model_revision=backbone.revision,
        grid=(motion.grid.frames, motion.grid.height, motion.grid.width),
        steps=steps,
        timesteps=tuple(denoised.timesteps[: len(denoised.positions)]),
        method=settings_dict(method),
        injected_steps=method.count_injected_steps(steps),
        losses=tuple(tuple(record.losses) for record in denoised.records if record.losses),
    )
    return MotionBank.of(header, denoised.positions, motion.latents, motion.flow)


def _signed(bank: MotionBank | None, prompt: str, size: tuple[int, int, int]) -> MotionBank | None:
    """Return the bank with the prompt and the size (frames, height, width) that it was learned with."""
    return bank and replace(bank, header=replace(bank.header, prompt=prompt, provenance={"size": list(size)}))


def _seconds_of(records: Sequence[StepRecord]) -> dict[str, float]:
    return {
        "guidance": sum(record.seconds_guidance for record in records),
        "denoise": sum(record.seconds_denoise for record in records),
    }
