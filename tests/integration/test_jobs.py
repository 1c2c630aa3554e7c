"""Whole jobs on a real local Ray: every kind, failing rows, poison rows, resume, object storage."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray import cloudpickle
from running import run, write_spec
from typer.testing import CliRunner

import pipeline.graph
from ditflow.banks.bank import MotionBank
from ditflow.media.video import probe_video
from jobs.cli import app
from jobs.spec import load_spec
from pipeline.faults import JobStoppedError
from pipeline.manifest import Manifest
from pipeline.plan import make_plan
from pipeline.run import run_plan
from pipeline.stages.generate import FinishRow
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("cluster")


def rows_of(folder: Path) -> list[dict]:
    return Manifest(Store(str(folder))).read().to_pylist()


def outputs_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "videos").iterdir())}


@pytest.fixture
def job_folder(tmp_path, references) -> Path:
    (tmp_path / "references").mkdir()
    for name in ("clip-0000.mp4", "clip-0001.mp4"):
        shutil.copy(references / name, tmp_path / "references")
    return tmp_path


def test_synthesize_bank_and_reuse_end_to_end(job_folder):
    prompts = ["a red ball moving over grass", "a blue star moving over sand"]
    spec, tally, _ = run(write_spec(job_folder, prompts=prompts))
    assert (tally.ok, tally.failed) == (4, 0)
    rows = rows_of(job_folder / "out")
    assert {row["status"] for row in rows} == {"ok"}
    assert Manifest(Store(spec.job.output.uri)).verify() == []
    assert len(list((job_folder / "out/amf").iterdir())) == 2, "one extraction per reference"
    for row in rows:
        info = probe_video(Path(row["output_uri"].removeprefix("file://")))
        assert (info.frames, info.height, info.width) == (9, 32, 32)
        assert len(row["losses"]) == 4
        assert row["losses"][1] < row["losses"][0], "falls within the first guided step"
        assert row["losses"][3] < row["losses"][2], "falls within the second"
        assert row["attempts"] == 1

    bank = {"method": {"optimize": "position", "preset": "paper", "guided_steps": 2, "iterations": 2}}
    banks = write_spec(job_folder, kind="build-bank", output={"uri": str(job_folder / "bank")}, **bank)
    _, tally, _ = run(banks)
    assert tally.ok == 2
    files = sorted((job_folder / "bank/banks").iterdir())
    assert MotionBank.from_bytes(files[0].read_bytes()).guided_steps == 2

    reuse = {"references": {}, "banks": {"uri": str(job_folder / "bank/banks")}, "prompts": ["a cross on wood"]}
    _, tally, _ = run(write_spec(job_folder, kind="reuse", output={"uri": str(job_folder / "reuse")}, **bank, **reuse))
    assert tally.ok == 2
    reused = rows_of(job_folder / "reuse")
    for row in reused:
        assert (row["frames"], row["height"], row["width"]) == (9, 32, 32)
        assert row["bank_uri"] in {f"file://{file}" for file in files}
        assert row["losses"] == []
    assert {used_of(row) for row in reused} == {used_of(row) for row in rows}, "a bank tells what it was learned of"
    result = CliRunner().invoke(app, ["evaluate", str(job_folder / "reuse"), "--metric", "motion_fidelity", "--json"])
    (entry,) = json.loads(result.stdout)["entries"]
    assert (entry["figure"], entry["interval"]["count"]) == ("motion_fidelity", 2), result.output


def used_of(row: dict) -> tuple[str, str, str]:
    """Which frames of which reference a row's motion is of."""
    return row["reference_uri"], row["reference_sha256"], json.dumps(json.loads(row["spec_json"])["video"])


def test_one_job_compares_several_methods_over_the_same_rows(job_folder):
    methods = {
        "plain": {"name": "none"},
        "flow": {},
        "features": {"name": "smm"},
        "zero-shot": {"optimize": "position", "zero_shot": True},
    }
    spec, tally, _ = run(write_spec(job_folder, methods=methods))
    assert (tally.ok, tally.failed) == (8, 0)
    rows = rows_of(job_folder / "out")
    assert Manifest(Store(spec.job.output.uri)).verify() == []
    made = {(row["variant"], row["method"], row["optimize"]) for row in rows}
    assert made == {
        ("plain", "none", None),
        ("flow", "ditflow", "latent"),
        ("features", "smm", "latent"),
        ("zero-shot", "ditflow", "zero-shot"),
    }
    for row in rows:
        guided = row["variant"] in ("flow", "features")
        assert bool(row["losses"]) == guided
        assert (row["amf_uri"] is None) == (row["variant"] == "plain")
        assert (row["seconds_learn"] > 0.01) == (row["variant"] == "zero-shot")
    assert len({row["output_sha256"] for row in rows}) == 7, "plain generation does not depend on the reference"
    alone = make_plan(load_spec(write_spec(job_folder)).job, spec.model.revision)
    assert alone.todo == [], "the row of a method alone is that of the comparison"
    check_evaluation(job_folder)


