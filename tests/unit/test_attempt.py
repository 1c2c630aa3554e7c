"""Facts about `Desk.attempt`: which errors are tried again, how often, and what is left in the ledger."""

import json
import random
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context

import pytest

from pipeline.faults import Fault, JobStoppedError, Policy
from pipeline.job import Job, Output
from pipeline.stages.attempt import Desk, Outcome, earlier_fault, not_to_blame
from pipeline.store import StoreError, StoreUnwritableError

ID = "0a1b2c"
POLICY = Policy(attempts=4, worker_died_attempts=5, base_seconds=0.5, max_seconds=3.0)
LOST = ConnectionResetError("the connection was lost")


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(Job("synthesize", "test", Output(str(tmp_path / "out")), faults=POLICY), "generate")


def failing(*errors: BaseException) -> Callable[[], str]:
    """Work that raises these errors, one at each try, and then succeeds."""
    left: Iterator[BaseException] = iter(errors)

    def work() -> str:
        for error in left:
            raise error
        return "done"

    return work


def never(seconds: float) -> None:
    pytest.fail(f"waited {seconds} s")


def begin_in_processes_that_die(desk: Desk, times: int) -> None:
    for _ in range(times):
        desk.ledger.begin(ID, {"node": "gone", "pid": 1})


# ------------------------------------------------------------------------------------------------------ outcomes


def test_work_that_succeeds_is_tried_once_and_its_result_is_returned(desk):
    assert desk.attempt(ID, failing(), never) == Outcome("done", None, 1)


def test_a_result_of_none_is_a_result_and_no_fault(desk):
    assert desk.attempt(ID, lambda: None, never) == Outcome(None, None, 1)


def test_a_permanent_error_ends_the_work_at_the_first_try(desk):
    calls = []

    def work() -> None:
        calls.append(1)
        raise ValueError("the clip is too short")

    outcome = desk.attempt(ID, work, never)
    assert outcome == Outcome(None, Fault("permanent", "ValueError", "the clip is too short"), 1)
    assert len(calls) == 1


def test_a_transient_error_is_tried_again_and_the_attempts_are_counted(desk):
    waits: list[float] = []
    assert desk.attempt(ID, failing(LOST), waits.append) == Outcome("done", None, 2)
    assert len(waits) == 1


def test_a_storage_error_that_calls_itself_transient_is_tried_again(desk):
    error = StoreError("503", transient=True)
    assert desk.attempt(ID, failing(error, error), lambda _: None).attempts == 3


