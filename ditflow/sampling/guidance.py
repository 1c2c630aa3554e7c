"""Motion guidance: the optimiser loop over latents or position embeddings (paper, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from ditflow.backbones.contract import Backbone, Condition, NoiseLevel, Schedule
from ditflow.banks.bank import MotionBank
from ditflow.motion.reference import MotionReference, capture_clean
from ditflow.sampling.optimizer import OPTIMIZERS
from ditflow.sampling.positions import PositionVariable
from ditflow.settings import ResolvedMethod
from ditflow.types import KeysValues, LearnedPosition, NonFiniteError, PositionEmbedding


@dataclass(frozen=True)
class Generation:
    """Inputs of one sampled video.

    noise: initial latents [1, F, C, h, w], fp32. conditions: of the prompt and, for classifier-free guidance, of the
    negative prompt. generator: of the solver's own noise.
    """

    noise: Tensor
    conditions: Sequence[Condition]
    schedule: Schedule
    generator: torch.Generator


@dataclass(frozen=True)
class GuidanceResult:
    """Inputs of one denoising step: latents and injected keys and values of every generation, and the position.

    position: None is the model's own. losses: the loss before every iteration. learned: the optimised variable of the
    position, if there is one; it initialises the next guided step.
    """

    latents: Sequence[Tensor]
    injected: Sequence[KeysValues | None] = ()
    position: PositionEmbedding | None = None
    losses: list[float] = field(default_factory=list)
    learning_rate: float | None = None
    learned: LearnedPosition | None = None


def optimise(
    variables: Iterable[Tensor],
    loss_of: Callable[[], Tensor],
    learning_rate: float,
    iterations: int,
    penalty_of: Callable[[], Tensor | float] = lambda: 0.0,
    averaged: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> list[float]:
    """Minimise `loss_of() + penalty_of()` over `variables`, in place, with a new optimiser.

    averaged: return the average of the iterates of the last half of the updates, rounded up, instead of the last one
    (Polyak averaging).
    Returns the loss before each update, without the penalty.

    Raises NonFiniteError at once when a loss is NaN or infinite.
    """
    variables = list(variables)
    optimiser = optimizer(variables, lr=learning_rate)
    first_kept = iterations // 2 if averaged else iterations - 1
    sums = [torch.zeros_like(variable) for variable in variables]
    losses: list[float] = []
    for number in range(iterations):
        optimiser.zero_grad()
        loss = loss_of()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(
                f"the guidance loss became {losses[-1]} in iteration {len(losses)}. Usual cause: overflow in 16 bits, "
                "or a learning rate far too high; try model.dtype: float32 or a smaller method.learning_rate"
            )
        (loss + penalty_of()).backward(inputs=variables)
        optimiser.step()
        if number >= first_kept:
            for total, variable in zip(sums, variables, strict=True):
                total += variable.detach()
    with torch.no_grad():
        for total, variable in zip(sums, variables, strict=True):
            variable.copy_(total / (iterations - first_kept))
    return losses


@dataclass(frozen=True)
class Guidance:
    """Motion guidance of the first `guided_steps` denoising steps.

    With a `bank`, nothing is optimised; its positions are applied.
    injected_steps: number of steps, from the first, in which the reference's keys and values are injected.
    source: condition of the reference's pass, needed for `measured: prediction`.
    """

    backbone: Backbone
    method: ResolvedMethod
    guided_steps: int
    injected_steps: int
    variable: PositionVariable
    reference: MotionReference | None = None
    bank: MotionBank | None = None
    source: Condition | None = None

    def guide(
        self,
        step: int,
        level: NoiseLevel,
        generations: Sequence[Generation],
        latents: Sequence[Tensor],
        warm_start: LearnedPosition | None,
    ) -> GuidanceResult:
        """Return the inputs of a step, after injection and optimisation, or with the bank's position.

        Positions are optimised over all generations, in turns.
        """
        injects = self.method.injects and step < self.injected_steps
        injected = [self._injected(generation, level) if injects else None for generation in generations]
        unguided = GuidanceResult(latents, injected)
        if step >= self.guided_steps or (self.bank is None and not self.method.has_loss):
            return unguided
        if self.bank is not None:
            device = latents[0].device
            stored = {part: value.to(device) for part, value in self.bank.offsets(step).items()}
            return GuidanceResult(latents, injected, self.variable.embedding(stored))
        rate = self.method.learning_rates(self.guided_steps)[step]
        if self.method.optimize == "latent":
            (generation,), (start,) = generations, latents
            variable = start.detach().clone().requires_grad_()
            losses = self._optimise(
                [variable], lambda: self._loss(level, generation, variable, None, injected[0]), rate
            )
            return GuidanceResult([variable.detach()], injected, None, losses, rate)
        learned = {
            part: value.detach().clone().requires_grad_()
            for part, value in (warm_start or self.variable.zero()).items()
        }
        turns = count(step * self.method.iterations)  # so that no generation is left out by few iterations

        def loss_of() -> Tensor:
            turn = next(turns) % len(generations)
            position = self.variable.embedding(learned)
            return self._loss(level, generations[turn], latents[turn], position, injected[turn])

        losses = self._optimise(learned.values(), loss_of, rate, lambda: self.variable.penalty(learned))
        learned = {part: value.detach() for part, value in learned.items()}
        return GuidanceResult(latents, injected, self.variable.embedding(learned), losses, rate, learned)

    def _injected(self, generation: Generation, level: NoiseLevel) -> KeysValues | None:
        """Return block 0's keys and values of the reference, noised to this level with the initial noise."""
        latents = self.reference.latents if self.reference is not None else None
        if latents is None:
            return None
        noised = generation.schedule.add_noise(latents.to(generation.noise), generation.noise, level)
        return self.backbone.first_keys_values(noised, level, generation.conditions[0])

    def _optimise(
        self,
        variables: Iterable[Tensor],
        loss_of: Callable[[], Tensor],
        rate: float,
        penalty_of: Callable[[], Tensor | float] = lambda: 0.0,
    ) -> list[float]:
        iterations, averaged, optimizer = self.method.iterations, self.method.averaged, self.method.optimizer
        with torch.enable_grad():
            return optimise(variables, loss_of, rate, iterations, penalty_of, averaged, OPTIMIZERS[optimizer])

    def _loss(
        self,
        level: NoiseLevel,
        generation: Generation,
        latents: Tensor,
        position: PositionEmbedding | None,
        injected: KeysValues | None,
    ) -> Tensor:
        """Return the motion loss of a generation's latents, averaged over the guidance blocks."""
        assert self.reference is not None, "nothing else has a loss"
        loss = self.method.make_loss()
        blocks, grid = self.method.blocks, self.backbone.layout.grid(latents.shape)
        prompt = generation.conditions[0]
        if self.method.measured == "prediction":
            assert self.source is not None, "the predicted video is captured with the reference's condition"
            (prediction,) = self.backbone.predict(latents, level, [prompt], position, injected)
            clean = generation.schedule.to_clean(prediction, level, latents)
            captured = capture_clean(self.backbone, generation.schedule, clean, self.source, loss, blocks)
        else:
            captured = self.backbone.capture(latents, level, prompt, blocks, position, injected, loss.captures)
        return torch.stack([loss(captured[b], self.reference.payloads[b], grid) for b in blocks]).mean()
