"""The guided steps: one optimiser loop, for latents and for position embeddings (paper, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from ditflow.backbones.base import Backbone, Solver
from ditflow.bank import MotionBank
from ditflow.losses import MOTION_LOSSES
from ditflow.optimizer import OPTIMIZERS
from ditflow.positions import FreePosition, MovedTokens
from ditflow.reference import MotionReference, look
from ditflow.settings import MethodSettings
from ditflow.types import KeysValues, LearnedPosition, NonFiniteError, PositionEmbedding


@dataclass
class Draft:
    """A video in the making: its latents [1, F, C, h, w] (fp32) change from step to step.

    embeds: text embeddings of the prompt and, for classifier-free guidance, of the negative prompt. noise: the latents
    that it began with. injected: block 0's keys and values of the reference, in this step.
    """

    latents: Tensor
    embeds: Sequence[Tensor]
    solver: Solver
    generator: torch.Generator
    noise: Tensor
    injected: KeysValues | None = None

    @classmethod
    def begin(cls, noise: Tensor, embeds: Sequence[Tensor], solver: Solver, generator: torch.Generator) -> Draft:
        """Begin with noise."""
        return cls(noise, embeds, solver, generator, noise)


@dataclass(frozen=True)
class Steered:
    """What a guided step hands to its denoising, beside the drafts: the position, and the loss of every iteration.

    learned: what the position was made of, if it was optimised: the next guided step goes on from there.
    """

    position: PositionEmbedding
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
    """Minimise `loss_of() + penalty_of()` over `variables` in place with a new optimiser.

    averaged: leave the variables at the mean of what they were after each of the last half of the updates, rounded up,
    instead of what they were after the last: what the updates do not agree about goes out of it (Polyak averaging).
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
    """What steers the first `guided_steps` denoising steps towards a reference's motion.

    `method` is resolved. With a `bank` nothing is optimised: its positions are used as they are.
    injected_steps: first steps in which the reference's keys and values are injected, if the method injects.
    source_embeds: text embeddings of the reference's pass, where the motion is measured as the reference's was.
    """

    backbone: Backbone
    method: MethodSettings
    guided_steps: int
    injected_steps: int
    positions: FreePosition | MovedTokens
    reference: MotionReference | None = None
    bank: MotionBank | None = None
    source_embeds: Tensor | None = None

    def steer(
        self, step: int, timestep: int, drafts: Sequence[Draft], warm_start: LearnedPosition | None
    ) -> Steered | None:
        """Prepare a step: inject the reference into the drafts, and optimise, or take the bank's position.

        The latents of a draft are optimised in place; positions are learned over all drafts, in turns. Returns None
        behind the guided steps, whether something is still injected or not.
        """
        for draft in drafts:
            draft.injected = self._injected(draft, timestep) if step < self.injected_steps else None
        if step >= self.guided_steps:
            return None
        if self.bank is not None:
            device = drafts[0].latents.device
            stored = {part: value.to(device) for part, value in self.bank.change(step).items()}
            return Steered(self.positions.embedding(stored))
        own = self.positions.start()
        if self.method.loss is None:
            return Steered(self.positions.embedding(own))
        rate = self.method.learning_rates(self.guided_steps)[step]
        if self.method.optimize == "latent":
            return self._steer_latents(timestep, *drafts, position=self.positions.embedding(own), rate=rate)
        learned = {part: v.detach().clone().requires_grad_() for part, v in (warm_start or own).items()}
        assert self.method.iterations is not None, "resolve() first"
        turns = count(step * self.method.iterations)  # so that no draft is left out where there are few iterations

        def loss_of() -> Tensor:
            draft = drafts[next(turns) % len(drafts)]
            return self._loss(timestep, draft, self.positions.embedding(learned))

        losses = self._optimise(learned.values(), loss_of, rate, lambda: self.positions.penalty(learned))
        learned = {part: value.detach() for part, value in learned.items()}
        return Steered(self.positions.embedding(learned), losses, rate, learned)

    def _steer_latents(self, timestep: int, draft: Draft, *, position: PositionEmbedding, rate: float) -> Steered:
        draft.latents = draft.latents.detach().clone().requires_grad_()
        losses = self._optimise([draft.latents], lambda: self._loss(timestep, draft, position), rate)
        draft.latents = draft.latents.detach()
        return Steered(position, losses, rate)

    def _injected(self, draft: Draft, timestep: int) -> KeysValues | None:
        """Block 0's keys and values of the reference, noised to this timestep with the draft's initial noise."""
        latents = self.reference.latents if self.reference is not None else None
        if not self.method.injects or latents is None:
            return None
        noised = draft.solver.add_noise(latents.to(draft.noise), draft.noise, timestep)
        return self.backbone.first_keys_values(noised, timestep, draft.embeds[0])

    def _optimise(
        self,
        variables: Iterable[Tensor],
        loss_of: Callable[[], Tensor],
        rate: float,
        penalty_of: Callable[[], Tensor | float] = lambda: 0.0,
    ) -> list[float]:
        iterations, averaged, optimizer = self.method.iterations, self.method.averaged, self.method.optimizer
        assert iterations is not None and averaged is not None and optimizer is not None, "resolve() first"
        with torch.enable_grad():
            return optimise(variables, loss_of, rate, iterations, penalty_of, averaged, OPTIMIZERS[optimizer])

    def _loss(self, timestep: int, draft: Draft, position: PositionEmbedding) -> Tensor:
        """Motion loss of a draft, averaged over the guidance blocks."""
        assert self.method.loss is not None and self.method.blocks is not None and self.reference is not None
        loss = MOTION_LOSSES[self.method.loss].from_settings(self.method)
        blocks, grid = self.method.blocks, self.backbone.grid(draft.latents)
        if self.method.measured == "prediction":
            assert self.source_embeds is not None, "the predicted video is looked at with the reference's words"
            clean = self._predicted(timestep, draft, position)
            captured = look(self.backbone, clean, self.source_embeds, loss, blocks)
        else:
            captured = self.backbone.capture(
                draft.latents, timestep, draft.embeds[0], blocks, position, draft.injected, loss.captures
            )
        return torch.stack([loss(captured[b], self.reference.payloads[b], grid) for b in blocks]).mean()

    def _predicted(self, timestep: int, draft: Draft, position: PositionEmbedding) -> Tensor:
        """The clean latents that the model predicts for the prompt, differentiable in latents and position."""
        (prediction,) = self.backbone.predict(draft.latents, timestep, draft.embeds[:1], position, draft.injected)
        return draft.solver.clean(prediction, timestep, draft.latents)
