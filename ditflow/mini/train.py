"""Train the embedded models on the synthetic world.

    world clips --vae--> autoencoder --encode once--> latents on disk --rotary--> mini-rotary
                                                                      --additive--> mini-additive

Run it as `python -m ditflow.mini.train --out DIR`. A killed or timed-out run continues from its last checkpoint: what
is drawn at a step depends on the seed and the step alone, so on a CPU in 32 bits it ends in the same weights as a run
that was never stopped. `DIR` gets the checkpoints, the latents, pictures of the progress (`*.png`) and, after every
sampling interval, the diffusers folders `mini-rotary` and `mini-additive` in 16 bits. A finished stage that is run
again only writes its folder anew.

Axes: B clips, T pixel frames, F latent frames, C latent channels, H, W, h, w sides in pixels and in latents, L words.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ditflow.backbones import load
from ditflow.backbones.base import Backbone
from ditflow.mini.build import FRAMES, HEIGHT, WIDTH, build_pipeline
from ditflow.mini.measure import block_scores
from ditflow.mini.world import (
    Scene,
    TrueMotion,
    near_sprites,
    prompt_of,
    render,
    sample_scene,
    signed_distance,
    true_motion,
)
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import transfer_motion

KINDS = ("rotary", "additive")
STAGES = ("vae", *KINDS)


# ---- what every stage shares


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained.

    The learning rate rises over `warmup_steps`, rests at `learning_rate` and falls to zero over the last
    `decay_share` of all steps, so that `steps` may still be changed while it rests. `average_decay` is of the
    moving average of the weights. Beside `batch` clips, a step of a transformer sees the first latent frames of
    `images` others: shapes are learned from pictures at a quarter of the cost. Pictures and folders are written every
    `sample_steps`.
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
        """The step from which the learning rate falls."""
        return round(self.steps * (1 - self.decay_share))

    def learning_rate_at(self, step: int) -> float:
        """Return the rate of the update after `step` others."""
        rise = (step + 1) / self.warmup_steps
        fall = (self.steps - step) / max(self.steps - self.decay_from, 1)
        return self.learning_rate * min(rise, fall, 1.0)


RECIPES = {
    "vae": Recipe(steps=2800, batch=8, learning_rate=5e-3, average_decay=0.99, sample_steps=200),
    "rotary": Recipe(steps=17000, batch=16, learning_rate=4e-3, images=24),
    "additive": Recipe(steps=16000, batch=16, learning_rate=4e-3, images=24),
}


DEFAULTS: dict[str, dict[str, Any]] = {
    "rotary": {
        "blocks": [3, 4],
        "learning_rate": [0.08, 0.04],
        "variables": {"position": {"learning_rate": [0.002, 0.001]}},
        "lasting": {"coordinates": {"guided_steps": 0.28, "injected_steps": 0.52, "iterations": 20, "drafts": 16}},
        "steps": 25,
        "guidance_scale": 5.0,
        "losses": {
            "motionclone": {"blocks": [2], "learning_rate": [0.16, 0.08]},
            "moft": {"blocks": [2], "learning_rate": [0.04, 0.02]},
            "smm": {"blocks": [2], "learning_rate": [0.16, 0.08]},
        },
    },
    "additive": {
        "blocks": [3],
        "learning_rate": [0.02, 0.01],
        "variables": {"position": {"learning_rate": [0.01, 0.005]}},
        "lasting": {
            "coordinates": {
                "guided_steps": 0.24,
                "iterations": 20,
                "learning_rate": [0.25, 0.125],
                "optimizer": "adam",
                "drafts": 16,
            }
        },
        "steps": 25,
        "guidance_scale": 5.0,
        "losses": {
            "motionclone": {"blocks": [3, 4], "learning_rate": [0.02, 0.01]},
            "moft": {"blocks": [2], "learning_rate": [0.01, 0.005]},
            "smm": {"blocks": [2], "learning_rate": [0.01, 0.005]},
        },
    },
}
"""`ditflow.json` of each folder: what `python -m benchmarks.mini_sweep` found best; of lasting banks, see
docs/bank-recipes.md."""


class Training:
    """A model with its optimisers, the moving average of its weights and its step count: what a checkpoint holds."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.model, self.recipe, self.step = model, recipe, 0
        self.optimizers = optimizers_of(model)
        self.average = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def update(self, loss: Tensor) -> None:
        """Take one step with every optimiser and average the weights."""
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(self.step)
            optimizer.step()
        self.step += 1
        update_average(self.average, dict(self.model.named_parameters()), self.recipe.average_decay, self.step)

    def save(self, file: Path) -> None:
        """Write a checkpoint; a kill at any moment leaves the old one or the new one."""
        tensors = {f"model.{name}": weight.detach() for name, weight in self.model.named_parameters()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.items()}
        for which, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{which}.{index}.{name}": value for name, value in state.items()}
        tensors["step"] = torch.tensor(self.step)
        with _replacing(file) as temporary:
            save_file(tensors, temporary)

    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        tensors = load_file(file)
        self.step = int(tensors["step"])
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, which, index, name = key.split(".")
                states[int(which)].setdefault(int(index), {})[name] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        own = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        _fill(self.model, self.average)
        try:
            yield
        finally:
            _fill(self.model, own)


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised, for weights of two or more axes (the first against all others).

    K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch's own takes no convolutions. Steps have
    the root mean square that Adam's usually have, 0.2 of the learning rate, so that one rate serves both.
    """

    def __init__(self, weights: Iterable[Tensor], momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(weights, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, weight: Tensor, gradient: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(gradient, 1 - momentum)
        step = orthogonalised(gradient.lerp(state["momentum"], momentum).flatten(1))
        weight.mul_(1 - lr * weight_decay)
        weight.add_(step.view_as(weight), alpha=-0.2 * lr * math.sqrt(max(step.shape)))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about U V^T of a matrix U S V^T: five Newton-Schulz steps bring its singular values into 0.7 ... 1.2."""
    flat = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    flat = flat / (flat.norm() + 1e-7)
    for _ in range(5):
        square = flat @ flat.T
        flat = 3.4445 * flat + (-4.7750 * square + 2.0315 * square @ square) @ flat
    return flat if matrix.shape[0] <= matrix.shape[1] else flat.T


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices and convolutions of a model, and AdamW for its vectors and embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for weight in model.parameters():
        (matrices if weight.ndim > 1 and id(weight) not in embeddings else others).append(weight)
    return [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)]