def check_evaluation(folder: Path) -> None:
    """The finished job is measured, the methods are compared, and a second evaluation measures nothing."""
    tables = [folder / name for name in ("table.csv", "table.tex", "table.json", "table.png")]
    options = [part for table in tables for part in ("--table", str(table))]
    metrics = ["--metric", "motion_fidelity", "--metric", "warp_error", "--metric", "world"]
    result = CliRunner().invoke(app, ["evaluate", str(folder / "out"), *metrics, *options, "--json"])
    assert result.exit_code == 0, result.output
    assert re.search("8 rows of .*out to measure", result.stderr)
    compared = json.loads(result.stdout)
    assert compared["baseline"] == "plain"
    by_name = {(entry["variant"], entry["figure"]): entry for entry in compared["entries"]}
    assert by_name["flow", "track_cosine"]["difference"]["count"] == 2
    assert {variant for variant, _ in by_name} == {"plain", "flow", "features", "zero-shot"}
    assert json.loads((folder / "table.json").read_text()) == compared
    assert all(table.stat().st_size > 0 for table in tables)
    assert Manifest(Store(str(folder / "out"))).verify() == [], "measurements are no orphans"
    again = CliRunner().invoke(app, ["evaluate", str(folder / "out"), *metrics])
    assert re.search("0 rows of .*out to measure", again.stderr)
    assert "zero-shot" in again.stdout
    check_evaluation_job(folder)


def check_evaluation_job(folder: Path) -> None:
    """The same as a job of its own: planned, run, and nothing is left."""
    metrics = {"names": ["motion_fidelity", "warp_error"], "tracker": "lucas-kanade"}
    spec = write_spec(folder, kind="evaluate", metrics=metrics)
    counts = []
    for command in ("plan", "run", "plan"):
        result = CliRunner().invoke(app, [command, str(spec), "--json"])
        assert result.exit_code == 0, result.output
        counts.append([json.loads(line) for line in result.stdout.splitlines()])
    before, measured, after = counts
    assert (before[0]["todo"], len(measured), after[0]["todo"]) == (8, 8, 0), "only the tracker's metric is missing"
    assert {row["status"] for row in measured} == {"ok"}


def test_extract_jobs_store_one_motion_per_reference(job_folder):
    _, tally, _ = run(write_spec(job_folder, kind="extract", prompts=[]))
    assert tally.ok == 2
    assert Manifest(Store(str(job_folder / "out"))).verify() == []


def test_a_second_run_does_nothing_and_a_new_prompt_only_its_own_rows(job_folder):
    run(write_spec(job_folder))
    before = {file: file.stat().st_mtime_ns for file in (job_folder / "out").rglob("*.mp4")}
    _, tally, rows = run(write_spec(job_folder))
    assert (tally.ok, rows) == (0, [])
    _, tally, _ = run(write_spec(job_folder, prompts=["a red ball moving over grass", "a white ring on water"]))
    assert tally.ok == 2
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(rows_of(job_folder / "out")) == 4


def test_the_same_rows_in_another_place_have_the_same_bytes(job_folder):
    run(write_spec(job_folder))
    moved = job_folder / "elsewhere"
    moved.mkdir()
    (job_folder / "references").rename(moved / "references")
    run(write_spec(moved, name="another-name"))
    assert outputs_of(moved / "out") == outputs_of(job_folder / "out")


