"""Facts about `ditflow status`: what it makes of an output, and how it is printed."""

import io
import json
import os
import socket
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from jobs.status import lines, show_status
from jobs.streams import _outliving
from jobs.table import Screen
from pipeline.faults import Ledger
from pipeline.lease import Holder, Lease
from pipeline.manifest import Manifest
from pipeline.pace import RECENT_S, busy_share, recent_since, rows_per_hour
from pipeline.record import make_row
from pipeline.status import RUN_KEY, Run, Watch, Whereabouts, longest_at_work, whereabouts
from pipeline.store import Store, StoreDamagedError, StoreError

STARTED = datetime(2026, 1, 1, tzinfo=UTC)
OUTPUT = {"output_uri": "file:///o/videos/a.mp4", "output_sha256": "0" * 64, "output_bytes": 1}
FAULT = {"error_kind": "permanent", "error_class": "VideoError", "error_message": "the clip is cut off"}


def commit(store: Store, row_id: str, minutes: float | None = None, status: str = "ok", **values) -> None:
    """Record a row that ended so many minutes after the run began."""
    finished = None if minutes is None else STARTED + timedelta(minutes=minutes)
    needed = OUTPUT if status == "ok" else FAULT
    Manifest(store).commit(
        make_row(**{"row_id": row_id, "status": status, "finished_at": finished, **needed, **values})
    )


def begin(store: Store, **changes) -> None:
    run = {"planned": 20, "started_at": STARTED.timestamp(), "todo": 20, "kept": 0, **changes}
    store.put(RUN_KEY, Run(**run).to_json())


def at(minutes: float) -> float:
    return (STARTED + timedelta(minutes=minutes)).timestamp()


# ---------------------------------------------------------------------------------------------------------- pace


def test_a_young_run_is_counted_from_its_beginning():
    assert recent_since(np.array([10.0, 20.0]), 5.0, 100.0) == 5.0
    assert rows_per_hour(np.array([10.0, 20.0]), 5.0, 65.0) == 120.0


def test_an_old_run_is_counted_over_the_last_while_alone():
    ended = np.array([*range(1000), *range(100_000, 100_060)], float)
    now = 100_060.0
    since = recent_since(ended, 0.0, now)
    assert since == now - RECENT_S
    assert rows_per_hour(ended, since, now) == pytest.approx(60 / RECENT_S * 3600)


def test_the_last_while_of_slow_rows_reaches_back_over_ten_of_them():
    ended = np.arange(1, 101) * 7200.0
    now = float(ended[-1])
    assert rows_per_hour(ended, recent_since(ended, 0.0, now), now) == pytest.approx(0.5)


def test_the_pace_of_a_run_that_hangs_falls():
    ended = np.arange(1, 101) * 60.0
    fresh, later = (rows_per_hour(ended, recent_since(ended, 0.0, now), now) for now in (6000.0, 6000.0 + 36_000))
    assert fresh == pytest.approx(60)
    assert later < 1.1


def test_no_rows_make_no_pace():
    assert rows_per_hour(np.array([]), 0.0, 10.0) is None
    assert busy_share(np.array([]), np.array([]), np.array([])) is None


def test_a_process_that_waits_as_long_as_it_works_is_busy_half_of_the_time():
    ended, seconds = np.array([10.0, 30.0, 50.0]), np.array([10.0, 10.0, 10.0])
    assert busy_share(np.zeros(3, int), ended, seconds) == pytest.approx(30 / 50)


def test_the_busy_share_of_several_processes_is_that_of_all_their_time():
    ended, seconds = np.array([100.0, 10.0, 100.0]), np.array([100.0, 10.0, 10.0])
    assert busy_share(np.array([7, 9, 9]), ended, seconds) == pytest.approx((100 + 20) / 200)


# --------------------------------------------------------------------------------------------------- what is read


def test_rows_are_counted_by_status_and_kind_of_error(store):
    begin(store)
    commit(store, "a", 1)
    commit(store, "b", 2, "failed")
    commit(store, "c", 3, "failed", error_kind="deadline")
    commit(store, "d", 4, "quarantined", error_kind="worker_died")
    status = Watch(store).look(at(5))
    assert status.counts == {"ok": 1, "failed": 2, "quarantined": 1}
    assert status.error_kinds == {"failed": {"permanent": 1, "deadline": 1}, "quarantined": {"worker_died": 1}}
    assert (status.planned, status.todo) == (20, 16)


