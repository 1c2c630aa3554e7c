"""One run at a time works on an output, and a dead run's lease passes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from pipeline.lease import Holder, Lease, LeaseHeldError, LeaseLostError, held
from pipeline.store import Store, StoreDamagedError, StoreError

OFTEN = "import pipeline.lease; pipeline.lease._RENEWALS = 240\n"
"""A lease of a minute is renewed four times a second then: no machine is so slow that it would lose it."""
ELSEWHERE = {"number": 1, "token": "t", "host": "another-machine", "pid": 7, "since": "2026-01-01T00:00:00+00:00"}


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr("pipeline.lease._RENEWALS", 240)


def leave(store: Store, **values) -> None:
    """Leave the lease of a run that is not renewed by anybody."""
    holder = {**ELSEWHERE, "beat": 0, **values}
    store.put(f"lease/{holder['number']:06d}.json", json.dumps(holder).encode())


def holders(store: Store) -> list[dict]:
    return [json.loads(store.read(key)) for key in store.list("lease")]


def test_a_lease_is_held_for_a_block_and_given_back(store):
    with Lease(store) as lease:
        lease.check()
        assert [holder["pid"] for holder in holders(store)] == [os.getpid()]
    assert holders(store) == []
    with Lease(store):
        pass


@pytest.mark.usefixtures("often")
def test_a_second_run_is_refused_while_the_first_lives(local_store):
    with Lease(local_store):
        command = OFTEN + (
            "import sys; from pipeline.lease import Lease; from pipeline.store import Store\n"
            "with Lease(Store(sys.argv[1])): print('held')"
        )
        second = subprocess.run([sys.executable, "-c", command, local_store.uri], capture_output=True, text=True)
        assert "held" not in second.stdout
        assert f"another run is working on this output (process {os.getpid()} on" in second.stderr
        assert len(holders(local_store)) == 1


def test_a_lease_that_nobody_renews_passes_on_and_the_wait_is_told(store):
    leave(store, number=4)
    waited, told = [], []
    with Lease(store, expires_s=60, on_wait=told.append, sleep=waited.append):
        assert max(holder["number"] for holder in holders(store)) == 5
    assert sum(waited) == pytest.approx(60)
    assert [holder.host for holder in told] == ["another-machine"]
    assert holders(store) == []


def test_the_lease_of_a_dead_process_of_this_machine_passes_on_at_once(local_store):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    here = Holder.here(1)
    leave(local_store, host=here.host, pid=int(gone.stdout), processes=here.processes)
    with Lease(local_store, sleep=lambda seconds: pytest.fail("it need not wait")):
        pass
    leave(local_store, host=here.host, pid=os.getpid(), processes=here.processes)
    with Lease(local_store, sleep=lambda seconds: pytest.fail("a process id comes again: that was another run")):
        pass


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["its number is ours", "its number is nobody's"])
@pytest.mark.parametrize("processes", [None, "another-boot pid:[4026531836]"])
def test_a_holder_whose_process_number_means_nothing_here_is_waited_for(local_store, pid, processes):
    here, waited = Holder.here(1), []
    leave(local_store, host=here.host, pid=pid, processes=processes)
    with Lease(local_store, expires_s=60, sleep=waited.append):
        pass
    assert sum(waited) == pytest.approx(60)


UNSHARE = ["unshare", "--fork", "--pid", "--mount-proc"]
HAS_UNSHARE = shutil.which("unshare") and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not HAS_UNSHARE, reason="process namespaces may not be made here")
def test_of_two_containers_that_share_a_host_name_the_second_is_refused(local_store):
    command = [*UNSHARE, sys.executable, "-c"]
    lease = f"{OFTEN}import sys; from pipeline.lease import Lease; from pipeline.store import Store\n"
    hold = f"{lease}with Lease(Store(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    first = subprocess.Popen([*command, hold, local_store.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    assert [holder["pid"] for holder in holders(local_store)] == [1]
    take = f"{lease}with Lease(Store(sys.argv[1])): print('taken')"
    second = subprocess.run([*command, take, local_store.uri], capture_output=True, text=True)
    first.communicate()
    assert "another run is working on this output (process 1 on" in second.stderr
    assert (second.stdout, first.returncode) == ("", 0)


def test_a_lease_that_is_given_back_meanwhile_is_free(store):
    leave(store)
    with Lease(store, sleep=lambda seconds: store.delete("lease/000001.json")):
        assert [holder["number"] for holder in holders(store)] == [1]


HOLD = f"""{OFTEN}
import sys, time
from pipeline.lease import Lease, LeaseHeldError
from pipeline.store import Store
try:
    with Lease(Store(sys.argv[1], patience_s=30)):  # as a job has it
        began = time.monotonic()
        time.sleep(0.5)
        print(began, time.monotonic())
