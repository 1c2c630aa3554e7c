"""A run that is stopped gives the rows in flight their tries back, whatever stops it, and however often."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray

import pipeline.run
from pipeline.faults import Ledger
from pipeline.job import Job, Output
from pipeline.lease import held
from pipeline.run import sole_run
from pipeline.store import Store


@pytest.fixture
def begun(monkeypatch, tmp_path) -> Ledger:
    """The ledger of an output with a row that was begun; Ray runs, as far as can be seen."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    ledger = Ledger(Store(str(tmp_path)))
    ledger.begin("0a", {"stage": "generate", "node": "host", "pid": 1})
    return ledger


def stop(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), sole_run(Job("synthesize", "test", Output(str(folder))), print):
        raise KeyboardInterrupt
    assert held(Store(str(folder))) is None, "the lease was given back"


def test_rows_in_flight_get_their_tries_back(begun, tmp_path):
    stop(tmp_path)
    assert begun.unfinished() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_keep_the_tries(begun, monkeypatch, tmp_path, number):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupted)
    monkeypatch.setattr(pipeline.run, "_end_workers", lambda _: signal.raise_signal(number))
    try:
        stop(tmp_path)
        assert signal.getsignal(number) is interrupted
    finally:
        signal.signal(number, before)
    assert begun.unfinished() == {}


def test_a_ray_that_does_not_end_does_not_keep_the_tries(begun, monkeypatch, tmp_path):
    """What stops a whole group of processes, such as `timeout`, has ended Ray's before the driver asks them to end."""
    never = threading.Event()
    monkeypatch.setattr(ray, "shutdown", never.wait)
    monkeypatch.setattr(pipeline.run, "_HURRY_S", 0.01)
    stop(tmp_path)
    assert begun.unfinished() == {}
    never.set()


def test_a_run_that_is_stopped_before_its_first_row_leaves_the_tries_of_earlier_ones(begun, monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    stop(tmp_path)
    assert begun.unfinished() == {"0a": 1}


def test_what_closes_after_the_end_of_ray_does_not_start_it_anew():
    program = (
        "import pipeline.source, ray\n"
        "source = object.__new__(pipeline.source.Source)\n"
        "source._ended = None\n"
        "source.close()\n"
        "print(ray.is_initialized())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
