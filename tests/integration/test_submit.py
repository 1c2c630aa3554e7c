"""Facts about jobs on a cluster of their own: a real Ray head in processes of its own, and the real command line."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from heads import TOKEN, end, environment, new_options, started
from running import write_spec

from jobs.spec import PRESETS
from pipeline.manifest import Manifest
from pipeline.store import Store

LONGEST_JOB_S = 3600
SMALL = ["references.frames=9", "references.height=32", "references.width=32", "references.stride=2"]
SMALL += ["sampling.steps=3", "method.guided_steps=2", "method.iterations=2"]


def ask(address: str, path: str) -> requests.Response:
    return requests.get(f"{address}{path}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of the dashboard of a Ray head that is no part of this process."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = new_options(folder, dashboard=True)
        address = f"http://127.0.0.1:{options['dashboard-port']}"
        ray = started(options, lambda: ask(address, "/api/jobs/").ok, Path(folder, "start.log"))
        yield address
        end(ray)


def submit(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "jobs", "submit", *(str(argument) for argument in arguments)]


def ended(*arguments: object, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    return subprocess.run(
        submit(*arguments), env=environment(token), capture_output=True, text=True, timeout=LONGEST_JOB_S, check=False
    )


def one_of(references: Path, folder: Path) -> Path:
    """A folder of one clip."""
    clips = folder / "references"
    clips.mkdir()
    clip = min(references.glob("*.mp4"))
    (clips / clip.name).write_bytes(clip.read_bytes())
    return clips


def statuses(output: Path) -> list[str]:
    return sorted(Manifest(Store(str(output))).statuses().values())


def test_a_submitted_job_shows_its_log_and_ends_with_the_status_of_its_run(head, references, tmp_path):
    """One reference is a video and the other is none, so that the status is neither 0 nor 1."""
    clips = one_of(references, tmp_path)
    (clips / "broken.mp4").write_bytes(b"no video")
    done = ended(write_spec(tmp_path), "--address", head)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "this run ended 1 ok, 1 failed" in done.stdout
    assert "exit code 3" in done.stderr
    assert statuses(tmp_path / "out") == ["failed", "ok"]


def test_a_job_goes_on_when_its_submitter_is_killed_and_can_be_followed_to_its_end(head, references, tmp_path):
    output = tmp_path / "out"
    places = [f"references.uri={one_of(references, tmp_path)}", f"output.uri={output}"]
    changes = [argument for change in [*places, *SMALL] for argument in ("--set", change)]
    submitter = subprocess.Popen(
        submit(PRESETS / "quickstart.yaml", *changes, "--address", head),
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert submitter.stderr is not None
    told = next(line for line in submitter.stderr if line.startswith("job "))
    job_id = told.split(";")[0].removeprefix("job ")
    submitter.send_signal(signal.SIGKILL)
    assert submitter.wait(60) == -signal.SIGKILL
    assert ask(head, f"/api/jobs/{job_id}").json()["status"] in ("PENDING", "RUNNING")

    followed = ended("--follow", job_id, "--address", head)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "this run ended 2 ok, 0 failed" in followed.stdout
    assert followed.stdout.count("2 rows of kind synthesize") == 1
    assert statuses(output) == ["ok"] * 2


def test_a_job_is_not_followed_where_it_is_not_known(head):
    done = ended("--follow", "raysubmit_nowhere", "--address", head)
    assert done.returncode == 1
    assert "knows no job raysubmit_nowhere" in done.stderr


def test_a_cluster_that_asks_for_a_token_says_so(head, tmp_path):
    done = ended(write_spec(tmp_path), "--address", head, token="of-another-cluster")
    assert done.returncode == 1
    assert "the cluster asks for a token" in done.stderr
    assert "of-another-cluster" not in done.stderr
