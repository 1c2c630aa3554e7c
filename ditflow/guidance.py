"""The guided steps: one optimiser loop, for latents and for position embeddings (paper, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditflow.backbones.base import Backbone, Solver
from ditflow.bank import MotionBank
from ditflow.losses import MOTION_LOSSES
from ditflow.positions import FreePosition, MovedTokens
from ditflow.reference import MotionReference
from ditflow.settings import MethodSettings
from ditflow.types import KeysValues, LearnedPosition, NonFiniteLossError, PositionEmbedding


@dataclass(frozen=True)
class Steered:
    """What a guided step hands to its denoising: latents, position, and the loss of every iteration.

    learned: what the position was made of, if it was optimised: the next guided step goes on from there.
    """

    latents: Tensor
    position: PositionEmbedding
    losses: list[float]
    learning_rate: float | None = None
    learned: LearnedPosition | None = None


def optimise(
    variables: Iterable[Tensor],
    loss_of: Callable[[], Tensor],
    learning_rate: float,
    iterations: int,
    penalty_of: Callable[[], Tensor | float] = lambda: 0.0,
) -> list[float]:
    """Minimise `loss_of() + penalty_of()` over `variables` in place with a new Adam.

    Returns the loss before each update, without the penalty.

    Raises NonFiniteLossError at once when a loss is NaN or infinite.
    """
    variables = list(variables)
    optimiser = torch.optim.Adam(variables, lr=learning_rate)
    losses: list[float] = []
    for _ in range(iterations):
        optimiser.zero_grad()
        loss = loss_of()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NonFiniteLossError(
                f"the guidance loss became {losses[-1]} in iteration {len(losses)}. Usual cause: 16-bit overflow or "
                "a learning rate far too high; try model.dtype: float32 or a smaller method.learning_rate."
            )
        (loss + penalty_of()).backward(inputs=variables)
        optimiser.step()
    return losses


@dataclass(frozen=True)
class Guidance:
    """What steers the first `guided_steps` denoising steps towards a reference's motion.

    `method` is resolved. With a `bank` nothing is optimised: its positions are used as they are.
    """

    backbone: Backbone
    method: MethodSettings
    guided_steps: int
    prompt_embeds: Tensor
    positions: FreePosition | MovedTokens
    reference: MotionReference | None = None
    bank: MotionBank | None = None
    initial_noise: Tensor | None = None

    def injected(self, solver: Solver, timestep: int) -> KeysValues | None:
        """Block 0's keys and values of the reference, noised to this timestep with the initial noise."""
        latents = self.reference.latents if self.reference is not None else None
        if not self.method.injects or latents is None:
            return None
        assert self.initial_noise is not None, "injection noises the reference with the initial noise"
        noised = solver.add_noise(latents.to(self.initial_noise), self.initial_noise, timestep)
        return self.backbone.first_keys_values(noised, timestep, self.prompt_embeds)

    def steer(
        self,
        step: int,
        timestep: int,
        latents: Tensor,
        warm_start: LearnedPosition | None,
        injected: KeysValues | None,
    ) -> Steered:
        """Optimise the latents or the position of one guided step, or take the bank's position."""
        if self.bank is not None:
            stored = {part: value.to(latents.device) for part, value in self.bank.change(step).items()}
            return Steered(latents, self.positions.embedding(stored), [])
        own = self.positions.start()
        if self.method.loss is None:
            return Steered(latents, self.positions.embedding(own), [])
        rate = self.method.learning_rates(self.guided_steps)[step]
        if self.method.optimize == "latent":
            latents, position = latents.detach().clone().requires_grad_(), self.positions.embedding(own)
            losses = self._optimise([latents], lambda: self._loss(timestep, latents, position, injected), rate)
            return Steered(latents.detach(), position, losses, rate)
        learned = {part: v.detach().clone().requires_grad_() for part, v in (warm_start or own).items()}
        losses = self._optimise(
            learned.values(),
            lambda: self._loss(timestep, latents, self.positions.embedding(learned), injected),
            rate,
            lambda: self.positions.penalty(learned),
        )
        learned = {part: value.detach() for part, value in learned.items()}
        return Steered(latents, self.positions.embedding(learned), losses, rate, learned)

    def _optimise(
        self,
        variables: Iterable[Tensor],
        loss_of: Callable[[], Tensor],
        rate: float,
        penalty_of: Callable[[], Tensor | float] = lambda: 0.0,
    ) -> list[float]:
        assert self.method.iterations is not None, "resolve() first"
        with torch.enable_grad():
            return optimise(variables, loss_of, rate, self.method.iterations, penalty_of)

    def _loss(self, timestep: int, latents: Tensor, position: PositionEmbedding, injected: KeysValues | None) -> Tensor:
        """Motion loss of the video in the making, averaged over the guidance blocks."""
        assert self.method.loss is not None and self.method.blocks is not None and self.reference is not None
        loss = MOTION_LOSSES[self.method.loss].from_settings(self.method)
        blocks = self.method.blocks
        captured = self.backbone.capture(
            latents, timestep, self.prompt_embeds, blocks, position, injected, loss.captures
        )
        grid = self.backbone.grid(latents)
        return torch.stack([loss(captured[b], self.reference.payloads[b], grid) for b in blocks]).mean()
