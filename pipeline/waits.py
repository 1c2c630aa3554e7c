"""What this process waits for, so that it can be said where nothing else would be seen for minutes.

What may take long is done within `waiting` or `counted`. Nothing is printed here: the command line asks for
`long_waits` now and then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

_Result = TypeVar("_Result")

_lock = threading.Lock()
_open: dict[object, tuple[float, Callable[[], str]]] = {}
"""When each wait began, and what says what it is for."""


@contextmanager
def waiting(told: Callable[[], str]) -> Iterator[None]:
    """Have it known what this process waits for, for the length of a `with` block. told: asked when it takes long."""
    wait = object()
    with _lock:
        _open[wait] = (time.monotonic(), told)
    try:
        yield
    finally:
        with _lock:
            del _open[wait]


def counted(results: Iterable[_Result], what: str, total: int) -> Iterator[_Result]:
    """Yield results that come one after the other, each of them quick; it is known how many have come."""
    done = 0
    with waiting(lambda: f"{what}, {done} of {total} so far"):
        for result in results:
            done += 1
            yield result


def long_waits(least_s: float, most: int = 3) -> list[str]:
    """Return what this process has been waiting for so long, the longest first, at most so many of them."""
    with _lock:
        waits = sorted(_open.values(), key=lambda wait: wait[0])
    now = time.monotonic()
    texts = [(told(), now - since) for since, told in waits if now - since >= least_s]
    return [f"{text} (for {timedelta(seconds=int(seconds))})" for text, seconds in texts if text][:most]