def update_average(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float, step: int) -> None:
    """Move the average towards the weights of `step` (from 1): a = d a + (1 - d) w, with d rising to `decay`."""
    decay = min(decay, step / (step + 9))
    with torch.no_grad():
        for name, mean in average.items():
            mean.lerp_(weights[name], 1 - decay)


def fit(
    training: Training,
    loss_at: Callable[[int], Tensor],
    file: Path,
    deadline: float = math.inf,
    on_sample: Callable[[Training], None] | None = None,
) -> bool:
    """Train from the checkpoint in `file`, if there is one, to the recipe's last step; return whether it got there.

    loss_at: the loss at a step, drawn from nothing but the step. deadline: of `time.monotonic`. on_sample is called
    before the checkpoint of its step is written, so that what it writes is there when the checkpoint is.
    """
    if file.is_file():
        training.load(file)
    if on_sample is not None and training.step >= training.recipe.steps:
        on_sample(training)
    recipe, losses, started = training.recipe, [], time.monotonic()
    while training.step < recipe.steps and time.monotonic() < deadline:
        loss = loss_at(training.step)
        training.update(loss)
        losses.append(loss.detach())
        last = training.step == recipe.steps
        if on_sample is not None and (training.step % recipe.sample_steps == 0 or last):
            on_sample(training)
        if training.step % recipe.checkpoint_steps == 0 or last:
            training.save(file)
            seconds = (time.monotonic() - started) / len(losses)
            left = (recipe.steps - training.step) * seconds / 60
            mean = torch.stack(losses).mean().item()
            say(f"{file.stem} {training.step}/{recipe.steps} loss {mean:.4f} {seconds:.2f} s/step {left:.0f} min left")
            losses, started = [], time.monotonic()
    return training.step >= recipe.steps


def say(message: str) -> None:
    """Print a line with the time of day."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Lend a temporary path beside `target`; what was written there takes its place at once, or not at all."""
    temporary = target.with_name(f"writing-{target.name}")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    yield temporary
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(temporary, target)


