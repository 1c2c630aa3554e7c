"""The way of log lines from the workers to the driver, whose standard error a person sees.

Ray would do it itself (`log_to_driver`), but puts the name of the process before every line, leaves out lines that
repeat, and brings along whatever any library prints. So the lines go to one small actor on the driver's machine, from
where the driver takes them. Without it nothing is lost but the view: Ray keeps every worker's standard error.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.logs import LogSettings

_NAME = "ditflow-log"
_EVERY_S, _PATIENCE_S = 0.5, 30.0  # the actor itself takes a while to start
_MOST_LINES = 100_000
"""Lines that wait to be shown; beyond them the oldest are dropped."""


class Lines:
    """Keeps lines, numbered from 0, until they are known to be shown."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._first = 0

    def add(self, line: str) -> None:
        """Keep one more line."""
        self._lines.append(line)
        self._forget(self._first + len(self._lines) - _MOST_LINES)

    def since(self, number: int) -> tuple[int, list[str]]:
        """Forget the lines before this one; return the number of the first that is left, and all that are."""
        self._forget(number)
        return self._first, [*self._lines]

    def _forget(self, number: int) -> None:
        while self._first < number and self._lines:
            self._lines.popleft()
            self._first += 1


@contextmanager
def relayed(log: str | Literal[False] | None) -> Iterator[None]:
    """Show the workers' lines on this process's standard error during a `with` block, if `log` asks for any."""
    if not LogSettings.parse(log, "log").asked:
        yield
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # It lives as long as the driver: workers that have found it go on using it in the driver's next job.
    options = {"name": _NAME, "get_if_exists": True, "num_cpus": 0, "scheduling_strategy": here}
    lines = ray.remote(Lines).options(**options).remote()
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(lines, ended), name="log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * _PATIENCE_S)


def _show(lines: Any, ended: threading.Event) -> None:
    """Print lines until the run has ended, and then those that are left."""
    shown, last = 0, False
    while not last:
        last = ended.wait(_EVERY_S)
        try:
            first, new = ray.get(lines.since.remote(shown), timeout=_PATIENCE_S)
        except ray.exceptions.GetTimeoutError:  # the machine is busy; nothing is lost by asking again
            continue
        except (ray.exceptions.RayError, ConnectionError) as error:
            print(f"the workers' log is no longer shown here, Ray keeps it: {error}", file=sys.stderr)
            return
        for line in new:
            print(line, file=sys.stderr, flush=True)
        shown = first + len(new)
    lines.since.remote(shown)  # for the driver's next job


def forward(line: str) -> None:
    """Send a worker's line to the driver, if it takes any. Waits until it is there: a worker may end at any moment."""
    try:
        if ray.is_initialized():
            ray.get(_lines().add.remote(line), timeout=_PATIENCE_S)
    except (ValueError, ray.exceptions.RayError):  # nobody takes lines, or the driver's machine is out of reach
        _lines.cache_clear()


@cache
def _lines() -> Any:
    """Return the actor; ValueError if there is none."""
    return ray.get_actor(_NAME)
