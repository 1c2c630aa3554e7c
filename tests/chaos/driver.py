"""The command line with two rows that are poison: one kills its process, one never ends; the others take their time."""

import os
import signal
import time

import pipeline.graph
from jobs.cli import main
from pipeline.stages.generate import FinishRow

KILLS, NEVER_ENDS = "a prompt that kills its process", "a prompt that never ends"
PAUSE_S = 0.5  # so that most kills meet a row that is being made


class PoisonRow(FinishRow):
    """Makes rows as ever, but for the poison."""

    def _make(self, work, row):
        if work.prompt == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600 if work.prompt == NEVER_ENDS else PAUSE_S)
        return super()._make(work, row)


if __name__ == "__main__":
    pipeline.graph.FinishRow = PoisonRow
    main()
