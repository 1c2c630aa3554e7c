"""A short job that is killed once in every way. `make chaos` does it at length."""

from collections import Counter
from pathlib import Path

import pytest
from chaos.driver import KILLS, NEVER_ENDS
from chaos.storm import KINDS, Kill, Storm, draw_kills
from running import run, write_spec
from swift.server import SwiftServer

from jobs.spec import load_spec
from pipeline.faults import JobStoppedError
from pipeline.manifest import Manifest
from pipeline.plan import make_plan
from pipeline.run import run_plan
from pipeline.store import Store

ROWS = 14
KILLS_IN_TURN = (
    (1, "foreign lease files"),
    (2, "503 burst"),
    (3, "output moved"),
    (4, "driver"),
    (5, "node"),
    (6, "object server"),
    (8, "actor"),
)
"""After how many rows. What needs a job that goes on for a while comes early."""


def test_a_job_that_is_killed_in_every_way_loses_nothing_and_doubles_nothing(cluster, swift, tmp_path):
    storm = Storm(tmp_path, swift, ROWS, seed=1)
    report = storm.run([Kill(rows, kind) for rows, kind in KILLS_IN_TURN])
    assert report.kills == Counter(KINDS)
    assert report.statuses == {"ok": ROWS - 2, "failed": 1, "quarantined": 1}
    assert (report.lost, report.duplicates, report.innocents_lost, report.remade) == (0, 0, 0, 0)
    assert not report.two_drivers
    assert report.problems_after_cleaning == 0
    assert report.poison[KILLS]["error_kind"] == "worker_died"
    assert report.poison[NEVER_ENDS]["error_kind"] == "deadline"
    assert all(again <= flying for again, flying in zip(report.redone, report.in_flight, strict=True))
    assert report.outputs == storm.undisturbed()


def on_swift(swift: SwiftServer, folder: Path, references: Path, seeds: int) -> Path:
    """A job with a row for each seed, all of it on the server that can fail."""
    bucket, clip = f"s3://{swift.new_bucket()}", references / "clip-0000.mp4"
    stored = Store(f"{bucket}/in").put(clip.name, clip)
    return write_spec(
        folder,
        seeds=list(range(seeds)),
        references={"uri": stored.uri, "frames": 9, "height": 32, "width": 32, "stride": 2},
        output={"uri": f"{bucket}/out"},
        storage_options={"endpoint_url": swift.endpoint},
    )


def test_storage_that_throttles_every_second_request_fails_no_row(cluster, swift, references, tmp_path):
    spec = on_swift(swift, tmp_path, references, seeds=4)
    swift.faults.set([{"status": 503, "rate": 0.5, "times": 60}])
    _, tally, _ = run(spec)
    assert swift.faults.counts()["503"] > 10
    assert (tally.ok, tally.not_ok) == (4, 0)


def test_storage_that_refuses_everything_stops_the_job_with_one_message(cluster, swift, references, tmp_path):
    spec = load_spec(on_swift(swift, tmp_path, references, seeds=20))
    plan, ended = make_plan(spec.job, spec.model.revision), []

    def on_row(row):
        ended.append(row)
        swift.faults.set([{"status": 403}])

    with pytest.raises(JobStoppedError, match="access was refused"):
        run_plan(spec.job, plan, spec.model.revision, spec.yaml, on_row)
    swift.faults.clear()
    assert len(Manifest(spec.job.store()).statuses()) <= len(ended) + 1, "at most the row that was being written"


def test_kills_are_drawn_from_the_seed_alone_and_of_every_kind():
    assert draw_kills(25, 60, seed=3) == draw_kills(25, 60, seed=3) != draw_kills(25, 60, seed=4)
    assert {kill.kind for kill in draw_kills(25, 60, seed=3)} == set(KINDS)
    assert all(0 < kill.rows < 58 for kill in draw_kills(25, 60, seed=3))
