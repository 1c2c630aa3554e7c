"""A driver that is killed or stopped in the middle of a job of twelve rows, and the same command again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import write_spec

from jobs.clips import render_clips
from pipeline.faults import Ledger
from pipeline.manifest import Manifest
from pipeline.store import Store

ROWS = 12


def start(spec: Path, *options: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen:
    """The command line in a process of its own, with a Ray of its own, as the leader of a session."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs", "run", str(spec), *options]
    return subprocess.Popen(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_rows(driver: subprocess.Popen, manifest: Manifest, count: int) -> None:
    while len(manifest.statuses()) < count:
        assert driver.poll() is None, driver.stderr.read().decode()
        time.sleep(0.05)


def outputs(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (folder / "videos").glob("*.mp4")}


def test_a_killed_job_goes_on_where_it_was(tmp_path):
    render_clips(tmp_path / "references", count=2, seed=0)
    spec = write_spec(tmp_path, seeds=list(range(ROWS // 2)))
    out = tmp_path / "out"
    manifest, ledger = Manifest(Store(str(out))), Ledger(Store(str(out)))

    driver = start(spec)
    wait_for_rows(driver, manifest, ROWS // 3)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_job_leaves_nothing_behind_and_says_how_to_go_on(tmp_path, number):
    render_clips(tmp_path / "references", count=1, seed=0)
    spec = write_spec(tmp_path, seeds=list(range(ROWS)), sampling={"steps": 20}, faults={"lease_s": 10})
    store = Store(str(tmp_path / "out"))
    manifest = Manifest(store)

    driver = start(spec)
    wait_for_rows(driver, manifest, 1)
    second = start(spec)
    _, refusal = second.communicate()
    assert (second.returncode, driver.poll()) == (1, None)
    assert f"another run is working on this output (process {driver.pid} on " in " ".join(refusal.decode().split())

    # A service manager ends the driver; a terminal that closes reaches every process of it.
    os.kill(driver.pid, number) if number == signal.SIGTERM else os.killpg(driver.pid, number)
    _, message = driver.communicate()
    assert driver.returncode == 128 + number
    assert "Run the same command again to go on" in message.decode()
    assert 1 <= len(manifest.statuses()) < ROWS
    assert Ledger(store).unfinished() == {}, "no try is held against the row in flight"
    assert store.list("lease") == []

    again = start(spec)
    _, errors = again.communicate()
    assert again.returncode == 0, errors.decode()
    assert {row["attempts"] for row in manifest.read().to_pylist()} == {1}
    assert manifest.verify() == []


def test_a_job_outlives_the_readers_of_its_output_and_its_terminal(tmp_path):
    render_clips(tmp_path / "references", count=1, seed=0)
    spec = write_spec(tmp_path, seeds=list(range(ROWS)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        driver = start(spec, "--json", stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, before)
    first = driver.stdout.readline()
    assert first, driver.stderr.read().decode()
    assert json.loads(first)["status"] == "ok"
    driver.stdout.close()
    driver.stderr.close()
    os.killpg(driver.pid, signal.SIGHUP)
    assert driver.wait() == 0
    manifest = Manifest(Store(str(tmp_path / "out")))
    assert [*manifest.statuses().values()] == ["ok"] * ROWS
