"""Facts about faults: what kind an error is, what is tried again, and that a dead process leaves its mark."""

import concurrent.futures
import errno
import http.client
import pickle
import ssl
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore import exceptions as boto

from pipeline.faults import (
    MESSAGE_CHARACTERS,
    STOPS_JOB,
    Fault,
    Ledger,
    Policy,
    breaks_device,
    classify,
    retry_faults,
)
from pipeline.job import Job, Output, OwnSettings, RunningJob
from pipeline.manifest import Manifest
from pipeline.record import ERROR_KINDS, RecordError, make_row
from pipeline.store import (
    Store,
    StoreDamagedError,
    StoreError,
    StoreForbiddenError,
    StoreMissingError,
    StoreUnwritableError,
)


def client_error(status: int, code: str) -> boto.ClientError:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(response, "GetObject")


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class WithStatus(Exception):
    """As aiohttp's ClientResponseError has it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class OutOfMemoryError(RuntimeError):
    """The name torch.cuda.OutOfMemoryError has."""


class RayLikeTaskError(Exception):
    """Ray's task errors carry the worker's exception as an attribute."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("ray::MapWorker() a long remote traceback")
        self.cause = cause


TRANSIENT = [
    TimeoutError("slow"), TimeoutError(), concurrent.futures.TimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"), BrokenPipeError(errno.EPIPE, "pipe"), ConnectionRefusedError(),
    OSError(errno.ETIMEDOUT, "timed out"), OSError(errno.EBUSY, "busy"), OSError(errno.EHOSTUNREACH, "no route"),
    OSError(errno.ESTALE, "stale file handle"), http.client.IncompleteRead(b""),
    boto.EndpointConnectionError(endpoint_url="http://x"), boto.ReadTimeoutError(endpoint_url="http://x"),
    boto.ConnectionClosedError(endpoint_url="http://x"), client_error(503, "SlowDown"),
    client_error(429, "TooManyRequests"), client_error(500, "InternalError"), WithStatus(502), WithStatus(504),
    StoreError("busy", transient=True), caused(RuntimeError("while reading"), TimeoutError("slow")),
    RayLikeTaskError(TimeoutError("slow")),
]  # fmt: skip
PERMANENT = [
    ValueError("3 frames, expected 24"), KeyError("x"), RuntimeError("shape mismatch"), FileNotFoundError("gone"),
    PermissionError(errno.EACCES, "no"), OSError(errno.ENOSPC, "disk full"), IsADirectoryError(errno.EISDIR, "d"),
    StoreError("odd"), StoreMissingError("gone"), StoreForbiddenError("no"), client_error(403, "AccessDenied"),
    client_error(404, "NoSuchKey"), WithStatus(404), AssertionError(), ssl.SSLCertVerificationError("self-signed"),
    boto.SSLError(endpoint_url="https://x", error="self-signed"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    RayLikeTaskError(ValueError("bad clip")), caused(StoreMissingError("gone"), FileNotFoundError()),
    ValueError("connection timed out"),
]  # fmt: skip
OUT_OF_MEMORY = [
    MemoryError(), OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), OSError(errno.ENOMEM, "no"),
    RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    caused(RuntimeError("row failed"), OutOfMemoryError("CUDA out of memory")),
]  # fmt: skip


DEVICE_BROKEN = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    caused(ValueError("row failed"), RuntimeError("CUDA error: device-side assert triggered")),
]
DEVICE_SOUND = [*OUT_OF_MEMORY, *PERMANENT, *TRANSIENT, ValueError("CUDA error: only a text")]


@pytest.mark.parametrize("error", DEVICE_BROKEN + DEVICE_SOUND, ids=lambda value: repr(value)[:60])
def test_only_errors_of_the_device_itself_spoil_it(error):
    assert breaks_device(error) == (error in DEVICE_BROKEN)


def test_an_output_that_refuses_to_be_written_to_stops_the_job():
    fault = classify(caused(RuntimeError("while committing"), StoreUnwritableError("the disk is full")))
    assert (fault.kind, fault.stops_job) == (STOPS_JOB, True)
    assert not classify(StoreForbiddenError("an input")).stops_job
    assert STOPS_JOB not in ERROR_KINDS


@pytest.mark.parametrize(
    ("error", "kind"),
    [(error, "transient") for error in TRANSIENT]
    + [(error, "permanent") for error in PERMANENT]
    + [(error, "out_of_memory") for error in OUT_OF_MEMORY],
    ids=lambda value: repr(value)[:60],
)
def test_an_error_has_its_kind(error, kind):
    assert classify(error).kind == kind


