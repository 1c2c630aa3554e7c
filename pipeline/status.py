"""How a job goes, read from its output alone: the manifest, the lease, the attempts, and what the run set out to do.

Rows are counted and averaged by Arrow, never as Python objects: a manifest may have millions. Texts are read of the
newest failures only.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.faults import EVALUATING, READING, Ledger
from pipeline.lease import Held, held
from pipeline.manifest import DIGEST, RUN_KEY, Manifest, once_each
from pipeline.pace import busy_share, recent_since, rows_per_hour
from pipeline.record import PHASES
from pipeline.store import Entry, Store, StoreMissingError

SHOWN_FAILURES = 5
_MOST_PIECES = 1000

_WORK = ["node", "process", "seconds_total", "finished_at"]
_FAILURE = ("row_id", "status", "error_kind", "error_message", "finished_at")
_FILE = "file"
"""A column beside those of the manifest: the number of the file that a row was read from."""


@dataclass(frozen=True)
class Run:
    """What a run set out to do.

    planned: rows of its job. started_at: seconds since 1970. todo: those of its rows that had not ended, and kept: rows
    in the manifest then, also of earlier plans; None if that was not told. motions: references whose motion it needs.
    lease_s: after so many seconds without a sign it counts as dead. notes: what was said of it when it began.
    """

    planned: int
    started_at: float
    todo: int | None = None
    kept: int | None = None
    motions: int = 0
    lease_s: float = 60.0
    notes: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Return it as it is stored under RUN_KEY."""
        return json.dumps(asdict(self)).encode()

    def left(self, recorded: int) -> int:
        """Return how many rows have not ended when so many are in the manifest."""
        if self.todo is None or self.kept is None:
            return max(0, self.planned - recorded)
        return max(0, self.todo - max(0, recorded - self.kept))


def latest_run(store: Store) -> Run | None:
    """Return what the latest run on an output set out to do; None if there was none."""
    try:
        return store.read_record(RUN_KEY, _run, "remove it: the next run writes another")
    except StoreMissingError:
        return None


def _run(told: Any) -> Run:
    run = Run(**{name: value for name, value in told.items() if name in Run.__dataclass_fields__})
    counts = [run.planned, run.motions, *(count for count in (run.todo, run.kept) if count is not None)]
    times = [run.started_at, run.lease_s]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(f"the counts {counts!r:.100}")
    if not all(isinstance(time_, int | float) and 0 <= time_ < _END_OF_TIME for time_ in times):
        raise ValueError(f"the times {times!r:.100}")
    if not all(isinstance(note, str) for note in run.notes):
        raise ValueError(f"the notes {run.notes!r:.100}")
    return run


_END_OF_TIME = 253_000_000_000
"""In the year 9987, in seconds since 1970: datetime knows none after 9999."""


@dataclass(frozen=True)
class Attempt:
    """One piece of work that was begun and has not ended. stage: read, extract, generate or evaluate."""

    work_id: str
    stage: str
    attempt: int
    node: str
    pid: int
    started_at: datetime


@dataclass(frozen=True)
class Failure:
    """A row that failed or was quarantined, and why."""

    row_id: str
    status: str
    error_kind: str | None
    error_message: str | None
    finished_at: datetime | None


@dataclass(frozen=True)
class Runner:
    """Who works on an output. state: `nobody`; `alive`; `silent`, if it gave no sign for as long as its lease lasts;
    `gone`, if its process was on this machine and is no more."""

    state: Literal["nobody", "alive", "silent", "gone"]
    host: str | None = None
    pid: int | None = None
    since: str | None = None
    renewed_at: datetime | None = None


