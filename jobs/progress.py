"""The progress of `ditflow run`: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from jobs.status import duration
from jobs.table import Screen, printable
from pipeline.cluster import unplaced_actors
from pipeline.pace import RECENT_ROWS, RECENT_S, busy_share, recent_since, rows_per_hour
from pipeline.status import Whereabouts, longest_at_work, whereabouts
from pipeline.store import Store, StoreError
from pipeline.waits import long_waits

LOOK_EVERY_S, LINE_EVERY_S = 10.0, 60.0
"""How often the output is looked at for where the work is, and a line printed where there is no terminal."""
STILL_S = 60.0
"""After so long without a row that ends or work that begins, it is said what the job waits for."""


_NOTHING_KNOWN = "a process to load its model, or Ray to start the next task: every process is up, and none has begun"


@dataclass(frozen=True)
class _Ended:
    """A row: when the driver heard of its end, when its process ended it, how long it took, and who made it."""

    heard: float
    ended: float
    seconds: float
    process: tuple[str, int]


class RowProgress:
    """Rows done, rows per hour of the last while, time left, how busy the actors are, the newest loss, and failures.

    On a terminal a bar; elsewhere a line every minute, without a character that commands a terminal. Use it as a
    context: a thread of it looks at where the work is.

    store: the job's output, looked at for `motions`, the references' motions that the rows need, and rows in flight.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        screen: Screen,
        store: Store,
        motions: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name, self._rows, self._screen, self._clock = name, rows, screen, clock
        self._store, self._motions = Store(store.uri, store.storage_options), motions  # the next look is its patience
        self._done = self._failed = 0
        self._newest_loss: float | None = None
        self._begun = self._newest = self._said = self._moved = clock()
        self._waits_for: list[str] = []
        self._recent: deque[_Ended] = deque()
        self._where: Whereabouts | None = None
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._shows_bar = screen.is_terminal and not screen.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows {task.fields[facts]}", markup=False),
            console=screen,
            disable=rows == 0 or not self._shows_bar,
            # Rows as JSON go to a file or a program, not to the bar's terminal.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._task: TaskID = self._bar.add_task(name, total=rows, facts="starting")

    def __enter__(self) -> RowProgress:
        self._bar.start()
        if self._rows:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._ended.set()
        if self._rows and (kind is None or self._done):  # a refused job has no progress to show
            with self._lock:
                self._say(last=True)
        self._bar.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Count one more row that has ended; one that is not ok is told with its reason."""
        with self._lock:
            self._count(row)
            self._say()
        if row["status"] != "ok":
            self._bar.console.print(f"{row['status']} {row['row_id']}: {row['error_message']}")

    def look(self) -> None:
        """See where the work is, and say it."""
        before, waits_for = self._where, list[str]()
        try:
            self._where = whereabouts(self._store, self._motions)
            if before is None or (before, before.begun) != (self._where, self._where.begun):
                self._moved = self._clock()
            if self._clock() - max(self._moved, self._newest) >= STILL_S:
                waits_for = [*unplaced_actors(), *longest_at_work(self._store, time.time())]
                # What the driver itself waits for is said by `jobs.waiting`.
                waits_for = waits_for or ([] if long_waits(STILL_S) else [_NOTHING_KNOWN])
        except StoreError as error:  # it is only for show
            waits_for = [f"the output's storage: {error}"]
        with self._lock:
            self._waits_for = waits_for
            if not self._ended.is_set():
                self._say()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self.look()

    def _count(self, row: Mapping[str, Any]) -> None:
        self._done += 1
        self._failed += row["status"] != "ok"
        self._newest, self._waits_for = self._clock(), []
        if row["loss_final"] is not None:
            self._newest_loss = row["loss_final"]
        finished = row.get("finished_at")
        ended = datetime.fromisoformat(finished).timestamp() if finished else self._newest
        process = (row.get("node") or "", row.get("process") or 0)
        self._recent.append(_Ended(self._newest, ended, row["seconds_total"] or 0.0, process))
        while len(self._recent) > RECENT_ROWS + 1 and self._recent[0].heard < self._newest - RECENT_S:
            self._recent.popleft()

    # ------------------------------------------------------------------------------------------ what is said

    def _say(self, last: bool = False) -> None:
        if self._shows_bar:
            self._bar.update(self._task, completed=self._done, facts=self._facts(separator="\n"))
        elif last or self._clock() - self._said >= LINE_EVERY_S:
            self._said = self._clock()
            self._screen.print(f"{self._name}: {self._done}/{self._rows} rows {self._facts(separator='; ')}")

    def _facts(self, separator: str) -> str:
        """What is known of the run's progress, beside the number of rows."""
        rate, busy = self._pace()
        left = self._rows - self._done
        facts = [
            f"{rate:.4g} rows/h" if rate else "",
            f"{duration(left / rate * 3600)} left" if rate and left else "",
            f"busy {busy:.0%}" if busy is not None else "",
            f"loss {self._newest_loss:.4f}" if self._newest_loss is not None else "",
            f"{self._failed} failed" if self._failed else "",
            f"none for {duration(self._clock() - self._newest)}" if left else "",
        ]
        told = ", ".join(filter(None, facts))
        waits = f"waiting for {', and '.join(self._waits_for)}" if self._waits_for and left else ""
        return separator.join(map(printable, filter(None, [told, self._whereabouts() if left else "", waits])))

    def _pace(self) -> tuple[float | None, float | None]:
        """Return rows per hour, and how busy the processes are, in the last while."""
        now, heard = self._clock(), np.array([row.heard for row in self._recent])
        since = recent_since(heard, self._begun, now)
        rows = [row for row in self._recent if row.heard > since]
        numbers = {process: number for number, process in enumerate({row.process for row in rows})}
        busy = busy_share(
            np.array([numbers[row.process] for row in rows]),
            np.array([row.ended for row in rows]),
            np.array([row.seconds for row in rows]),
        )
        return rows_per_hour(heard, since, now), busy

    def _whereabouts(self) -> str:
        """Where the work is, as far as it is known."""
        where = self._where
        if where is None:
            return ""
        stages = [
            f"{count} being {stage}"
            for stage, count in (("read", where.reading), ("extracted", where.extracting))
            if count
        ]
        references = [f"references: {', '.join([f'{where.motions} of {len(self._motions)} ready', *stages])}"]
        return "; ".join([*(references if self._motions else []), f"{where.rows} rows in flight"])
