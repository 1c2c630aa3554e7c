"""Facts about what Prometheus is served while a job runs: a real Ray head, the real command line, and the manifest."""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from heads import end, environment, new_options, started
from prometheus_client.parser import text_string_to_metric_families
from running import write_spec

from pipeline.manifest import Manifest
from pipeline.store import Store
from pipeline.telemetry import LEAST_SECONDS, METRICS, PHASES

REPORTS = {"RAY_metrics_report_interval_ms": "1000"}
NAME = 'night "kings" \\ 1'
ROWS, FAILED = 6, 3
SERVED_S = 300
LONG_ROWS = {
    "method": {"name": "ditflow", "optimize": "latent", "guided_steps": 10, "iterations": 10},
    "sampling": {"steps": 25},
}
"""Rows that outlast a report or two: what is in flight for a shorter time is not always seen."""


@dataclass(frozen=True)
class Head:
    """A Ray head: where drivers connect, and where its metrics are."""

    address: str
    metrics: str

    def samples(self) -> list:
        """All samples that are served now, as Prometheus would read them."""
        families = text_string_to_metric_families(requests.get(self.metrics, timeout=60).text)
        return [one for family in families for one in family.samples]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head without a dashboard: its agent serves the metrics all the same."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = new_options(folder, dashboard=False)
        found = Head(f"127.0.0.1:{options['port']}", f"http://127.0.0.1:{options['metrics-export-port']}/metrics")
        ray = started(options, lambda: bool(found.samples()), Path(folder, "start.log"), **REPORTS)
        yield found
        end(ray)


@dataclass
class Watched:
    """A job that was watched from its beginning to its end: its manifest, and all that was served."""

    rows: list[dict]
    seen: dict[str, list]
    """Every sample of ours that was served at some time, by its series."""
    operators: set[str]
    """Operators of Ray Data that were named at some time."""
    last: list
    """What was served when all had been told."""

    def total(self, series: str, **labels: str) -> float:
        """The sum over processes of what was served last."""
        return sum(one.value for one in self.last if one.name == series and labels.items() <= one.labels.items())

    def values(self, series: str, **labels: str) -> set[float]:
        """All values that were served at some time."""
        return {one.value for one in self.seen.get(series, []) if labels.items() <= one.labels.items()}


