"""Reference videos of the synthetic world: what `ditflow mini clips` does."""

from __future__ import annotations

from pathlib import Path


def render_clips(folder: Path, count: int, seed: int) -> None:
    """Render clips of the world's evaluation split as mp4, each with its prompt beside it; keep what is there."""
    missing = {n: folder / f"clip-{n:04d}.mp4" for n in range(seed, seed + count)}
    missing = {number: file for number, file in missing.items() if not file.exists()}
    if missing:
        # Slow to import, and a second quickstart has nothing to render.
        from ditflow.mini.world import render, sample_scene
        from ditflow.video import write_video

        folder.mkdir(parents=True, exist_ok=True)
        for number, file in missing.items():
            clip = render(sample_scene(number, "eval"))
            file.with_suffix(".txt").write_text(clip.prompt + "\n")
            write_video(file, clip.frames, fps=8.0)
