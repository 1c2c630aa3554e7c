"""The pictures of README and docs, made by the embedded model: `python -m benchmarks.pictures`.

    transfer.png    a reference, its motion, and a new video that was guided by it
    attention.png   where one patch of the reference finds itself in the other frames
    loss.png        the loss over all iterations of the guided steps
    variables.png   one reference, followed by everything that can be optimised, and by nothing
    bank.png        one lasting bank and three prompts, nothing optimised
    mask.png        a reference of two sprites, and videos that follow one or the other
    natural.png     a natural clip, and a video that follows its optical flow

All from seeds, into docs/pictures; names on the command line make some of them. Some four minutes on two cores.
natural.png is made only with `--clip`. The clip itself is not shown: it may be nobody's to publish.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from ditflow import backbones
from ditflow.backbones.contract import CLEAN, Backbone
from ditflow.losses.amf import AttentionMotionFlowLoss
from ditflow.media.plot import contact_sheet, pixel_frame, plot_losses, plot_transfer
from ditflow.media.video import read_video
from ditflow.mini.world import render, sample_pair
from ditflow.motion.amf import hard_displacement, soft_displacement
from ditflow.motion.reference import extract_motion
from ditflow.settings import MethodSettings, MotionSettings
from ditflow.transfer import Transferred, learn_bank, transfer_motion
from ditflow.types import QueriesKeys, TokenGrid
from jobs.clips import render_clips

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 300_000
CLIP, SEED = 2, 1
PROMPT = "a yellow star moving over the water"
BANK_JOB = ROOT / "jobs" / "quickstart-bank.yaml"
"""Whose prompts a bank is learned with, after this one:"""
BANK_PROMPT = "a red ball moving over the grass"
REUSED = (PROMPT, "a blue square moving over the sand", "a white ball moving over the bricks")
MASK_SEED = 501
NATURAL_PROMPT = "a red ball moving over the bricks"
PATCH = (4, 7)
"""The patch of attention.png, as x and y: on the reference's ring in its first frame."""


@cache
def model() -> Backbone:
    return backbones.load("mini")


@cache
def reference() -> np.ndarray:
    """The clip of `ditflow mini clips clips --count 3` that rises."""
    with tempfile.TemporaryDirectory() as folder:
        render_clips(Path(folder), count=1, seed=CLIP)
        return read_video(Path(folder) / f"clip-{CLIP:04d}.mp4", frames=17, height=64, width=64).frames


@cache
def transferred(method: MethodSettings) -> Transferred:
    return transfer_motion(model(), PROMPT, reference=reference(), method=method, seed=SEED)


def video(method: MethodSettings) -> np.ndarray:
    made = transferred(method).video
    assert made is not None
    return made


def draw_transfer(path: Path) -> None:
    motion = transferred(MethodSettings()).motion_reference
    assert motion is not None
    grid = (motion.grid.frames, motion.grid.height, motion.grid.width)
    plot_transfer(reference(), motion.displacement.numpy(), grid, video(MethodSettings()), path, title=PROMPT)


def draw_losses(path: Path) -> None:
    plot_losses(transferred(MethodSettings()).losses, path, title=f"DiTFlow on mini, latents: {PROMPT}")


def draw_variables(path: Path) -> None:
    rows = {
        "reference": reference(),
        "nothing optimised: the plain model": video(MethodSettings(name="none")),
        "optimize: latent": video(MethodSettings()),
        "optimize: position": video(MethodSettings(optimize="position")),
        "optimize: coordinates": video(MethodSettings(optimize="coordinates")),
    }
    contact_sheet(list(rows.items()), path, columns=5)


def draw_bank(path: Path) -> None:
    prompts = yaml.safe_load(BANK_JOB.read_text())["method"]["more_prompts"]
    method = MethodSettings(optimize="coordinates", preset="lasting", more_prompts=tuple(prompts))
    motion = extract_motion(model(), reference(), method)
    size = (17, 64, 64)
    bank = learn_bank(model(), BANK_PROMPT, reference=motion, size=size, method=method, seed=SEED).bank
    rows = [("reference of the bank", reference())]
    reuse = replace(method, preset="paper")
    for number, prompt in enumerate(REUSED):
        made = transfer_motion(model(), prompt, reference=bank, size=size, method=reuse, seed=SEED + number).video
        assert made is not None
        rows.append((f"reused: {prompt}", made))
    contact_sheet(rows, path, columns=5)


def draw_mask(path: Path) -> None:
    scene, _ = sample_pair(MASK_SEED, "eval", sprites=2)
    clip = render(scene)
    rows = [("reference", clip.frames)]
    for number, sprite in enumerate(scene.sprites):
        method = MethodSettings(motion=MotionSettings("attention", ("mask",)))
        mask = clip.masks[number].astype(np.uint8)
        made = transfer_motion(model(), PROMPT, reference=clip.frames, mask=mask, method=method, seed=SEED).video
        assert made is not None
        look = sprite.appearance
        rows.append((f"mask of the {look.colour} {look.texture} {look.shape}: {PROMPT}", made))
    contact_sheet(rows, path, columns=5)


