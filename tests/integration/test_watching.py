"""Facts about watching a real job: its log from driver and workers, and its status afterwards."""

import json
import shutil
from pathlib import Path

import pytest
from running import run, write_spec
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.manifest import Manifest
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def spec(tmp_path, references) -> Path:
    """One reference that is a clip, and one that is none."""
    (tmp_path / "references").mkdir()
    shutil.copy(references / "clip-0000.mp4", tmp_path / "references")
    (tmp_path / "references" / "broken.mp4").write_bytes(b"no video")
    return write_spec(tmp_path, prompts=["a red ball moving over grass", "a blue star moving over sand"])


def test_every_line_of_a_jobs_log_is_an_event_and_the_output_tells_how_it_went(spec, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("DITFLOW_LOG", "json")
    _, tally, _ = run(spec)
    assert (tally.ok, tally.failed) == (2, 2)
    text = capfd.readouterr().err
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert "a red ball" not in text
    check_events(events, tmp_path / "out")

    result = CliRunner().invoke(app, ["status", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    counts = {key: facts[key] for key in ("planned", "todo", "ok", "failed", "motions")}
    assert counts == {"planned": 4, "todo": 0, "ok": 2, "failed": 2, "motions": 1}
    assert facts["rows_per_hour"] > 0
    assert 0 < facts["busy_share"] <= 1
    assert facts["in_flight"] == []
    assert len(facts["failures"]) == 2
    assert {"guidance", "denoise", "decode"} <= facts["seconds"].keys()


def check_events(events: list[dict], output: Path) -> None:
    """Every event of the job is told by whom it concerns, once, with what the manifest says."""
    rows = {row["row_id"]: row for row in Manifest(Store(str(output))).read().to_pylist()}
    assert {event["job"] for event in events} == {"test"}
    by_name: dict[str, list[dict]] = {}
    for event in events:
        by_name.setdefault(event["event"], []).append(event)
    (begun,), (ended,) = by_name["run_begun"], by_name["run_ended"]
    assert (begun["rows"], begun["todo"], ended["ok"], ended["failed"]) == (4, 4, 2, 2)
    assert {event["row_id"] for event in by_name["row_begun"]} == rows.keys()
    assert len(by_name["row_ended"]) == len(rows)
    for event in by_name["row_ended"]:
        row = rows[event["row_id"]]
        assert (event["status"], event["pid"], event["node"]) == (row["status"], row["process"], row["node"])
        assert event["seconds"]["total"] == row["seconds_total"]
        assert event.get("message") == row["error_message"]
    assert sorted(event["status"] for event in by_name["reference_read"]) == ["failed", "ok"]
    assert [event["status"] for event in by_name["motion_extracted"]] == ["ok"]
    (failed,) = by_name["attempt_failed"]
    assert (failed["stage"], failed["error_kind"], failed["again"]) == ("read", "permanent", False)
    assert {event["pid"] for event in by_name["row_ended"]} != {begun["pid"]}, "rows are made in other processes"
