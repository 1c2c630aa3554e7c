"""The command line with two rows that are poison: one kills its process, one never ends; the others take their time.

It also bears witness: a driver at work holds a lock of the operating system on a file beside its spec, and one that
finds the lock taken says so in another.
"""

import fcntl
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pipeline.graph
import pipeline.run
from jobs.cli import main
from pipeline.run import run_plan
from pipeline.stages.generate import FinishRow

KILLS, NEVER_ENDS = "a prompt that kills its process", "a prompt that never ends"
PAUSE_S = 0.5  # so that most kills meet a row that is being made


class PoisonRow(FinishRow):
    """Makes rows as ever, but for the poison, and begins none while the job is held."""

    def __call__(self, row):
        while hold(self._job.output.uri).exists():
            time.sleep(0.1)
        return super().__call__(row)

    def _make(self, work, row):
        if work.prompt == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600 if work.prompt == NEVER_ENDS else PAUSE_S)
        return super()._make(work, row)


def run_with_witness(*args, **kwargs):
    """Run a plan, and leave a note if another driver is at work on it."""
    spec = Path(sys.argv[-1])
    with spec.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            two_drivers(spec).touch()
        return run_plan(*args, **kwargs)


def hold(output_uri: str) -> Path:
    """The file that holds a job as long as it is there: its processes are on this machine."""
    return Path(tempfile.gettempdir()) / f"hold-{hashlib.sha256(output_uri.encode()).hexdigest()[:16]}"


def two_drivers(spec: Path) -> Path:
    """The note that two drivers were at work at once."""
    return spec.with_suffix(".two-drivers")


if __name__ == "__main__":
    pipeline.graph.FinishRow = PoisonRow
    pipeline.run.run_plan = run_with_witness
    main()
