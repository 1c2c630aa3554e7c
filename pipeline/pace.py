"""How fast a run goes, and how busy those are who make its rows: of its last while, not of its whole life.

A run's first rows wait for a cluster and a model, so what it did from its beginning says little of what it does now.
"""

from __future__ import annotations

import numpy as np

RECENT_S = 1800.0
"""The last while: rows that ended in so many seconds."""
RECENT_ROWS = 10
"""At least so many rows are counted, however long ago they ended: fewer say nothing of a pace."""


def recent_since(ended: np.ndarray, begun: float, now: float) -> float:
    """Return when the last while of a run began, in seconds; a run that is younger is counted from its beginning.

    ended: when each of its rows ended, in any order. All times in seconds of one clock.
    """
    ended = np.sort(ended)
    enough = ended[-RECENT_ROWS - 1] if len(ended) > RECENT_ROWS else begun
    return max(begun, min(now - RECENT_S, float(enough)))


def rows_per_hour(ended: np.ndarray, since: float, now: float) -> float | None:
    """Return at what rate rows ended between `since` and `now`; None if none did, which tells of no rate."""
    count = int((ended > since).sum())
    return count / (now - since) * 3600 if count and now > since else None


def busy_share(processes: np.ndarray, ended: np.ndarray, seconds: np.ndarray) -> float | None:
    """Return which share of the time of the processes that made some rows went into making them, from 0 to 1.

    The time of a process goes from the beginning of its first of these rows to the end of its last one. What is missing
    from 1 went into waiting for work and for storage; loading a model, and processes that are gone or that wait for
    their first row, do not count. None without rows. It means the same on a GPU and on a CPU, and says nothing of how
    well a row uses either.

    processes: who made each row, as whole numbers. ended: when. seconds: how long it took.
    """
    if not len(processes):
        return None
    _, number = np.unique(processes, return_inverse=True)
    first = np.full(number.max() + 1, np.inf)
    last = -first
    np.minimum.at(first, number, ended - seconds)
    np.maximum.at(last, number, ended)
    whole = float((last - first).sum())
    return min(1.0, float(seconds.sum()) / whole) if whole > 0 else None