def test_rows_of_earlier_plans_are_none_of_those_that_are_left(local_store):
    for number in range(30):
        commit(local_store, f"old-{number}")
    begin(local_store, planned=5, todo=5, kept=30)
    commit(local_store, "new", 1)
    status = Watch(local_store).look(at(2))
    assert (status.planned, status.todo, status.counts["ok"]) == (5, 4, 31)
    assert status.rows_per_hour == pytest.approx(60)


def test_pace_time_left_and_busy_share_are_those_of_the_last_while(local_store):
    begin(local_store, planned=300, todo=300)
    for number in range(11):  # slow at first
        commit(local_store, f"early-{number}", 10 * (number + 1), node="n", process=1, seconds_total=1.0)
    for number in range(60):
        commit(local_store, f"late-{number}", 600 + number / 2, node="n", process=1, seconds_total=15.0)
    status = Watch(local_store).look(at(10_000))
    assert status.runner.state == "nobody"
    assert status.newest_at == STARTED + timedelta(minutes=629.5)
    assert status.rows_per_hour == pytest.approx(120, rel=0.02)
    assert status.seconds_left == pytest.approx((300 - 71) / 120 * 3600, rel=0.02)
    assert status.busy_share == pytest.approx(0.5, abs=0.02)


def test_means_are_of_rows_that_are_ok_and_a_phase_that_a_row_has_not_took_none(local_store):
    begin(local_store)
    commit(
        local_store, "a", 1, seconds_total=4.0, seconds_read=1.0, loss_first=4.0, loss_final=1.0, peak_memory_bytes=7
    )
    commit(local_store, "b", 3, seconds_total=2.0, loss_first=2.0, loss_final=0.5, peak_memory_bytes=9)
    commit(local_store, "c", 2, "failed", seconds_total=100.0, seconds_read=50.0)
    status = Watch(local_store).look(at(4))
    assert (status.mean_seconds, status.seconds) == (3.0, {"read": 0.5})
    assert (status.mean_loss_first, status.mean_loss_final, status.newest_loss) == (3.0, 0.75, 0.5)
    assert status.peak_memory_bytes == 9


def test_a_loss_that_is_no_number_spoils_no_mean(local_store):
    commit(local_store, "a", 1, loss_final=float("nan"))
    commit(local_store, "b", 2, loss_final=1.0)
    assert Watch(local_store).look(at(4)).mean_loss_final == 1.0


def test_the_newest_failures_are_told_with_their_reasons_also_when_they_were_merged(store):
    for number in range(7):
        commit(store, f"row-{number}", number, "failed", error_message=f"reason {number}")
    Manifest(store).compact()
    commit(store, "row-7", 7, "failed", error_message="reason 7")
    told = [(failure.row_id, failure.error_message) for failure in Watch(store).look(at(9)).failures]
    assert told == [(f"row-{number}", f"reason {number}") for number in (7, 6, 5, 4, 3)]


def test_a_row_that_stands_in_two_files_is_counted_once(local_store):
    commit(local_store, "a", 1)
    single = local_store.read("manifest/a.parquet")
    Manifest(local_store).compact()
    local_store.put("manifest/a.parquet", single)
    assert Watch(local_store).look(at(2)).counts == {"ok": 1}


def test_what_was_read_is_read_only_once(s3_store, s3):
    watch = Watch(s3_store)
    for row_id in ("a", "b"):
        commit(s3_store, row_id, 1)
    watch.look(at(2))
    commit(s3_store, "c", 2)
    s3.requests.clear()
    assert watch.look(at(3)).counts == {"ok": 3}
    read = [request for request in s3.requests if request.startswith("GET") and ".parquet" in request.split("?")[0]]
    assert len(read) == 1