def _randomness(seed: int, step: int) -> torch.Generator:
    """Return the source of everything that is drawn at a step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@contextmanager
def _precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


# ---- the autoencoder

_KL_WEIGHT = 1e-3
_CROP = 32


def vae_loss(vae: AutoencoderKLCogVideoX, pixels: Tensor, noise: Tensor) -> Tensor:
    """Return the reconstruction loss plus a weak pull of the latents [B, C, F, h, w] towards the unit Gaussian.

    noise: unit noise of the latents' shape, for the reparametrised sample.
    """
    posterior = vae.encode(pixels).latent_dist
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
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


def vae_batch(seed: int, step: int, recipe: Recipe) -> Tensor:
    """Return training pixels [B, 3, T, H, W]: crops at first, then (as the learning rate falls) fewer whole clips."""
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


def to_pixels(frames: np.ndarray) -> Tensor:
    """Turn uint8 clips [B, T, H, W, 3] into [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)


def train_autoencoder(run: Run) -> bool:
    """Train the autoencoder and write it to `vae` in the run's folder; return whether it is done."""
    vae, recipe = build_pipeline(rotary=True, seed=run.seed).vae.to(run.device), run.recipe("vae")

    def loss_at(step: int) -> Tensor:
        pixels = vae_batch(run.seed, step, recipe).to(run.device)
        batch, _, _, height, width = pixels.shape
        shape = (batch, vae.config.latent_channels, (FRAMES - 1) // 4 + 1, height // 4, width // 4)
        noise = torch.randn(shape, generator=_randomness(run.seed, step)).to(run.device)
        with _precision(run.device, run.dtype):
            return vae_loss(vae, pixels, noise)

    def on_sample(training: Training) -> None:
        with training.averaged(), _replacing(run.out / "vae") as folder:
            picture_reconstructions(vae, run.out / f"vae-{training.step:06d}.png")
            scale_latents(vae, run)
            vae.save_pretrained(folder)

    return fit(Training(vae, recipe), loss_at, run.out / "vae.safetensors", run.deadline, on_sample)


def scale_latents(vae: AutoencoderKLCogVideoX, run: Run, clips: int = 64) -> None:
    """Set the scaling factor that gives the latents of training clips a deviation of 1, all channels together.

    Channels keep their own sizes: making weak ones strong would make their noise strong as well.
    """
    vae.register_to_config(scaling_factor=1.0)
    deviation = encode_clips(vae, range(clips), run.dtype).std().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 3))
    say(f"scaling factor {vae.config.scaling_factor}")


@torch.no_grad()
def picture_reconstructions(vae: AutoencoderKLCogVideoX, file: Path, clips: int = 8) -> float:
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


def save_contact_sheet(videos: Sequence[np.ndarray], file: Path, frames: int = 5, enlarge: int = 2) -> None:
    """Write a PNG with a row for each uint8 video [T, H, W, 3] and evenly spaced frames of it side by side."""
    shown = np.linspace(0, len(videos[0]) - 1, frames).round().astype(int)
    sheet = np.concatenate([np.concatenate(list(video[shown]), axis=1) for video in videos])
    Image.fromarray(sheet.repeat(enlarge, axis=0).repeat(enlarge, axis=1)).save(file)


# ---- the latents

_CLIPS_PER_FILE = 200


