"""The autoencoder's stage: reconstruction of clips, crops first.

Axes: B clips, T pixel frames, F latent frames, C latent channels, H, W, h, w sides in pixels and in latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ditflow.mini.build import HEIGHT, WIDTH
from ditflow.mini.training.kinds import AUTOENCODERS
from ditflow.mini.training.latents import fit_scale, to_pixels
from ditflow.mini.training.loop import Training, fit, generator_of, precision, replacing
from ditflow.mini.training.recipe import Recipe, Run
from ditflow.mini.training.samples import picture_reconstructions
from ditflow.mini.world import render, sample_scene

_KL_WEIGHT = 1e-3
_CROP = 32


def train_autoencoder(stage: str, run: Run) -> bool:
    """Train an autoencoder and write it to the run's folder, by the stage's name; return whether it is done."""
    vae, recipe = AUTOENCODERS[stage](seed=run.seed).vae.to(run.device), run.recipe(stage)

    def loss_at(step: int) -> Tensor:
        pixels = vae_batch(run.seed, step, recipe).to(run.device)
        with precision(run.device, run.dtype):
            return vae_loss(vae, pixels, generator_of(run.seed, step))

    def on_sample(training: Training) -> None:
        picture_reconstructions(training.average, run.out / f"{stage}-{training.step:06d}.png")
        fit_scale(training.average, run.dtype)
        with replacing(run.out / stage) as folder:
            training.average.save_pretrained(folder)

    return fit(Training(vae, recipe), loss_at, run.out / f"{stage}.safetensors", run.deadline, on_sample)


def vae_batch(seed: int, step: int, recipe: Recipe) -> Tensor:
    """Return training pixels [B, 3, T, H, W]: crops, and once the learning rate decays fewer but whole clips."""
    whole = step >= recipe.decay_from
    size = HEIGHT if whole else _CROP
    count = max(recipe.batch * _CROP**2 // size**2, 1)
    rng = np.random.default_rng((seed, step))
    crops = []
    for index in range(count):
        frames = render(sample_scene(step * recipe.batch + index)).frames
        top, left = rng.integers(HEIGHT - size + 1), rng.integers(WIDTH - size + 1)
        crops.append(frames[:, top : top + size, left : left + size])
    return to_pixels(np.stack(crops))


def vae_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the reconstruction loss of pixels [B, 3, T, H, W] plus a weakly weighted KL divergence of the latents."""
    posterior = vae.encode(pixels).latent_dist
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
    noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
    made = vae.decode(posterior.mean + posterior.std * noise).sample
    return reconstruction_loss(made.float(), pixels) + _KL_WEIGHT * divergence


def reconstruction_loss(made: Tensor, true: Tensor) -> Tensor:
    """Return the mean absolute error of pixels [B, 3, T, H, W] and of their edges, and the squared error of 4x4 means.

    The squared term is for large errors of few pixels: without it the colours of sprites come late.
    """
    error = made - true
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    coarse = functional.avg_pool3d(error, (1, 4, 4)).square().mean()
    return error.abs().mean() + 0.5 * edges + 2 * coarse