def test_what_the_run_remembers_of_its_rows_is_not_read_row_by_row(s3_store, s3):
    for row_id, status in (("a", "ok"), ("b", "failed"), ("c", "ok")):
        commit(s3_store, row_id, 1, status)
    plain = Watch(s3_store).look(at(9))
    Manifest(s3_store).remember()
    assert Watch(s3_store).look(at(9)) == plain
    commit(s3_store, "d", 2, seconds_total=3.0)
    Manifest(s3_store).forget(["b"])
    commit(s3_store, "b", 3)
    s3.requests.clear()
    status = Watch(s3_store).look(at(9))
    assert (status.counts, status.mean_seconds) == ({"ok": 4}, 3.0)
    read = [request.split("?")[0] for request in s3.requests if request.startswith("GET")]
    assert sorted(key.rsplit("/", 1)[1] for key in read if "/manifest/" in key) == ["b.parquet", "d.parquet"]


def test_a_file_that_was_replaced_or_removed_is_not_believed_any_more(local_store):
    watch = Watch(local_store)
    commit(local_store, "a", 1)
    commit(local_store, "b", 1, "failed")
    assert watch.look(at(2)).counts == {"ok": 1, "failed": 1}
    Manifest(local_store).forget(["b"])
    assert watch.look(at(3)).counts == {"ok": 1}
    Manifest(local_store).compact()
    commit(local_store, "b", 4)
    assert watch.look(at(5)).counts == {"ok": 2}


def test_an_output_of_an_older_release_says_how_many_are_left(local_store):
    local_store.put(RUN_KEY, json.dumps({"planned": 9, "started_at": at(0)}).encode())
    commit(local_store, "a", 30)
    status = Watch(local_store).look(at(60))
    assert (status.planned, status.todo, status.rows_per_hour) == (9, 8, pytest.approx(2))


def test_an_empty_output_has_a_status(local_store):
    status = Watch(local_store).look()
    assert (status.planned, status.todo, status.counts, status.at_rest) == (0, 0, {}, True)


# ------------------------------------------------------------------------------------------------------- who runs it


def test_a_run_that_lives_is_told_with_its_process(store):
    with Lease(store):
        runner = Watch(store).look().runner
    assert (runner.state, runner.pid, runner.host) == ("alive", os.getpid(), socket.gethostname())
    assert Watch(store).look().runner.state == "nobody"


def hold(store: Store, **changes) -> None:
    holder = {"number": 1, "token": "t", "host": "elsewhere", "pid": 1, "since": STARTED.isoformat(), **changes}
    store.put("lease/000001.json", json.dumps(Holder(**holder).__dict__).encode())


def test_a_run_that_gives_no_sign_for_as_long_as_its_lease_lasts_is_silent(store):
    hold(store)
    begin(store, lease_s=60.0)
    assert Watch(store).look(time.time()).runner.state == "alive"
    assert Watch(store).look(time.time() + 3600).runner.state == "silent"


def test_a_run_whose_process_on_this_machine_has_ended_is_gone(local_store):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    hold(local_store, host=socket.gethostname(), pid=child, processes=Holder.here(1).processes)
    assert Watch(local_store).look().runner.state == "gone"


def test_what_is_in_flight_is_told_with_its_latest_attempt(store):
    ledger = Ledger(store)
    ledger.begin("row-a", {"stage": "generate", "node": "n1", "pid": 1})
    ledger.begin("read-m", {"stage": "read", "node": "n2", "pid": 2})
    ledger.begin("row-a", {"stage": "generate", "node": "n3", "pid": 3})
    ledger.begin("row-z", {"node": "n1", "pid": 1})
    ledger.end("row-z")
    told = [(one.work_id, one.stage, one.attempt, one.node) for one in Watch(store).look().in_flight]
    assert told == [("read-m", "read", 1, "n2"), ("row-a", "generate", 2, "n3")]


def test_the_whereabouts_are_those_of_the_references_of_the_run(store):
    for motion in ("m1", "m2", "of-another-job"):
        store.put(f"amf/m/{motion}.safetensors", b"motion")
    for work in ("read-m4", "read-m5", "m3", "row-a", "row-b", "row-c"):
        Ledger(store).begin(work, {"node": "n", "pid": 1})
    assert whereabouts(store, {"m1", "m2", "m3", "m4", "m5"}) == Whereabouts(2, reading=2, extracting=1, rows=3)


# ---------------------------------------------------------------------------------------------------------- printing


def told(store: Store, minutes: float, **options) -> dict[str, str]:
    now = STARTED + timedelta(minutes=minutes)
    return dict(lines(Watch(store).look(now.timestamp()), store.uri, now))


