"""Facts about the command line, on real files with the embedded models. Nothing here starts Ray."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
import typer
import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from ditflow import backbones
from ditflow.banks.bank import MotionBank
from ditflow.media.video import probe_video, read_video, write_video
from ditflow.motion.reference import MotionReference
from jobs import cli
from jobs.cli import app
from jobs.doctor import examine
from pipeline.lease import Lease, LeaseHeldError
from pipeline.manifest import Manifest
from pipeline.plan import make_plan
from pipeline.record import COLUMN_NAMES, make_row
from pipeline.store import Store

FRAMES, HEIGHT, WIDTH = 9, 32, 48
SIZE = ("--frames", FRAMES, "--height", HEIGHT, "--width", WIDTH)
FEW_STEPS = ("--steps", 3, "--guided-steps", 2)
PROMPT = "a red ball moving over grass"
MODELS = ("mini", "mini-additive")


def ditflow(*arguments: object, status: int = 0) -> Result:
    """Run the command line in this process; any error that is no exit status is a traceback for the user."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.stderr
    return result


def json_of(result: Result) -> dict:
    """The one JSON object that is all of stdout."""
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def lines_of(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def errors_of(result: Result) -> list[str]:
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    """Any connection to Ray is a failure, also where another module's cluster is still up."""

    def refuse(*_, **__):
        raise AssertionError("this command started Ray")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture(scope="module", autouse=True)
def _cached_models_on_one_thread(tmp_path_factory):
    """Models are built once, and run on one thread: they are too small for more, which only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITFLOW_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    ditflow("mini", "clips", folder, "--count", 2)
    return sorted(folder.glob("*.mp4"))


@pytest.fixture(scope="module", params=MODELS)
def made(request, clips, tmp_path_factory) -> SimpleNamespace:
    """One video by position optimisation, with its bank and loss curve, on each of the models."""
    folder = tmp_path_factory.mktemp(request.param)
    names = {"video": "out.mp4", "bank": "bank.safetensors", "plot": "loss.png", "picture": "transfer.png"}
    files = {what: folder / name for what, name in names.items()}
    drawn = ("--plot", files["plot"], "--picture", files["picture"])
    options = ("--optimize", "position", "--save-bank", files["bank"], *drawn, "--seed", 4)
    result = ditflow(
        "transfer", clips[0], PROMPT, "-o", files["video"], "--model", request.param, *SIZE, *FEW_STEPS, *options
    )
    return SimpleNamespace(model=request.param, result=result, **files)


# ---------------------------------------------------------------------------------------------------- mini clips


def test_the_rendered_clips_are_videos_of_the_models_size_with_a_prompt_beside_each(clips):
    size = backbones.identify("mini").layout.trained_size
    assert [(info.frames, info.height, info.width) for info in map(probe_video, clips)] == [size, size]
    assert all(clip.with_suffix(".txt").read_text().strip() for clip in clips)
    assert clips[0].read_bytes() != clips[1].read_bytes()


def test_a_clip_that_is_there_is_kept(clips):
    before = [clip.stat().st_mtime_ns for clip in clips]
    ditflow("mini", "clips", clips[0].parent, "--count", 2)
    assert [clip.stat().st_mtime_ns for clip in clips] == before


def test_clips_have_as_many_sprites_as_asked_for(tmp_path):
    for sprites in (1, 2):
        ditflow("mini", "clips", tmp_path / str(sprites), "--count", 3, "--sprites", sprites)
        prompts = [file.read_text() for file in (tmp_path / str(sprites)).glob("*.txt")]
        assert [prompt.count(" and ") for prompt in prompts] == [sprites - 1] * 3


def test_rendered_pairs_come_with_a_table_of_prompts_in_three_classes(tmp_path):
    ditflow("mini", "pairs", tmp_path, "--count", 3, "--seed", 3)
    with (tmp_path / "pairs.csv").open(newline="") as stream:
        caption, subject, scene = csv.DictReader(stream)
    assert [row["category"] for row in (caption, subject, scene)] == ["caption", "subject", "scene"]
    own = {
        row["reference"]: (tmp_path / row["reference"]).with_suffix(".txt").read_text().strip()
        for row in (caption, subject, scene)
    }
    grounds = [
        (row["prompt"].split(" over ")[1], own[row["reference"]].split(" over ")[1])
        for row in (caption, subject, scene)
    ]
    assert caption["prompt"] == own[caption["reference"]]
    assert subject["prompt"] != own[subject["reference"]]
    assert [one == other for one, other in grounds] == [True, True, False]
    assert len({row[column] for row in (caption, subject, scene) for column in ("prompt", "learn_with")}) == 6


# ----------------------------------------------------------------------------------------------- frames to clips


def picture(level: int, size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Image.Image:
    """A picture of one grey, which tells which frame it is."""
    return Image.new(mode, size, (level,) * 3 if mode == "RGB" else level)


@pytest.fixture
def frames(tmp_path) -> Path:
    """Two folders of three frames each, `one` as JPEG and `two` as PNG, and what is no folder of frames."""
    folder = tmp_path / "frames"
    for name, ending in (("one", ".jpg"), ("two", ".png")):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            picture(60 * number).save(folder / name / f"{number:05d}{ending}")
    (folder / "README.txt").write_text("two clips")
    (folder / ".cache").mkdir()
    return folder


def levels(clip: Path) -> list[int]:
    """The grey level of every frame of a clip, rounded to those of `frames`."""
    info = probe_video(clip)
    read = read_video(clip, frames=info.frames, height=info.height, width=info.width).frames
    return [round(float(frame.mean()) / 60) * 60 for frame in read]


def test_every_folder_of_frames_becomes_a_clip_of_its_name(frames, tmp_path):
    out = tmp_path / "new" / "clips"
    result = ditflow("frames-to-clips", frames, out, "--fps", 12)
    assert sorted(clip.name for clip in out.iterdir()) == ["one.mp4", "two.mp4"]
    for clip in out.iterdir():
        info = probe_video(clip)
        assert (info.frames, info.height, info.width, info.fps) == (3, 32, 48, 12)
        assert levels(clip) == [0, 60, 120]
        assert str(clip) in result.stderr
    assert result.stdout == ""


def test_frames_come_in_the_order_of_the_numbers_in_their_names(frames, tmp_path):
    for number, name in enumerate(("f1", "f2", "f10", "f0011")):
        picture(60 * number).save(frames / "one" / f"{name}.JPEG")
    for number in range(3):
        (frames / "one" / f"{number:05d}.jpg").unlink()
    (frames / "one" / "._f1.jpg").write_bytes(b"what some systems leave beside a file")
    (frames / "one" / "f3.txt").write_text("no picture")
    ditflow("frames-to-clips", frames, tmp_path / "clips")
    assert levels(tmp_path / "clips" / "one.mp4") == [0, 60, 120, 180]


def test_a_clip_of_frames_loses_less_than_half_of_what_other_videos_lose(tmp_path):
    """As it is read for its motion, and what JPEG has lost is lost already; on noise, the hardest there is."""
    grey = np.random.default_rng(0).integers(64, 192, (4, 64, 96, 1), np.uint8)
    shown = grey.repeat(3, -1)
    (tmp_path / "frames" / "a").mkdir(parents=True)
    for number, frame in enumerate(shown):
        Image.fromarray(frame).save(tmp_path / "frames" / "a" / f"{number}.png")
    ditflow("frames-to-clips", tmp_path / "frames", tmp_path)
    write_video(tmp_path / "b.mp4", shown, 24)

    def lost(clip: Path) -> float:
        read = read_video(clip, frames=4, height=64, width=96).frames
        return float(np.square(read.astype(float) - shown).mean())

    assert 2 * lost(tmp_path / "a.mp4") < lost(tmp_path / "b.mp4")


def test_clips_that_are_there_are_kept_and_their_frames_not_needed(frames, tmp_path):
    (tmp_path / "one.mp4").write_bytes(b"kept")
    for file in (frames / "one").iterdir():
        file.unlink()
    result = ditflow("frames-to-clips", frames, tmp_path)
    assert (tmp_path / "one.mp4").read_bytes() == b"kept"
    assert result.stderr.splitlines() == [str(tmp_path / "two.mp4")]


def test_pictures_are_shown_upright_and_without_alpha(frames, tmp_path):
    turned = picture(0, (32, 48))
    turned.paste((255, 255, 255), (0, 0, 32, 24))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    for number in range(3):
        turned.save(frames / "one" / f"{number:05d}.jpg", exif=exif)
        picture(60 * number).convert("RGBA").save(frames / "two" / f"{number:05d}.png")
    ditflow("frames-to-clips", frames, tmp_path)
    shown = read_video(tmp_path / "one.mp4", frames=1, height=32, width=48).frames[0]
    assert (shown[:, :20].mean() < 20, shown[:, 28:].mean() > 235) == (True, True)
    assert levels(tmp_path / "two.mp4") == [0, 60, 120]


def remove_pictures(one: Path) -> None:
    for file in one.iterdir():
        file.unlink()


def wrap_in_a_folder(one: Path) -> None:
    (one / "480p").mkdir()
    for file in one.glob("*.jpg"):
        file.rename(one / "480p" / file.name)


def cut_off(one: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(noise).save(one / "00001.jpg")
    (one / "00001.jpg").write_bytes((one / "00001.jpg").read_bytes()[:1000])


def make_all_odd(one: Path) -> None:
    for file in one.iterdir():
        picture(0, (47, 32)).save(file)


BAD_FRAMES = {
    # what is wrong: (how the folder `one` comes to it, what is named beside the folder, what is said)
    "no pictures": (remove_pictures, "", "it holds no pictures: expected .jpg, .jpeg, .png"),
    "folders instead": (wrap_in_a_folder, "", "It holds folders itself"),
    "text": (lambda one: (one / "00001.jpg").write_text("<html>"), "/00001.jpg", "cannot be read as a picture"),
    "a cut-off file": (cut_off, "/00001.jpg", "cannot be read as a picture"),
    "a broken png": (
        lambda one: (one / "00003.png").write_bytes(b"\x89PNG\r\n\x1a\n" * 9),
        "/00003.png",
        "cannot be read as a picture",
    ),
    "two sizes": (
        lambda one: picture(0, (50, 32)).save(one / "00002.jpg"),
        "/00002.jpg",
        "it has 50x32 pixels, and 00000.jpg has 48x32: expected one size",
    ),
    "odd sizes": (make_all_odd, "", "47x32, and H.264 with 4:2:0 colour needs an even width"),
    "masks between": (lambda one: picture(0).save(one / "00001.png"), "", "00001.jpg and 00001.png have one name"),
    "16 bits": (lambda one: picture(0, mode="I;16").save(one / "00003.png"), "/00003.png", "expected 8 bits a channel"),
}


@pytest.mark.parametrize(("spoil", "named", "said"), BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_frames_that_make_no_clip_are_one_clear_line_and_status_2(frames, tmp_path, spoil, named, said):
    spoil(frames / "one")
    (error,) = errors_of(ditflow("frames-to-clips", frames, tmp_path / "clips", status=2))
    assert error.startswith(f"error: {frames / 'one'}{named}: ")
    assert said in error
    assert not (tmp_path / "clips" / "one.mp4").exists()


def test_an_empty_folder_of_frames_is_said_before_any_clip_is_made(frames, tmp_path):
    remove_pictures(frames / "two")
    (error,) = errors_of(ditflow("frames-to-clips", frames, tmp_path / "clips", status=2))
    assert str(frames / "two") in error
    assert not (tmp_path / "clips").exists()


def test_the_folder_of_one_clip_is_answered_with_the_folder_around_it(frames, tmp_path):
    (error,) = errors_of(ditflow("frames-to-clips", frames / "one", tmp_path / "clips", status=2))
    assert error.endswith(f"give the folder around it: {frames}")


@pytest.mark.parametrize("name", ["none", "README.txt"])
def test_a_folder_of_frames_that_is_none_is_one_clear_line(frames, tmp_path, name):
    (error,) = errors_of(ditflow("frames-to-clips", frames / name, tmp_path / "clips", status=2))
    assert str(frames / name) in error


def test_frames_without_a_rate_are_refused(frames, tmp_path):
    (error,) = errors_of(ditflow("frames-to-clips", frames, tmp_path / "clips", "--fps", 0, status=2))
    assert "fps is 0" in error


# ------------------------------------------------------------------------------------------------------- extract


@pytest.mark.parametrize("model", MODELS)
def test_extract_writes_the_motion_of_a_clip_and_says_what_it_found(clips, tmp_path, model):
    file = tmp_path / "amf.safetensors"
    summary = json_of(ditflow("extract", clips[0], "-o", file, "--model", model, *SIZE, "--json"))
    motion = MotionReference.from_bytes(file.read_bytes())
    assert (motion.loss, str(motion.grid)) == ("ditflow", summary["grid"])
    assert motion.model_revision == backbones.identify(model).revision
    assert summary["output"] == str(file)
    assert summary["moving"] == pytest.approx((motion.displacement != 0).any(-1).float().mean().item())


def test_extract_draws_the_motion_into_a_png(clips, tmp_path):
    pytest.importorskip("ditflow.media.plot")
    result = ditflow("extract", clips[0], "-o", tmp_path / "a", "--plot", tmp_path / "amf.png", *SIZE)
    assert (tmp_path / "amf.png").read_bytes().startswith(b"\x89PNG")
    assert "amf.png" in result.stderr
    assert result.stdout == ""


def test_extract_takes_the_block_that_is_asked_for(clips, tmp_path):
    ditflow("extract", clips[0], "-o", tmp_path / "amf", "--block", 0, *SIZE)
    assert list(MotionReference.from_bytes((tmp_path / "amf").read_bytes()).payloads) == [0]


# ------------------------------------------------------------------------------------------------------ transfer


@pytest.mark.parametrize("model", MODELS)
def test_transfer_makes_a_video_of_the_asked_size_and_tells_the_losses(clips, tmp_path, model):
    output = tmp_path / "out.mp4"
    result = ditflow("transfer", clips[0], PROMPT, "-o", output, "--model", model, *SIZE, *FEW_STEPS, "--json")
    summary, info = json_of(result), probe_video(output)
    assert (info.frames, info.height, info.width) == (FRAMES, HEIGHT, WIDTH)
    assert info.fps == pytest.approx(probe_video(clips[0]).fps)
    assert summary["output"] == str(output)
    assert [len(losses) for losses in summary["losses"]] == [5, 5]
    assert all(losses[-1] < losses[0] for losses in summary["losses"])
    assert {"extract", "guidance", "denoise", "decode"} <= summary["seconds"].keys()


def test_transfer_by_position_makes_a_video_a_bank_and_two_pictures(made):
    info = probe_video(made.video)
    assert (info.frames, info.height, info.width) == (FRAMES, HEIGHT, WIDTH)
    header = MotionBank.read_header(made.bank.read_bytes())
    assert (header.model, header.prompt, header.steps, len(header.timesteps)) == (made.model, PROMPT, 3, 2)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in (made.plot, made.picture))
    assert made.result.stdout == ""
    assert all(str(file) in made.result.stderr for file in (made.video, made.bank, made.plot, made.picture))


def test_a_saved_bank_moves_another_prompt_without_a_reference_and_without_losses(made, tmp_path):
    output = tmp_path / "reused.mp4"
    options = ("--bank", made.bank, "--model", made.model, *FEW_STEPS, "--json")
    summary = json_of(ditflow("transfer", *options, "a blue square", "-o", output))
    info = probe_video(output)
    assert (info.frames, info.height, info.width) == (FRAMES, HEIGHT, WIDTH)
    assert summary["losses"] == []


def test_a_saved_bank_repeats_the_video_that_it_was_learned_with(made, tmp_path):
    output = tmp_path / "again.mp4"
    ditflow("transfer", "--bank", made.bank, "--model", made.model, *FEW_STEPS, "--seed", 4, PROMPT, "-o", output)
    assert output.read_bytes() == made.video.read_bytes()


def test_a_bank_brings_its_own_number_of_steps(made, tmp_path):
    ditflow("transfer", "--bank", made.bank, "--model", made.model, PROMPT, "-o", tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").exists()


def test_a_bank_of_coordinates_moves_a_video_of_another_size(clips, tmp_path):
    bank, output = tmp_path / "bank.safetensors", tmp_path / "wide.mp4"
    options = ("--optimize", "coordinates", "--save-bank", bank, *SIZE, *FEW_STEPS)
    ditflow("transfer", clips[0], PROMPT, "-o", tmp_path / "out.mp4", *options)
    ditflow("transfer", "--bank", bank, *FEW_STEPS, "--width", 2 * WIDTH, PROMPT, "-o", output)
    info = probe_video(output)
    assert (info.frames, info.height, info.width) == (FRAMES, HEIGHT, 2 * WIDTH)


def test_a_bank_of_free_positions_is_refused_for_another_size(made, tmp_path):
    options = ("--bank", made.bank, "--model", made.model, *FEW_STEPS, "--width", 2 * WIDTH)
    (said,) = errors_of(ditflow("transfer", *options, PROMPT, "-o", tmp_path / "out.mp4", status=2))
    assert "cannot be resized" in said
    assert "optimize: coordinates" in said


def test_a_bank_of_another_model_is_refused(made, tmp_path):
    other = next(model for model in MODELS if model != made.model)
    options = ("--bank", made.bank, "--model", other, *FEW_STEPS)
    (said,) = errors_of(ditflow("transfer", *options, PROMPT, "-o", tmp_path / "out.mp4", status=2))
    assert "model revision" in said
    assert not (tmp_path / "out.mp4").exists()


def test_plain_generation_needs_no_losses_and_gives_the_same_bytes_for_the_same_seed(clips, tmp_path):
    def generated(name: str, seed: int) -> bytes:
        options = ("--method", "none", "--steps", 1, "--seed", seed, *SIZE)
        ditflow("transfer", clips[0], PROMPT, "-o", tmp_path / name, *options)
        return (tmp_path / name).read_bytes()

    assert generated("one.mp4", 1) == generated("again.mp4", 1)
    assert generated("two.mp4", 2) != generated("one.mp4", 1)


def test_start_and_stride_choose_the_frames_of_the_reference(clips, tmp_path):
    method = ("--method", "injection", "--steps", 1, "--guided-steps", 1)
    ranges = ("--start", 1, "--stride", 2, "--frames", 5, "--height", HEIGHT, "--width", WIDTH)
    ditflow("transfer", clips[0], PROMPT, "-o", tmp_path / "out.mp4", *method, *ranges)
    chosen = read_video(clips[0], frames=5, height=HEIGHT, width=WIDTH, start=1, stride=2)
    assert probe_video(tmp_path / "out.mp4").fps == pytest.approx(chosen.fps)


def test_a_name_with_brackets_is_written_and_shown_as_it_is(clips, tmp_path):
    output = tmp_path / "take[a].safetensors"
    result = ditflow("extract", clips[0], "-o", output, *SIZE)
    assert output.exists()
    assert str(output) in result.stderr


# ------------------------------------------------------------------------------------- errors with a single clip


@pytest.fixture
def bad(clips, tmp_path) -> dict[str, Path]:
    """Files that are no usable reference, by what is wrong with them."""
    files = {name: tmp_path / f"{name}.mp4" for name in ("missing", "text", "empty", "cut", "folder")}
    files["text"].write_text("<html>404 not found</html>\n" * 5)
    files["empty"].touch()
    files["cut"].write_bytes(clips[0].read_bytes()[:2000])
    files["folder"].mkdir()
    return files


@pytest.mark.parametrize("command", ["transfer", "extract"])
@pytest.mark.parametrize("name", ["missing", "text", "empty", "cut", "folder"])
def test_a_file_that_is_no_video_is_one_clear_line_and_status_2(bad, tmp_path, command, name):
    prompt = [PROMPT] if command == "transfer" else []
    result = ditflow(command, bad[name], *prompt, "-o", tmp_path / "out", *SIZE, status=2)
    (said,) = errors_of(result)
    assert str(bad[name]) in said
    assert not (tmp_path / "out").exists()


WRONG = {
    # what is wrong: (options, what is said)
    "a clip that is too short": (("--frames", 33), "33 frames .* it has only 17"),
    "a height that does not divide": (("--height", 60), "height: 60 is not valid: expected a multiple of 8"),
    "a width below a patch": (("--width", 4), "width: 4 is not valid"),
    "frames that the model cannot do": (("--frames", 10), "frames: 10 is not valid: expected 4k . 1 frames"),
    "a start behind the end": (("--start", 100), "it has only 17"),
    "no frames": (("--frames", 0), "frames"),
    "no width": (("--width", 0), "width"),
    "a stride of nothing": (("--stride", 0), "stride is 0, expected 1 or more"),
    "an unknown model": (("--model", "no/such"), "one of mini"),
}
WRONG_TRANSFER = {
    **WRONG,
    "an unknown method": (("--method", "ditflo"), "'ditflo' is not valid: expected one of none, injection, ditflow"),
    "more guided steps than steps": (("--steps", 3, "--guided-steps", 4), "guided_steps: 4 .* between 1 and"),
    "no steps": (("--steps", 0), "steps: 0 is not valid"),
    "a bank without learning": (("--save-bank", "b"), "--save-bank needs --optimize position"),
}
WRONG_EXTRACT = {**WRONG, "a block that is not there": (("--block", 99), "blocks: 99 is not valid: expected 0 to")}


@pytest.mark.parametrize(("options", "said"), WRONG_TRANSFER.values(), ids=WRONG_TRANSFER)
def test_a_wrong_transfer_is_one_clear_line_and_status_2(clips, tmp_path, options, said):
    small = () if options[0] in SIZE else SIZE
    (error,) = errors_of(ditflow("transfer", clips[0], PROMPT, "-o", tmp_path / "out.mp4", *small, *options, status=2))
    assert re.search(said, error)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(("options", "said"), WRONG_EXTRACT.values(), ids=WRONG_EXTRACT)
def test_a_wrong_extraction_is_one_clear_line_and_status_2(clips, tmp_path, options, said):
    small = () if options[0] in SIZE else SIZE
    (error,) = errors_of(ditflow("extract", clips[0], "-o", tmp_path / "amf", *small, *options, status=2))
    assert re.search(said, error)
    assert not (tmp_path / "amf").exists()


def test_a_transfer_without_a_prompt_is_told_so(clips):
    (said,) = errors_of(ditflow("transfer", clips[0], status=2))
    assert "PROMPT is missing" in said


@pytest.mark.parametrize("name", ["missing", "text", "empty"])
def test_a_file_that_is_no_bank_is_one_clear_line_and_status_2(bad, name):
    (said,) = errors_of(ditflow("transfer", "--bank", bad[name], PROMPT, status=2))
    assert str(bad[name]) in said


def test_a_motion_is_no_bank(clips, tmp_path):
    ditflow("extract", clips[0], "-o", tmp_path / "amf", *SIZE)
    (said,) = errors_of(ditflow("transfer", "--bank", tmp_path / "amf", PROMPT, status=2))
    assert "is not a motion bank: it is a motion reference" in said


@pytest.mark.parametrize("option", ["-o", "--plot", "--picture", "--save-bank"])
def test_a_file_that_cannot_be_written_is_said_before_the_work_begins(clips, tmp_path, option):
    files = {"-o": tmp_path / "out.mp4", option: tmp_path / "none" / "file"}
    options = [part for pair in files.items() for part in pair]
    result = ditflow("transfer", clips[0], PROMPT, "--optimize", "position", *SIZE, *FEW_STEPS, *options, status=2)
    (said,) = errors_of(result)
    assert str(tmp_path / "none") in said
    assert "3/3 steps" not in result.stderr


def test_an_extraction_that_cannot_be_written_is_one_clear_line_and_status_2(clips, tmp_path):
    (said,) = errors_of(ditflow("extract", clips[0], "-o", tmp_path / "none" / "amf", *SIZE, status=2))
    assert str(tmp_path / "none") in said


# ---------------------------------------------------------------------------------------------------------- plan


@pytest.fixture
def spec(clips, tmp_path) -> Path:
    """A job of two references, two prompts and one seed."""
    values = {
        "kind": "synthesize",
        "name": "small [a]",
        "model": {"path": "mini"},
        "references": {"uri": str(clips[0].parent), "frames": FRAMES, "height": HEIGHT, "width": WIDTH},
        "prompts": [PROMPT, "a blue square"],
        "seeds": [1],
        "output": {"uri": str(tmp_path / "out")},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def test_plan_prints_the_counts_for_people_and_starts_nothing(spec, tmp_path):
    result = ditflow("plan", spec)
    assert result.stdout == ""
    assert "small [a]: 4 rows of kind synthesize: 4 todo" in result.stderr
    assert str(tmp_path / "out") in result.stderr
    assert backbones.identify("mini").revision in result.stderr
    assert Store(str(tmp_path / "out")).list() == ["inputs.json"]


def test_plan_prints_the_counts_for_machines(spec, tmp_path):
    expected = {"name": "small [a]", "kind": "synthesize", "rows": 4, "todo": 4, "prompts_cut": 0}
    assert json_of(ditflow("plan", spec, "--json")) == expected
    commit(tmp_path / "out", row_ids(spec)[:2], status="failed")
    assert json_of(ditflow("plan", spec, "--json")) == {**expected, "todo": 2, "failed": 2}


def test_plan_takes_overrides(spec):
    overrides = ("--set", "seeds=[1,2,3]", "--set", "name=bigger")
    planned = json_of(ditflow("plan", spec, *overrides, "--json"))
    assert (planned["rows"], planned["name"]) == (12, "bigger")


SPEC_MISTAKES = {
    "misspelt key": ("method.iteration=5", "method.iteration: .*did you mean iterations"),
    "negative learning rate": ("method.learning_rate=[-1,1]", "method.learning_rate: .*two positive rates"),
    "guided steps beyond the steps": ("method.guided_steps=999", "method.guided_steps: .*between 1 and"),
    "height that does not divide": ("references.height=60", "references.height: .*multiple of 8"),
    "unknown method": ("method.name=ditflo", "method.name: .*none, injection, ditflow"),
    "output below a file": ("output.uri={spec}/out", "output.uri: .*cannot be written to"),
    "output on a protocol without atomic writes": ("output.uri=memory://out", "output.uri: .*s3://"),
    "unknown kind": ("kind=dream", "kind: .*'synthesize'"),
    "unknown model": ("model.path=no/such", "model.path: .*mini"),
    "wrong type": ("sampling.steps=many", "sampling.steps: .*integer"),
    "no such reference": ("references.uri={spec}/none", "none"),
    "no references": ("references.uri=[]", "references.uri: nothing is given"),
    "no prompts": ("prompts=[]", "prompts: there is none"),
    "zip of unequal lengths": ("prompts=[a, b, c]", "pairing: zip"),
    "credentials": ("storage_options={{key: AKIAIOSFODNN7EXAMPLE}}", "credentials"),
    "no override": ("seeds", "expected KEY=VALUE"),
}


@pytest.mark.parametrize(("override", "said"), SPEC_MISTAKES.values(), ids=SPEC_MISTAKES)
def test_a_wrong_spec_is_one_clear_line_and_status_2(spec, override, said):
    zipped = ("--set", "pairing=zip") if "c]" in override else ()
    (error,) = errors_of(ditflow("plan", spec, *zipped, "--set", override.format(spec=spec), status=2))
    assert re.search(said, error)
    assert "AKIA" not in error


FORGED = "\x1b[2J\x9b31m\nerror: forged"


@pytest.mark.parametrize("name", [FORGED, "", "x" * 201, "a\u202eb"])
def test_a_job_has_a_name_of_one_line(spec, name):
    spec.write_text(yaml.safe_dump({**yaml.safe_load(spec.read_text()), "name": name}))
    (said,) = errors_of(ditflow("plan", spec, status=2))
    assert re.search("name: .*one line, without control characters", said)


@pytest.mark.parametrize("key", ["output", "references", "model"])
def test_nothing_that_a_spec_names_commands_the_terminal(spec, tmp_path, key):
    values = yaml.safe_load(spec.read_text())
    values[key] |= {"path" if key == "model" else "uri": f"{tmp_path}/{FORGED}"}
    spec.write_text(yaml.safe_dump(values))
    result = ditflow("plan", spec, status=2)
    assert "forged" in result.stderr
    assert not re.search(r"[\x1b\x9b]|^error: forged", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("text", ["kind: [", "- a", "", "kind: !!python/object/apply:os.getcwd []"], ids=range(4))
def test_a_file_that_is_no_spec_is_one_clear_line_and_status_2(tmp_path, text):
    (tmp_path / "job.yaml").write_text(text)
    (said,) = errors_of(ditflow("plan", tmp_path / "job.yaml", status=2))
    assert str(tmp_path / "job.yaml") in said


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_spec_that_is_missing_is_one_clear_line_and_status_2(tmp_path, command):
    (said,) = errors_of(ditflow(command, tmp_path / "none.yaml", status=2))
    assert "quickstart.yaml" in said


def test_run_refuses_an_unknown_retry_before_it_reads_anything(tmp_path):
    (said,) = errors_of(ditflow("run", tmp_path / "none.yaml", "--retry", "broken", status=2))
    assert "failed or quarantined" in said


def test_run_starts_no_cluster_when_nothing_is_left_to_do(spec, tmp_path):
    commit(tmp_path / "out", row_ids(spec), status="ok")
    assert "4 ok" in ditflow("run", spec).stderr


def test_run_ends_with_status_3_when_rows_failed_earlier_and_says_how_to_see_them(spec, tmp_path):
    ids = row_ids(spec)
    commit(tmp_path / "out", ids[:3], status="ok")
    commit(tmp_path / "out", ids[3:], status="failed")
    result = ditflow("run", spec, status=3)
    assert f"1 rows failed: ditflow manifest show {tmp_path / 'out'} --status failed" in result.stderr


# ----------------------------------------------------------------------------------------- manifest, status, bank


def row_ids(spec: Path) -> list[str]:
    from jobs.spec import load_spec

    ready = load_spec(spec)
    return [row.row_id for row in make_plan(ready.job, ready.model.revision).todo]


def commit(output: Path, ids: Iterable[str], status: str, **values) -> None:
    """Write a job's rows, with an output for those that are ok."""
    store = Store(str(output))
    for row_id in ids:
        fault = {"error_kind": "permanent", "error_class": "VideoError", "error_message": "[red]cut off[/red] [/x]"}
        if status == "ok":
            stored = store.put(f"videos/{row_id}.mp4", f"video {row_id}".encode())
            fault = {"output_uri": stored.uri, "output_sha256": stored.sha256, "output_bytes": stored.bytes}
        Manifest(store).commit(make_row(row_id=row_id, status=status, **fault, **values))


@pytest.fixture
def output(tmp_path) -> Path:
    """A finished job of two rows that are ok and one that failed."""
    folder = tmp_path / "job"
    losses = {"losses": [2.0, 1.0], "loss_first": 2.0, "loss_final": 1.0, "seconds_total": 3.0}
    commit(folder, ["row-1", "row-2"], "ok", prompt="a [bold]ball[/bold]", seed=1, **losses)
    commit(folder, ["row-3"], "failed", prompt="ein Bär", seed=2)
    return folder


def test_manifest_show_is_a_table_of_all_rows_with_texts_as_they_are(output):
    shown = ditflow("manifest", "show", output, "--columns", "row_id,status,error_message").stdout
    assert [shown.count(text) for text in ("row-1", "row-2", "row-3", "failed")] == [1, 1, 1, 1]
    assert "[red]cut off[/red] [/x]" in shown


def test_manifest_show_names_the_rows_and_why_they_failed_by_default(output):
    shown = ditflow("manifest", "show", output).stdout
    assert [name in shown for name in ("row-1", "row-2", "row-3")] == [True] * 3
    assert [name in shown for name in ("row_id", "status", "seed")] == [True] * 3


def test_manifest_show_as_json_is_a_line_per_row(output):
    rows = lines_of(ditflow("manifest", "show", output, "--json", "--columns", "row_id,prompt,loss_final"))
    assert rows == [
        {"row_id": "row-1", "prompt": "a [bold]ball[/bold]", "loss_final": 1.0},
        {"row_id": "row-2", "prompt": "a [bold]ball[/bold]", "loss_final": 1.0},
        {"row_id": "row-3", "prompt": "ein Bär", "loss_final": None},
    ]


def test_manifest_show_may_be_limited_to_a_status_and_may_show_all_columns(output):
    (row,) = lines_of(ditflow("manifest", "show", output, "--json", "--status", "failed", "--columns", "all"))
    assert row.keys() == set(COLUMN_NAMES)
    assert (row["row_id"], row["error_class"]) == ("row-3", "VideoError")


@pytest.mark.parametrize(
    ("option", "wrong", "said"), [("--columns", "promt", "prompt"), ("--status", "fail", "failed")]
)
def test_manifest_show_refuses_names_that_do_not_exist_and_says_which_do(output, option, wrong, said):
    (error,) = errors_of(ditflow("manifest", "show", output, option, wrong, status=2))
    assert said in error


def test_a_sound_job_has_no_problems(output):
    result = ditflow("manifest", "verify", output)
    assert (result.stdout, result.stderr) == ("", "3 rows, 0 problems\n")


def test_verify_finds_a_missing_a_changed_and_a_superfluous_file_and_ends_with_status_1(output):
    videos = output / "videos"
    (videos / "row-1.mp4").unlink()
    (videos / "row-2.mp4").write_bytes(b"video row-X")
    (videos / "stray.mp4").write_bytes(b"?")
    problems = lines_of(ditflow("manifest", "verify", output, "--json", status=1))
    found = {(problem["kind"], problem["row_id"], problem["key"]) for problem in problems}
    assert found == {
        ("output_missing", "row-1", "videos/row-1.mp4"),
        ("output_sha256", "row-2", "videos/row-2.mp4"),
        ("orphan", None, "videos/stray.mp4"),
    }
    told = ditflow("manifest", "verify", output, "--no-hashes", status=1)
    assert "output_missing: row-1" in told.stdout
    assert "output_sha256" not in told.stdout
    assert told.stderr == "3 rows, 2 problems\n"


def test_verify_clean_lists_what_killed_runs_left_and_removes_it_when_told_to(output):
    store, id_ = Store(str(output)), "0123456789abcdef01234567"
    store.put("job.yaml", b"")
    store.put(f"videos/{id_}.mp4", b"of a row in flight")
    store.put("attempts/row-1/001.json", b"{}")
    store.put("attempts/row-9/001.json", b"{}")
    (output / f"videos/.tmp-{'0' * 32}").write_bytes(b"half a video")
    before = store.list()
    result = ditflow("manifest", "verify", output, "--clean", status=1)
    assert f"would be removed: videos/{id_}.mp4" in result.stderr
    assert "nothing was removed: --clean --yes does it" in result.stderr
    assert store.list() == before
    result = ditflow("manifest", "verify", output, "--clean", "--yes")
    assert f"removed videos/{id_}.mp4\nremoved videos/.tmp-{'0' * 32}\n3 rows, 0 problems" in result.stderr
    assert store.list("attempts") == ["attempts/row-9/001.json"], "a row that has not ended keeps its tries"
    assert not list(output.glob("videos/.tmp-*"))


def test_cleaning_a_folder_of_banks_removes_none(tmp_path):
    bank = tmp_path / "banks/0123456789abcdef01234567.safetensors"
    Store(str(tmp_path)).put("banks/0123456789abcdef01234567.safetensors", b"a bank")
    (error,) = errors_of(ditflow("manifest", "verify", tmp_path, "--clean", "--yes", status=1))
    assert "nothing is removed here: there is no record in manifest/" in error
    assert bank.exists()


def test_nothing_is_cleaned_or_merged_while_a_run_is_at_work(output, monkeypatch):
    def held(lease):
        raise LeaseHeldError("another run is working on this output")

    monkeypatch.setattr(Lease, "__enter__", held)
    Store(str(output)).put("videos/row-9.mp4", b"of a row in flight")
    for command in (("verify", "--clean", "--yes"), ("compact",)):
        (error,) = errors_of(ditflow("manifest", command[0], output, *command[1:], status=1))
        assert "another run is working" in error
    assert (output / "videos/row-9.mp4").exists()
    assert (output / "manifest/row-1.parquet").exists()


def test_verify_reports_a_damaged_manifest_file_and_the_rest_of_it(output):
    (output / "manifest" / "row-2.parquet").write_bytes(b"PAR1")
    (problem,) = lines_of(ditflow("manifest", "verify", output, "--json", status=1))
    assert (problem["kind"], problem["key"]) == ("manifest_unreadable", "manifest/row-2.parquet")


def test_status_counts_rows_and_tells_losses(output):
    facts = json_of(ditflow("status", output, "--json"))
    assert (facts["planned"], facts["todo"], facts["ok"], facts["failed"]) == (3, 0, 2, 1)
    assert (facts["mean_loss_first"], facts["mean_loss_final"], facts["mean_seconds"]) == (2.0, 1.0, 3.0)
    shown = ditflow("status", output)
    assert re.search(r"ok\s+2\n\s+failed\s+1", shown.stderr)


def test_status_of_a_run_in_the_middle_tells_rows_per_hour_and_time_left(output):
    from datetime import datetime, timedelta

    started = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
    run = {"planned": 9, "started_at": started.timestamp(), "todo": 6}
    Store(str(output)).put("run.json", json.dumps(run).encode())
    for minutes, row_id in ((10, "row-4"), (30, "row-5")):
        commit(output, [row_id], "ok", finished_at=started + timedelta(minutes=minutes))
    facts = json_of(ditflow("status", output, "--json"))
    assert (facts["planned"], facts["todo"]) == (9, 4)
    assert (facts["rows_per_hour"], facts["seconds_left"]) == (pytest.approx(4), pytest.approx(3600))
    assert "1:00:00" in ditflow("status", output).stderr


@pytest.fixture
def banks(made, tmp_path) -> Path:
    """An output folder with one bank."""
    bank = MotionBank.from_bytes(made.bank.read_bytes())
    provenance = {**bank.header.provenance, "reference_uri": "file:///refs/clip.mp4"}
    header = replace(bank.header, provenance=provenance)
    Store(str(tmp_path / "job")).put("banks/0a1b.safetensors", replace(bank, header=header).to_bytes())
    return tmp_path / "job"


def test_bank_list_tells_size_model_and_losses_of_every_bank(banks, made):
    (row,) = lines_of(ditflow("bank", "list", banks, "--json"))
    file = banks / "banks" / "0a1b.safetensors"
    assert (row["id"], row["bytes"], row["model"]) == ("0a1b", file.stat().st_size, made.model)
    assert (row["prompt"], row["reference_uri"], row["grid"]) == (PROMPT, "file:///refs/clip.mp4", "3x4x6")
    assert row["loss_first"] > 0
    shown = ditflow("bank", "list", banks)
    assert "0a1b" in shown.stdout
    assert shown.stderr == "1 of 1 banks\n"


def test_bank_show_prints_the_whole_header_as_json(banks, made):
    header = json.loads(ditflow("bank", "show", banks / "banks" / "0a1b.safetensors").stdout)
    assert (header["model"], header["steps"], header["method"]["optimize"]) == (made.model, 3, "position")
    assert [len(losses) for losses in header["losses"]] == [5, 5]


def test_bank_show_refuses_what_is_no_bank(output, tmp_path):
    (said,) = errors_of(ditflow("bank", "show", output / "videos" / "row-1.mp4", status=2))
    assert "row-1.mp4 is not a safetensors file" in said
    (said,) = errors_of(ditflow("bank", "show", tmp_path / "none", status=2))
    assert "does not exist" in said


@pytest.mark.parametrize("command", [("status",), ("manifest", "show"), ("manifest", "verify"), ("bank", "list")])
def test_a_folder_in_which_no_job_has_run_is_not_taken_for_a_sound_job(tmp_path, command):
    (said,) = errors_of(ditflow(*command, tmp_path / "mistyped", status=2))
    assert "mistyped" in said


@pytest.mark.parametrize("storage", ["{", "5", '{"key": "AKIAIOSFODNN7EXAMPLE"}'], ids=["no JSON", "a number", "key"])
def test_wrong_storage_options_are_one_clear_line(output, storage):
    result = CliRunner().invoke(app, ["status", str(output), "--storage", storage])
    (said,) = errors_of(result)
    assert result.exit_code in (1, 2)
    assert "storage" in said
    assert "AKIA" not in said


# -------------------------------------------------------------------------------------------- doctor, help, usage


def test_doctor_finds_what_works(tmp_path):
    findings = lines_of(ditflow("doctor", "--json", "--output", tmp_path / "out"))
    assert all(finding["ok"] for finding in findings)
    found = {finding["what"]: finding["found"] for finding in findings}
    assert backbones.identify("mini").revision in found["model mini"]
    assert "Python" in found["software"]
    assert len(ditflow("doctor").stderr.splitlines()) == len(findings) - 1


def test_doctor_says_what_does_not_work_and_ends_with_status_1(tmp_path):
    (tmp_path / "file").touch()
    options = ("--model", "no/such", "--output", tmp_path / "file" / "out")
    result = ditflow("doctor", *options, status=1)
    failed = [line for line in result.stderr.splitlines() if line.startswith("FAIL")]
    assert ["no/such" in failed[0], "cannot be written to" in failed[1], len(failed)] == [True, True, 2]


def commands(group: typer.core.TyperGroup, *path: str) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        below = commands(command, *path, name) if hasattr(command, "commands") else []
        found += below or [(*path, name)]
    return found


COMMANDS = commands(typer.main.get_command(app))


def help_of(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], terminal_width=200, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.stdout


def test_every_command_is_in_the_help_with_a_sentence():
    shown = help_of()
    for command in COMMANDS:
        assert re.search(rf"^  {command[0]}\s+[A-Z]", shown, re.MULTILINE)


def test_the_commands_are_those_that_are_promised():
    promised = ["transfer", "extract", "plan", "run", "status", "doctor"]
    assert {(name,) for name in promised} | {("manifest", "show"), ("manifest", "verify")} <= {*COMMANDS}
    assert {("bank", "list"), ("bank", "show"), ("mini", "clips")} <= {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_help_of_a_command_says_what_it_does_and_explains_its_options(command):
    shown = help_of(*command)
    assert shown.startswith(f"Usage: ditflow {' '.join(command)}") or f"Usage: root {' '.join(command)}" in shown
    assert re.search(r"^  [A-Z].*\.$", shown, re.MULTILINE)
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.MULTILINE)
    assert len(options) >= 2 or "ditflow " in shown.split("\n", 1)[1]


@pytest.mark.parametrize("command", ["transfer", "extract", "plan", "run"])
def test_every_example_of_a_help_is_a_line_of_its_own_that_can_be_copied(command):
    lines = [line.strip() for line in help_of(command).splitlines()[1:] if "ditflow " in line and "Usage" not in line]
    assert lines
    for line in lines:
        assert line.startswith(f"ditflow {command} ")
        assert line.count("ditflow ") == 1


@pytest.mark.parametrize("arguments", [["dream"], ["manifest", "dream"], ["transfer"], ["plan"], ["plan", "--dream"]])
def test_a_command_that_is_none_is_a_usage_error_with_status_2(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert result.stdout == ""


def test_a_loss_curve_of_a_method_without_losses_is_refused_before_the_work(clips, tmp_path):
    result = ditflow("transfer", clips[0], PROMPT, "--method", "none", "--plot", tmp_path / "loss.png", status=2)
    assert errors_of(result) == [
        "error: --plot draws the losses, and there are none: with --bank or this --method nothing is optimised"
    ]


def test_a_picture_of_a_motion_that_is_not_extracted_is_refused_before_the_work(clips, tmp_path):
    picture = ("--picture", tmp_path / "transfer.png")
    result = ditflow("transfer", clips[0], PROMPT, "--method", "injection", *picture, status=2)
    assert errors_of(result) == [
        "error: --picture draws a reference's attention motion flow: it needs --method ditflow and no --bank"
    ]


# ------------------------------------------------------------------------------------------------------- signals

WAITS = {
    "a thread that opens a FIFO": "with ThreadPoolExecutor() as pool: pool.submit(open, sys.argv[1]).result()",
    "the main thread, in native code": "lock = ctypes.create_string_buffer(64); [mutex(lock), mutex(lock)]",
}
WAITING = """
import ctypes, signal, sys
from concurrent.futures import ThreadPoolExecutor
import typer
from jobs import cli

mutex = ctypes.CDLL(None).pthread_mutex_lock
app = typer.Typer()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes begin with it ignored

@app.command()
def wait(fifo: str):
    with cli.expected_errors():
        print("ready", flush=True)
        {wait}

cli.app, cli._SECONDS_TO_STOP = app, 1.0
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("waiting", WAITS)
def test_a_signal_ends_a_command_whatever_it_waits_for(tmp_path, waiting, number):
    os.mkfifo(tmp_path / "fifo")
    program = WAITING.format(wait=WAITS[waiting])
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "fifo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as command:
        assert command.stdout.readline() == b"ready\n"
        command.send_signal(number)
        try:
            assert command.wait(120) == 128 + number
        finally:
            command.kill()


def test_a_mistake_of_a_library_is_shown_whole_and_without_secrets(capsys):
    with pytest.raises(typer.Exit) as ended, cli.expected_errors():
        raise RuntimeError("GET https://host/a.mp4?sig=s3cr3t failed")
    said = capsys.readouterr().err
    assert ended.value.exit_code == 1
    assert "Traceback" in said and "https://host/a.mp4?***" in said
    assert "s3cr3t" not in said


def test_a_current_folder_that_is_gone_is_named_as_the_trouble(capsys, monkeypatch):
    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    with pytest.raises(typer.Exit) as ended, cli.expected_errors():
        os.getcwd()
    assert ended.value.exit_code == 2
    assert "the current folder is gone" in capsys.readouterr().err


def test_an_error_that_names_no_file_is_told_in_its_own_words(capsys):
    with pytest.raises(typer.Exit), cli.expected_errors():
        raise FileNotFoundError("No usable temporary directory found in ['/tmp']")
    assert "error: No usable temporary directory found" in capsys.readouterr().err


def test_doctor_shows_no_credentials_of_an_output():
    findings = [*examine("mini", "s3://AKIAABCDEFGHIJKLMNOP:s3cr3t@bucket/run")]
    assert not findings[-1]["ok"]
    assert "s3cr3t" not in str(findings)