def test_an_error_that_was_merely_being_handled_decides_nothing():
    error = ValueError("a bad clip")
    error.__context__ = TimeoutError("slow")
    assert classify(error) == Fault("permanent", "ValueError", "a bad clip")


def test_the_message_is_one_paragraph_with_the_causes():
    fault = classify(caused(RuntimeError("cannot decode\n  frame 3"), ValueError("bad\tstream")))
    assert fault.error_class == "RuntimeError"
    assert fault.message == "cannot decode frame 3; caused by ValueError: bad stream"


def test_an_error_without_a_text_is_named_by_its_class():
    assert classify(AssertionError()).message == "AssertionError"


def test_the_message_is_capped_and_the_workers_error_speaks_for_the_task():
    fault = classify(RayLikeTaskError(ValueError("x" * 10_000)))
    assert fault.error_class == "ValueError"
    assert len(fault.message) == MESSAGE_CHARACTERS
    assert fault.message.endswith("x ...")


def test_the_message_shows_no_credentials():
    fault = classify(caused(RuntimeError("cannot read https://me:s3cr3t@host/a"), OSError("token=s3cr3t")))
    assert "s3cr3t" not in fault.message


def test_a_circle_of_causes_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify(first).message == "a; caused by ValueError: b"


# -------------------------------------------------------------------------------------------------- retries