except LeaseHeldError:
    pass
"""


def test_of_runs_that_find_a_dead_one_no_two_go_on_at_the_same_time(local_store):
    gone, here = (
        subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True),
        Holder.here(1),
    )
    leave(local_store, host=here.host, pid=int(gone.stdout), processes=here.processes)
    command = [sys.executable, "-c", HOLD, local_store.uri]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    spans = sorted([float(part) for part in line.split()] for run in runs if (line := run.communicate()[0]))
    assert [run.returncode for run in runs] == [0] * 4
    assert spans, "one goes on"
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def interruptible(request):
    """Only one signal reaches this process, as in one that a shell has put into the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == request.param else signal.SIG_IGN)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for_loss(lease: Lease, after: Callable[[], object] = lambda: None) -> None:
    """Work until the main thread is interrupted, as it is when the lease is lost."""

    def work() -> None:
        after()
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        work()
    lease.check()


@pytest.mark.usefixtures("interruptible", "often")
def test_a_run_that_was_taken_over_is_told_and_leaves_the_others_lease(local_store):
    with Lease(local_store) as lease, pytest.raises(LeaseLostError, match="another run took this output over"):
        wait_for_loss(lease, lambda: leave(local_store, number=2))
    assert max(holder["number"] for holder in holders(local_store)) == 2


def test_a_run_that_ends_before_it_is_told_leaves_the_others_lease_too(store):
    leave(store, number=3)
    with Lease(store, sleep=lambda seconds: None):
        leave(store, number=9)
    assert [holder["number"] for holder in holders(store)] == [9]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pipeline.lease.time.monotonic", clock)
    return clock


@pytest.mark.usefixtures("interruptible", "often")
def test_a_run_that_cannot_renew_its_lease_stops_before_another_may_begin(local_store, monkeypatch, clock):
    with Lease(local_store) as lease:

        def refuse(key: str, data: bytes) -> None:
            clock.now += 40
            raise StoreError("the network is away", transient=True)

        monkeypatch.setattr(local_store, "put", refuse)
        with pytest.raises(LeaseLostError, match=r"not be renewed for 60 seconds \(the network is away\)"):
            wait_for_loss(lease)


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000000001", "notes.json", "0000002.json", "٠٠٠٠٠٩.json", "x/y"])
@pytest.mark.usefixtures("often")
def test_a_foreign_file_beside_a_lease_changes_nothing(store, name):
    store.put(f"lease/{name}", b"?")
    with Lease(store) as lease:
        while not held(store).holder.beat:  # until it is renewed
            lease.check()
            time.sleep(0.1)
        assert held(store).holder.number == 1
    assert store.list("lease") == [f"lease/{name}"]


@pytest.mark.usefixtures("interruptible", "often")
def test_an_error_that_nobody_expects_in_the_renewal_ends_the_run(local_store, monkeypatch):
    with Lease(local_store) as lease:

        def fails(key: str, data: bytes) -> None:
            raise ValueError("nobody thought of this")

        monkeypatch.setattr(local_store, "put", fails)
        with pytest.raises(LeaseLostError, match="can no longer be renewed .*nobody thought of this"):
            wait_for_loss(lease)


@pytest.mark.usefixtures("interruptible", "often")
@pytest.mark.parametrize("emptied", ["removed", "moved"])
def test_a_run_whose_output_is_emptied_stops_and_writes_nothing_there(local_store, emptied):
    root = local_store.uri.removeprefix("file://")

    def empty() -> None:
        os.rename(root, f"{root}-moved")
        if emptied == "removed":
            shutil.rmtree(f"{root}-moved")

    said = "its lease is gone: the output was moved, emptied or unmounted"
    with Lease(local_store) as lease, pytest.raises(LeaseLostError, match=said):
        wait_for_loss(lease, empty)
    assert not os.path.exists(root)