@pytest.fixture(scope="module")
def watched(head, references, tmp_path_factory) -> Watched:
    """Two references, of which one is no video, and three seeds."""
    folder = tmp_path_factory.mktemp("watched")
    clips = folder / "references"
    clips.mkdir()
    clip = min(references.glob("*.mp4"))
    (clips / clip.name).write_bytes(clip.read_bytes())
    (clips / "broken.mp4").write_bytes(b"no video")
    spec = write_spec(folder, name=NAME, seeds=[1, 2, 3], **LONG_ROWS)
    seen: dict[str, list] = {}
    operators: set[str] = set()
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs", "run", str(spec)],
        env={**environment(), **REPORTS, "RAY_ADDRESS": head.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while job.poll() is None:
        samples = head.samples()
        keep(seen, samples)
        operators |= {one.labels["operator"] for one in samples if "operator" in one.labels}
        time.sleep(0.2)
    assert job.stdout is not None
    assert job.returncode == 3, job.stdout.read()
    rows = Manifest(Store(str(folder / "out"))).read().to_pylist()
    return Watched(rows, seen, operators, served_at_last(head, seen))


def keep(seen: dict[str, list], samples: list) -> None:
    for one in samples:
        if one.name.startswith("ray_ditflow") and one not in seen.setdefault(one.name, []):
            seen[one.name].append(one)


def served_at_last(head: Head, seen: dict[str, list]) -> list:
    """Wait until the rows that have ended are served, which processes tell as they end."""
    deadline = time.monotonic() + SERVED_S
    while time.monotonic() < deadline:
        samples = head.samples()
        keep(seen, samples)
        if sum(one.value for one in samples if one.name == "ray_ditflow_rows_total") >= ROWS:
            return samples
        time.sleep(0.5)
    raise AssertionError(f"no {ROWS} rows were served: {[one for one in samples if 'ditflow' in one.name]}")


def positive(rows: list[dict], phase: str) -> list[float]:
    """The seconds that rows spent on a phase, of those that went through it."""
    ended = [row for row in rows if row["status"] == "ok" or phase != "total"]
    return [row[f"seconds_{phase}"] for row in ended if (row[f"seconds_{phase}"] or 0) >= LEAST_SECONDS]


def test_rows_are_counted_as_the_manifest_has_them(watched):
    ended = Counter((row["status"], row["error_kind"] or "none") for row in watched.rows)
    assert ended == {("ok", "none"): ROWS - FAILED, ("failed", "permanent"): FAILED}
    for (status, kind), count in ended.items():
        labels = {"job_name": NAME, "variant": "ditflow", "stage": "generate"}
        assert watched.total("ray_ditflow_rows_total", **labels, status=status, error_kind=kind) == count
    assert watched.total("ray_ditflow_rows_total") == len(watched.rows) == ROWS


def test_attempts_are_counted_by_stage(watched):
    """A row of a reference that cannot be read is not attempted; it has the attempts that its reference had."""
    made = sum(row["attempts"] for row in watched.rows if row["status"] == "ok")
    assert watched.total("ray_ditflow_attempts_total", stage="generate") == made == ROWS - FAILED
    assert watched.total("ray_ditflow_attempts_total", stage="read") == 2
    assert watched.total("ray_ditflow_attempts_total", stage="extract") == 1
    assert watched.total("ray_ditflow_references_extracted_total") == 1


@pytest.mark.parametrize("phase", PHASES)
def test_seconds_of_a_phase_are_those_of_the_manifest(watched, phase):
    seconds = positive(watched.rows, phase)
    assert seconds or phase == "learn", "no row of this job learns"
    assert watched.total("ray_ditflow_work_seconds_total", phase=phase) == pytest.approx(sum(seconds))
    assert watched.total("ray_ditflow_phase_seconds_count", phase=phase) == len(seconds)
    [histogram] = [metric for metric in METRICS if metric.kind == "histogram"]
    for bound in histogram.buckets:
        below = watched.total("ray_ditflow_phase_seconds_bucket", phase=phase, le=str(float(bound)))
        assert below == sum(one <= bound for one in seconds)


def test_losses_and_memory_that_were_served_are_those_of_rows(watched):
    """Of each process the newest: what was served between two rows is not always seen."""
    for series, column, labels in [
        ("ray_ditflow_loss", "loss_first", {"at": "first"}),
        ("ray_ditflow_loss", "loss_final", {"at": "final"}),
        ("ray_ditflow_peak_memory_bytes", "peak_memory_bytes", {}),
    ]:
        served = watched.values(series, job_name=NAME, **labels)
        assert served and served <= {row[column] for row in watched.rows}


def test_rows_left_and_in_flight_are_served_while_the_job_runs(watched):
    assert watched.values("ray_ditflow_rows_planned", job_name=NAME) == {ROWS}
    left = watched.values("ray_ditflow_rows_left", job_name=NAME)
    assert ROWS in left and left <= set(range(ROWS + 1))
    for stage in ("read", "extract", "generate"):
        assert watched.values("ray_ditflow_rows_in_flight", stage=stage) <= {0, 1}
    assert 1 in watched.values("ray_ditflow_rows_in_flight")


def test_ray_calls_operators_by_what_they_do(watched):
    for name in ("read_reference", "ExtractMotion", "fan_out", "GenerateVideo"):
        assert any(f"({name})" in operator for operator in watched.operators), watched.operators


def test_no_label_of_ours_holds_a_rows_id_prompt_or_uri(watched):
    texts = [row[column] for row in watched.rows for column in ("row_id", "prompt", "reference_uri")]
    served = [one for samples in watched.seen.values() for one in samples]
    assert served
    for one in served:
        assert not any(text in value for text in texts for value in one.labels.values()), one