@dataclass(frozen=True)
class LatentClips:
    """Scaled mean latents of the first training clips, memory-mapped from files of `_CLIPS_PER_FILE` clips."""

    files: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.files) * _CLIPS_PER_FILE

    def take(self, clips: Sequence[int]) -> Tensor:
        """Return the latents [B, F, C, h, w] of these clips in fp32."""
        chosen = [self.files[clip // _CLIPS_PER_FILE][clip % _CLIPS_PER_FILE] for clip in clips]
        return torch.from_numpy(np.stack(chosen)).float()


def encode_world(vae: AutoencoderKLCogVideoX, run: Run) -> LatentClips | None:
    """Encode the run's training clips, file by file, and keep what is there already; None when time runs out.

    Raises ValueError when what is there was made by another encoder or from another world.
    """
    folder = run.out / "latents"
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
        with _replacing(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, latents.half().cpu().numpy())
        say(f"latents {index + 1}/{len(files)}")
    return LatentClips([np.load(file, mmap_mode="r") for file in files])


def _check_origin(vae: AutoencoderKLCogVideoX, folder: Path) -> None:
    """Note in a new folder which encoder fills it, and from what world; refuse one that others have begun."""
    digest = hashlib.sha256(str(vae.config.scaling_factor).encode())
    for weight in vae.encoder.state_dict().values():
        digest.update(weight.float().cpu().numpy().tobytes())
    for seed in range(32):
        digest.update(render(sample_scene(seed)).frames.tobytes())
    note = folder / "origin.txt"
    if not note.is_file():
        with _replacing(note) as temporary:
            temporary.write_text(digest.hexdigest())
    if note.read_text() != digest.hexdigest():
        raise ValueError(
            f"{folder} holds latents of another encoder or another world: the autoencoder was trained anew, or "
            "`world.py` was changed. Remove it."
        )


@torch.no_grad()
def encode_clips(vae: AutoencoderKLCogVideoX, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the scaled mean latents [B, F, C, h, w] of training clips."""
    pixels = to_pixels(np.stack([render(sample_scene(seed)).frames for seed in seeds])).to(vae.device)
    with _precision(vae.device, dtype):
        mean = vae.encode(pixels).latent_dist.mode()
    return mean.float().transpose(1, 2) * vae.config.scaling_factor


# ---- the transformers

PROMPT_DROPOUT = 0.1
CORRESPONDENCE_WEIGHT = 0.05
SILHOUETTE_WEIGHT = 0.5
SILHOUETTE_REACH = 12.0
"""Pixels from a silhouette beyond which its distance is not told."""
SPRITE_WEIGHT = 4.0
"""Of latents around sprites, of the others 1: grounds fill the picture, and would be all that is learned."""
TEMPERATURE = 2.0
"""Of the softmax in which motion is read from attention."""
SIZE = (FRAMES, HEIGHT, WIDTH)
GRID = ((FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
"""Latent frames, and patches along height and width."""


def velocity(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the target of v-prediction, sqrt(a) noise - sqrt(1 - a) clean, for alpha_bar [B]."""
    signal = alpha_bar.view(-1, 1, 1, 1, 1)
    return signal.sqrt() * noise - (1 - signal).sqrt() * clean


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the noised latents, sqrt(a) clean + sqrt(1 - a) noise, for alpha_bar [B]."""
    signal = alpha_bar.view(-1, 1, 1, 1, 1)
    return signal.sqrt() * clean + (1 - signal).sqrt() * noise


def draw_timesteps(batch: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """Return timesteps [B] that are uniform each, and spread evenly over the whole range together."""
    offset = torch.rand(1, generator=generator)
    return ((torch.arange(batch) + offset) / batch * timesteps).long().clamp(max=timesteps - 1)


def drop_prompts(words: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Replace one in ten of the prompts [B, L] by the empty one [L], for classifier-free guidance."""
    dropped = torch.rand(len(words), generator=generator) < PROMPT_DROPOUT
    return torch.where(dropped[:, None], empty, words)


@dataclass
class Denoiser:
    """A pipeline under training, and the loss of its transformer and text encoder."""

    pipeline: CogVideoXPipeline
    device: torch.device
    dtype: torch.dtype
    silhouette: nn.Linear = field(init=False)

    def __post_init__(self) -> None:
        config = self.pipeline.transformer.config
        self.silhouette = _zero_linear(config.num_attention_heads * config.attention_head_dim, 4)
        for block in self.pipeline.transformer.transformer_blocks:
            if self.device.type == "cpu" or block is self.taught_block:
                block.attn1.set_processor(SpelledOutAttention())

    @property
    def seen_block(self) -> Any:
        """The block whose tokens are taught to know where silhouettes are: the one before `taught_block`."""
        blocks = self.pipeline.transformer.transformer_blocks
        return blocks[max(len(blocks) // 2 - 1, 0)]

    @property
    def taught_block(self) -> Any:
        """The block whose attention is taught to follow true motion: at half depth, where CogVideoX is guided too."""
        blocks = self.pipeline.transformer.transformer_blocks
        return blocks[len(blocks) // 2]

    @property
    def model(self) -> nn.ModuleDict:
        """What is trained; the silhouette head is of no use afterwards."""
        parts = {"transformer": self.pipeline.transformer, "text_encoder": self.pipeline.text_encoder}
        return nn.ModuleDict({**parts, "silhouette": self.silhouette})

    def words(self, prompts: Sequence[str]) -> Tensor:
        """Return prompts as token numbers [B, L], padded as the pipeline pads them."""
        length = self.pipeline.transformer.config.max_text_seq_length
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return self.pipeline.tokenizer(list(prompts), **options).input_ids

    def loss(
        self,
        clean: Tensor,
        words: Tensor,
        generator: torch.Generator,
        truth: Truth | None = None,
    ) -> Tensor:
        """Return the mean squared error of the predicted velocity of latents [B, F, C, h, w]; words [B, L].

        With the truth about the clips, errors are weighted, and what the model is taught beside is added.
        """
        alphas = self.pipeline.scheduler.alphas_cumprod.float()
        timesteps = draw_timesteps(len(clean), len(alphas), generator)
        noise = torch.randn(clean.shape, generator=generator)
        alpha_bar = alphas[timesteps]
        target = velocity(clean, noise, alpha_bar).to(self.device)
        noisy = add_noise(clean, noise, alpha_bar).to(self.device)
        words = drop_prompts(words, self.words([""])[0], generator).to(self.device)
        self.taught_block.attn1.processor.keeps = truth is not None and bool(truth.motion)
        with _precision(self.device, self.dtype), _outputs_of(self.seen_block) as features:
            predicted = self.pipeline.transformer(
                hidden_states=noisy,
                encoder_hidden_states=self.pipeline.text_encoder(words)[0],
                timestep=timesteps.to(self.device),
                image_rotary_emb=self._rotary(clean.shape[1]),
                return_dict=False,
            )[0]
        error = (predicted.float() - target).square()
        if truth is None:
            return error.mean()
        loss = weighted_mean(error, truth.weight.to(self.device))
        loss += SILHOUETTE_WEIGHT * self._silhouette_loss(features[0][0].float(), truth)
        if truth.motion:
            queries, keys = self.taught_block.attn1.processor.taken()
            loss += CORRESPONDENCE_WEIGHT * correspondence_loss(queries, keys, truth.motion)
        return loss

    def _silhouette_loss(self, tokens: Tensor, truth: Truth) -> Tensor:
        """Return the weighted error of the distances to silhouettes that a linear head reads from tokens [B, S, D]."""
        seen, weight = (by_patch(part).to(self.device) for part in (truth.silhouette, truth.weight[:, :, 0]))
        return weighted_mean((self.silhouette(tokens) - seen).square(), weight)

    def _rotary(self, frames: int) -> tuple[Tensor, Tensor] | None:
        if not self.pipeline.transformer.config.use_rotary_positional_embeddings:
            return None
        return self.pipeline._prepare_rotary_positional_embeddings(HEIGHT, WIDTH, frames, self.device)


class SpelledOutAttention:
    """diffusers' attention with a spelled-out softmax: on a CPU in 16 bits twice as fast as torch's fused kernel.

    keeps: hold the queries and keys of the latest call until they are taken.
    """

    keeps = False
    _queries_keys: tuple[Tensor, Tensor] | None = None

    def taken(self) -> tuple[Tensor, Tensor]:
        """Hand out the video tokens' queries and keys [B, H, S, d] of the latest call, once."""
        queries_keys, self._queries_keys = self._queries_keys, None
        assert queries_keys is not None, "nothing was attended since the last time"
        return queries_keys

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attended video and text tokens [B, S, D]."""
        assert attention_mask is None, "CogVideoX attends without a mask"
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (part(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in projections)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([part[:, :, :text], apply_rotary_emb(part[:, :, text:], image_rotary_emb)], dim=2)
                for part in (query, key)
            )
        if self.keeps:
            self._queries_keys = (query[:, :, text:], key[:, :, text:])
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1)
        attended = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](attended))
        return output[:, text:], output[:, :text]


@dataclass(frozen=True)
class Truth:
    """What is known of clips beside their latents.

    weight [B, F, 1, h, w]: of the errors, more around sprites. silhouette [B, F, h, w]: distance to the nearest
    silhouette over `SILHOUETTE_REACH`, in [-1, 1]. motion: of each clip, if they move.
    """

    weight: Tensor
    silhouette: Tensor
    motion: Sequence[TrueMotion] = ()

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Truth:
        """Return the truth about scenes, on the grid of their latents."""
        cells = (GRID[0], HEIGHT // 4, WIDTH // 4)
        near = torch.from_numpy(np.stack([near_sprites(scene, SIZE, cells) for scene in scenes]))
        distance = torch.from_numpy(np.stack([signed_distance(scene, SIZE, cells) for scene in scenes]))
        weight = 1 + (SPRITE_WEIGHT - 1) * near[:, :, None].float()
        silhouette = (distance / SILHOUETTE_REACH).clamp(-1, 1)
        return cls(weight, silhouette, [true_motion(scene, SIZE, GRID) for scene in scenes])

    def first_frame(self) -> Truth:
        """Return the truth about the first latent frame alone, which does not move."""
        return Truth(self.weight[:, :1], self.silhouette[:, :1])


def by_patch(cells: Tensor) -> Tensor:
    """Return cells [B, F, h, w] as the four cells of each patch [B, F*h/2*w/2, 4], in the order of the tokens."""
    return cells.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4).flatten(1, 3)


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what a module puts out."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of values, weighted by what can be broadcast to them."""
    weight = weight.expand_as(values)
    return (values * weight).sum() / weight.sum()


def correspondence_loss(queries: Tensor, keys: Tensor, motion: Sequence[TrueMotion]) -> Tensor:
    """Return how badly attention finds where things went: the cross-entropy of AMF's softmax, half for sprites.

    queries, keys: video tokens [B, H, F*P, d]. The logits are AMF's: the mean over heads, times `TEMPERATURE`, and a
    softmax over the patches of every other frame. Its target is the place of the point under a patch's centre, shared
    out among the four patches around it, as long as the point is visible.
    """
    frames, height, width = GRID
    heads, _, head_dim = queries.shape[1:]
    queries, keys = (part.transpose(1, 2).flatten(2) for part in (queries, keys))
    logits = (queries @ keys.mT).float() * (TEMPERATURE / (heads * math.sqrt(head_dim)))
    by_frame = logits.view(-1, frames, height * width, frames, height * width).transpose(2, 3)
    place = torch.from_numpy(np.stack([clip.displacement for clip in motion])) + _patch_coordinates()
    target = _shared_out(place[..., 1], height).unsqueeze(-1) * _shared_out(place[..., 0], width).unsqueeze(-2)
    cost = -(target.flatten(-2).to(logits.device) * by_frame.log_softmax(-1)).sum(-1)
    seen = (
        torch.from_numpy(np.stack([clip.visible for clip in motion])) & ~torch.eye(frames, dtype=torch.bool)[..., None]
    )
    sprite = torch.from_numpy(np.stack([clip.owner for clip in motion]) >= 0)[:, :, None]
    return torch.stack([cost[(seen & kind).to(cost.device)].mean() for kind in (sprite, ~sprite)]).mean()


def _patch_coordinates() -> Tensor:
    """Coordinates (x, y) of the patches [P, 2]."""
    _, height, width = GRID
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1).float()


def _shared_out(place: Tensor, size: int) -> Tensor:
    """Linear weights [..., size] of places [...] along an axis of `size` patches; outer places go to the border."""
    distance = place.clamp(0, size - 1)[..., None] - torch.arange(size)
    return (1 - distance.abs()).clamp(min=0)


def train_transformer(kind: str, run: Run) -> bool:
    """Train a transformer and its text encoder on the latents; return whether it is done."""
    vae = AutoencoderKLCogVideoX.from_pretrained(run.out / "vae").to(run.device)
    if (latents := encode_world(vae, run)) is None:
        return False
    pipeline = build_pipeline(rotary=kind == "rotary", seed=run.seed)
    pipeline.vae = vae
    denoiser, recipe = Denoiser(pipeline, run.device, run.dtype), run.recipe(kind)
    model = denoiser.model.to(run.device)

    def loss_at(step: int) -> Tensor:
        drawn = np.random.default_rng((run.seed, step)).integers(len(latents), size=recipe.batch + recipe.images)
        scenes, generator = [sample_scene(int(clip)) for clip in drawn], _randomness(run.seed, step)
        clean, words = latents.take(drawn.tolist()), denoiser.words([prompt_of(scene) for scene in scenes])
        clips, images = slice(recipe.batch), slice(recipe.batch, None)
        of_clips = denoiser.loss(clean[clips], words[clips], generator, Truth.of(scenes[clips]))
        truth = Truth.of(scenes[images]).first_frame()
        return of_clips + denoiser.loss(clean[images, :1], words[images], generator, truth)

    def on_sample(training: Training) -> None:
        with training.averaged():
            folder = export(pipeline, run.out / f"mini-{kind}")
        picture_samples(folder, run.out / f"{kind}-{training.step:06d}.png")

    return fit(Training(model, recipe), loss_at, run.out / f"{kind}.safetensors", run.deadline, on_sample)


def export(pipeline: CogVideoXPipeline, folder: Path) -> Path:
    """Write an ordinary diffusers folder in 16 bits, with the model's own defaults beside it; return the folder."""
    with _replacing(folder) as temporary:
        half_precision_copy(pipeline).save_pretrained(temporary)
        kind = "rotary" if pipeline.transformer.config.use_rotary_positional_embeddings else "additive"
        (temporary / "ditflow.json").write_text(json.dumps(DEFAULTS[kind], indent=2) + "\n")
    return folder


def half_precision_copy(pipeline: CogVideoXPipeline) -> CogVideoXPipeline:
    """Return a pipeline of copies in 16 bits; the weights under training stay as they are."""
    parts = dict(pipeline.components)
    for name in ("vae", "transformer", "text_encoder"):
        parts[name] = copy.deepcopy(parts[name]).to("cpu", torch.float16)
    return CogVideoXPipeline(**parts)


# ---- what can be seen of the progress


def picture_samples(folder: Path, file: Path, clips: int = 8, steps: int = 25) -> None:
    """Draw held-out prompts with the exported model, and say how well its attention follows true motion."""
    backbone = load(str(folder))
    method, sampling = MethodSettings(name="none"), SamplingSettings(steps=steps, guidance_scale=4.0)
    videos = []
    for seed in range(clips):
        prompt = prompt_of(sample_scene(seed, "eval"))
        made = transfer_motion(
            backbone, prompt, size=(FRAMES, HEIGHT, WIDTH), method=method, sampling=sampling, seed=seed
        )
        assert made.video is not None
        videos.append(made.video)
    save_contact_sheet(videos, file)
    errors = " ".join(f"{error:.2f}" for error in motion_errors(backbone, range(1000, 1016)))
    say(f"{file.stem}: end-point error on sprites by block, in patches: {errors}")


def motion_errors(backbone: Backbone, seeds: Sequence[int]) -> list[float]:
    """Return for every block the mean end-point error of its motion flow on the sprites of held-out clips, in patches.

    Zero flow scores about 3.
    """
    scores = [block_scores(backbone, render(sample_scene(seed, "eval"))) for seed in seeds]
    return np.nanmean([[score.sprite_error for score in blocks] for blocks in scores], axis=0).tolist()


# ---- the command


@dataclass(frozen=True)
class Run:
    """Where and how a run trains. deadline: of `time.monotonic`; clips: encoded for the transformers."""

    out: Path
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    clips: int = 9_000
    steps: int | None = None
    deadline: float = math.inf

    def recipe(self, stage: str) -> Recipe:
        """Return a stage's recipe, with the number of steps that was asked for."""
        return RECIPES[stage] if self.steps is None else replace(RECIPES[stage], steps=self.steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the stages that were asked for, one after the other, until done or out of time."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    run = Run(
        out=asked.out,
        device=torch.device(asked.device),
        dtype=getattr(torch, asked.precision),
        seed=asked.seed,
        clips=asked.clips,
        steps=asked.steps,
        deadline=time.monotonic() + 60 * asked.minutes,
    )
    for stage in STAGES if asked.stage == "all" else (asked.stage,):
        done = train_transformer(stage, run) if stage in KINDS else train_autoencoder(run)
        if not done:
            say(f"out of time in stage {stage}: run the same command again to continue")
            return
        say(f"stage {stage} is done")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ditflow.mini.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, pictures and models")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, to be continued, after this long")
    parser.add_argument("--steps", type=int, help="of the stages that are run; may be changed on the way")
    parser.add_argument("--clips", type=int, default=Run.clips, help="encoded for the transformers")
    parser.add_argument("--seed", type=int, default=Run.seed)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    return parser


if __name__ == "__main__":
    main()
