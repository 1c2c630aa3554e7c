"""The head of a dataset: entries that are handed out as earlier ones end, so that reading stays only so far ahead.

Ray Data bounds by bytes what waits between two stages, and starts a reader wherever a CPU is free. Thousands of small
references would all be read before the first row ends, on the CPUs that the stages after them wait for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.data import Dataset

Entry = dict[str, Any]


class Source:
    """A dataset of entries, at most `ahead` of which are under way: one has ended when all rows that it leads to have.

    entries: each with the ids of its rows.
    """

    def __init__(self, entries: Sequence[tuple[Entry, Collection[str]]], ahead: int):
        self._entry_of = {row_id: number for number, (_, ids) in enumerate(entries) for row_id in ids}
        self._rows_left = Counter(self._entry_of.values())
        # On the driver's machine, which is there as long as the job is. Neither of the two takes a CPU from a stage.
        node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._ended = ray.remote(Ended).options(num_cpus=0, label_selector=node).remote()
        work = {"entries": ray.put([entry for entry, _ in entries]), "ended": self._ended, "ahead": ahead}
        self.dataset: Dataset = ray.data.from_items([{"source": 0}]).flat_map(
            hand_out, fn_kwargs=work, num_cpus=0, label_selector=node
        )

    def end(self, row_id: str) -> None:
        """Take note that a row has ended; rows of other sources are ignored."""
        entry = self._entry_of.pop(row_id, None)
        if entry is None:
            return
        self._rows_left[entry] -= 1
        if not self._rows_left[entry]:
            self._ended.add.remote()

    def close(self) -> None:
        """End the process that counts: nothing else does, as long as this one lives."""
        with suppress(Exception):  # Ray may have been shut down
            ray.kill(self._ended)


class Ended:
    """How many entries have ended; an actor, for which `hand_out` waits."""

    def __init__(self) -> None:
        self._count, self._changed = 0, asyncio.Condition()

    async def add(self) -> None:
        """Count one more."""
        async with self._changed:
            self._count += 1
            self._changed.notify_all()

    async def reach(self, count: int) -> None:
        """Return when there are so many."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._count >= count)


def hand_out(_: Entry, entries: Any, ended: Any, ahead: int) -> Iterator[Entry]:
    """Yield the first `ahead` entries, and one more for each that ends."""
    all_entries = ray.get(entries)
    for number, entry in enumerate(all_entries):
        if number >= ahead:
            try:
                ray.get(ended.reach.remote(number - ahead + 1))
            except ray.exceptions.RayActorError:  # nobody counts any more: too many entries are better than none
                ahead = len(all_entries)
        yield entry
