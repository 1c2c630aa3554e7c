"""Facts about what is told to Ray's metrics: which figures, how often, and under which labels."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from running import write_spec

from jobs.spec import load_spec
from pipeline import telemetry
from pipeline.faults import Policy
from pipeline.job import Job, Output
from pipeline.manifest import Manifest
from pipeline.plan import make_plan
from pipeline.record import ERROR_KINDS, STATUSES, make_row
from pipeline.stages.attempt import Desk
from pipeline.stages.extract import without_motion
from pipeline.stages.generate import FinishRow
from pipeline.telemetry import METRICS, PHASES, STAGES

PROMETHEUS_OWN = {"job", "instance", "pod", "container", "namespace", "endpoint", "le", "quantile"}
RAYS_OWN = {"Component", "IsHeadNode", "JobId", "NodeAddress", "SessionName", "Version", "WorkerId"}
UNBOUNDED = {"row_id", "motion_id", "prompt", "uri", "reference_uri", "output_uri", "seed", "error_message", "node"}
DONE = {
    "row_id": "0a1b",
    "job": "nightly",
    "variant": "flow",
    "status": "ok",
    "output_uri": "out/0a1b.mp4",
    "output_sha256": "00",
    "output_bytes": 1,
    "started_at": datetime.now(UTC),
}
FAILED = {**DONE, "status": "failed", "error_kind": "permanent", "error_class": "VideoError", "error_message": "broken"}


class Told(list):
    """What was recorded: (metric, value, labels), in order."""

    def values(self, name: str, **labels: str) -> list[float]:
        return [value for metric, value, own in self if metric == name and labels.items() <= own.items()]


@pytest.fixture
def told(monkeypatch) -> Told:
    found, known = Told(), {metric.name: metric for metric in METRICS}

    def recorder(name):
        def record(value, labels):
            assert set(labels) == set(known[name].labels), name
            assert all(isinstance(text, str) for text in labels.values())
            assert value > 0 or known[name].kind != "counter", "Ray refuses such a count"
            found.append((name, value, dict(labels)))

        return record

    monkeypatch.setattr(telemetry, "_recorder", recorder)
    return found


# ----------------------------------------------------------------------------------------------------- the table


def test_names_are_ours_and_labels_are_bounded_and_nobody_elses():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("ditflow_") and not metric.name.endswith("_total")
        assert metric.meaning
        assert not set(metric.labels) & (PROMETHEUS_OWN | RAYS_OWN | UNBOUNDED)
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_ray_takes_every_metric_as_it_is_defined():
    for metric in METRICS:
        telemetry._recorder.__wrapped__(metric.name)(1.0, dict.fromkeys(metric.labels, "x"))


# --------------------------------------------------------------------------------------------------------- rows


def test_a_row_that_is_ok_tells_its_seconds_losses_memory_and_banks(told):
    figures = {f"seconds_{phase}": float(number) for number, phase in enumerate(PHASES, start=1)}
    row = make_row(**DONE, **figures, loss_first=0.5, loss_final=0.25, peak_memory_bytes=7, bank_loads=2)
    telemetry.row_ended(row)
    own = {"job_name": "nightly", "variant": "flow"}
    assert told.values("ditflow_rows", **own, stage="generate", status="ok", error_kind="none") == [1]
    for number, phase in enumerate(PHASES, start=1):
        for name in ("ditflow_phase_seconds", "ditflow_work_seconds"):
            assert told.values(name, **own, phase=phase) == [number]
    assert told.values("ditflow_loss", **own, at="first") == [0.5]
    assert told.values("ditflow_loss", **own, at="final") == [0.25]
    assert told.values("ditflow_peak_memory_bytes") == [7]
    assert told.values("ditflow_bank_loads") == [2]


def test_what_a_row_did_not_do_is_not_told(told):
    telemetry.row_ended(make_row(**DONE, seconds_read=0.0, seconds_learn=3e-7, seconds_total=2.0, bank_loads=0))
    assert [(name, value) for name, value, _ in told] == [
        ("ditflow_rows", 1),
        ("ditflow_phase_seconds", 2.0),
        ("ditflow_work_seconds", 2.0),
    ]


def test_a_failed_row_tells_its_kind_of_error_and_not_how_long_a_row_takes(told):
    telemetry.row_ended(make_row(**FAILED, seconds_read=3.0, seconds_total=0.001))
    assert told.values("ditflow_rows", status="failed", error_kind="permanent") == [1]
    assert {labels["phase"] for name, _, labels in told if name == "ditflow_work_seconds"} == {"read"}


def test_a_loss_below_nothing_is_told(told):
    telemetry.row_ended(make_row(**DONE, loss_first=-0.5, loss_final=-2.0))
    assert told.values("ditflow_loss") == [-0.5, -2.0]


def test_a_measured_row_is_counted_for_its_stage(told):
    telemetry.row_measured("nightly", "flow", None, 4.0)
    telemetry.row_measured("nightly", "flow", "transient", 9.0)
    assert told.values("ditflow_rows", stage="evaluate", status="ok", error_kind="none") == [1]
    assert told.values("ditflow_rows", stage="evaluate", status="failed", error_kind="transient") == [1]
    assert told.values("ditflow_work_seconds") == [4.0]


def test_what_cannot_be_told_costs_no_row_and_is_logged(monkeypatch, caplog):
    def recorder(name):
        raise RuntimeError("the metrics are gone")

    monkeypatch.setattr(telemetry, "_recorder", recorder)
    telemetry.row_ended(make_row(**DONE))
    assert "ditflow_rows was not recorded: RuntimeError: the metrics are gone" in caplog.text


# ----------------------------------------------------------------------------------------------------- attempts


@pytest.fixture
def desk(tmp_path) -> Desk:
    policy = Policy(attempts=3, base_seconds=0, max_seconds=0)
    return Desk(Job("synthesize", "nightly", Output(str(tmp_path / "out")), faults=policy), "extract")


def test_work_is_in_flight_from_its_first_attempt_to_its_last(desk, told):
    errors: Iterator[Exception] = iter([ConnectionResetError("lost"), ValueError("bad")])

    def work():
        raise next(errors)

    outcome = desk.attempt("0a1b", work, lambda seconds: None)
    flight, attempt = ("ditflow_rows_in_flight", "ditflow_attempts")
    assert [(name, value) for name, value, _ in told] == [(flight, 1), (attempt, 1), (attempt, 1), (flight, 0)]
    assert outcome.attempts == sum(told.values(attempt, job_name="nightly", stage="extract"))


def test_nothing_is_in_flight_behind_an_error_that_stops_the_job(desk, told):
    desk.ledger.begin = None  # what is called raises
    with pytest.raises(TypeError):
        desk.attempt("0a1b", lambda: None)
    assert told.values("ditflow_rows_in_flight") == [1, 0]


def test_work_that_is_given_up_before_it_is_begun_is_no_attempt(desk, told):
    for _ in range(desk.job.faults.worker_died_attempts):
        desk.ledger.begin("0a1b", {})
    assert desk.attempt("0a1b", lambda: pytest.fail("it was run")).fault.kind == "worker_died"
    assert told.values("ditflow_attempts") == []


def test_a_gauge_is_set_again_while_its_process_lives(monkeypatch):
    monkeypatch.setattr(telemetry, "_REPEAT_S", 0.001)
    sets, again = Counter(), threading.Event()

    class Remembering:
        def set(self, value, labels):
            sets[value, labels["stage"]] += 1
            if sets[2, "read"] > 3 and sets[5, "generate"] > 3:
                again.set()

    gauge = telemetry._LastingGauge(Remembering())
    gauge.set(1, {"stage": "read"})
    gauge.set(5, {"stage": "generate"})
    gauge.set(2, {"stage": "read"})
    assert again.wait(60)


# ------------------------------------------------------------------------------------------------------ a real row


def test_no_label_holds_what_a_row_is_about(tmp_path, told):
    prompt, sizes = "a prompt that nobody else has", {"frames": 9, "height": 32, "width": 32}
    spec = load_spec(write_spec(tmp_path, method={"name": "none"}, prompts=[prompt], references=sizes))
    row = without_motion(make_plan(spec.job, spec.model.revision).todo[0])
    assert FinishRow(spec.job, spec.model.revision)(row)["status"] == "ok"
    [record] = Manifest(spec.job.store()).read().to_pylist()
    labels = json.dumps([own for _, _, own in told])
    for text in (prompt, record["row_id"], str(tmp_path), record["output_uri"], record["node"]):
        assert text not in labels
    bounded = {"none", spec.job.name, *STAGES, *STATUSES, *ERROR_KINDS, *PHASES, "first", "final"}
    assert {text for _, _, own in told for text in own.values()} <= bounded
    assert sum(told.values("ditflow_attempts")) == record["attempts"]
    assert told.values("ditflow_work_seconds", phase="total") == [record["seconds_total"]]


def test_a_row_whose_result_was_lost_is_counted_once(tmp_path, told):
    sizes = {"frames": 9, "height": 32, "width": 32}
    spec = load_spec(write_spec(tmp_path, method={"name": "none"}, references=sizes))
    row = without_motion(make_plan(spec.job, spec.model.revision).todo[0])
    for _ in range(2):
        FinishRow(spec.job, spec.model.revision)(dict(row))
    assert told.values("ditflow_rows") == [1]
