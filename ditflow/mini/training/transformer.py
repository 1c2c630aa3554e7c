"""The transformers' stages: denoising of encoded clips, and the diffusers folders that come out of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditflow.mini.training.kinds import KINDS
from ditflow.mini.training.latents import encode_world
from ditflow.mini.training.loop import Training, fit, generator_of, replacing
from ditflow.mini.training.recipe import Run
from ditflow.mini.training.samples import picture_samples
from ditflow.mini.training.truth import Truth
from ditflow.mini.world import prompt_of, sample_scene


def train_transformer(name: str, run: Run) -> bool:
    """Train the transformer and text encoder of a kind on latents, and write its folder; return whether it is done."""
    kind, recipe = KINDS[name], run.recipe(name)
    pipeline = kind.build(seed=run.seed)
    pipeline.vae = vae = type(pipeline.vae).from_pretrained(run.out / kind.autoencoder).to(run.device)
    vae.register_to_config(_name_or_path="")  # else the exported folder would name this machine's path
    if (latents := encode_world(vae, run, run.out / kind.latents)) is None:
        return False
    denoiser = kind.denoiser(pipeline, run.device, run.dtype)
    model = denoiser.model.to(run.device)

    def loss_at(step: int) -> Tensor:
        drawn = np.random.default_rng((run.seed, step)).integers(len(latents), size=recipe.batch + recipe.images)
        scenes, generator = [sample_scene(int(clip)) for clip in drawn], generator_of(run.seed, step)
        clean, words = latents.take(drawn.tolist()), denoiser.words([prompt_of(scene) for scene in scenes])
        clips, images = slice(recipe.batch), slice(recipe.batch, None)
        of_clips = denoiser.loss(clean[clips], words[clips], generator, Truth.of(scenes[clips]))
        truth = Truth.of(scenes[images]).first_frame()
        return of_clips + denoiser.loss(clean[images, :1], words[images], generator, truth)

    def on_sample(training: Training) -> None:
        trained = {part: training.average[part] for part in ("transformer", "text_encoder")}
        exported = export(pipeline, run.out / f"mini-{name}", kind.defaults, trained).to(run.device, torch.float32)
        picture_samples(kind.denoiser(exported, run.device, torch.float32), run.out / f"{name}-{training.step:06d}.png")

    return fit(Training(model, recipe), loss_at, run.out / f"{name}.safetensors", run.deadline, on_sample)


def export(pipeline: Any, folder: Path, defaults: Mapping[str, Any], trained: Mapping[str, Any] | None = None) -> Any:
    """Write a diffusers folder in 16 bits, with the model's own defaults as `ditflow.json`; return what was written.

    trained: parts that take the place of the pipeline's.
    """
    parts = {**pipeline.components, **(trained or {})}
    for name in ("vae", "transformer", "text_encoder"):
        parts[name] = copy.deepcopy(parts[name]).to("cpu", torch.float16)
    exported = type(pipeline)(**parts)
    with replacing(folder) as temporary:
        exported.save_pretrained(temporary)
        (temporary / "ditflow.json").write_text(json.dumps(defaults, indent=2) + "\n")
    return exported
