"""`ditflow status`: how a job goes, printed once or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from jobs.streams import is_lost
from jobs.table import Screen
from pipeline.status import Attempt, Failure, Runner, Status, Watch
from pipeline.store import Store, StoreError

_SHOWN_IN_FLIGHT = 8


def show_status(
    store: Store, screen: Screen, as_json: bool, every_s: float | None, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Print how the job in a store goes; with `every_s`, again after so many seconds until it is at rest or Ctrl-C.

    Also until nobody reads it any more.

    Raises ValueError for `every_s` of 0 or less. StoreError comes from the storage at the first time; later on it is
    said, and looked again.
    """
    if every_s is not None and every_s <= 0:
        raise ValueError(f"--watch: {every_s:g} is not valid: expected seconds, more than 0")
    watch = Watch(store)
    status: Status | None = watch.look()
    while True:
        if status is not None:
            _show(status, store, screen, as_json, clear=every_s is not None)
        if every_s is None or (status is not None and status.at_rest) or is_lost(screen.file):
            return
        try:
            sleep(every_s)
            status = _looked_again(watch, screen)
        except KeyboardInterrupt:
            return


def _looked_again(watch: Watch, screen: Screen) -> Status | None:
    try:
        return watch.look()
    except StoreError as error:
        screen.print(f"not read, tried again: {error}")
        return None


def _show(status: Status, store: Store, screen: Screen, as_json: bool, clear: bool) -> None:
    if as_json:
        print(json.dumps(status.to_dict()), flush=True)
        return
    if clear and screen.is_terminal and not screen.is_dumb_terminal:
        screen.clear()
    elif clear:
        screen.print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
    for name, told in lines(status, store.uri, datetime.now(UTC)):
        screen.print(f"{name:>16}  {told}")


def lines(status: Status, uri: str, now: datetime) -> Iterator[tuple[str, str]]:
    """Return a status as lines for a person: a name and what is told of it. What is not known has none."""
    yield "run", _told_of(status.runner, status.todo, uri, now)
    yield "planned", str(status.planned)
    yield "todo", str(status.todo)
    for name, count in status.counts.items():
        kinds = ", ".join(f"{number} {kind}" for kind, number in status.error_kinds.get(name, {}).items())
        yield name, f"{count} ({kinds})" if kinds else str(count)
    yield from _pace(status, now)
    yield from _figures(status)
    yield from _in_flight(status.in_flight, now)
    for failure in status.failures:
        yield failure.status, _failure(failure, now)


def _told_of(runner: Runner, todo: int, uri: str, now: datetime) -> str:
    """Who runs it, or how to go on."""
    who = f"process {runner.pid} on {runner.host}, since {runner.since}"
    if runner.state == "alive":
        sign = f"; last sign {ago(runner.renewed_at, now)}" if runner.renewed_at else ""
        return f"{who}{sign}"
    why = {
        "nobody": "nobody runs it",
        "gone": f"nobody runs it: {who} has ended without giving it back",
        "silent": f"{who} gave its last sign {ago(runner.renewed_at, now)}: most likely it is dead",
    }[runner.state]
    return f"{why}. To go on: ditflow run JOB.yaml; as it was last run it is {uri}/job.yaml" if todo else why


def _pace(status: Status, now: datetime) -> Iterator[tuple[str, str]]:
    if status.rows_per_hour is not None and status.recent_s is not None:
        yield "rows per hour", f"{status.rows_per_hour:.4g} in {duration(status.recent_s)}"
    if status.seconds_left is not None:
        yield "time left", duration(status.seconds_left)
    if status.busy_share is not None:
        yield "busy", f"{status.busy_share:.0%} of the time of the processes that make rows"
    if status.newest_at is not None:
        yield "newest row", f"ended {ago(status.newest_at, now)}"


def _figures(status: Status) -> Iterator[tuple[str, str]]:
    means = {"first": status.mean_loss_first, "final": status.mean_loss_final}
    losses = [f"{value:.4g} {name} (mean)" for name, value in means.items() if value is not None]
    losses += [f"{status.newest_loss:.4g} newest"] if status.newest_loss is not None else []
    if losses:
        yield "loss", ", ".join(losses)
    if status.mean_seconds is not None:
        phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in status.seconds.items())
        yield "mean seconds", f"{status.mean_seconds:.4g}" + (f" ({phases})" if phases else "")
    if status.peak_memory_bytes is not None:
        yield "peak memory", f"{status.peak_memory_bytes / 1024**3:.2f} GiB"
    if status.motions:
        yield "motions", f"{status.motions} references extracted"


def _in_flight(attempts: tuple[Attempt, ...], now: datetime) -> Iterator[tuple[str, str]]:
    if attempts:
        yield "in flight", f"{len(attempts)}, the oldest first"
    for one in attempts[:_SHOWN_IN_FLIGHT]:
        where = f"process {one.pid} on {one.node}"
        yield one.stage, f"{one.work_id}, attempt {one.attempt}, {where}, begun {ago(one.started_at, now)}"


def _failure(failure: Failure, now: datetime) -> str:
    when = f", {ago(failure.finished_at, now)}" if failure.finished_at else ""
    return f"{failure.row_id} ({failure.error_kind}{when}): {failure.error_message}"


def ago(then: datetime | None, now: datetime) -> str:
    """How long ago something was, for a person."""
    return "at an unknown time" if then is None else f"{duration(max(0.0, (now - then).total_seconds()))} ago"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
