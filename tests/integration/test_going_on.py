"""Facts about a job that cannot go on, or not as far as it was asked to: it says so, and reading never runs away."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import ray
from ray import cloudpickle
from running import run, write_spec
from typer.testing import CliRunner

import pipeline.graph
from jobs.cli import app
from pipeline.cluster import unplaced_actors
from pipeline.job import Job
from pipeline.source import Source
from pipeline.stages.generate import FinishRow
from pipeline.stages.read import Row, read_reference

pytestmark = pytest.mark.usefixtures("cluster")
QUICK = {"sampling": {"steps": 2}, "method": {"name": "ditflow", "guided_steps": 1, "iterations": 1}}


@pytest.fixture
def job_folder(tmp_path, references) -> Path:
    shutil.copytree(references, tmp_path / "references")
    return tmp_path


def counted_read(row: Row, job: Job) -> Row:
    """Read a reference, and leave a file beside the output for it."""
    Path(job.output.uri.removeprefix("file://"), "read", row["motion_id"]).touch()
    return read_reference(row, job)


class CountingRow(FinishRow):
    """Ends a row, and leaves behind how many references had been read by then."""

    def __call__(self, row: Row) -> Row:
        ended, output = super().__call__(row), Path(self._job.output.uri.removeprefix("file://"))
        with (output / "read-when-rows-ended").open("a") as lines:
            lines.write(f"{len(list((output / 'read').iterdir()))}\n")
        return ended


def test_references_are_read_at_most_so_far_ahead_of_the_rows(job_folder, monkeypatch):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(pipeline.graph, "read_reference", counted_read)
    monkeypatch.setattr(pipeline.graph, "FinishRow", CountingRow)
    (job_folder / "out/read").mkdir(parents=True)
    prompts = ["a red ball moving over grass", "a blue star moving over sand"]
    spec = write_spec(job_folder, prompts=prompts, resources={"read_ahead": 2}, **QUICK)
    _, tally, _ = run(spec)
    assert (tally.ok, tally.failed) == (8, 0)
    read = [int(line) for line in (job_folder / "out/read-when-rows-ended").read_text().split()]
    assert read[0] <= 2, "when the first row ends"
    assert all(count <= 2 + number // 2 for number, count in enumerate(read)), "two rows to a reference"
    assert read[-1] == 4


def test_a_source_whose_count_is_lost_hands_out_all_that_is_left(tmp_path):
    source = Source([({"number": number}, [str(number)]) for number in range(20)], ahead=2)
    got = []
    for batch in source.dataset.iter_batches(batch_size=None, prefetch_batches=0):
        got += batch["number"].tolist()
        ray.kill(source._ended)
    assert got == list(range(20))


def too_many() -> int:
    return 8 * int(ray.cluster_resources()["CPU"])


def test_more_actors_than_find_room_are_refused_by_the_key_before_anything_is_written(job_folder):
    spec = write_spec(job_folder, resources={"generate": {"actors": too_many()}}, **QUICK)
    result = CliRunner().invoke(app, ["run", str(spec)])
    assert result.exit_code == 2, result.output
    refused = next(line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert refused.startswith(f"error: resources.generate.actors: {too_many()} is not valid: expected at most ")
    assert "CPU" in refused
    assert "0/4 rows" not in result.stderr
    assert not (job_folder / "out/job.yaml").exists()


def test_gpus_that_no_machine_has_are_refused_by_the_key(job_folder):
    spec = write_spec(job_folder, resources={"extract": {"gpus": 1000}}, **QUICK)
    result = CliRunner().invoke(app, ["run", str(spec)])
    assert result.exit_code == 2, result.output
    assert "error: resources.extract.gpus: 1000" in result.stderr


def test_of_a_range_of_actors_those_that_find_room_do_the_work_and_that_is_said_and_kept(job_folder):
    spec = write_spec(job_folder, resources={"generate": {"actors": [1, too_many()]}}, **QUICK)
    result = CliRunner().invoke(app, ["run", str(spec)])
    assert result.exit_code == 0, result.output
    (note,) = json.loads((job_folder / "out/run.json").read_text())["notes"]
    assert note.startswith("resources.generate.actors: at most ")
    assert note in result.stderr


def test_actors_without_a_place_are_named_with_what_is_free():
    waiting = ray.remote(Waiting).options(num_cpus=1 + ray.cluster_resources()["CPU"]).remote()
    deadline = time.monotonic() + 60  # the cluster hears of it a moment later
    while not (found := unplaced_actors()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert any(text.startswith("1 x Waiting to get its place") and " CPU" in text for text in found)
    ray.kill(waiting)


class Waiting:
    """An actor that asks for more CPUs than there are."""