class Rung:
    """A lighter way to work that remembers when it was entered and left."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.events.append("entered")
        yield
        self.events.append("left")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_is_tried_once_more_in_the_lighter_way(desk, error):
    lighter = Rung()
    work = failing(error)
    tries: list[list[str]] = []

    def noted() -> str:
        tries.append([*lighter.events])
        return work()

    assert desk.attempt(ID, noted, never, lighter=lighter) == Outcome("done", None, 2)
    assert tries == [[], ["entered"]]


def test_out_of_memory_in_the_lighter_way_too_is_recorded_as_such(desk):
    outcome = desk.attempt(ID, failing(*[MemoryError("full")] * 9), never, lighter=Rung())
    assert (outcome.fault, outcome.attempts) == (Fault("out_of_memory", "MemoryError", "full"), 2)


def test_out_of_memory_where_there_is_no_lighter_way_ends_the_work(desk):
    assert desk.attempt(ID, failing(*[MemoryError("full")] * 9), never).attempts == 1


def test_other_errors_never_lead_to_the_lighter_way(desk):
    lighter = Rung()
    desk.attempt(ID, failing(LOST, ValueError("bad")), lambda _: None, lighter=lighter)
    assert lighter.events == []


def test_an_output_that_cannot_be_written_to_is_no_fault_of_the_row(desk):
    refused = StoreUnwritableError("cannot write 's3://b/videos/x.mp4': access was refused")
    with pytest.raises(JobStoppedError, match="access was refused"):
        desk.attempt(ID, failing(refused), never)


def test_a_fault_of_the_job_on_its_way_stops_who_reads_it():
    fault = not_to_blame(StoreError("the storage is gone")).fault_json()
    with pytest.raises(JobStoppedError, match="the storage is gone"):
        earlier_fault({"row_id": ID, "fault": fault})


def test_a_process_ends_at_its_deadline_also_when_the_storage_is_gone(tmp_path):
    desk = Desk(
        Job("synthesize", "test", Output(str(tmp_path / "out")), faults=replace(POLICY, row_deadline_s=0.2)), "generate"
    )

    def outlast(desk: Desk) -> None:
        desk.ledger.expire = lambda work_id: desk.store.read("nothing")  # raises
        desk.attempt(ID, lambda: time.sleep(60), never)

    process = get_context("fork").Process(target=outlast, args=(desk,))
    process.start()
    process.join(30)
    assert process.exitcode == 1


def test_an_error_that_spoils_the_device_ends_the_process_and_the_next_one_tells_why(desk):
    def spoil() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for _ in range(POLICY.worker_died_attempts):
        process = get_context("fork").Process(target=desk.attempt, args=(ID, spoil, never))
        process.start()
        process.join()
        assert process.exitcode == 1
    outcome = desk.attempt(ID, lambda: pytest.fail("it was run"), never)
    assert outcome.fault.kind == "worker_died"
    assert "an illegal memory access was encountered" in outcome.fault.message
    desk.ledger.end(ID)
    assert desk.store.list() == []


def test_a_permanent_error_after_a_transient_one_ends_the_work(desk):
    outcome = desk.attempt(ID, failing(LOST, KeyError("block"), LOST), lambda _: None)
    assert (outcome.fault.kind, outcome.fault.error_class, outcome.attempts) == ("permanent", "KeyError", 2)


def test_an_error_that_never_passes_is_tried_as_often_as_the_policy_says(desk):
    waits: list[float] = []
    outcome = desk.attempt(ID, failing(*[LOST] * 99), waits.append)
    assert outcome == Outcome(None, Fault("transient", "ConnectionResetError", str(LOST)), POLICY.attempts)
    assert len(waits) == POLICY.attempts - 1  # nothing is waited for after the last try


def test_the_longest_possible_waits_grow_up_to_the_policys_limit(desk, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda _, longest: longest)
    waits: list[float] = []
    desk.attempt(ID, failing(*[LOST] * 99), waits.append)
    assert waits == sorted(waits)
    assert 0 < waits[0] < waits[1] <= waits[-1] <= POLICY.max_seconds


def test_what_a_failed_try_held_in_memory_is_free_before_the_next_one_begins(desk):
    class Tensor:
        """Stands for the gigabytes that filled the memory."""

    held: list[weakref.ref] = []

    def work() -> str:
        assert [reference() for reference in held] == [None] * len(held)
        activations = Tensor()
        held.append(weakref.ref(activations))
        if len(held) < 2:
            raise MemoryError
        return "done"

    assert desk.attempt(ID, work, never, lighter=Rung()) == Outcome("done", None, 2)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_request_to_stop_is_never_caught(desk, stop):
    with pytest.raises(stop):
        desk.attempt(ID, failing(stop()), never)


# ------------------------------------------------------------------------------------------ processes that died


def test_every_try_is_in_the_ledger_before_it_begins(desk):
    seen: list[int] = []

    def work() -> None:
        seen.append(len(desk.ledger.attempts(ID)))
        raise LOST

    desk.attempt(ID, work, lambda _: None)
    assert seen == [1, 2, 3, 4]


def test_tries_of_processes_that_died_are_counted_in_the_attempts(desk):
    begin_in_processes_that_die(desk, 2)
    assert desk.attempt(ID, failing(), never) == Outcome("done", None, 3)


def test_work_is_still_tried_by_the_last_process_that_the_policy_allows(desk):
    begin_in_processes_that_die(desk, POLICY.worker_died_attempts - 1)
    assert desk.attempt(ID, failing(), never).result == "done"


def test_work_that_killed_its_process_too_often_is_given_up_without_being_run(desk):
    begin_in_processes_that_die(desk, POLICY.worker_died_attempts)
    outcome = desk.attempt(ID, lambda: pytest.fail("it was run"), never)
    assert (outcome.result, outcome.attempts) == (None, POLICY.worker_died_attempts)
    assert outcome.fault.kind == "worker_died"
    assert "--retry quarantined" in outcome.fault.message


def test_processes_that_died_over_one_row_do_not_count_for_another(desk):
    begin_in_processes_that_die(desk, POLICY.worker_died_attempts)
    assert desk.attempt("another", failing(), never) == Outcome("done", None, 1)


@pytest.mark.parametrize("errors", [[], [LOST, LOST], [ValueError("no")]], ids=["ok", "slow", "bad"])
def test_the_ledger_holds_the_tries_until_the_outcome_is_safe_and_nothing_afterwards(desk, errors):
    outcome = desk.attempt(ID, failing(*errors), lambda _: None)
    assert desk.ledger.unfinished() == {ID: outcome.attempts}
    desk.ledger.end(ID)
    assert desk.ledger.unfinished() == {}
    assert desk.ledger.attempts(ID) == []
    assert desk.store.list() == []


# ------------------------------------------------------------------------------------------ faults on their way


def test_a_fault_comes_back_whole_from_the_column_of_a_dataset():
    outcome = Outcome(None, Fault("permanent", "VideoError", 'a "bad"\nfilm: größer'), 3)
    assert earlier_fault({"row_id": ID, "fault": outcome.fault_json()}) == outcome


def test_a_row_without_a_fault_has_no_earlier_one():
    assert json.loads(Outcome("done", None, 1).fault_json()) is None
    assert earlier_fault({"fault": Outcome("done", None, 1).fault_json()}) is None
    assert earlier_fault({"row_id": ID}) is None
