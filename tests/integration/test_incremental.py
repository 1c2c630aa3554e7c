"""Facts about jobs that are run again and again: they do what is new and nothing else."""

from pathlib import Path

import pytest
from running import run

from jobs.clips import render_clips
from jobs.spec import PRESETS, load_spec
from pipeline.job import Job
from pipeline.manifest import Manifest
from pipeline.measurements import Measurements
from pipeline.plan import make_plan

SMALL = ["model.path=mini", "references.frames=9", "references.height=32", "references.width=32"]
SMALL += ["references.stride=2", "sampling.steps=3", "method.guided_steps=2", "method.iterations=2"]


@pytest.fixture
def clips(tmp_path) -> Path:
    folder = tmp_path / "references"
    render_clips(folder, count=2, seed=40)
    return folder


def made_small(preset: str, folder: Path, *changes: str) -> Path:
    """A preset as its comments say to run it on a laptop, and a few steps instead of many."""
    spec = folder / f"{preset}.yaml"
    spec.write_text(load_spec(PRESETS / f"{preset}.yaml", [*SMALL, *changes]).yaml)
    return spec


def rows_of(job: Job) -> dict[str, dict]:
    """Every record of the manifest, by its row's id."""
    return {row["row_id"]: row for row in Manifest(job.store()).read().to_pylist()}


def test_the_nightly_job_makes_the_one_new_reference_and_its_manifest_grows_by_its_rows(cluster, clips, tmp_path):
    places = (f"references.uri={clips}", f"output.uri={tmp_path / 'out'}")
    nightly = made_small("nightly-synthesis", tmp_path, *places)
    first, tally, _ = run(nightly)
    prompts = len(first.job.prompts)
    assert (tally.ok, tally.not_ok) == (2 * prompts, 0)
    before = rows_of(first.job)

    known = {clip.name for clip in clips.glob("*.mp4")}
    (clips / "renamed.mp4").write_bytes((clips / sorted(known)[0]).read_bytes())  # no new content
    render_clips(clips, count=3, seed=40)
    (new,) = {clip.name for clip in clips.glob("*.mp4")} - known - {"renamed.mp4"}
    second, tally, rows = run(nightly)
    assert (tally.ok, tally.not_ok) == (prompts, 0)

    after = rows_of(second.job)
    added = [row for row_id, row in after.items() if row_id not in before]
    assert {row_id: after[row_id] for row_id in before} == before
    assert {row["row_id"] for row in added} == {row["row_id"] for row in rows}
    assert {Path(row["reference_uri"]).name for row in added} == {new}
    assert sorted(row["prompt"] for row in added) == sorted(first.job.prompts)

    third, tally, rows = run(nightly)
    assert rows == [] == make_plan(third.job, third.model.revision).todo


def test_a_library_of_motions_is_built_and_reused_by_the_presets(cluster, clips, tmp_path):
    places = (f"references.uri={clips}", f"output.uri={tmp_path / 'built'}")
    built = made_small("bank-construction", tmp_path, *places)
    assert run(built)[1].ok == 2
    reused = made_small(
        "bank-reuse", tmp_path, f"banks.uri={tmp_path / 'built/banks'}", f"output.uri={tmp_path / 'new'}"
    )
    spec, tally, _ = run(reused)
    assert (tally.ok, tally.not_ok) == (2 * len(spec.job.prompts), 0)


def test_a_data_set_is_made_and_measured_by_the_presets(cluster, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(PRESETS.parent)  # where the preset's table of prompts lies
    output = tmp_path / "videos"
    made = made_small("dataset-synthesis", tmp_path, f"references.uri={clips}", f"output.uri={output}", "seeds=[1]")
    _, tally, _ = run(made)
    assert (tally.ok, tally.not_ok) == (2 * 4, 0)

    from pipeline.run import run_evaluation

    job = load_spec(PRESETS / "evaluation.yaml", [f"output.uri={output}"]).job
    measurements = Measurements(job.store())
    todo = measurements.todo(job.metrics)
    assert len(todo) == 8
    assert run_evaluation(job, todo, lambda row: None).not_ok == 0
    assert measurements.todo(job.metrics) == []
