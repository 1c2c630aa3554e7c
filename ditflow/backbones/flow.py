"""Flow matching: noise levels and Euler steps of the families that predict a velocity.

Latents at a level are `(1 - sigma) * clean + sigma * noise`, and the model predicts `noise - clean`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditflow.backbones.contract import NoiseLevel


class FlowSchedule:
    """A stateless Euler solver over the sigmas of a diffusers scheduler.

    sigmas: decreasing, one per step and a final 0. training_timesteps: the timestep of sigma 1.
    """

    def __init__(self, sigmas: Sequence[float], training_timesteps: int):
        self._sigmas, self._training_timesteps = tuple(sigmas), training_timesteps
        self.levels: Sequence[NoiseLevel] = tuple(
            NoiseLevel(index, sigma * training_timesteps, sigma) for index, sigma in enumerate(self._sigmas[:-1])
        )

    def level_at(self, share: float) -> NoiseLevel:
        """Return the noise level at a share of the training timesteps: its sigma."""
        return NoiseLevel(None, share * self._training_timesteps, share)

    def step(self, prediction: Tensor, level: NoiseLevel, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of the next level, by an Euler step."""
        assert level.index is not None, "only levels of the schedule have a next one"
        return latents + (self._sigmas[level.index + 1] - level.sigma) * prediction

    def to_clean(self, prediction: Tensor, level: NoiseLevel, latents: Tensor) -> Tensor:
        """Return the clean latents that a velocity implies."""
        return latents - level.sigma * prediction

    def add_noise(self, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """Return clean latents noised to a level."""
        return (1 - level.sigma) * latents + level.sigma * noise
