"""Reference videos: of the synthetic world (`ditflow mini clips`, `ditflow mini pairs`), and of folders of frames."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

OTHER_LOOKS = 50_000
"""What is learnt for zero-shot reuse wears the looks of this many seeds further on."""
PICTURES = (".jpg", ".jpeg", ".png")
"""Endings of the names of pictures."""
REFERENCE_CRF = 4
"""x264's quality for clips that are made of frames: files as large as JPEG frames, so that little is lost twice."""


def render_clips(folder: Path, count: int, seed: int, sprites: int | None = None) -> None:
    """Render clips of the world's evaluation split as mp4, each with its prompt beside it; keep what is there.

    sprites: in every clip (None: one or two, as the seed says).
    """
    _render({folder / f"clip-{number:04d}.mp4": (number, sprites) for number in range(seed, seed + count)}.items())


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
        from ditflow.media.video import write_video
        from ditflow.mini.world import render, sample_scene

        for file, seed, sprites in missing:
            file.parent.mkdir(parents=True, exist_ok=True)
            clip = render(sample_scene(seed, "eval", sprites=sprites))
            file.with_suffix(".txt").write_text(clip.prompt + "\n")
            write_video(file, clip.frames, fps=8.0)


# ------------------------------------------------------------------------------------------------ folders of frames


class FramesError(ValueError):
    """A folder of frames makes no clip."""


def encode_frame_folders(frames_folder: Path, out_folder: Path, fps: float) -> Iterator[Path]:
    """Encode each folder of pictures in `frames_folder` as `NAME.mp4` in `out_folder`; yield every file that is new.

    Pictures come in the order of their names, in which numbers count as numbers. A clip that is there is kept, and its
    folder not read. Folders are read one by one, all pictures of one at once. Raises FramesError for a folder without
    pictures, before anything is encoded, and for pictures that are unreadable, of several sizes or of odd sides.
    """
    clips = {out_folder / f"{folder.name}.mp4": folder for folder in _folders_in(frames_folder)}
    missing = {clip: _pictures_in(folder) for clip, folder in clips.items() if not clip.exists()}
    for clip, files in missing.items():
        _encode(files, clip, fps)
        yield clip


def _encode(files: Sequence[Path], clip: Path, fps: float) -> None:
    # Slow to import, and when all clips are there, nothing is to be encoded.
    from ditflow.media.video import VideoError, write_video

    clip.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_video(clip, np.stack(list(_alike(files))), fps, crf=REFERENCE_CRF)
    except VideoError as error:
        raise FramesError(f"{files[0].parent}: {error}") from error


def _folders_in(frames_folder: Path) -> list[Path]:
    folders = sorted(entry for entry in frames_folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if folders:
        return folders
    hint = "Check its spelling."
    if _named_as_pictures(frames_folder):
        hint = f"It holds pictures itself: if it is one of the clips, give the folder around it: {frames_folder.parent}"
    raise FramesError(f"{frames_folder}: it holds no folders: expected a folder of pictures for each clip. {hint}")


def _pictures_in(folder: Path) -> list[Path]:
    """Return a folder's pictures in the order of their names: frame_2 before frame_10."""
    files = sorted(_named_as_pictures(folder), key=lambda file: ([*_numbered(file.stem)], file.name))
    if not files:
        hint = "Most likely it was not unpacked to the end: unpack it again, or take it away."
        if any(entry.is_dir() for entry in folder.iterdir()):
            hint = "It holds folders itself: if these are the clips, it is the folder to give."
        raise FramesError(f"{folder}: it holds no pictures: expected {', '.join(PICTURES)}. {hint}")
    for file, following in pairwise(files):
        if file.stem == following.stem:
            raise FramesError(
                f"{folder}: {file.name} and {following.name} have one name: expected one picture for each frame. "
                "Most likely masks lie beside the pictures: keep them in a folder of their own."
            )
    return files


def _named_as_pictures(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")]


def _numbered(name: str) -> Iterator[str | int]:
    for number, part in enumerate(re.split(r"(\d+)", name)):
        yield int(part) if number % 2 else part


def _alike(files: Sequence[Path]) -> Iterator[np.ndarray]:
    """Read pictures as uint8 RGB [H, W, 3], all of the first one's size."""
    size = None
    for file in files:
        picture = _read_picture(file)
        size = size or picture.shape
        if picture.shape != size:
            raise FramesError(
                f"{file}: it has {picture.shape[1]}x{picture.shape[0]} pixels, and {files[0].name} has "
                f"{size[1]}x{size[0]}: expected one size in a folder. Most likely two clips lie in it: give each a "
                "folder, or bring all pictures to one size."
            )
        yield picture


def _read_picture(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise FramesError(f"{file}: it has {image.mode} pixels: expected 8 bits a channel. Convert it.")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise FramesError(
            f"{file}: it cannot be read as a picture ({error}). Most likely it was cut off on its way: fetch it again."
        ) from error
