"""The search: one input after the other in a child process, which is watched."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.fuzz.mutations import splice
from benchmarks.fuzz.targets import LARGEST_SEED, TARGETS, Target, workplace
from pipeline.stages.read import bounded_memory

CPU_SECONDS = 20
WALL_SECONDS = 600
"""Of one input: a machine with other work to do may give a process a hundredth of its time."""
MEMORY_BYTES = 2**30
MOST_SEEDS = 300


@dataclass
class Report:
    """How a search went; `finding` is what ended it early."""

    target: str
    inputs: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    """Messages that differ in more than numbers and quoted values."""
    seconds: float = 0.0
    finding: str | None = None
    saved: str | None = None


# -------------------------------------------------------------------------------------------------- the search


class Search:
    """Makes one input after the other, reads it, and mutates those further that led to something new."""

    def __init__(self, target: Target, seed: int):
        self._target, self._seed = target, seed
        self._seeds, self._heard = list(_seeds_of(target.name)), set[str]()
        self._warnings = _Warnings()

    def input(self, number: int) -> bytes:
        """Return an input; the same for the same number, as long as those before it were read."""
        rng = random.Random(f"{self._target.name} {self._seed} {number}")
        # Half of the time one that is sound: what was mutated again and again is refused at its first byte.
        data = rng.choice(rng.choice((_seeds_of(self._target.name), self._seeds)))
        if rng.random() < 0.1:
            data = splice(data, rng.choice(self._seeds), rng)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            data = rng.choice(self._target.mutations)(data, rng)
        return data

    def read(self, data: bytes) -> str:
        """Read an input and return how that ended: ok, or a documented error. Raises any other one."""
        try:
            with self._warnings:
                self._target.read(data)
        except self._target.documented as error:
            if self._target.file not in str(error):
                raise AssertionError(f"{self._target.file} is not named: {error}") from error
            self._learn(f"{type(error).__name__} {error}", data)
            return type(error).__name__
        self._learn(" ".join(["ok", *self._warnings.texts]), data)
        return "ok"

    @property
    def messages(self) -> int:
        """How many different messages were heard."""
        return len(self._heard)

    def _learn(self, message: str, data: bytes) -> None:
        shape = re.sub(r"\d+|'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "", message.replace(str(workplace()), ""))[:200]
        if shape not in self._heard and len(self._seeds) < MOST_SEEDS and len(data) <= LARGEST_SEED:
            self._seeds.append(data)
        self._heard.add(shape)


class _Warnings(logging.Handler):
    """What our own log has said during a `with` block."""

    def __enter__(self) -> None:
        self.texts: list[str] = []
        logging.getLogger("ditflow").addHandler(self)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("ditflow").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.texts.append(record.getMessage())


@cache
def _seeds_of(target: str) -> tuple[bytes, ...]:
    return tuple(TARGETS[target].seeds())


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> Report:
    """Search for so long in a child process; what ends it early is in the report, and its input in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    current = folder / f"{name}-{seed}{Path(TARGETS[name].file).suffix}"
    report, started = Report(name), time.monotonic()
    workplace(), _seeds_of(name)  # made once, before the child is
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(TARGETS[name], seconds, seed, current, writer)
    os.close(writer)
    with os.fdopen(reader) as lines:
        for line in _watched(lines, child):
            told = json.loads(line)
            report.inputs, report.messages = told["inputs"], told["messages"]
            report.outcomes = told["outcomes"]
            report.finding = told.get("finding")
    _, status = os.waitpid(child, 0)
    report.seconds = round(time.monotonic() - started, 1)
    if os.WIFSIGNALED(status) and report.finding is None:
        report.finding = _DEATHS.get(os.WTERMSIG(status), f"the process died of signal {os.WTERMSIG(status)}")
    if report.finding is None:
        current.unlink(missing_ok=True)
    else:
        report.saved = str(current)
    return report


_DEATHS: dict[int, str] = {
    signal.SIGPROF: f"one input took more than {CPU_SECONDS} seconds of processor time",
    signal.SIGKILL: f"one input took more than {WALL_SECONDS} seconds without doing anything, or the memory of all",
}


def _watched(lines: Any, child: int) -> Iterator[str]:
    """Yield what the child tells; end it if it says nothing for too long."""
    while True:
        previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.alarm(WALL_SECONDS)
        line = lines.readline()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        if not line:
            return
        yield line


def _work(target: Target, seconds: float, seed: int, current: Path, writer: int) -> None:
    """Read inputs until the time is over or one of them does what it may not; never returns."""
    search, number, finding = Search(target, seed), 0, None
    ends, base, told = time.monotonic() + seconds, _peak_bytes(), time.monotonic()
    counts: Counter[str] = Counter()
    with os.fdopen(writer, "w", buffering=1) as out:
        while finding is None and time.monotonic() < ends:
            data = search.input(number)
            current.write_bytes(data)
            number += 1
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                with bounded_memory(2 * MEMORY_BYTES):
                    counts[search.read(data)] += 1
            except BaseException as error:
                finding = f"input {number - 1}: {type(error).__name__}: {error}"[:2000]
            signal.setitimer(signal.ITIMER_PROF, 0)
            if finding is None and _peak_bytes() - base > MEMORY_BYTES:
                finding = f"input {number - 1}: it took {(_peak_bytes() - base) >> 20} MiB of memory"
            if finding or time.monotonic() - told > 1 or time.monotonic() >= ends:
                told = time.monotonic()
                about = {"inputs": number, "messages": search.messages, "outcomes": counts, "finding": finding}
                out.write(json.dumps(about) + "\n")
    os._exit(0)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
