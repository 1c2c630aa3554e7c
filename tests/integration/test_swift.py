"""Facts about storage on a real S3 server that fails on demand: what survives, what is tried again, what is not.

The first half holds on a local folder as well and runs on both.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3fs import S3FileSystem
from swift.server import LISTING_PAGE

from pipeline.faults import Ledger
from pipeline.manifest import Manifest
from pipeline.record import make_row
from pipeline.store import PART_BYTES, Store, StoreError, StoreForbiddenError, StoreMissingError

ODD_KEYS = ["in/a b.mp4", "in/größe 日本.mp4", "in/a\nb.mp4", "in/a+b%20c?d=1&e#f.mp4", 'in/it\'s "q" [1]*.mp4']
LARGE = b"".join(letter * PART_BYTES for letter in (b"a", b"b")) + b"the last part"


def store_with(bucket: str, *, attempts: int = 5, patience_s: float = 0.0, **config) -> Store:
    """A store on Swift whose requests are made at most so many times."""
    retries = {"mode": "standard", "total_max_attempts": attempts}
    return Store(f"s3://{bucket}/runs/one", {"config_kwargs": {"retries": retries, **config}}, patience_s)


def failed(row_id: str, message: str = "no") -> dict:
    error = {"error_kind": "permanent", "error_class": "ValueError", "error_message": message}
    return make_row(row_id=row_id, status="failed", **error)


@pytest.fixture
def swift_store(swift_bucket: str) -> Store:
    return Store(f"s3://{swift_bucket}/runs/one")


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs" / "one"))


@pytest.fixture(params=["local", "swift"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(f"{request.param}_store")


# --------------------------------------------------------------------------------- on every kind of storage


@pytest.mark.parametrize("key", ODD_KEYS)
def test_what_was_put_is_read_listed_and_deleted(store, key):
    stored = store.put(key, b"frames")
    assert store.read(key) == b"frames"
    assert store.list() == store.list("in") == [key]
    assert (stored.bytes, store.sizes()) == (6, {key: 6})
    store.delete(key)
    assert store.list() == []
    assert not store.exists(key)
    with pytest.raises(StoreMissingError):
        store.read(key)
    store.delete(key)  # what is gone already is no error


def test_an_empty_object_is_an_object(store):
    store.put("a", b"long content")
    store.put("a", b"")
    assert store.read("a") == b""
    assert store.sizes() == {"a": 0}


@pytest.mark.parametrize("source", ["bytes", "file"])
def test_an_upload_in_parts_arrives_whole_and_in_order(store, source, tmp_path):
    data = LARGE if source == "bytes" else tmp_path / "large"
    if source == "file":
        data.write_bytes(LARGE)
    assert store.put("videos/large", data).bytes == len(LARGE)
    assert store.read("videos/large") == LARGE
    assert store.list() == ["videos/large"]


def test_a_listing_of_several_pages_is_complete(store):
    keys = [f"attempts/{n:04d}/001.json" for n in range(2 * LISTING_PAGE + 1)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert store.list() == keys
    assert store.list("attempts/0007") == ["attempts/0007/001.json"]


def test_of_eight_that_create_one_key_exactly_one_wins(store):
    together = threading.Barrier(8)

    def create(number: int) -> bool:
        together.wait()
        return store.create("manifest/r1", bytes([number]) * 1000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert store.read("manifest/r1") == bytes([won.index(True)]) * 1000


def test_the_probe_of_an_output_leaves_nothing_behind(store):
    store.check_writable()
    assert store.list() == []


def test_the_first_record_of_a_row_counts(store):
    manifest = Manifest(store)
    first = manifest.commit(failed("r1", "first"))
    assert manifest.commit(failed("r1", "second")) == first
    manifest.commit(failed("r2"))
    assert manifest.compact() == 2
    assert manifest.commit(failed("r3"))["row_id"] == "r3"
    assert sorted(manifest.read(["row_id"])["row_id"].to_pylist()) == ["r1", "r2", "r3"]
    assert manifest.get("r1")["error_message"] == "first"


def test_tries_are_numbered_until_the_row_ends(store):
    ledger = Ledger(store)
    assert [ledger.begin("r1", {"node": "a"}), ledger.begin("r1", {"node": "b"})] == [1, 2]
    assert [attempt["node"] for attempt in ledger.attempts("r1")] == ["a", "b"]
    ledger.end("r1")
    assert ledger.unfinished() == {}
    assert ledger.begin("r1", {}) == 1


# --------------------------------------------------------------------------------------------------- access


OPERATIONS = {
    "read": lambda store: store.read("a"),
    "put": lambda store: store.put("a", b"new"),
    "create": lambda store: store.create("b", b"new"),
    "list": lambda store: store.list(),
    "exists": lambda store: store.exists("a"),
    "delete": lambda store: store.delete("a"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_secret_is_refused_by_the_first_request(swift, swift_store, operation, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another secret")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreForbiddenError) as refused:
        OPERATIONS[operation](swift_store)
    assert not refused.value.transient
    assert swift.faults.counts()["requests"] == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refusal_is_believed_at_once(swift, swift_store, operation):
    swift.faults.set([{"status": 403}])
    with pytest.raises(StoreForbiddenError):
        OPERATIONS[operation](swift_store)
    assert swift.faults.counts()["403"] == swift.faults.counts()["requests"] == 1


def test_a_bucket_that_does_not_exist_is_missing(swift):
    store = Store("s3://no-such-bucket/runs/one")
    for operation in (lambda: store.read("a"), lambda: store.put("a", b""), lambda: store.create("a", b"")):
        with pytest.raises(StoreMissingError):
            operation()


# -------------------------------------------------------------------------------------------- busy and broken


def test_a_burst_of_errors_is_ridden_out(swift, swift_store):
    swift.faults.set([{"status": 503, "rate": 0.5, "seed": 24}])
    swift_store.put("a", b"frames")
    assert swift_store.read("a") == b"frames"
    assert swift.faults.counts()["503"] >= 2


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_stays_busy_is_asked_no_more_often_than_configured(swift, swift_bucket, status):
    swift.faults.set([{"status": status}])
    with pytest.raises(StoreError) as busy:
        store_with(swift_bucket, attempts=2).read("a")
    assert busy.value.transient
    assert swift.faults.counts()["requests"] == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_request_whose_connection_was_dropped_is_sent_again(swift, swift_store, operation):
    swift_store.put("a", b"old")
    swift.faults.set([{"status": "drop", "times": 1}])
    OPERATIONS[operation](swift_store)
    assert swift.faults.counts()["drop"] == 1
    assert swift.faults.counts()["requests"] >= 2


def test_an_answer_that_is_cut_short_is_an_error_and_not_short_data(swift, swift_bucket):
    store_with(swift_bucket).put("a", b"x" * 300_000)
    swift.faults.set([{"status": "cut", "methods": ["GET"], "times": 1}])
    with pytest.raises(StoreError) as cut:
        store_with(swift_bucket).read("a")
    assert cut.value.transient


def test_a_patient_store_reads_again_what_was_cut_short(swift, swift_bucket):
    store = store_with(swift_bucket, patience_s=600)
    store.put("a", b"x" * 300_000)
    swift.faults.set([{"status": "cut", "methods": ["GET"], "times": 1}])
    assert store.read("a") == b"x" * 300_000
    assert swift.faults.counts()["cut"] == 1


def test_an_answer_that_does_not_come_is_asked_for_again(swift, swift_bucket):
    store = store_with(swift_bucket, read_timeout=2)
    store.put("a", b"frames")
    swift.faults.set([{"status": "slow", "seconds": 3600, "times": 1}])
    assert store.read("a") == b"frames"
    assert swift.faults.counts()["slow"] == 1


def test_what_a_killed_object_server_held_is_there_after_its_return(swift, swift_bucket):
    store = store_with(swift_bucket, attempts=1)
    store.put("a", b"before")
    swift.kill_object_server()
    for operation in (lambda: store.read("a"), lambda: store.put("b", b"after"), lambda: store.create("c", b"after")):
        with pytest.raises(StoreError) as lost:
            operation()
        assert lost.value.transient
    swift.start_object_server()
    assert store.read("a") == b"before"
    store.put("b", b"after")
    assert store.create("c", b"after")
    assert [store.read(key) for key in store.list()] == [b"before", b"after", b"after"]


def test_a_patient_store_waits_for_the_return_of_a_killed_object_server(swift, swift_bucket):
    store = store_with(swift_bucket, attempts=1, patience_s=600)
    swift.kill_object_server()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.put, "a", b"frames")
        while not swift.faults.counts()["PUT"]:
            assert not writing.done()
            time.sleep(0.05)
        swift.start_object_server()
        writing.result()
    assert store.read("a") == b"frames"


# ------------------------------------------------------------------------------------------------ lost answers


def test_a_write_whose_answer_was_lost_is_written_once_more(swift, swift_store):
    swift.faults.set([{"status": "lost", "methods": ["PUT"], "times": 1}])
    assert swift_store.put("a", b"frames").bytes == 6
    assert swift_store.read("a") == b"frames"
    assert swift.faults.counts()["PUT"] == 2


def test_a_deletion_whose_answer_was_lost_is_no_error(swift, swift_store):
    swift_store.put("a", b"frames")
    swift.faults.set([{"status": "lost", "methods": ["DELETE"], "times": 1}])
    swift_store.delete("a")
    assert swift_store.list() == []
    assert swift.faults.counts()["DELETE"] == 2


@pytest.mark.parametrize(
    ("status", "method", "request_of"), [("drop", "PUT", "partNumber=2"), ("lost", "POST", "uploadId")]
)
def test_an_upload_in_parts_survives_a_lost_part_and_a_lost_end(swift, swift_store, status, method, request_of):
    rule = {"status": status, "methods": [method], "path_contains": request_of, "times": 1}
    swift.faults.set([rule])
    swift_store.put("videos/large", LARGE)
    assert swift.faults.counts()[status] == 1
    assert swift_store.read("videos/large") == LARGE


def test_a_row_whose_commit_was_not_acknowledged_is_recorded_once_and_returned(swift, swift_store):
    manifest = Manifest(swift_store)
    swift.faults.set([{"status": "lost", "methods": ["PUT"], "path_contains": "manifest/", "times": 1}])
    assert manifest.commit(failed("r1", "mine")) == failed("r1", "mine")
    assert swift.faults.counts()["lost"] == 1
    assert swift.faults.counts()["PUT"] == 2  # the second one loses to the first
    assert manifest.read(["row_id", "error_message"]).to_pylist() == [{"row_id": "r1", "error_message": "mine"}]
    assert manifest.verify() == []


def test_a_try_whose_beginning_was_not_acknowledged_is_the_first_one(swift, swift_store):
    ledger = Ledger(swift_store)
    swift.faults.set([{"status": "lost", "methods": ["PUT"], "times": 1}])
    assert ledger.begin("r1", {"node": "a"}) == 1
    assert swift.faults.counts()["lost"] == 1
    assert [attempt["attempt"] for attempt in ledger.attempts("r1")] == [1]
    assert ledger.begin("r1", {"node": "a"}) == 2


def test_of_eight_that_commit_one_row_over_a_bad_line_all_return_the_same_record(swift, swift_store):
    manifest = Manifest(swift_store)
    swift.faults.set([{"status": "lost", "methods": ["PUT"], "rate": 0.5, "seed": 24}])
    with ThreadPoolExecutor(8) as pool:
        returned = list(pool.map(lambda n: manifest.commit(failed("r1", f"attempt {n}")), range(8)))
    assert len({row["error_message"] for row in returned}) == 1
    assert manifest.read().to_pylist() == returned[:1]
    assert swift.faults.counts()["lost"] >= 2
