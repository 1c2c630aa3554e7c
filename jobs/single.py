"""One clip on this machine: what `ditflow transfer`, `ditflow extract` and `ditflow mini clips` do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ditflow import backbones
from ditflow.backbones.base import Backbone
from ditflow.bank import MotionBank
from ditflow.plot import plot_flow, plot_losses
from ditflow.reference import extract_motion
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import transfer_motion
from ditflow.types import StepRecord
from ditflow.video import Clip, read_video, write_video
from pipeline.job import DEFAULT_FPS

Asked = tuple[int | None, int | None, int | None]
"""Frames, height and width as far as the user gave them."""


def transfer(
    *,
    reference: str | None,
    prompt: str,
    output: Path,
    method: dict[str, Any],
    bank_path: Path | None,
    save_bank: Path | None,
    plot: Path | None,
    model: str,
    size: Asked,
    frame_range: tuple[int, int],
    steps: int | None,
    seed: int,
    as_json: bool,
    screen: Console,
) -> None:
    """Transfer motion from a video, or from a bank, to one new video."""
    bank = MotionBank.from_bytes(bank_path.read_bytes(), str(bank_path)) if bank_path is not None else None
    settings = MethodSettings(**({**method, "optimize": "position"} if bank is not None else method))
    if save_bank is not None and (settings.optimize != "position" or bank is not None):
        raise ValueError("--save-bank needs --optimize position, and no --bank: nothing else learns positions")
    backbone = backbones.load(model)
    wanted = _bank_size(bank) if bank is not None else _size(backbone, size)
    clip = _read(reference, wanted, frame_range) if reference is not None and bank is None else None
    sampling = SamplingSettings(steps=steps)
    with _step_progress(screen, settings.name) as progress:
        total = sampling.resolve(backbone.defaults).steps
        task = progress.add_task("", total=total, loss="")

        def on_step(record: StepRecord) -> None:
            loss = f"loss {record.losses[-1]:.4f}" if record.losses else ""
            progress.update(task, advance=1, loss=loss)

        result = transfer_motion(
            backbone,
            prompt,
            reference=bank if bank is not None else clip.frames if clip is not None else None,
            size=wanted,
            method=settings,
            sampling=sampling,
            seed=seed,
            on_step=on_step,
        )
    assert result.video is not None
    write_video(output, result.video, clip.fps if clip is not None else DEFAULT_FPS)
    if save_bank is not None and result.bank is not None:
        save_bank.write_bytes(result.bank.to_bytes())
    if plot is not None:
        plot_losses(result.losses, plot, title=f"{settings.name}, {settings.optimize}: {prompt}")
    summary = {"output": str(output), "losses": result.losses, "seconds": dict(result.seconds)}
    _report(summary, [output, save_bank, plot], as_json, screen)


def extract(
    *,
    reference: str,
    output: Path,
    plot: Path | None,
    block: int | None,
    model: str,
    size: Asked,
    frame_range: tuple[int, int],
    as_json: bool,
    screen: Console,
) -> None:
    """Extract a video's attention motion flow."""
    backbone = backbones.load(model)
    clip = _read(reference, _size(backbone, size), frame_range)
    method = MethodSettings(blocks=None if block is None else (block,))
    motion = extract_motion(backbone, clip.frames, method)
    output.write_bytes(motion.to_bytes())
    displacement = motion.displacement
    if plot is not None:
        grid = (motion.grid.frames, motion.grid.height, motion.grid.width)
        title = f"{Path(reference).name}: {backbone.name}, block {next(iter(motion.payloads))}"
        plot_flow(clip.frames, displacement.numpy(), grid, plot, title=title)
    moving = float((displacement != 0).any(dim=-1).float().mean())
    length = float(displacement.float().norm(dim=-1).mean())
    summary = {"output": str(output), "grid": str(motion.grid), "moving": moving, "mean_displacement": length}
    screen.print(f"{moving:.0%} of the patches of a {motion.grid} grid move, by {length:.2f} patches on average")
    _report(summary, [output, plot], as_json, screen)


def render_clips(folder: Path, count: int, seed: int) -> None:
    """Render clips of the synthetic world's evaluation split as mp4, each with its prompt beside it."""
    from ditflow.mini.build import FRAMES, HEIGHT, WIDTH
    from ditflow.mini.world import render, sample_scene

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(seed, seed + count):
        file = folder / f"clip-{number:04d}.mp4"
        if not file.exists():
            clip = render(sample_scene(number, "eval"), FRAMES, HEIGHT, WIDTH)
            file.with_suffix(".txt").write_text(clip.prompt + "\n")
            write_video(file, clip.frames, DEFAULT_FPS)


def _size(backbone: Backbone, asked: Asked) -> tuple[int, int, int]:
    """What the user asked for, and the model's own size for the rest; SettingsError if the model cannot do it."""
    frames, height, width = (
        value if value is not None else own for value, own in zip(asked, backbone.geometry.sample_size, strict=True)
    )
    backbone.latent_shape(frames, height, width)
    return frames, height, width


def _bank_size(bank: MotionBank) -> tuple[int, int, int]:
    frames, height, width = bank.header.provenance["size"]
    return frames, height, width


def _read(reference: str, size: tuple[int, int, int], frame_range: tuple[int, int]) -> Clip:
    frames, height, width = size
    start, stride = frame_range
    return read_video(reference, frames=frames, height=height, width=width, start=start, stride=stride)


def _step_progress(screen: Console, method: str) -> Progress:
    return Progress(
        TextColumn(f"{method} {{task.description}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=screen,
    )


def _report(summary: dict[str, Any], files: list[Path | None], as_json: bool, screen: Console) -> None:
    if as_json:
        print(json.dumps(summary))
    screen.print("written: " + ", ".join(str(file) for file in files if file is not None))
