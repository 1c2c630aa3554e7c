"""Facts about the progress of `ditflow run`, on a terminal and elsewhere."""

import io
import re
from datetime import UTC, datetime, timedelta

import pytest

from jobs.progress import LINE_EVERY_S, STILL_S, RowProgress
from jobs.table import Screen
from pipeline.faults import Ledger
from pipeline.store import Store


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def row(clock: Clock, **changes) -> dict:
    finished = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=clock.now)
    ended = {"row_id": "row", "status": "ok", "loss_final": 0.125, "seconds_total": 30.0, "error_message": None}
    return {**ended, "node": "n", "process": 1, "finished_at": finished.isoformat(), **changes}


def progress(clock: Clock, store: Store, rows: int = 100, motions=(), terminal: bool = False) -> RowProgress:
    screen = Screen(file=io.StringIO(), force_terminal=terminal, width=200, soft_wrap=True)
    return RowProgress("job", rows, screen, store, motions, clock)


def said(shown: RowProgress) -> str:
    return shown._screen.file.getvalue()


def test_rows_that_end_every_minute_are_sixty_an_hour_and_half_busy(clock, local_store):
    with progress(clock, local_store) as shown:
        for _ in range(20):
            clock.now += 60
            shown.show(row(clock))
    last = said(shown).splitlines()[-1]
    assert last.startswith("job: 20/100 rows 60 rows/h, 1:20:00 left, busy 51%, loss 0.1250, none for 0:00:00")


def test_the_pace_is_that_of_the_last_while(clock, local_store):
    with progress(clock, local_store, rows=1000) as shown:
        for seconds in [600] * 20 + [6] * 400:
            clock.now += seconds
            shown.show(row(clock, seconds_total=1.0))
    assert "600 rows/h, 0:58:00 left" in said(shown).splitlines()[-1]


def test_elsewhere_than_on_a_terminal_a_line_comes_every_minute_and_none_of_them_commands_one(clock, local_store):
    with progress(clock, local_store, rows=500) as shown:
        for _ in range(300):
            clock.now += 1
            shown.show(row(clock))
    lines = said(shown).splitlines()
    assert len(lines) == 300 / LINE_EVERY_S + 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said(shown))


def test_a_run_that_hangs_is_told_too(clock, local_store):
    with progress(clock, local_store) as shown:
        clock.now += 30
        shown.show(row(clock))
        clock.now += 3600
        shown.look()
        assert "none for 1:00:00" in said(shown).splitlines()[-1]


def test_a_row_that_failed_is_counted_and_told_with_its_reason_as_plain_text(clock, local_store):
    with progress(clock, local_store) as shown:
        shown.show(row(clock, status="failed", loss_final=None, error_message="[red]bad\x1b[1m"))
    assert "failed row: [red]bad\ufffd[1m" in said(shown)
    assert "1 failed" in said(shown).splitlines()[-1]


def test_where_the_work_is_is_told(clock, local_store):
    local_store.put("amf/m1.safetensors", b"motion")
    for work in ("read-m2", "m3", "row-a", "row-b"):
        Ledger(local_store).begin(work, {"node": "n", "pid": 1})
    with progress(clock, local_store, motions={"m1", "m2", "m3"}) as shown:
        clock.now += LINE_EVERY_S
        shown.look()
        told = said(shown).splitlines()[-1]
    assert told.endswith("references: 1 of 3 ready, 1 being read, 1 being extracted; 2 rows in flight")


def test_on_a_terminal_there_is_a_bar(clock, local_store):
    with progress(clock, local_store, rows=2, terminal=True) as shown:
        clock.now += 60
        shown.show(row(clock))
        shown.look()
    assert "\x1b[" in said(shown)
    assert "1/2" in said(shown)
    assert "60 rows/h" in said(shown)


def test_rows_that_name_no_process_have_no_bad_effect(clock, local_store):
    with progress(clock, local_store) as shown:
        shown.show({"row_id": "a", "status": "ok", "loss_final": None, "seconds_total": None, "error_message": None})
    assert "1/100 rows" in said(shown)


def test_no_rows_say_nothing(clock, local_store):
    with progress(clock, local_store, rows=0) as shown:
        pass
    assert said(shown) == ""


def test_after_a_minute_without_movement_it_is_said_what_the_job_waits_for(clock, local_store):
    Ledger(local_store).begin("row-a", {"stage": "generate", "node": "host-7", "pid": 4711})
    with progress(clock, local_store) as shown:
        shown.look()
        clock.now += STILL_S - 1
        shown.look()
        assert "waiting for" not in said(shown)
        clock.now += 1
        shown.look()
        told = said(shown).splitlines()[-1]
        assert re.search(r"waiting for .*generate of row-a, at work for .* in process 4711 on host-7", told)
        Ledger(local_store).begin("row-b", {"stage": "generate", "node": "host-7", "pid": 4712})
        clock.now += LINE_EVERY_S
        shown.look()
        assert "waiting for" not in said(shown).splitlines()[-1], "work has begun"


def test_a_run_that_was_refused_before_its_first_row_says_no_progress(clock, local_store):
    with pytest.raises(ValueError, match="refused"), progress(clock, local_store) as shown:
        raise ValueError("refused")
    assert said(shown) == ""


def test_a_terminal_that_takes_no_commands_gets_lines(clock, local_store):
    screen = Screen(file=io.StringIO(), force_terminal=True, width=200, soft_wrap=True, _environ={"TERM": "dumb"})
    with RowProgress("job", 2, screen, local_store, (), clock) as shown:
        clock.now += LINE_EVERY_S
        shown.show(row(clock))
        assert said(shown).startswith("job: 1/2 rows")
