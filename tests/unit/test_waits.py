"""A command that waits says what for: which address, and how much of the work is done."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest

import jobs.waiting
from jobs.waiting import tell_of_waits
from pipeline.job import Job, Output, References
from pipeline.plan import make_plan
from pipeline.store import StoreError, patiently
from pipeline.waits import counted, long_waits, waiting


class Gate(threading.Event):
    """Released by the test."""


@pytest.fixture
def slow() -> Iterator[tuple[str, Gate]]:
    """A web server that lets everybody wait until its gate is opened: its address, and the gate."""
    gate = Gate()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            gate.wait()
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *_) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", gate
        gate.set()
        server.shutdown()


def waits_with(*parts: str) -> str:
    """What this process waits for, as soon as it holds all of these parts."""
    while not all(part in (told := "; ".join(long_waits(0, most=50))) for part in parts):
        time.sleep(0.01)
    return told


def test_what_is_waited_for_is_known_as_long_as_it_is():
    with waiting(lambda: "a bus"):
        assert long_waits(0) == ["a bus (for 0:00:00)"]
        assert long_waits(60) == []
    assert long_waits(0) == []


def test_of_many_things_it_is_known_how_many_are_done():
    done = counted(iter("abc"), "letters", 3)
    assert (next(done), long_waits(0)) == ("a", ["letters, 1 of 3 so far (for 0:00:00)"])
    assert ([*done], long_waits(0)) == (["b", "c"], [])


def test_a_plan_that_waits_for_storage_names_the_address_and_counts_its_inputs(slow, tmp_path):
    address, gate = slow
    uris = tuple(f"{address}/{name}.mp4?sig=s3cr3t" for name in "abc")
    job = Job("extract", "test", Output(str(tmp_path)), references=References(uris, frames=9, height=32, width=32))
    planning = threading.Thread(target=make_plan, args=(job, "revision"))
    planning.start()
    told = waits_with("the inputs to be hashed, 0 of 3 so far", f"the storage to look up '{address}/a.mp4'")
    assert "s3cr3t" not in told
    gate.set()
    planning.join()
    assert long_waits(0) == []


def test_storage_that_is_tried_again_is_named_with_its_error():
    def fail() -> None:
        raise StoreError("the disk is away", transient=True)

    told: list[str] = []
    with pytest.raises(StoreError):
        patiently(fail, 0.05, sleep=lambda seconds: told.extend(long_waits(0)) or time.sleep(seconds))
    assert told[0].startswith("storage that is tried again: the disk is away")


def test_waits_are_said_once_they_are_long_and_then_now_and_then(monkeypatch):
    monkeypatch.setattr(jobs.waiting, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(jobs.waiting, "LONG_S", 0.0)
    monkeypatch.setattr(jobs.waiting, "AGAIN_S", 0.0)
    said, twice = [], threading.Event()
    numbers = count()

    def say(text: str) -> None:
        said.append(text)
        if next(numbers):
            twice.set()

    tell_of_waits(say)
    with waiting(lambda: "a bus"):
        twice.wait()
    assert said[0].startswith("still waiting: a bus")


def test_a_command_that_waits_says_so_on_stderr_and_keeps_its_stdout_clean(slow, tmp_path):
    address, gate = slow
    spec = {"kind": "extract", "name": "t", "references": {"uri": [f"{address}/a.mp4", f"{address}/b.mp4"]}}
    spec |= {"output": {"uri": str(tmp_path / "out")}, "references": {**spec["references"], "frames": 9}}
    spec["references"] |= {"height": 32, "width": 32}
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    program = (
        "import jobs.waiting as w; w.LOOK_EVERY_S, w.LONG_S = 0.1, 0.0\n"
        "import sys; sys.argv = ['ditflow', 'plan', sys.argv[1], '--json']\n"
        "from jobs.cli import main; main()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "job.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as plan:
        line = next(line for line in plan.stderr if address in line)
        assert line.startswith("still waiting: ")
        gate.set()
        out, _ = plan.communicate()
    assert [json.loads(line)["todo"] for line in out.splitlines()] == [2]
