"""A prompt that is longer than what the text encoder reads is said to be, before the work and in the manifest."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ditflow import backbones
from ditflow.media.video import write_video
from ditflow.mini import mini_folder
from jobs.cli import _print_plan
from jobs.spec import load_spec
from pipeline.job import Job
from pipeline.plan import make_plan
from pipeline.record import COLUMN_NAMES
from pipeline.stages.extract import without_motion
from pipeline.stages.generate import FinishRow

SHORT = "a red ball"
LONG = "a red ball moving over the grass " * 6
ENDS = [LONG + "at night", LONG + "at noon"]


def spec(folder: Path, prompts: list[str], **changes):
    values = {
        "kind": "synthesize",
        "name": "long",
        "model": {"path": "mini"},
        "references": {"frames": 9, "height": 32, "width": 32},
        "prompts": prompts,
        "method": {"name": "none"},
        "sampling": {"steps": 1},
        "output": {"uri": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump({**values, **changes}))
    return folder / "job.yaml"


def plan(file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jobs", "plan", str(file), "--json"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_limit_read_from_a_folder_is_where_the_encoder_cuts():
    limit, backbone = backbones.read_text_limit("mini"), backbones.load("mini", device="cpu")
    assert limit.tokens == backbone.text_limit.tokens == backbone.condition(SHORT).shape[1]
    prompt = "ball " * (limit.tokens - 1)  # and the end mark
    assert limit.count([prompt, prompt + "ball"]) == [limit.tokens, limit.tokens + 1]
    assert limit.too_long([prompt, prompt + "ball", SHORT]) == {prompt + "ball": limit.tokens + 1}
    first, second = (backbone.condition(text) for text in ENDS)
    assert torch.equal(first, second), "what is beyond the limit changes nothing"


def test_plan_counts_the_prompts_that_are_too_long(tmp_path):
    planned = plan(spec(tmp_path, [SHORT, *ENDS]))
    assert json.loads(planned.stdout)["prompts_cut"] == 2
    assert "warning: 2 of 3 prompts are longer than the 32 tokens that the model reads" in planned.stderr
    planned = plan(spec(tmp_path, [SHORT]))
    assert json.loads(planned.stdout)["prompts_cut"] == 0
    assert "warning" not in planned.stderr


def test_plan_says_when_there_is_no_tokenizer_to_count_with(tmp_path):
    shutil.copytree(mini_folder("mini"), tmp_path / "model")
    shutil.rmtree(tmp_path / "model/tokenizer")
    planned = plan(spec(tmp_path, [LONG], model={"path": str(tmp_path / "model")}))
    assert (planned.returncode, json.loads(planned.stdout)["prompts_cut"]) == (0, None)
    assert "warning: the lengths of the prompts were not checked" in planned.stderr


def test_a_row_records_how_long_its_prompt_is_and_whether_it_was_cut(tmp_path):
    ready = load_spec(spec(tmp_path, [SHORT, *ENDS]))
    rows = [record(ready.job, ready.model.revision, work) for work in make_plan(ready.job, ready.model.revision).todo]
    assert [row["prompt_cut"] for row in rows] == [False, True, True]
    assert rows[0]["prompt_tokens"] < 32 < rows[1]["prompt_tokens"]
    assert len({row["row_id"] for row in rows}) == 3
    assert rows[1]["output_sha256"] == rows[2]["output_sha256"]
    assert {"prompt_tokens", "prompt_cut"} <= set(COLUMN_NAMES)


def record(job: Job, revision: str, work) -> dict:
    """The row of the manifest that the last stage leaves."""
    stage = FinishRow(job, revision)
    assert stage(without_motion(work))["status"] == "ok"
    return stage._desk.manifest.recorded(work.row_id)


@pytest.mark.parametrize(("prompt", "warned"), [(SHORT, False), (LONG, True)])
def test_transfer_warns_of_a_prompt_that_is_too_long(tmp_path, prompt, warned):
    write_video(tmp_path / "ref.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    size = ["--frames", "9", "--height", "32", "--width", "32", "--steps", "1", "--method", "none"]
    command = [sys.executable, "-m", "jobs", "transfer", str(tmp_path / "ref.mp4"), prompt, *size]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.mp4")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("tokens, of which the model reads 32" in done.stderr) == warned


def test_plan_warns_of_every_text_that_the_encoder_cuts(tmp_path, capsys):
    learns = {"name": "ditflow", "optimize": "position", "guided_steps": 1, "zero_shot": True}
    learns |= {"learn_with": LONG, "more_prompts": [LONG]}
    references = {"uri": str(tmp_path / "ref.mp4"), "frames": 9, "height": 32, "width": 32}
    write_video(tmp_path / "ref.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    sampling = {"steps": 1, "guidance_scale": 2.0, "negative_prompt": ENDS[0]}
    ready = load_spec(spec(tmp_path, [SHORT], method=learns, sampling=sampling, references=references))
    planned = make_plan(ready.job, ready.model.revision)
    assert planned.other_texts(ready.job) == {
        "learn_with": {LONG},
        "more_prompts": {LONG},
        "sampling.negative_prompt": {ENDS[0]},
    }
    assert _print_plan(ready, planned) == 0, "no prompt of a row is cut"
    said = capsys.readouterr().err
    for key in ("learn_with", "more_prompts", "sampling.negative_prompt"):
        assert f"warning: 1 of 1 texts of {key} are longer than the 32 tokens that the model reads" in said


def test_texts_that_nothing_reads_are_none(tmp_path):
    write_video(tmp_path / "ref.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    references = {"uri": str(tmp_path / "ref.mp4"), "frames": 9, "height": 32, "width": 32}
    sampling = {"steps": 1, "guidance_scale": 1.0, "negative_prompt": LONG}
    ready = load_spec(
        spec(tmp_path, [SHORT], method={"name": "ditflow", "guided_steps": 1}, sampling=sampling, references=references)
    )
    assert make_plan(ready.job, ready.model.revision).other_texts(ready.job) == {}