class Flaky:
    """Raises the given errors one after the other, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_transient_errors_are_tried_again_with_growing_bounded_waits():
    waits: list[float] = []
    flaky = Flaky(*[TimeoutError()] * 7)
    assert retry_faults(flaky, 8, base_seconds=1.0, max_seconds=5.0, sleep=waits.append) == "done"
    assert flaky.calls == 8
    limits = [1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0]
    assert all(0 <= wait <= limit for wait, limit in zip(waits, limits, strict=True))
    assert len(set(waits)) > 1


def test_it_gives_up_with_the_last_error_itself():
    last = ConnectionResetError("third")
    flaky = Flaky(TimeoutError("first"), TimeoutError("second"), last, TimeoutError("never reached"))
    with pytest.raises(ConnectionResetError) as caught:
        retry_faults(flaky, 3, 1.0, 5.0, sleep=lambda _: None)
    assert caught.value is last
    assert flaky.calls == 3


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError(), StoreMissingError("gone")])
def test_other_errors_are_not_tried_again(error):
    flaky = Flaky(error)
    with pytest.raises(type(error)):
        retry_faults(flaky, 3, 1.0, 5.0, sleep=lambda _: pytest.fail("waited"))
    assert flaky.calls == 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"attempts": 0}, "attempts: 0"),
        ({"worker_died_attempts": 0}, "worker_died_attempts: 0"),
        ({"max_failures_in_a_row": 0}, "max_failures_in_a_row: 0"),
        ({"storage_patience_s": -1}, "storage_patience_s: -1"),
        ({"base_seconds": -1}, "base_seconds"),
        ({"base_seconds": 9, "max_seconds": 1}, "max_seconds"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(values, says):
    assert Policy().attempts == 3
    with pytest.raises(ValueError, match=says):
        Policy(**values)


# --------------------------------------------------------------------------------------------------- ledger


def test_tries_are_counted_across_processes(store):
    for number in (1, 2, 3):
        again = Ledger(pickle.loads(pickle.dumps(store)))  # as a process that knows nothing of the one before
        assert again.begin("row-a", {"pid": 100 + number}) == number
    assert Ledger(store).begin("row-b", {}) == 1
    found = Ledger(store).attempts("row-a")
    assert [(entry["attempt"], entry["pid"], entry["row_id"]) for entry in found] == [
        (1, 101, "row-a"), (2, 102, "row-a"), (3, 103, "row-a")
    ]  # fmt: skip
    assert Ledger(store).unfinished() == {"row-a": 3, "row-b": 1}


def test_an_ended_row_has_no_tries_and_starts_anew(store):
    ledger = Ledger(store)
    ledger.begin("row", {})
    ledger.begin("row", {})
    ledger.begin("row-2", {})
    ledger.end("row")
    ledger.end("row")
    assert ledger.attempts("row") == []
    assert ledger.unfinished() == {"row-2": 1}
    assert ledger.begin("row", {}) == 1


def test_two_that_begin_at_the_same_time_get_different_numbers(store):
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: Ledger(store).begin("row", {}), range(8)))
    assert sorted(numbers) == list(range(1, 9))


def test_a_try_whose_answer_was_lost_counts_once(store, monkeypatch):
    create = type(store).create

    def repeated(self, key, data):  # the first request succeeds, its answer is lost, and the client sends it again
        create(self, key, data)
        return create(self, key, data)

    monkeypatch.setattr(type(store), "create", repeated)
    assert Ledger(store).begin("row", {}) == 1
    assert Ledger(store).begin("row", {}) == 2


def test_the_tenth_hundredth_and_thousandth_try_stand_in_order(local_store):
    for number in (9, 10, 999, 1000):
        local_store.put(f"attempts/row/{number:03d}.json", b'{"n": %d}' % number)
    assert [entry["n"] for entry in Ledger(local_store).attempts("row")] == [9, 10, 999, 1000]
    local_store.put("attempts/row/001.json", b'{"token": ""}')
    assert Ledger(local_store).begin("row", {}) == 1001


def test_an_interrupted_end_leaves_a_count_without_gaps(store, monkeypatch):
    ledger = Ledger(store)
    for _ in range(3):
        ledger.begin("row", {})
    delete, deleted = type(store).delete, []

    def once(self, key):
        if deleted:
            raise KeyboardInterrupt
        deleted.append(key)
        delete(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "delete", once)
        with pytest.raises(KeyboardInterrupt):
            ledger.end("row")
    assert ledger.begin("row", {}) == 3


def test_a_first_try_costs_one_request(s3, s3_store):
    s3.requests.clear()
    Ledger(s3_store).begin("row", {})
    assert len(s3.requests) == 1


@pytest.mark.parametrize("row_id", ["", "../x", "a/b", ".", "a b", None, "x" * 201])
def test_a_row_id_that_cannot_be_a_file_name_is_refused(local_store, row_id):
    with pytest.raises(RecordError, match="row_id is"):
        Ledger(local_store).begin(row_id, {})


# ------------------------------------------------------------------------------------------------- damaged markers

DAMAGED = {
    "nothing": b"", "cut off": b'{"row_id": "r', "a list": b"[1]", "null": b"null", "no text": b"\xff",
    "nested": b"[" * 100_000, "no time": b'{"row_id": "r1"}',
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_marker_of_a_try_is_named_by_its_file_and_counts_as_a_try(local_store, content):
    ledger = Ledger(local_store)
    local_store.put("attempts/r1/001.json", content)
    with pytest.raises(
        StoreDamagedError, match=r"attempts/r1/001\.json \([0-9]+ bytes\) is damaged .*: remove it if no"
    ):
        ledger.in_flight()
    assert ledger.begin("r1", {}) == 2
    assert ledger.unfinished() == {"r1": 2}


def test_foreign_files_beside_markers_are_passed_over(local_store):
    ledger = Ledger(local_store)
    for name in (".nfs0001.json", "notes.json", ".DS_Store"):
        local_store.put(f"attempts/r1/{name}", b"?")
    assert ledger.begin("r1", {"node": "n"}) == 1
    assert ledger.begin("r1", {"node": "n"}) == 2
    assert [marker["attempt"] for marker in ledger.in_flight()] == [2]


# ------------------------------------------------------------------------------------------- an output that is gone


@pytest.mark.parametrize("then", ["moved", "replaced by an empty folder, as by an unmounted disk"])
def test_an_output_that_is_gone_stops_the_job_and_is_not_made_anew(tmp_path, then):
    out = tmp_path / "out"
    job = RunningJob.of(Job("synthesize", "test", Output(str(out)), faults=Policy(storage_patience_s=0)))
    Store(str(out)).put("run.json", b"{}")
    Ledger(job.store()).begin("row-1", {})
    out.rename(tmp_path / "moved")
    if then != "moved":
        out.mkdir()
    store = pickle.loads(pickle.dumps(job.with_own(OwnSettings(start=1)).store()))  # as a worker has it
    failed = make_row(row_id="row-1", status="failed", error_kind="permanent", error_class="E", error_message="e")
    for write in (
        lambda: store.put("videos/row-1.mp4", b"video"),
        lambda: store.create("manifest/row-1.parquet", b"record"),
        lambda: Ledger(store).begin("row-2", {}),
        lambda: Manifest(store).commit(failed),
        lambda: Manifest(store).remember(),
    ):
        with pytest.raises(StoreUnwritableError, match=r"is gone: run\.json is no more in it\. It was moved") as caught:
            write()
        assert classify(caught.value).stops_job
    assert not out.exists() or not list(out.iterdir())


def test_last_words_that_are_no_text_are_kept_as_far_as_they_are(local_store):
    ledger = Ledger(local_store)
    local_store.put("attempts/r1/last-words", b"CUDA error \xff")
    assert ledger.noted("r1") == "CUDA error \ufffd"
