"""A driver that is killed with SIGKILL in the middle of a job of twelve rows, and the same command again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from running import write_spec

from jobs.clips import render_clips
from pipeline.faults import Ledger
from pipeline.manifest import Manifest
from pipeline.store import Store

ROWS = 12


def start(spec: Path) -> subprocess.Popen:
    """The command line in a process of its own, with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs", "run", str(spec)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def outputs(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (folder / "videos").glob("*.mp4")}


def test_a_killed_job_goes_on_where_it_was(tmp_path):
    render_clips(tmp_path / "references", count=2, seed=0)
    spec = write_spec(tmp_path, seeds=list(range(ROWS // 2)))
    out = tmp_path / "out"
    manifest, ledger = Manifest(Store(str(out))), Ledger(Store(str(out)))

    driver = start(spec)
    while len(manifest.statuses()) < ROWS // 3:
        assert driver.poll() is None, driver.stderr.read().decode()
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(5)  # the cluster dies with its driver; a row in flight may still end before
    ended, in_flight = manifest.statuses(), ledger.unfinished()
    assert ROWS // 3 <= len(ended) < ROWS
    before = outputs(out)

    again = start(spec)
    _, errors = again.communicate()
    assert again.returncode == 0, errors.decode()
    rows = manifest.read().to_pylist()
    assert len(rows) == len({row["row_id"] for row in rows}) == ROWS
    assert {row["status"] for row in rows} == {"ok"}
    assert manifest.verify() == []
    assert ledger.unfinished() == {}

    after = outputs(out)
    assert {name: after[name] for name in before if name.removesuffix(".mp4") in ended} == {
        name: content for name, content in before.items() if name.removesuffix(".mp4") in ended
    }, "a finished row is not touched"
    redone = {row["row_id"] for row in rows if row["attempts"] > 1}
    assert redone <= set(in_flight)
    assert len(in_flight) <= 1, "one generating actor has one row in flight"

    repeated = sorted(ended)[0]
    (out / f"manifest/{repeated}.parquet").unlink()
    third = start(spec)
    third.communicate()
    assert third.returncode == 0
    assert outputs(out)[f"{repeated}.mp4"][1] == after[f"{repeated}.mp4"][1], "the same row has the same bytes"
