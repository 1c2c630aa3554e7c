"""Reference videos of the synthetic world: what `ditflow mini clips` and `ditflow mini pairs` do."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

OTHER_LOOKS = 50_000
"""What is learnt for zero-shot reuse wears the looks of this many seeds further on."""


def render_clips(folder: Path, count: int, seed: int) -> None:
    """Render clips of the world's evaluation split as mp4, each with its prompt beside it; keep what is there."""
    _render({folder / f"clip-{number:04d}.mp4": (number, None) for number in range(seed, seed + count)}.items())


def render_pairs(folder: Path, count: int, seed: int) -> None:
    """Render clips of one sprite, and write `pairs.csv`, a table for `pairing` with a prompt for each of them.

    Prompts are of three classes in turn: `caption` tells the clip itself, `subject` another sprite on the same ground,
    `scene` another sprite on another ground. Zero-shot methods learn with the words of yet another scene.
    """
    from ditflow.mini.world import prompt_of, sample_pair

    files = {number: folder / f"pair-{number:04d}.mp4" for number in range(seed, seed + count)}
    _render((file, (number, 1)) for number, file in files.items())
    with (folder / "pairs.csv").open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["reference", "prompt", "category", "learn_with"])
        for number, file in files.items():
            reference, scene = sample_pair(number, "eval", sprites=1)
            _, subject = sample_pair(number, "eval", sprites=1, same_ground=True)
            _, other = sample_pair(number + OTHER_LOOKS, "eval", sprites=1)
            classes = (("caption", reference), ("subject", subject), ("scene", scene))
            category, asked = classes[number % len(classes)]
            table.writerow([file.name, prompt_of(asked), category, prompt_of(other)])


def _render(files: Iterable[tuple[Path, tuple[int, int | None]]]) -> None:
    """Render each file that is not there; each comes with its seed and its number of sprites."""
    missing = [(file, *what) for file, what in files if not file.exists()]
    if missing:
        # Slow to import, and a second quickstart has nothing to render.
        from ditflow.mini.world import render, sample_scene
        from ditflow.video import write_video

        for file, seed, sprites in missing:
            file.parent.mkdir(parents=True, exist_ok=True)
            clip = render(sample_scene(seed, "eval", sprites=sprites))
            file.with_suffix(".txt").write_text(clip.prompt + "\n")
            write_video(file, clip.frames, fps=8.0)