@dataclass(frozen=True)
class Status:
    """How a job goes. Times in UTC, memory in bytes; what is not known is None.

    counts: rows in the manifest by status, of all plans. todo: rows of the latest run that have not ended.
    mean_seconds, seconds: of rows that are ok, whole and by phase. rows_per_hour, recent_s, busy_share: see
    `pipeline.pace`; over the last `recent_s` seconds of the run. motions: references whose motion is stored.
    """

    planned: int
    todo: int
    counts: Mapping[str, int]
    error_kinds: Mapping[str, Mapping[str, int]]
    runner: Runner
    started_at: datetime | None = None
    newest_at: datetime | None = None
    rows_per_hour: float | None = None
    recent_s: float | None = None
    busy_share: float | None = None
    mean_loss_first: float | None = None
    mean_loss_final: float | None = None
    newest_loss: float | None = None
    mean_seconds: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    motions: int = 0
    in_flight: tuple[Attempt, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def seconds_left(self) -> float | None:
        """Time until the last row ends, if rows go on ending as they did of late."""
        return self.todo / self.rows_per_hour * 3600 if self.rows_per_hour else None

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left to do and nobody at work."""
        return self.todo == 0 and self.runner.state in ("nobody", "gone")

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, the counts on the level of the other facts."""
        values = asdict(self)
        counts = values.pop("counts")
        return json.loads(
            json.dumps({**values, **counts, "seconds_left": self.seconds_left}, default=datetime.isoformat)
        )


class Watch:
    """Reads how a job goes, as often as it is asked; what it has read of the manifest it reads only once."""

    def __init__(self, store: Store):
        self._store, self._manifest = store, Manifest(store)
        self._known: dict[str, Entry] = {}
        self._files: list[str] = []
        self._rows = _nothing()

    def look(self, now: float | None = None) -> Status:
        """Return how the job goes at `now`, seconds since 1970.

        Raises ManifestError for an unreadable manifest, StoreError from the storage.
        """
        now = time.time() if now is None else now
        # First what changes fast, then the rows: what ends in between is in both rather than in none.
        holder, in_flight = held(self._store), self._in_flight()
        rows = self._newest_rows()
        run = latest_run(self._store) or Run(rows.num_rows, 0.0)
        runner = _runner(holder, run, now)
        return Status(
            planned=run.planned,
            todo=run.left(rows.num_rows),
            runner=runner,
            started_at=datetime.fromtimestamp(run.started_at, UTC) if run.started_at else None,
            motions=len(self._store.list("amf")),
            in_flight=in_flight,
            failures=self._failures(rows),
            **_counted(rows),
            **_pace(rows, run.started_at, now if runner.state == "alive" else None),
            **_averages(rows),
        )

    # ------------------------------------------------------------------------------------------ reading

    def _newest_rows(self) -> Any:
        """Return all rows, each once. Files that are known are not read again, unless one of them has changed."""
        entries = self._manifest.entries()
        if any(entries.get(key) != entry for key, entry in self._known.items()):
            self._known, self._files, self._rows = {}, [], _nothing()
        if not self._known:
            self._begin(entries)
        listed, newer = [self._rows], list[Any]()
        for key, table in self._manifest.tables(DIGEST, known=self._known):
            numbered = _in_files(table, [len(self._files)] * len(table))
            self._files.append(key)
            (listed if key in entries else newer).append(numbered)
        self._known = {key: entries[key] for key in [*self._known, *self._files] if key in entries}
        self._rows = _in_few_pieces(pa.concat_tables(listed))
        return once_each(pa.concat_tables([self._rows, *newer]))

    def _begin(self, entries: Mapping[str, Entry]) -> None:
        """Take what the run itself remembers of its rows, instead of reading a file for each."""
        rows = self._manifest.remembered(entries)
        self._files = rows["key"].to_pylist()
        self._known = {key: entries[key] for key in self._files}
        self._rows = _in_files(rows.select(DIGEST), range(len(rows)))

    def _failures(self, rows: Any) -> tuple[Failure, ...]:
        """Return the rows that failed last, newest first, with their reasons, which are read of these alone."""
        failed = rows.filter(pc.not_equal(rows["status"], "ok"))
        newest = failed.take(pc.select_k_unstable(failed, SHOWN_FAILURES, [("finished_at", "descending")]))
        found = [self._failure(row["row_id"], self._files[row[_FILE]]) for row in newest.to_pylist()]
        return tuple(failure for failure in found if failure is not None)

    def _failure(self, row_id: str, key: str) -> Failure | None:
        try:
            table = self._manifest.load(key, _FAILURE)
        except StoreMissingError:  # forgotten or merged a moment ago
            return None
        found = table.filter(pc.equal(table["row_id"], row_id)).to_pylist()
        return Failure(**found[0]) if found else None

    def _in_flight(self) -> tuple[Attempt, ...]:
        return tuple(Ledger(self._store).in_flight(_attempt))


def _attempt(marker: Any) -> Attempt:
    """Parse the marker of an attempt."""
    attempt = Attempt(
        work_id=marker["row_id"],
        stage=marker["stage"],
        attempt=marker["attempt"],
        node=marker["node"],
        pid=marker["pid"],
        started_at=datetime.fromisoformat(marker["started_at"]),
    )
    texts, numbers = (attempt.work_id, attempt.stage, attempt.node), (attempt.attempt, attempt.pid)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(number, int) for number in numbers):
        raise TypeError(f"its fields have other types: {attempt!r:.200}")
    return replace(attempt, started_at=attempt.started_at.astimezone(UTC))


def _nothing() -> Any:
    return _in_files(Manifest.empty(DIGEST), [])


def _in_files(rows: Any, numbers: Sequence[int]) -> Any:
    return rows.append_column(_FILE, pa.array(numbers, pa.int32()))


def _in_few_pieces(table: Any) -> Any:
    """Return a table that is cheap to go through; copying one that has few pieces would only take memory."""
    return table.combine_chunks() if table["row_id"].num_chunks > _MOST_PIECES else table


def _runner(lease: Held | None, run: Run, now: float) -> Runner:
    if lease is None:
        return Runner("nobody")
    who, renewed = lease.holder, lease.renewed_at
    silent = renewed is not None and now - renewed.timestamp() > run.lease_s
    state: Literal["gone", "silent", "alive"] = "gone" if who.is_gone else "silent" if silent else "alive"
    return Runner(state, who.host, who.pid, who.since, renewed)


