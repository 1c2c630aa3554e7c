"""The motion banks that a process has in memory: those that were used last."""

from __future__ import annotations

from collections import OrderedDict

from ditflow.banks.bank import MotionBank
from pipeline.job import Job
from pipeline.plan import Input
from pipeline.stages.read import read_unchanged


class RecentBanks:
    """Banks by the hash of their content, up to `resources.bank_bytes`; the newest is always kept.

    A job's rows come bank by bank, so that a process reads each bank once, unless the limit is very low.
    """

    def __init__(self, job: Job):
        self._job = job
        self._held: OrderedDict[str, tuple[MotionBank, int]] = OrderedDict()
        self._loads = 0

    def get(self, source: Input) -> MotionBank:
        """Return a bank, from memory if it is there. Raises what reading it raises."""
        if source.identity not in self._held:
            data = read_unchanged(source, self._job)
            self._loads += 1
            self._held[source.identity] = (MotionBank.from_bytes(data, source.uri), len(data))
            self._make_room()
        self._held.move_to_end(source.identity)
        return self._held[source.identity][0]

    def take_loads(self) -> int:
        """Return how many banks were read since this was asked last."""
        loads, self._loads = self._loads, 0
        return loads

    def _make_room(self) -> None:
        """Let go of the banks that were not used for longest until the rest fits."""
        while len(self._held) > 1 and sum(size for _, size in self._held.values()) > self._job.resources.bank_bytes:
            self._held.popitem(last=False)