def test_a_job_that_nobody_runs_says_how_to_go_on(local_store):
    begin(local_store)
    commit(local_store, "a", 1)
    assert told(local_store, 5)["run"].startswith("nobody runs it. To go on: ditflow run JOB.yaml")
    begin(local_store, todo=1)
    assert told(local_store, 5)["run"] == "nobody runs it"


def test_failures_are_printed_without_what_commands_a_terminal(local_store):
    commit(local_store, "a", 1, "failed", error_message="bad \x1b[31m clip")
    screen = Screen(file=io.StringIO(), width=300, soft_wrap=True)
    show_status(local_store, screen, as_json=False, every_s=None)
    shown = screen.file.getvalue()
    assert "bad \ufffd[31m clip" in shown
    assert "\x1b" not in shown


def test_a_watch_ends_when_the_job_is_at_rest_and_outlasts_storage_that_is_away(local_store, monkeypatch):
    begin(local_store, planned=2, todo=2)
    commit(local_store, "a", 1)
    screen = Screen(file=io.StringIO(), width=300, soft_wrap=True)
    waits: list[float] = []
    look = Watch.look

    def away(watch, now=None):
        if len(waits) == 1:
            raise StoreError("the storage is away", transient=True)
        return look(watch, now)

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            commit(local_store, "b", 2)

    monkeypatch.setattr(Watch, "look", away)
    show_status(local_store, screen, as_json=False, every_s=7.0, sleep=sleep)
    shown = screen.file.getvalue()
    assert waits == [7.0, 7.0]
    assert [shown.count(text) for text in ("todo  1", "todo  0", "the storage is away")] == [1, 1, 1]


def test_as_json_a_watch_is_a_line_each_time(local_store, capsys):
    begin(local_store, planned=1, todo=1)
    screen = Screen(file=io.StringIO())
    show_status(local_store, screen, True, 1.0, sleep=lambda _: commit(local_store, "a", 1))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["todo"], second["todo"], second["ok"]) == (1, 0, 1)
    assert second["started_at"] == STARTED.isoformat()


def test_a_watch_of_no_seconds_is_refused(local_store):
    with pytest.raises(ValueError, match="--watch: 0 is not valid"):
        show_status(local_store, Screen(file=io.StringIO()), False, 0)


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"planned": "9", "started_at": 0}', b'{"started_at": 0}',
     b'{"planned": 9, "started_at": NaN}', b'{"planned": 9, "started_at": 1e300}', b'{"planned": -1, "started_at": 0}',
     b'{"planned": 9, "started_at": "5.0"}',
     b'{"planned": 9, "started_at": 0, "notes": 5}', b'{"planned": 9, "started_at": 0, "lease_s": null}'],
    ids=range(13),
)  # fmt: skip
def test_a_damaged_word_of_the_run_is_named_by_its_file(local_store, damaged):
    local_store.put(RUN_KEY, damaged)
    with pytest.raises(StoreDamagedError, match=r"run\.json \([0-9]+ bytes\) is damaged .*: remove it: the next run"):
        Watch(local_store).look()


@pytest.mark.parametrize("change", [{"node": None}, {"pid": "x"}, {"started_at": "yesterday"}, {"stage": 5}], ids=str)
def test_a_damaged_marker_is_named_by_its_file(local_store, change):
    marker = {"row_id": "r", "stage": "read", "attempt": 1, "node": "n", "pid": 1, "started_at": STARTED.isoformat()}
    local_store.put("attempts/r/001.json", json.dumps({**marker, **change}).encode())
    for look in (Watch(local_store).look, lambda: longest_at_work(local_store, 0.0)):
        with pytest.raises(StoreDamagedError, match=r"attempts/r/001\.json \([0-9]+ bytes\) is damaged"):
            look()


def test_a_watch_ends_when_nobody_reads_it_any_more(local_store):
    begin(local_store)
    reading, writing = os.pipe()
    os.close(reading)
    with Lease(local_store), os.fdopen(writing, "w") as pipe:
        screen = Screen(file=_outliving(pipe), width=200)
        show_status(local_store, screen, as_json=False, every_s=1.0, sleep=lambda _: pytest.fail("it goes on"))