def draw_natural(path: Path, clip: Path) -> None:
    seen = read_video(clip, frames=17, height=64, width=64).frames
    method = MethodSettings(motion=MotionSettings("optical_flow"))
    made = transfer_motion(model(), NATURAL_PROMPT, reference=seen, method=method, seed=SEED)
    motion, guided = made.motion_reference, made.video
    assert motion is not None and guided is not None
    grid = (motion.grid.frames, motion.grid.height, motion.grid.width)
    whole = motion.displacement.float().round().long().numpy()
    plot_transfer(None, whole, grid, guided, path, title=f"{clip.stem}: {NATURAL_PROMPT}")


def draw_attention(path: Path) -> None:
    """Attention of one patch of the first frame, in each frame, with its best and its expected match."""
    attention, grid = attention_of_reference()
    patch = PATCH[1] * grid.width + PATCH[0]
    hard = hard_displacement(attention, grid)[0, :, patch].float()
    soft = soft_displacement(attention, grid, AttentionMotionFlowLoss.temperature)[0, :, patch]
    shares = attention_shares(attention, grid, patch)
    figure = Figure(figsize=(2.4 * grid.frames, 3.3), dpi=100, layout="constrained")
    for frame, axes in enumerate(figure.subplots(1, grid.frames)):
        picture = reference()[pixel_frame(frame, len(reference()), grid.frames)].mean(axis=-1)
        box = (-0.5, grid.width - 0.5, grid.height - 0.5, -0.5)
        axes.imshow(picture, cmap="gray", vmin=-100, vmax=300, extent=box)
        axes.imshow(shares[frame], cmap="magma", vmin=0, alpha=0.55, extent=box)
        axes.plot(*PATCH, "s", color="cyan", markersize=20, fillstyle="none", mew=2)
        axes.plot(PATCH[0] + hard[frame, 0], PATCH[1] + hard[frame, 1], "x", color="white", markersize=12, mew=3)
        axes.plot(PATCH[0] + soft[frame, 0], PATCH[1] + soft[frame, 1], "o", color="lime", markersize=7)
        best, expected = (f"({x:+.{n}f}, {y:+.{n}f})" for n, (x, y) in ((0, hard[frame]), (1, soft[frame])))
        axes.set_title(f"latent frame {frame}\nbest {best}\nexpected {expected}", fontsize=9)
        axes.set_axis_off()
    figure.suptitle(
        "Attention of the patch in the blue square (of latent frame 0) to the patches of every latent frame. "
        "Cross: best match. Dot: expected match.",
        fontsize=10,
    )
    figure.savefig(path)


def attention_of_reference() -> tuple[QueriesKeys, TokenGrid]:
    """Queries and keys of the reference's clean latents in the model's first guidance block."""
    block = model().defaults.blocks[0]
    latents = model().encode_video(reference())
    with torch.no_grad():
        captured = model().capture(latents, CLEAN, model().condition(""), [block])
    return captured[block], model().layout.grid(latents.shape)


def attention_shares(attention: QueriesKeys, grid: TokenGrid, patch: int) -> np.ndarray:
    """Softmax of one patch of the first frame over the patches of each frame, [F, h, w]; see `ditflow.motion.amf`."""
    head_dim = attention.query.shape[1] // attention.heads
    logits = attention.key @ attention.query[patch] / (attention.heads * head_dim**0.5)
    by_frame = logits.view(grid.frames, grid.patches) * AttentionMotionFlowLoss.temperature
    return by_frame.softmax(dim=-1).view(grid.frames, grid.height, grid.width).numpy()


DRAWN: Mapping[str, Callable[[Path], None]] = {
    "transfer": draw_transfer,
    "attention": draw_attention,
    "loss": draw_losses,
    "variables": draw_variables,
    "bank": draw_bank,
    "mask": draw_mask,
}


def shrink(path: Path) -> None:
    """Write a PNG again without the two lowest bits of each colour: half the bytes, and nothing that an eye misses."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    Image.fromarray(pixels // 4 * 4).save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        raise RuntimeError(f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}: draw it smaller")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of README and docs.")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(DRAWN)} (default: all)")
    parser.add_argument("--clip", type=Path, help="draws natural.png, and nothing else")
    asked = parser.parse_args()
    if asked.clip is not None:
        draw_natural(PICTURES / "natural.png", asked.clip)
        shrink(PICTURES / "natural.png")
        return
    names = asked.names or list(DRAWN)
    if unknown := sorted(set(names) - set(DRAWN)):
        parser.error(f"{', '.join(unknown)} is not valid: expected some of {', '.join(DRAWN)}")
    for name in names:
        path = PICTURES / f"{name}.png"
        DRAWN[name](path)
        shrink(path)
        print(path)


if __name__ == "__main__":
    main()