def test_a_run_that_ends_before_it_sees_that_its_output_was_emptied_has_not_succeeded(store):
    with pytest.raises(LeaseLostError, match="moved, emptied or unmounted"), Lease(store):
        store.delete("lease/000001.json")


def test_a_run_that_fails_in_an_emptied_output_tells_of_its_own_failure(store):
    def fail() -> None:
        store.delete("lease/000001.json")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Lease(store):
        fail()


def test_a_run_that_ends_beside_another_with_its_number_has_not_succeeded(store):
    with pytest.raises(LeaseLostError, match="another run works on this output"), Lease(store):
        leave(store, token="of another")
    assert [holder["token"] for holder in holders(store)] == ["of another"]


@pytest.mark.usefixtures("interruptible", "often")
def test_a_run_whose_number_another_has_since_the_output_was_emptied_stops_and_leaves_that_ones_lease(local_store):
    said = r"another run works on this output \(process 7 .*was emptied"
    with Lease(local_store) as lease, pytest.raises(LeaseLostError, match=said):
        wait_for_loss(lease, lambda: leave(local_store, token="of another"))
    assert [holder["token"] for holder in holders(local_store)] == ["of another"]


@pytest.mark.usefixtures("interruptible", "often")
def test_a_process_that_stood_still_for_longer_than_its_lease_has_lost_it_to_a_run_that_began_meanwhile(
    local_store, monkeypatch
):
    def stand_still() -> None:
        leave(local_store, number=2)

    with Lease(local_store) as lease:
        with pytest.raises(LeaseLostError, match="another run took this output over"):
            wait_for_loss(lease, stand_still)
        assert max(holder["number"] for holder in holders(local_store)) == 2


@pytest.mark.usefixtures("often")
def test_a_process_that_stood_still_and_was_not_replaced_goes_on(local_store, clock):
    with Lease(local_store) as lease:
        clock.now += 100
        beat = holders(local_store)[0]["beat"]
        while holders(local_store)[0]["beat"] < beat + 2:
            time.sleep(0.01)
        lease.check()


def test_a_run_that_is_renewed_in_the_last_moment_is_not_replaced(local_store, monkeypatch):
    leave(local_store)
    create = local_store.create

    def create_late(key: str, data: bytes) -> bool:
        leave(local_store, beat=1)
        return create(key, data)

    monkeypatch.setattr(local_store, "create", create_late)
    with (
        pytest.raises(LeaseHeldError, match="another run is working on this output"),
        Lease(local_store, sleep=lambda _: None),
    ):
        pass
    assert [holder["number"] for holder in holders(local_store)] == [1]


@pytest.mark.usefixtures("interruptible", "often")
def test_a_storage_that_answers_late_does_not_keep_a_run_from_noticing(local_store, monkeypatch, clock):
    answer = threading.Event()

    def answers_late(key: str, data: bytes) -> None:
        clock.now += 100
        answer.wait(60)

    with Lease(local_store) as lease:
        monkeypatch.setattr(local_store, "put", answers_late)
        with pytest.raises(LeaseLostError, match="the storage does not answer"):
            wait_for_loss(lease)
        assert not answer.is_set()
        answer.set()


def test_a_run_waits_for_another_as_long_as_that_ones_lease_lasts(store):
    for theirs, waits in ((90, 90), (1, 60), (1e9, 3600)):
        leave(store, expires_s=theirs)
        waited = []
        with Lease(store, expires_s=60, sleep=waited.append):
            pass
        assert sum(waited) == pytest.approx(waits)


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"number": 1}',
     *(json.dumps({**ELSEWHERE, **changes}).encode()
       for changes in ({"pid": "7"}, {"pid": -1}, {"number": 2}, {"expires_s": float("nan")}))],
    ids=range(11),
)  # fmt: skip
def test_a_damaged_lease_is_named_by_its_file(local_store, damaged):
    local_store.put("lease/000001.json", damaged)
    for act in (lambda: held(local_store), Lease(local_store, expires_s=0.1).__enter__):
        with pytest.raises(StoreDamagedError, match=r"lease/000001\.json \([0-9]+ bytes\) is damaged"):
            act()