# ----------------------------------------------------------------------------------------------- counting


def _counted(rows: Any) -> dict[str, Any]:
    """Return rows by status, those that failed by kind of error too, and where the time of those that are ok went."""
    spent = [f"seconds_{phase}" for phase in PHASES]
    sums = [("row_id", "count"), ("seconds_total", "mean"), *((name, "sum") for name in spent)]
    counts: Counter[str] = Counter()
    kinds: dict[str, dict[str, int]] = {}
    ok: dict[str, Any] = {}
    for group in rows.group_by(["status", "error_kind"]).aggregate(sums).to_pylist():
        counts[group["status"]] += group["row_id_count"]
        if group["error_kind"] is not None:
            kinds.setdefault(group["status"], {})[group["error_kind"]] = group["row_id_count"]
        if group["status"] == "ok":
            ok = group
    # A phase that a row does not have took it no time.
    seconds = {
        phase: ok[f"seconds_{phase}_sum"] / ok["row_id_count"] for phase in PHASES if ok.get(f"seconds_{phase}_sum")
    }
    return {
        "counts": dict(counts),
        "error_kinds": kinds,
        "mean_seconds": ok.get("seconds_total_mean"),
        "seconds": seconds,
    }


def _averages(rows: Any) -> dict[str, Any]:
    """Return what rows came to and needed."""
    return {
        "mean_loss_first": _mean(rows["loss_first"]),
        "mean_loss_final": _mean(rows["loss_final"]),
        "newest_loss": _newest_loss(rows),
        "peak_memory_bytes": pc.max(rows["peak_memory_bytes"]).as_py(),
    }


def _mean(column: Any) -> float | None:
    return pc.mean(column.filter(pc.is_finite(column))).as_py()


def _newest_loss(rows: Any) -> float | None:
    known = rows.select(["loss_final", "finished_at"]).filter(pc.is_valid(rows["loss_final"]))
    newest = known.take(pc.select_k_unstable(known, 1, [("finished_at", "descending")]))
    return newest["loss_final"][0].as_py() if len(newest) else None


def _pace(rows: Any, started_at: float, now: float | None) -> dict[str, Any]:
    """Return how fast the latest run goes. now: None for a run that is over: it ended with its newest row."""
    micros = rows["finished_at"].cast(pa.int64())
    since_start = pc.fill_null(pc.greater_equal(micros, int(started_at * 1e6)), False)
    ended = micros.filter(since_start).to_numpy() / 1e6
    if not started_at or not len(ended):
        return {}
    newest = float(ended.max())
    now = newest if now is None else max(now, newest)
    since = recent_since(ended, started_at, now)
    recent = rows.select(_WORK).filter(pc.greater(micros, int(since * 1e6)))
    return {
        "newest_at": datetime.fromtimestamp(newest, UTC),
        "rows_per_hour": rows_per_hour(ended, since, now),
        "recent_s": now - since,
        "busy_share": _busy(recent.drop_null()),
    }


def _busy(rows: Any) -> float | None:
    names = pc.binary_join_element_wise(rows["node"], rows["process"].cast(pa.string()), "/")
    who = names.combine_chunks().dictionary_encode().indices.to_numpy()
    ended = rows["finished_at"].cast(pa.int64()).to_numpy() / 1e6
    return busy_share(who, ended, rows["seconds_total"].to_numpy())


# ------------------------------------------------------------------------------------- where the work is


@dataclass(frozen=True)
class Whereabouts:
    """Where the work of a run is: references whose motion is stored, those at work just now, and rows in flight.

    begun: what is at work, by its names in the ledger, and how often each was tried.
    """

    motions: int
    reading: int
    extracting: int
    rows: int
    begun: frozenset[tuple[str, int]] = field(default=frozenset(), compare=False)


def whereabouts(store: Store, motions: Collection[str]) -> Whereabouts:
    """Return where the work of a run on these motions is; two listings."""
    tries = Ledger(store).unfinished()
    reading = sum(work_id.startswith(READING) for work_id in tries)
    extracting = len(tries.keys() & set(motions))
    stored = {PurePosixPath(key).stem for key in store.list("amf")} if motions else set()
    return Whereabouts(
        motions=len(stored.intersection(motions)),
        reading=reading,
        extracting=extracting,
        rows=len(tries) - reading - extracting,
        begun=frozenset(tries.items()),
    )


def longest_at_work(store: Store, now: float, most: int = 2) -> list[str]:
    """Return what has been at work for longest, as texts: who does what to which row, and for how long."""
    begun = Ledger(store).in_flight(_attempt)
    return [
        f"{attempt.stage} of {attempt.work_id.removeprefix(READING).removeprefix(EVALUATING)}, at work for "
        f"{timedelta(seconds=int(now - attempt.started_at.timestamp()))} in process {attempt.pid} on {attempt.node}"
        for attempt in begun[:most]
    ]
