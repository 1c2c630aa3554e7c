"""A motion loss in one file of one's own is a method like any other, and is tested like one.

The file is `plugins/losses/toy.py`. Nothing else here or in the package knows it: it is named in no list, and found in
new processes alone, since the registries are filled when the package is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from running import write_spec

from ditflow.losses import MOTION_LOSSES
from ditflow.media.video import probe_video, write_video
from ditflow.registry import PLUGINS_VARIABLE
from jobs.spec import SpecError, load_spec

TESTS = Path(__file__).parents[1]
PLUGINS = Path(__file__).parent / "plugins"
PROMPT = "a red ball moving over grass"
COMMANDS = """
import json, sys
from jobs.cli import app
for arguments in json.loads(sys.argv[1]):
    if status := app(arguments, standalone_mode=False):
        sys.exit(status)
"""


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python beside the tests, with the folder of the toy's file named as a user would name it."""
    environment = os.environ | {PLUGINS_VARIABLE: str(PLUGINS)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)


def ditflow(*commands: list[object]) -> list[dict]:
    """Run the command line, one command after the other; return the JSON lines of all."""
    result = python("-c", COMMANDS, json.dumps([[str(part) for part in command] for command in commands]))
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def job(tmp_path) -> Path:
    """A job on one small clip that asks for the toy by its name."""
    (tmp_path / "references").mkdir()
    texture = np.kron(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
    frames = np.stack([texture[:32, 2 * t : 2 * t + 32] for t in range(9)])
    write_video(tmp_path / "references" / "sliding.mp4", frames, fps=8)
    references = {"uri": str(tmp_path / "references"), "frames": 9, "height": 32, "width": 32}
    return write_spec(tmp_path, references=references, method={"name": "toy", "guided_steps": 2, "iterations": 3})


def test_every_test_of_the_registered_losses_runs_for_it_and_passes(tmp_path):
    """As many as for a loss of the package: those of the contract, and that it guides a whole transfer."""
    report = tmp_path / "report.xml"
    files = (TESTS / "contract" / "test_losses.py", TESTS / "unit" / "test_transfer.py")
    result = python("-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", "toy or smm", *files)
    assert result.returncode == 0, result.stdout
    cases = {case.get("name"): [part.tag for part in case] for case in ElementTree.parse(report).iter("testcase")}
    toys = {name for name in cases if "toy" in name}
    assert {name.replace("toy", "smm") for name in toys} == cases.keys() - toys
    assert {name.partition("[")[0] for name in toys} >= {
        "test_the_motion_of_the_reference_costs_less_than_any_other",
        "test_every_loss_guides_by_everything_that_can_be_optimised",
    }
    assert not any(cases.values()), "one of them was skipped or failed"


def test_a_job_and_the_command_line_select_it_by_its_name(job, tmp_path):
    output, size = tmp_path / "out.mp4", ["--frames", 9, "--height", 32, "--width", 32]
    transfer = ["transfer", tmp_path / "references" / "sliding.mp4", PROMPT, "--method", "toy", "-o", output]
    few_steps = ["--steps", 3, "--guided-steps", 2]
    planned, made = ditflow(["plan", job, "--json"], [*transfer, *size, *few_steps, "--json"])
    assert (planned["rows"], planned["todo"]) == (1, 1)
    assert probe_video(output).frames == 9
    assert len(made["losses"]) == 2
    assert all(losses[-1] < losses[0] for losses in made["losses"])


def test_without_its_folder_it_is_no_method_and_the_error_names_those_that_are(job):
    assert "toy" not in MOTION_LOSSES
    with pytest.raises(SpecError, match=r"method.name: 'toy' is not valid: expected one of none, injection, ditflow, "):
        load_spec(job)
