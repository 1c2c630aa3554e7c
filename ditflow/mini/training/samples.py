"""Pictures and figures of a run's progress.

Axes: T pixel frames, H, W sides in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ditflow.mini.build import FRAMES, HEIGHT, TEXT_TOKENS, WIDTH
from ditflow.mini.measure import flow_score
from ditflow.mini.training.denoiser import Denoiser
from ditflow.mini.training.latents import encode, to_pixels
from ditflow.mini.training.loop import say
from ditflow.mini.training.truth import GRID, SIZE
from ditflow.mini.world import prompt_of, render, sample_scene, true_motion
from ditflow.motion.amf import hard_displacement
from ditflow.types import TokenGrid


@torch.no_grad()
def picture_reconstructions(vae: Any, file: Path, clips: int = 8) -> float:
    """Draw held-out clips (first row of each pair) and their reconstructions; return their mean PSNR in dB."""
    rows, ratios = [], []
    for seed in range(clips):
        frames = render(sample_scene(seed, "eval")).frames
        pixels = to_pixels(frames[None]).to(vae.device)
        made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float()
        ratios.append(-10 * math.log10((made - pixels).clamp(-2, 2).square().mean().item() / 4))
        video = made[0].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
        rows += [frames, video.cpu().numpy()]
    save_contact_sheet(rows, file)
    say(f"reconstruction PSNR {np.mean(ratios):.2f} dB")
    return float(np.mean(ratios))


def picture_samples(denoiser: Denoiser, file: Path, clips: int = 8, steps: int = 25) -> None:
    """Draw held-out prompts with a pipeline, and print how well its attention follows true motion."""
    denoiser.pipeline.set_progress_bar_config(disable=True)
    videos = denoiser.pipeline(
        [prompt_of(sample_scene(seed, "eval")) for seed in range(clips)],
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=4.0,
        max_sequence_length=TEXT_TOKENS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(clips)],
        output_type="np",
    ).frames
    save_contact_sheet([np.rint(255 * video).astype(np.uint8) for video in videos], file)
    errors = " ".join(f"{error:.2f}" for error in motion_errors(denoiser, range(1000, 1016)))
    say(f"{file.stem}: end-point error on sprites by block, in patches: {errors}")


def motion_errors(denoiser: Denoiser, seeds: Sequence[int]) -> list[float]:
    """Return for every block the mean end-point error of its motion flow on the sprites of held-out clips, in patches.

    Zero flow scores about 1.7.
    """
    scores = []
    for scene in (sample_scene(seed, "eval") for seed in seeds):
        seen = denoiser.attended(encode(denoiser.pipeline.vae, render(scene).frames[None], torch.float32))
        flows = [hard_displacement(queries_keys, TokenGrid(*GRID)).cpu().numpy() for queries_keys in seen]
        scores.append([flow_score(flow, true_motion(scene, SIZE, GRID)).sprite_error for flow in flows])
    return np.nanmean(scores, axis=0).tolist()


def save_contact_sheet(videos: Sequence[np.ndarray], file: Path, frames: int = 5, enlarge: int = 2) -> None:
    """Write a PNG with one row per uint8 video [T, H, W, 3], of evenly spaced frames side by side."""
    shown = np.linspace(0, len(videos[0]) - 1, frames).round().astype(int)
    sheet = np.concatenate([np.concatenate(list(video[shown]), axis=1) for video in videos])
    Image.fromarray(sheet.repeat(enlarge, axis=0).repeat(enlarge, axis=1)).save(file)