def test_four_bad_references_fail_alone_with_their_reasons(job_folder, references):
    """Item 4 of the main job: a truncated mp4, an empty file, a missing one and a text file among eight."""
    folder = job_folder / "references"
    whole = (references / "clip-0002.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    for name in ("clip-0002.mp4", "clip-0003.mp4"):
        shutil.copy(references / name, folder)
    uris = [str(file) for file in sorted(folder.iterdir())] + [str(folder / "missing.mp4")]
    spec = write_spec(job_folder, references={"uri": uris, "frames": 9, "height": 32, "width": 32, "stride": 2})
    result = CliRunner().invoke(app, ["run", str(spec)])
    assert result.exit_code == 3, result.output
    rows = {Path(row["reference_uri"]).name: row for row in rows_of(job_folder / "out")}
    assert len(rows) == 8
    bad = {"truncated.mp4", "empty.mp4", "text.mp4", "missing.mp4"}
    for name, row in rows.items():
        assert row["status"] == ("failed" if name in bad else "ok"), row["error_message"]
        assert (row["error_kind"] == "permanent") == (name in bad)
    assert rows["missing.mp4"]["error_class"] == "StoreMissingError"
    assert "does not exist" in rows["missing.mp4"]["error_message"]
    assert all(name in rows[name]["error_message"] for name in bad)


def test_retry_failed_does_only_the_failed_rows_again(job_folder, references):
    broken = job_folder / "references/clip-0001.mp4"
    whole = broken.read_bytes()
    missing = {"uri": [str(job_folder / "references/clip-0000.mp4"), str(job_folder / "late.mp4")]}
    size = {"frames": 9, "height": 32, "width": 32, "stride": 2}
    _, tally, _ = run(write_spec(job_folder, references={**missing, **size}))
    assert (tally.ok, tally.failed) == (1, 1)
    _, tally, rows = run(write_spec(job_folder, references={**missing, **size}))
    assert rows == [], "a failed row has ended"
    _, tally, rows = run(write_spec(job_folder, references={**missing, **size}), retry=("failed",))
    assert (tally.ok, tally.failed) == (0, 1)
    (job_folder / "late.mp4").write_bytes(whole)
    _, tally, rows = run(write_spec(job_folder, references={**missing, **size}))
    assert tally.ok == 1, "content that has come gives the row a new id"


class PoisonRow(FinishRow):
    """Kills its process for one seed, as a crash in native code would."""

    def _make(self, work, row):
        if work.seed == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._make(work, row)


def test_a_row_that_kills_its_process_is_quarantined_and_harms_no_other(job_folder, monkeypatch):

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(pipeline.graph, "FinishRow", PoisonRow)
    faults = {"worker_died_attempts": 2, "base_seconds": 0, "max_seconds": 0}
    (job_folder / "references/clip-0001.mp4").unlink()
    _, tally, _ = run(write_spec(job_folder, seeds=[1, 13, 2], faults=faults))
    assert (tally.ok, tally.quarantined) == (2, 1)
    rows = {row["seed"]: row for row in rows_of(job_folder / "out")}
    assert rows[13]["error_kind"] == "worker_died"
    assert rows[13]["attempts"] == 2
    assert [rows[seed]["attempts"] for seed in (1, 2)] == [1, 1]
    assert not list((job_folder / "out/attempts").rglob("*.json"))


def test_references_prompts_and_outputs_on_object_storage(s3_bucket, references):
    store = Store(f"s3://{s3_bucket}/in")
    store.put("refs/a b.mp4", (references / "clip-0000.mp4").read_bytes())
    store.put("prompts.csv", b"prompt\na red ball moving over grass\na blue star moving over sand\n")
    out = Store(f"s3://{s3_bucket}/out")
    folder = references.parent
    spec = write_spec(
        folder,
        references={"uri": f"s3://{s3_bucket}/in/refs", "frames": 9, "height": 32, "width": 32, "stride": 2},
        prompts={"uri": f"s3://{s3_bucket}/in/prompts.csv"},
        output={"uri": out.uri},
    )
    _, tally, _ = run(spec)
    assert (tally.ok, tally.failed) == (2, 0)
    assert Manifest(out).verify() == []
    assert out.exists("job.yaml")


def test_the_manifest_is_one_table_for_any_parquet_reader(job_folder):
    run(write_spec(job_folder, seeds=[1, 2]))
    table = pq.read_table(job_folder / "out/manifest")
    assert table.num_rows == 4
    settings = json.loads(table["spec_json"][0].as_py())
    assert settings["method"]["guided_steps"] == 2
    assert json.loads(table["execution_json"][0].as_py())["cfg"] == "batched"


class SlowRow(FinishRow):
    """Never ends for one seed."""

    def _make(self, work, row):
        if work.seed == 13:
            time.sleep(600)
        return super()._make(work, row)


def test_a_row_beyond_its_deadline_fails_and_harms_no_other(job_folder, monkeypatch):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(pipeline.graph, "FinishRow", SlowRow)
    (job_folder / "references/clip-0001.mp4").unlink()
    faults = {"row_deadline_s": 15, "base_seconds": 0, "max_seconds": 0}
    _, tally, _ = run(write_spec(job_folder, seeds=[1, 13, 2], faults=faults))
    assert (tally.ok, tally.failed) == (2, 1)
    row = next(row for row in rows_of(job_folder / "out") if row["seed"] == 13)
    assert (row["error_kind"], row["error_class"]) == ("deadline", "DeadlineExceeded")
    assert not list((job_folder / "out/attempts").rglob("*.*"))


def test_what_meets_every_row_stops_the_job_at_once_with_its_message(job_folder):
    spec = load_spec(write_spec(job_folder, seeds=list(range(50))))
    plan = make_plan(spec.job, spec.model.revision)
    with pytest.raises(JobStoppedError, match="planned with 0123"):
        run_plan(spec.job, plan, "0123", spec.yaml, lambda row: pytest.fail(str(row)))
    assert rows_of(job_folder / "out") == []
