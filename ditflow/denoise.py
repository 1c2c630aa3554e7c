"""The sampling loop: classifier-free guidance, motion guidance, injection and bank reuse, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditflow.backbones.base import Backbone
from ditflow.guidance import Draft, Guidance, Steered
from ditflow.settings import SamplingSettings
from ditflow.types import LearnedPosition, NonFiniteError, StepRecord, check_finite

OnStep = Callable[[StepRecord], None]


@dataclass(frozen=True)
class Denoised:
    """The record of every step, and what was learned of positions in every guided one."""

    records: list[StepRecord]
    positions: list[LearnedPosition]
    timesteps: list[int]


@torch.no_grad()
def denoise(
    backbone: Backbone,
    drafts: Sequence[Draft],
    sampling: SamplingSettings,
    guidance: Guidance | None = None,
    last_step: int | None = None,
    on_step: OnStep | None = None,
) -> Denoised:
    """Sample drafts of one size with resolved settings: their latents are denoised in place.

    One draft is the usual case; several share what guidance learns of positions.
    last_step: stop after this many steps (learning a bank needs no more than the guided ones).

    Raises NonFiniteError in the step in which a loss, a position or the latents become NaN or infinite.
    """
    assert sampling.steps is not None, "resolve() first"
    default_position = backbone.default_position(backbone.grid(drafts[0].latents))
    timesteps = [int(timestep) for timestep in drafts[0].solver.timesteps[:last_step]]
    check_finite("the initial latents", *(draft.latents for draft in drafts))
    records: list[StepRecord] = []
    positions: list[LearnedPosition] = []
    for step, timestep in enumerate(timesteps):
        started = time.perf_counter()
        steered = Steered(default_position)
        scale = guidance_scale(sampling, timestep)
        try:
            if guidance is not None:
                warm_start = positions[-1] if positions else None
                steered = guidance.steer(step, timestep, drafts, warm_start) or steered
                positions += [] if steered.learned is None else [steered.learned]
                if steered.losses:
                    check_finite("what guidance optimised", *steered.position.values(), *(d.latents for d in drafts))
            steered_at = time.perf_counter()
            for draft in drafts:
                predictions = backbone.predict(draft.latents, timestep, draft.embeds, steered.position, draft.injected)
                prediction = _classifier_free(predictions, scale)
                draft.latents = draft.solver.step(prediction, step, draft.latents, draft.generator)
                check_finite("the latents", draft.latents)
        except NonFiniteError as error:
            raise NonFiniteError(f"denoising step {step + 1} (timestep {timestep}): {error}") from None
        records.append(_record(step, timestep, scale, steered, started, steered_at))
        if on_step is not None:
            on_step(records[-1])
    return Denoised(records, positions, timesteps)


def guidance_scale(sampling: SamplingSettings, timestep: int) -> float:
    """Classifier-free guidance scale of a step.

    The dynamic scale is diffusers' formula for CogVideoX-5B, which mixes the raw timestep with the number of steps;
    published results were made with it.
    """
    assert sampling.guidance_scale is not None and sampling.steps is not None, "resolve() first"
    if not sampling.dynamic_guidance_scale or sampling.guidance_scale == 1:
        return sampling.guidance_scale
    progress = ((sampling.steps - timestep) / sampling.steps) ** 5
    return 1 + sampling.guidance_scale * (1 - math.cos(math.pi * progress)) / 2


def _classifier_free(predictions: Sequence[Tensor], scale: float) -> Tensor:
    """Move from the negative prompt's prediction through the prompt's."""
    if len(predictions) == 1:
        return predictions[0]
    prompted, unprompted = predictions
    return unprompted + scale * (prompted - unprompted)


def _record(step: int, timestep: int, scale: float, steered: Steered, started: float, steered_at: float) -> StepRecord:
    return StepRecord(
        step=step,
        timestep=timestep,
        guidance_scale=scale,
        learning_rate=steered.learning_rate,
        losses=steered.losses,
        seconds_guidance=steered_at - started,
        seconds_denoise=time.perf_counter() - steered_at,
    )
