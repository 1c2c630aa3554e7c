"""The sampling loop: classifier-free guidance, motion guidance, injection and bank reuse, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditflow.backbones.contract import Backbone, Guider
from ditflow.sampling.guidance import Generation, Guidance, GuidanceResult
from ditflow.types import LearnedPosition, NonFiniteError, StepRecord, check_finite

OnStep = Callable[[StepRecord], None]


@dataclass(frozen=True)
class Denoised:
    """Final latents [1, F, C, h, w] of every generation, step records, and the learned positions of the guided steps.

    timesteps: of the completed steps.
    """

    latents: list[Tensor]
    records: list[StepRecord]
    positions: list[LearnedPosition]
    timesteps: list[int | float]


@torch.no_grad()
def denoise(
    backbone: Backbone,
    generations: Sequence[Generation],
    guider: Guider,
    guidance: Guidance | None = None,
    last_step: int | None = None,
    on_step: OnStep | None = None,
) -> Denoised:
    """Sample generations of one size.

    One generation is the usual case; several share the position that motion guidance learns.
    last_step: stop after this many steps (learning a bank needs no more than the guided ones).

    Raises NonFiniteError in the step in which a loss, a position or the latents become NaN or infinite.
    """
    latents = [generation.noise for generation in generations]
    check_finite("the initial latents", *latents)
    levels = generations[0].schedule.levels[:last_step]
    records: list[StepRecord] = []
    positions: list[LearnedPosition] = []
    for step, level in enumerate(levels):
        started = time.perf_counter()
        guided = GuidanceResult(latents)
        try:
            if guidance is not None:
                guided = guidance.guide(step, level, generations, latents, positions[-1] if positions else None)
                if guided.learned is not None:
                    positions.append(guided.learned)
                if guided.losses:
                    check_finite("what guidance optimised", *(guided.position or {}).values(), *guided.latents)
            guided_at = time.perf_counter()
            latents = []
            for number, generation in enumerate(generations):
                before, injected = guided.latents[number], guided.injected[number] if guided.injected else None
                predictions = backbone.predict(before, level, generation.conditions, guided.position, injected)
                prediction = guider.combine(predictions, level)
                latents.append(generation.schedule.step(prediction, level, before, generation.generator))
            check_finite("the latents", *latents)
        except NonFiniteError as error:
            raise NonFiniteError(f"denoising step {step + 1} (timestep {level.timestep}): {error}") from None
        record = StepRecord(
            step=step,
            timestep=level.timestep,
            guidance_scale=guider.scale(level),
            learning_rate=guided.learning_rate,
            losses=guided.losses,
            seconds_guidance=guided_at - started,
            seconds_denoise=time.perf_counter() - guided_at,
        )
        records.append(record)
        if on_step is not None:
            on_step(record)
    return Denoised(latents, records, positions, [level.timestep for level in levels])
