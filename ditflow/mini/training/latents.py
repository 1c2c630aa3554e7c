"""Training clips as latents: encoded once, then memory-mapped.

Axes: B clips, T pixel frames, F latent frames, C latent channels, H, W, h, w sides in pixels and in latents.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ditflow.mini.training.loop import precision, replacing, say
from ditflow.mini.training.recipe import Run
from ditflow.mini.world import render, sample_scene

_CLIPS_PER_FILE = 200


@dataclass(frozen=True)
class LatentClips:
    """Scaled mean latents of the first training clips, in files of `_CLIPS_PER_FILE` clips."""

    files: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.files) * _CLIPS_PER_FILE

    def take(self, clips: Sequence[int]) -> Tensor:
        """Return the latents [B, F, C, h, w] of these clips in fp32."""
        chosen = [self.files[clip // _CLIPS_PER_FILE][clip % _CLIPS_PER_FILE] for clip in clips]
        return torch.from_numpy(np.stack(chosen)).float()


def encode_world(vae: Any, run: Run, folder: Path) -> LatentClips | None:
    """Encode the run's training clips to files in a folder; existing files are kept. None if the deadline passes.

    Raises ValueError if the existing files come from another encoder or another version of the world.
    """
    folder.mkdir(exist_ok=True)
    _check_origin(vae, folder)
    files = [folder / f"{index:04d}.npy" for index in range(-(-run.clips // _CLIPS_PER_FILE))]
    for index, file in enumerate(files):
        if file.is_file():
            continue
        if time.monotonic() > run.deadline:
            return None
        seeds = range(index * _CLIPS_PER_FILE, (index + 1) * _CLIPS_PER_FILE)
        batches = [seeds[start : start + 8] for start in range(0, len(seeds), 8)]
        latents = torch.cat([encode_clips(vae, batch, run.dtype) for batch in batches])
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, latents.half().cpu().numpy())
        say(f"latents {index + 1}/{len(files)}")
    return LatentClips([np.load(file, mmap_mode="r") for file in files])


def _check_origin(vae: Any, folder: Path) -> None:
    """Record in a new folder the hash of its encoder and world; raise ValueError if the recorded one differs."""
    digest = hashlib.sha256(str(_scale_of(vae)).encode())
    for part in filter(None, (vae.encoder, vae.quant_conv)):
        for weight in part.state_dict().values():
            digest.update(weight.float().cpu().numpy().tobytes())
    for seed in range(32):
        digest.update(render(sample_scene(seed)).frames.tobytes())
    note = folder / "origin.txt"
    if not note.is_file():
        with replacing(note) as temporary:
            temporary.write_text(digest.hexdigest())
    if note.read_text() != digest.hexdigest():
        raise ValueError(
            f"{folder} holds latents of another encoder or another world: the autoencoder was trained again, or "
            "`world.py` has changed. Remove the folder."
        )


def encode_clips(vae: Any, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the scaled mean latents [B, F, C, h, w] of training clips."""
    return encode(vae, np.stack([render(sample_scene(seed)).frames for seed in seeds]), dtype)


def encode(vae: Any, frames: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return the scaled mean latents [B, F, C, h, w] of uint8 clips [B, T, H, W, 3]."""
    latents, scale = _unscaled(vae, frames, dtype), _scale_of(vae)
    if isinstance(scale, float):
        return latents * scale
    mean, deviation = (torch.tensor(part, device=latents.device)[:, None, None] for part in scale)
    return (latents - mean) / deviation


def fit_scale(vae: Any, dtype: torch.dtype, clips: int = 64) -> None:
    """Set the VAE's scale so that the latents of training clips have a standard deviation of 1, over all channels.

    Channels keep their relative sizes: amplifying the weak ones would amplify their noise as well. A Wan VAE also
    centres each channel.
    """
    latents = _unscaled(vae, np.stack([render(sample_scene(seed)).frames for seed in range(clips)]), dtype)
    if isinstance(vae, AutoencoderKLWan):
        mean = latents.mean(dim=(0, 1, 3, 4), keepdim=True)
        deviation = round((latents - mean).std().item(), 3)
        centres = [round(value, 3) for value in mean.flatten().tolist()]
        vae.register_to_config(latents_mean=centres, latents_std=[deviation] * len(centres))
    else:
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 3))
    say(f"scale of the latents: {_scale_of(vae)}")


def _scale_of(vae: Any) -> float | tuple[Sequence[float], Sequence[float]]:
    """Return the factor of all latents, or the mean and the standard deviation of every channel (Wan)."""
    config = vae.config
    return (config.latents_mean, config.latents_std) if isinstance(vae, AutoencoderKLWan) else config.scaling_factor


@torch.no_grad()
def _unscaled(vae: Any, frames: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return the mean latents [B, F, C, h, w] of uint8 clips [B, T, H, W, 3], as the encoder computes them."""
    with precision(vae.device, dtype):
        return vae.encode(to_pixels(frames).to(vae.device)).latent_dist.mode().float().transpose(1, 2)


def to_pixels(frames: np.ndarray) -> Tensor:
    """Convert uint8 clips [B, T, H, W, 3] to [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)
