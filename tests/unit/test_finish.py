"""Facts about `FinishRow`, called as Ray would call it, in this process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from running import write_spec

import pipeline.stages.generate as generate
from ditflow.mini import mini_folder
from jobs.clips import render_clips
from jobs.spec import load_spec
from pipeline.manifest import Manifest
from pipeline.plan import make_plan
from pipeline.run import _settled
from pipeline.stages.attempt import STOPPED, not_to_blame
from pipeline.stages.extract import without_motion
from pipeline.stages.generate import FinishRow, comparable
from pipeline.store import StoreError


@pytest.fixture
def spec(tmp_path):
    return load_spec(write_spec(tmp_path, references={"frames": 9, "height": 32, "width": 32}, method={"name": "none"}))


def planned(spec) -> dict:
    return without_motion(make_plan(spec.job, spec.model.revision).todo[0])


def test_a_row_that_has_ended_is_not_made_again_when_its_result_was_lost(spec, tmp_path):
    row, stage = planned(spec), FinishRow(spec.job, spec.model.revision)
    first = stage(dict(row))
    video = next((tmp_path / "out/videos").iterdir())
    written = video.stat().st_mtime_ns
    assert first["status"] == "ok"
    assert FinishRow(spec.job, spec.model.revision)(dict(row)) == first
    assert video.stat().st_mtime_ns == written
    assert spec.job.store().list("attempts") == []


def test_too_little_memory_leads_to_one_more_try_that_needs_less_and_says_so(spec, monkeypatch):
    real = generate.transfer_motion

    def hungry(backbone, *arguments, **settings):
        if backbone.execution.cfg != "serial":
            raise MemoryError("CUDA out of memory")
        return real(backbone, *arguments, **settings)

    monkeypatch.setattr(generate, "transfer_motion", hungry)
    assert FinishRow(spec.job, spec.model.revision)(planned(spec))["status"] == "ok"
    [row] = Manifest(spec.job.store()).read().to_pylist()
    execution = json.loads(row["execution_json"])
    assert row["attempts"] == 2
    assert (execution["checkpointing"], execution["cfg"], execution["vae_tiling"]) == ("on", "serial", "on")


def test_outputs_of_many_rows_lie_in_folders_by_their_ids(spec):
    job = replace(spec.job, output=replace(spec.job.output, spread=True))
    row = planned(spec)
    row_id = json.loads(row["work"])["row_id"]
    FinishRow(job, spec.model.revision)(row)
    assert job.store().list("videos") == [f"videos/{row_id[:2]}/{row_id}.mp4"]
    assert Manifest(job.store()).verify() == []
    assert make_plan(spec.job, spec.model.revision).todo == [], "the row is the same wherever its output lies"


@pytest.mark.parametrize(("rows", "asked", "settled"), [(99_999, None, False), (100_000, None, True), (9, True, True)])
def test_outputs_are_spread_from_a_hundred_thousand_rows_on(spec, rows, asked, settled):
    job = replace(spec.job, output=replace(spec.job.output, spread=asked))
    assert _settled(job, rows).output.spread is settled


@pytest.fixture
def lost_model(tmp_path) -> Path:
    """A model folder whose weights are gone after the plan was made."""
    return Path(shutil.copytree(mini_folder("mini"), tmp_path / "model"))


def test_a_model_that_cannot_load_stops_the_job_and_records_nothing(tmp_path, lost_model):
    size = {"frames": 9, "height": 32, "width": 32}
    file = write_spec(tmp_path, references=size, method={"name": "none"}, model={"path": str(lost_model)})
    spec = load_spec(file)
    row = planned(spec)
    next((lost_model / "transformer").glob("*.safetensors")).unlink()
    told = FinishRow(spec.job, spec.model.revision)(row)
    assert told["status"] == STOPPED
    assert str(lost_model) in told["error_message"]
    assert Manifest(spec.job.store()).statuses() == {}


def test_a_fault_of_the_job_in_an_earlier_stage_is_passed_on_and_not_recorded(spec):
    fault = not_to_blame(StoreError("the bucket is gone")).fault_json()
    told = FinishRow(spec.job, spec.model.revision)({**planned(spec), "fault": fault})
    assert (told["status"], told["error_message"]) == (STOPPED, "the bucket is gone")
    assert Manifest(spec.job.store()).statuses() == {}


def test_a_motion_that_the_job_stored_and_that_is_gone_stops_the_job_and_fails_no_row(tmp_path):
    size = {"frames": 9, "height": 32, "width": 32}
    render_clips(tmp_path / "references", count=1, seed=0)
    spec = load_spec(write_spec(tmp_path, references={"uri": str(tmp_path / "references"), **size}))
    uri = spec.job.store().uri_of("amf/0.safetensors")
    row = {**planned(spec), "amf_uri": uri}
    told = FinishRow(spec.job, spec.model.revision)(row)
    assert told["status"] == STOPPED
    assert "amf/0.safetensors is gone" in told["error_message"]
    assert Manifest(spec.job.store()).statuses() == {}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((17, 64, 64), (64, 64)),
        ((17, 128, 128), (128, 128)),
        ((25, 64, 64), None),
        ((17, 64, 96), None),
    ],
)
def test_a_reused_reference_is_held_against_videos_of_its_own_length_and_shape(size, expected):
    video = {"frames": 17, "height": 64, "width": 64, "start": 3, "stride": 2, "fit": "crop"}
    shown = comparable(video, size)
    assert shown == (None if expected is None else {**video, "height": expected[0], "width": expected[1]})
    assert comparable(None, size) is None
