"""One clip on this machine: what `ditflow transfer` and `ditflow extract` do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ditflow import backbones
from ditflow.backbones.contract import Backbone
from ditflow.banks.bank import MotionBank
from ditflow.media.mask import read_mask
from ditflow.media.plot import plot_flow, plot_losses, plot_transfer
from ditflow.media.video import Clip, read_video, write_video
from ditflow.motion.reference import MotionReference, extract_motion
from ditflow.sampling.denoise import OnStep
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import Transferred, transfer_motion
from ditflow.types import StepRecord
from jobs.table import Screen
from pipeline.cpus import limit_threads, usable_cpus
from pipeline.job import DEFAULT_FPS


@dataclass(frozen=True)
class ReferenceClip:
    """A reference video and the part of it that is used; sizes left out are the model's own."""

    path: str
    frames: int | None
    height: int | None
    width: int | None
    start: int
    stride: int
    mask: Path | None = None

    def read_mask(self, backbone: Backbone) -> np.ndarray | None:
        """Read the mask like the clip; see `ditflow.media.mask`."""
        if self.mask is None:
            return None
        frames, height, width = self.size(backbone)
        return read_mask(
            self.mask.read_bytes(),
            frames=frames,
            height=height,
            width=width,
            start=self.start,
            stride=self.stride,
            name=str(self.mask),
        )

    def read(self, backbone: Backbone, screen: Screen) -> Clip:
        """Decode it at a size that the model can do; SettingsError and VideoError say why not."""
        frames, height, width = self.size(backbone)
        backbone.layout.latent_shape(frames, height, width)
        clip = read_video(self.path, frames=frames, height=height, width=width, start=self.start, stride=self.stride)
        for note in clip.notes:
            screen.print(f"{self.path}: {note}")
        return clip

    def size(self, backbone: Backbone) -> tuple[int, int, int]:
        """Frames, height and width."""
        return _size((self.frames, self.height, self.width), backbone.layout.trained_size)


@dataclass(frozen=True)
class ReusedBank:
    """A motion bank and the size of the new video; what is left out of it is the bank's own."""

    bank: MotionBank
    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def at_size(self, backbone: Backbone) -> MotionBank:
        """Return the bank for the new video's size; see `MotionBank.resized`."""
        size = _size((self.frames, self.height, self.width), self.bank.header.provenance["size"])
        return self.bank.resized(backbone.layout, size)


def _size(asked: Sequence[int | None], own: Sequence[int]) -> tuple[int, int, int]:
    frames, height, width = (one if value is None else value for value, one in zip(asked, own, strict=True))
    return frames, height, width


