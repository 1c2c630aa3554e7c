"""Hyperparameters of every stage, and where and how a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one stage.

    The learning rate warms up over `warmup_steps`, stays at `learning_rate` and decays linearly to zero over the last
    `decay_share` of all steps; `steps` may be changed until the decay begins. `average_decay` is that of the moving
    average of the weights. A transformer's batch has `batch` clips and the first latent frames of `images` other
    clips: shapes can be learned from single frames at a quarter of the cost. Pictures and model folders are written
    every `sample_steps`.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int = 200
    decay_share: float = 0.3
    average_decay: float = 0.999
    images: int = 0
    checkpoint_steps: int = 50
    sample_steps: int = 500

    @property
    def decay_from(self) -> int:
        """The step at which the learning rate begins to decay."""
        return round(self.steps * (1 - self.decay_share))

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` others."""
        warmup = (step + 1) / self.warmup_steps
        decay = (self.steps - step) / max(self.steps - self.decay_from, 1)
        return self.learning_rate * min(warmup, decay, 1.0)


RECIPES = {
    "vae": Recipe(steps=2800, batch=8, learning_rate=5e-3, average_decay=0.99, sample_steps=200),
    "rotary": Recipe(steps=17000, batch=16, learning_rate=4e-3, images=24),
    "additive": Recipe(steps=16000, batch=16, learning_rate=4e-3, images=24),
    "vae-wan": Recipe(
        steps=2800, batch=8, learning_rate=5e-3, average_decay=0.99, checkpoint_steps=25, sample_steps=200
    ),
    "wan": Recipe(steps=12000, batch=16, learning_rate=4e-3, images=24, checkpoint_steps=25),
}
"""By stage."""


@dataclass(frozen=True)
class Run:
    """Where and how a run trains.

    out: folder of checkpoints, latents, pictures and models. clips: how many are encoded for the transformers.
    steps: of every stage, in place of its recipe's. deadline: in seconds of `time.monotonic`.
    """

    out: Path
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    clips: int = 9_000
    steps: int | None = None
    deadline: float = math.inf

    def recipe(self, stage: str) -> Recipe:
        """Return a stage's recipe, with this run's number of steps."""
        return RECIPES[stage] if self.steps is None else replace(RECIPES[stage], steps=self.steps)