def transfer(
    reference: ReferenceClip | ReusedBank,
    prompt: str,
    output: Path,
    *,
    model: str,
    method: MethodSettings,
    sampling: SamplingSettings,
    seed: int,
    screen: Screen,
    save_bank: Path | None = None,
    plot: Path | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Transfer motion from a video, or from a bank, to one new video; return a summary."""
    if save_bank is not None and (isinstance(reference, ReusedBank) or not method.learns_positions):
        raise ValueError(
            "--save-bank needs --optimize position or coordinates, and no --bank: nothing else learns positions"
        )
    if plot is not None and (isinstance(reference, ReusedBank) or not method.has_loss):
        raise ValueError(
            "--plot draws the losses, and there are none: with --bank or this --method nothing is optimised"
        )
    if picture is not None and (isinstance(reference, ReusedBank) or method.name != "ditflow"):
        raise ValueError("--picture draws a reference's attention motion flow: it needs --method ditflow and no --bank")
    _check_folders(output, save_bank, plot, picture)
    limit_threads(usable_cpus())
    if isinstance(reference, ReusedBank):
        method, sampling = _as_learned(reference.bank, method, sampling)
    backbone = backbones.load(model)
    for tokens in backbone.text_limit.too_long([prompt]).values():
        screen.print(f"warning: the prompt has {tokens} tokens, of which the model reads {backbone.text_limit.tokens}")
    source, size, fps = _source(reference, backbone, method, screen)
    steps = sampling.resolve(backbone.defaults).steps
    with _showing_steps(screen, method.name, steps) as on_step:
        result = transfer_motion(
            backbone,
            prompt,
            reference=source,
            mask=None if isinstance(reference, ReusedBank) else reference.read_mask(backbone),
            size=size,
            method=method,
            sampling=sampling,
            seed=seed,
            on_step=on_step,
        )
    assert result.video is not None
    write_video(output, result.video, fps)
    if save_bank is not None and result.bank is not None:
        save_bank.write_bytes(result.bank.to_bytes())
    if plot is not None:
        plot_losses(result.losses, plot, title=f"{method.name}, {method.optimize}: {prompt}")
    if picture is not None:
        _draw_transfer(source, result, prompt, picture)
    _say_written(screen, [output, save_bank, plot, picture])
    return {"output": str(output), "losses": result.losses, "seconds": dict(result.seconds)}


def _draw_transfer(source: np.ndarray | MotionBank | None, result: Transferred, prompt: str, picture: Path) -> None:
    motion = result.motion_reference
    assert isinstance(source, np.ndarray) and motion is not None and result.video is not None
    grid = (motion.grid.frames, motion.grid.height, motion.grid.width)
    plot_transfer(source, _whole_patches(motion), grid, result.video, picture, title=prompt)


def extract(
    reference: ReferenceClip,
    output: Path,
    *,
    model: str,
    method: MethodSettings,
    screen: Screen,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Extract a video's attention motion flow; return a summary."""
    _check_folders(output, plot)
    limit_threads(usable_cpus())
    backbone = backbones.load(model)
    clip = reference.read(backbone, screen)
    motion = extract_motion(backbone, clip.frames, method, reference.read_mask(backbone))
    output.write_bytes(motion.to_bytes())
    displacement = motion.displacement.float()
    if plot is not None:
        grid = (motion.grid.frames, motion.grid.height, motion.grid.width)
        title = f"{Path(reference.path).name}: {backbone.name}, block {next(iter(motion.payloads))}"
        plot_flow(clip.frames, _whole_patches(motion), grid, plot, title=title)
    moving = float((displacement != 0).any(dim=-1).float().mean())
    length = float(displacement.norm(dim=-1).mean())
    screen.print(f"{moving:.0%} of the patches of a {motion.grid} grid move, by {length:.2f} patches on average")
    _say_written(screen, [output, plot])
    return {"output": str(output), "grid": str(motion.grid), "moving": moving, "mean_displacement": length}


def _whole_patches(motion: MotionReference) -> np.ndarray:
    """Displacement of the first guidance block, rounded to whole patches for drawing."""
    return np.rint(motion.displacement.float().numpy()).astype(np.int64)


def _as_learned(
    bank: MotionBank, method: MethodSettings, sampling: SamplingSettings
) -> tuple[MethodSettings, SamplingSettings]:
    """Take from the bank what the user left open: it serves only the schedule that it was learned in."""
    steps = sampling.steps or bank.header.steps
    return replace(method, optimize=bank.header.optimize), replace(sampling, steps=steps)


def _source(
    reference: ReferenceClip | ReusedBank, backbone: Backbone, method: MethodSettings, screen: Screen
) -> tuple[np.ndarray | MotionBank | None, tuple[int, int, int], float]:
    """What moves the new video, its size, and its frames per second."""
    if isinstance(reference, ReusedBank):
        bank = reference.at_size(backbone)
        frames, height, width = bank.header.provenance["size"]
        return bank, (frames, height, width), bank.header.provenance.get("fps") or DEFAULT_FPS
    if not method.needs_reference:
        return None, reference.size(backbone), DEFAULT_FPS
    clip = reference.read(backbone, screen)
    return clip.frames, reference.size(backbone), clip.fps


@contextmanager
def _showing_steps(screen: Screen, method: str, steps: int | None) -> Iterator[OnStep]:
    """Show a progress bar over denoising steps, with the loss of the newest guided one."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps {task.fields[loss]}"), TimeRemainingColumn())
    with Progress(TextColumn(method), *columns, console=screen) as progress:
        task = progress.add_task("", total=steps, loss="")

        def on_step(record: StepRecord) -> None:
            progress.advance(task)
            if record.losses:
                progress.update(task, loss=f"loss {record.losses[-1]:.4f}")

        yield on_step


def _check_folders(*files: Path | None) -> None:
    """Raise before the work, not after it, when a result would have nowhere to go."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: the folder {file.parent} does not exist: make it first")


def _say_written(screen: Screen, files: Sequence[Path | None]) -> None:
    screen.print("written: " + ", ".join(str(file) for file in files if file is not None))
