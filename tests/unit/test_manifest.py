"""Facts about the manifest: its columns, that a row is recorded once, and that verify finds what is wrong."""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline.manifest import Manifest, ManifestError, output_key, parquet_bytes
from pipeline.record import COLUMN_NAMES, COLUMNS, SCHEMA, RecordError, make_row, rows_to_table
from pipeline.store import Store, StoreError

GOLDEN = """
row_id string; job string; kind string; status string; reference_uri string; reference_sha256 string; prompt string;
category string; negative_prompt string; seed int64; variant string; method string; optimize string; model string;
model_revision string; spec_json string; output_uri string; output_sha256 string; output_bytes int64; amf_uri
string; bank_uri string; bank_loads int32; frames int32; height int32; width int32; fps double; losses
list<float32>; loss_first float; loss_final float; seconds_read double; seconds_extract double; seconds_learn
double; seconds_guidance double; seconds_denoise double; seconds_decode double; seconds_encode double; seconds_write
double; seconds_total double; peak_memory_bytes int64; device string; node string; process int64; attempts int32;
error_kind string; error_class string; error_message string; started_at timestamp[us, tz=UTC]; finished_at
timestamp[us, tz=UTC]; versions_json string; execution_json string; reference_notes list<item: string>; noise_losses
list<float32>; prompt_tokens int32; prompt_cut bool; motion_source string; motion_filters string; mask_uri string;
mask_sha256 string
"""


def failed(row_id: str, **values) -> dict:
    defaults = {"status": "failed", "error_kind": "permanent", "error_class": "ValueError", "error_message": "no"}
    return make_row(row_id=row_id, **{**defaults, **values})


def finished(store: Store, row_id: str, data: bytes = b"video", **values) -> dict:
    """A row that is ok, with its output in the store."""
    stored = store.put(f"videos/{row_id}.mp4", data)
    output = {"output_uri": stored.uri, "output_sha256": stored.sha256, "output_bytes": stored.bytes}
    return make_row(**{"row_id": row_id, "status": "ok", **output, **values})


@pytest.fixture
def manifest(store: Store) -> Manifest:
    return Manifest(store)


def found(manifest: Manifest, **options) -> list[tuple]:
    return [(problem.kind, problem.row_id, problem.key) for problem in manifest.verify(**options)]


def put_table(store: Store, key: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.put(key, sink.getvalue().to_pybytes())


# ---------------------------------------------------------------------------------------------------- record


def test_the_columns_their_order_and_their_types_are_those_of_the_contract():
    expected = [tuple(part.split(None, 1)) for part in " ".join(GOLDEN.split()).split("; ")]
    types = [(field.name, re.sub("<item: float>", "<float32>", str(field.type))) for field in SCHEMA]
    assert types == expected


def test_every_column_says_what_it_means_and_its_unit():
    assert all(column.meaning for column in COLUMNS)
    assert SCHEMA.field("seconds_read").metadata == {b"unit": b"seconds", b"meaning": COLUMNS[29].meaning.encode()}
    assert SCHEMA.metadata == {b"ditflow_schema_version": b"1"}


def test_a_row_has_every_column_in_order():
    row = failed("r1", prompt="a leopard")
    assert tuple(row) == COLUMN_NAMES
    assert row["prompt"] == "a leopard"
    assert row["seed"] is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"promt": "x"}, r"'promt' \(did you mean 'prompt'\?\)"),
        ({"zzz": 1}, "unknown manifest columns: 'zzz'. Valid: row_id"),
        ({"status": "done"}, "status is 'done'; valid: ok, failed, quarantined"),
        ({"error_kind": "odd"}, "error_kind is 'odd'; valid: transient, permanent"),
        ({"error_kind": None}, "'failed' without error_kind"),
        ({"error_class": None, "error_message": None}, "without error_class, error_message"),
        ({"status": "quarantined", "error_class": None}, "'quarantined' without error_class"),
        ({"status": "ok", "output_uri": "s3://b/a"}, "'ok' without output_sha256, output_bytes"),
        ({"row_id": "../x"}, "row_id is '../x'"),
        ({"row_id": None}, "row_id is None"),
        ({"started_at": datetime(2026, 1, 1)}, "with a time zone"),
        ({"started_at": "2026-01-01"}, "expected a datetime"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(values, says):
    with pytest.raises(RecordError, match=says):
        failed(**{"row_id": "r1", **values})


def test_an_ok_row_has_no_error():
    output = {"output_uri": "s3://b/videos/a", "output_sha256": "0", "output_bytes": 1}
    with pytest.raises(RecordError, match="'ok' with error_kind"):
        make_row(row_id="r", status="ok", error_kind="transient", **output)


def test_a_wrong_type_is_refused_by_the_name_of_its_column():
    with pytest.raises(RecordError, match="column 'frames' holds str; expected int32"):
        rows_to_table([failed("r", frames="many")])


def test_no_credential_reaches_a_row():
    row = failed("r", error_message="token=s3cr3t", reference_uri="https://me:s3cr3t@h/a?X-Amz-Signature=s3cr3t")
    assert "s3cr3t" not in str(row)
    assert failed("r", prompt="a token: gold")["prompt"] == "a token: gold"


# ---------------------------------------------------------------------------------------------------- commit


def test_a_row_is_read_back_as_it_was_recorded(store, manifest):
    elsewhere = timezone(timedelta(hours=2))
    began = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=elsewhere)
    row = finished(store, "r1", losses=[0.5, 0.25], loss_final=0.25, frames=17, started_at=began, prompt="größe\n")
    assert manifest.commit(row) == row
    assert manifest.get("r1") == row
    assert row["started_at"] == began
    assert store.list("manifest") == ["manifest/r1.parquet"]


def test_the_one_that_comes_second_gets_the_first_ones_row(manifest):
    first = manifest.commit(failed("r1", attempts=1))
    assert manifest.commit(failed("r1", attempts=2)) == first
    assert manifest.read().num_rows == 1


def test_of_many_that_commit_one_row_all_get_the_same_winner(manifest):
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda n: manifest.commit(failed("r1", attempts=n)), range(8)))
    assert all(row == rows[0] for row in rows)
    assert manifest.read().to_pylist() == rows[:1]


def test_a_row_is_checked_before_it_is_recorded(manifest):
    with pytest.raises(RecordError):
        manifest.commit({"row_id": "r1", "status": "ok"})
    assert manifest.statuses() == {}


def test_one_row_costs_one_request_and_few_bytes(s3, s3_store):
    row = finished(s3_store, "r1")
    s3.requests.clear()
    Manifest(s3_store).commit(row)
    assert len(s3.requests) == 1
    assert s3_store.sizes("manifest")["manifest/r1.parquet"] < 375 * len(SCHEMA)


# ------------------------------------------------------------------------------------------------------ read


def test_an_empty_manifest_is_an_empty_table_of_the_schema(manifest):
    assert manifest.read().schema.equals(SCHEMA, check_metadata=True)
    assert manifest.read().num_rows == 0
    assert manifest.statuses() == {}
    assert manifest.get("r1") is None


def test_all_rows_are_read_with_the_columns_asked_for(store, manifest):
    for n in range(30):
        manifest.commit(failed(f"r{n:02d}", seed=n))
    manifest.commit(finished(store, "ok"))
    assert manifest.read(["seed", "row_id"]).column_names == ["seed", "row_id"]
    assert sorted(manifest.read(["seed"])["seed"].to_pylist()[1:]) == list(range(30))
    assert manifest.statuses() == {"ok": "ok", **{f"r{n:02d}": "failed" for n in range(30)}}
    with pytest.raises(RecordError, match="did you mean 'seed'"):
        manifest.read(["sead"])


def test_a_merged_file_counts_and_a_row_in_two_files_appears_once(store, manifest):
    rows = [failed(f"r{n}", seed=n) for n in range(4)]
    manifest.commit(rows[0])
    manifest.commit(rows[3])
    put_table(store, "manifest/merged-0001.parquet", rows_to_table(rows[:3]))
    assert sorted(manifest.read(["row_id"])["row_id"].to_pylist()) == ["r0", "r1", "r2", "r3"]
    assert manifest.read().num_rows == 4
    assert manifest.get("r1") == rows[1]


class DiesAfter:
    """A store that fails for good after so many changes, as a killed process would."""

    def __init__(self, store: Store, changes: int):
        self._store, self._left = store, changes

    def __getattr__(self, name):
        return getattr(self._store, name)

    def _change(self, change, *arguments):
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return change(*arguments)

    def put(self, *arguments):
        return self._change(self._store.put, *arguments)

    def delete(self, *arguments):
        return self._change(self._store.delete, *arguments)


def records(manifest: Manifest) -> list[dict]:
    return sorted(manifest.read().to_pylist(), key=lambda row: row["row_id"])


def test_compaction_keeps_every_record_and_leaves_few_files(store, manifest):
    for n in range(7):
        manifest.commit(failed(f"r{n}", seed=n, losses=[1.0, n]))
    before = records(manifest)
    assert manifest.compact(rows_per_file=3) == 7
    assert len(store.list("manifest")) == 3
    assert records(manifest) == before
    assert manifest.get("r5") == before[5]
    assert manifest.compact() == 0
    manifest.commit(failed("r7"))
    assert manifest.compact() == 1
    assert len(records(manifest)) == 8


@pytest.mark.parametrize("changes", range(12))
def test_compaction_may_end_anywhere_and_be_done_again(local_store, changes):
    """Two merges of three rows: eight changes when nothing ends them."""
    manifest = Manifest(local_store)
    for n in range(6):
        manifest.commit(failed(f"r{n}", seed=n))
    before = records(manifest)
    with contextlib.suppress(KeyboardInterrupt):
        Manifest(DiesAfter(local_store, changes)).compact(rows_per_file=3)
    assert records(manifest) == before
    manifest.compact(rows_per_file=3)
    assert records(manifest) == before
    assert manifest.verify() == [], "no row stands twice"
    assert all(key.startswith("manifest/merged-") for key in local_store.list("manifest"))


def test_few_files_are_left_alone_when_only_many_are_worth_it(local_store):
    manifest = Manifest(local_store)
    for n in range(3):
        manifest.commit(failed(f"r{n}"))
    assert manifest.compact(least=4) == 0
    assert len(local_store.list("manifest")) == 3
    assert manifest.compact(least=3) == 3


ID = "0123456789abcdef01234567"


def test_cleaning_removes_what_no_record_names_and_nothing_else(store, manifest):
    amf = store.put("amf/ab/m1.safetensors", b"motion")
    manifest.commit(finished(store, "r1", amf_uri=amf.uri))
    manifest.commit(failed("r2"))
    row, motion = f"videos/{ID}.mp4", f"amf/{ID[:2]}/{ID}.safetensors"
    store.put(row, b"of a row in flight when all was killed")
    store.put(motion, b"of a job that never went on")
    store.put("job.yaml", b"kind: synthesize")
    assert sorted(problem.key for problem in manifest.leftovers()) == [motion, row]
    assert store.exists(row)
    assert sorted(problem.key for problem in manifest.clean()) == [motion, row]
    assert manifest.verify() == []
    assert manifest.clean() == []
    assert store.exists("job.yaml")
    assert store.exists("amf/ab/m1.safetensors")


@pytest.mark.parametrize("there", [(), ("job.yaml",), ("record",)], ids=["banks alone", "no manifest", "no job"])
def test_nothing_is_cleaned_without_a_job_and_a_record(local_store, there):
    manifest = Manifest(local_store)
    for key in (f"banks/{ID}.safetensors", f"videos/{ID}.mp4", *(key for key in there if key == "job.yaml")):
        local_store.put(key, b"the only copy")
    if "record" in there:
        manifest.commit(failed("r1"))
    before = local_store.list()
    with pytest.raises(ManifestError, match="nothing is removed here: there is no "):
        manifest.clean()
    assert local_store.list() == before


def test_files_of_the_users_own_are_left_alone_and_links_are_not_followed(local_store, tmp_path):
    manifest = Manifest(local_store)
    manifest.commit(failed("r1"))
    local_store.put("job.yaml", b"kind: synthesize")
    own = ["videos/notes.txt", "videos/best.mp4", f"videos/zz/{ID}.mp4", f"banks/{ID}.safetensors.bak", f"amf/{ID}"]
    for key in own:
        local_store.put(key, b"mine")
    elsewhere, root = tmp_path / "elsewhere", Path(local_store.uri.removeprefix("file://"))
    elsewhere.mkdir()
    (elsewhere / f"{ID}.mp4").write_bytes(b"outside")
    (elsewhere / f".tmp-{'0' * 32}").write_bytes(b"outside")
    (root / "videos/01").symlink_to(elsewhere)
    (root / f"videos/{ID}.mp4").symlink_to(elsewhere / f"{ID}.mp4")
    assert manifest.clean() == []
    assert local_store.remove_unfinished() == 0
    with pytest.raises(StoreError, match="symbolic link"):
        local_store.delete(f"videos/01/{ID}.mp4")
    assert sorted(path.name for path in elsewhere.iterdir()) == [f".tmp-{'0' * 32}", f"{ID}.mp4"]
    assert all(local_store.exists(key) for key in own)


def test_cleaning_removes_the_second_record_of_a_row_that_was_merged(store, manifest):
    store.put("job.yaml", b"kind: synthesize")
    manifest.commit(failed("r1", seed=1))
    manifest.commit(failed("r2"))
    manifest.compact()
    manifest.commit(failed("r1", seed=2))  # by a worker of a run that was thought dead
    assert [problem.kind for problem in manifest.verify()] == ["row_duplicate"]
    assert [problem.row_id for problem in manifest.clean()] == ["r1"]
    assert manifest.verify() == []
    assert manifest.get("r1")["seed"] == 1


def test_nothing_is_cleaned_while_a_record_cannot_be_read(store, manifest):
    manifest.commit(finished(store, "r1"))
    store.put("job.yaml", b"kind: synthesize")
    store.put("manifest/r1.parquet", b"damaged")
    with pytest.raises(ManifestError, match="no readable manifest file"):
        manifest.clean()
    assert store.exists("videos/r1.mp4")


def test_a_reader_whose_files_are_merged_meanwhile_reads_every_row(local_store, monkeypatch):
    manifest = Manifest(local_store)
    for n in range(4):
        manifest.commit(failed(f"r{n}"))
    listed, lists = local_store.list("manifest"), []

    def list_before_the_merge(folder):
        lists.append(folder)
        return listed if len(lists) == 1 else Store.list(local_store, folder)

    Manifest(Store(local_store.uri)).compact()
    monkeypatch.setattr(local_store, "list", list_before_the_merge)
    assert sorted(manifest.statuses()) == ["r0", "r1", "r2", "r3"]


def test_an_unreadable_file_is_not_merged_away(store, manifest):
    manifest.commit(failed("r1"))
    store.put("manifest/r2.parquet", b"no parquet")
    with pytest.raises(ManifestError, match=r"r2\.parquet"):
        manifest.compact()
    assert sorted(store.list("manifest")) == ["manifest/r1.parquet", "manifest/r2.parquet"]


def test_files_that_are_no_records_are_passed_over(store, manifest):
    manifest.commit(failed("r1"))
    for name in ("manifest/_SUCCESS", "manifest/.hidden.parquet", "manifest/_tmp.parquet", "manifest/notes.txt"):
        store.put(name, b"no parquet")
    assert manifest.statuses() == {"r1": "failed"}


def test_columns_that_an_older_release_did_not_write_are_null(store, manifest):
    old = rows_to_table([failed("r1")]).drop_columns(["execution_json", "node"])
    put_table(store, "manifest/r1.parquet", old)
    assert manifest.get("r1") == failed("r1")
    assert manifest.read(["node", "row_id"]).to_pylist() == [{"node": None, "row_id": "r1"}]


def test_records_of_a_newer_release_are_refused(store, manifest):
    newer = rows_to_table([failed("r1")]).replace_schema_metadata({"ditflow_schema_version": "2"})
    put_table(store, "manifest/r1.parquet", newer)
    with pytest.raises(ManifestError, match="version 2, this program knows 1"):
        manifest.read()


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"x" * 1000])
def test_an_unreadable_file_is_an_error_that_names_it(store, manifest, content):
    manifest.commit(failed("r1"))
    store.put("manifest/r2.parquet", content)
    with pytest.raises(ManifestError, match=r"manifest/r2.parquet .* no readable manifest file"):
        manifest.statuses()


NO_TEXT = pa.array([b"\xff"]).view(pa.string())
NO_TIME = pa.array([2**62]).view(pa.timestamp("us", tz="UTC"))


@pytest.mark.parametrize(("column", "values"), [("prompt", NO_TEXT), ("finished_at", NO_TIME)])
def test_a_record_with_values_that_python_cannot_have_is_an_error_that_names_it(store, manifest, column, values):
    row = rows_to_table([failed("r1")])
    put_table(store, "manifest/r1.parquet", row.set_column(row.column_names.index(column), column, values))
    with pytest.raises(ManifestError, match=r"manifest/r1.parquet .* no readable manifest file"):
        manifest.read()


def test_a_record_with_a_column_twice_is_an_error_that_names_it(store, manifest):
    row = rows_to_table([failed("r1")])
    put_table(store, "manifest/r1.parquet", row.append_column("prompt", row["prompt"]))
    with pytest.raises(ManifestError, match=r"manifest/r1.parquet .* no readable manifest file"):
        manifest.read()


@pytest.mark.parametrize("others", [[], [failed("r2")]])
def test_a_file_without_the_row_that_it_is_named_after_is_an_error_that_names_it(store, manifest, others):
    put_table(store, "manifest/r1.parquet", rows_to_table(others))
    with pytest.raises(ManifestError, match="manifest/r1.parquet has no record of its row"):
        manifest.recorded("r1")


def test_a_parquet_file_of_another_program_is_an_error_that_shows_its_columns(store, manifest):
    put_table(store, "manifest/x.parquet", pa.table({"a": [1], "b": [2]}))
    with pytest.raises(ManifestError, match="no row_id and status, but a, b"):
        manifest.read()


def test_any_parquet_reader_reads_the_folder_as_one_table(store, manifest):
    manifest.commit(finished(store, "r1", losses=[1.0, 0.5]))
    manifest.commit(failed("r2"))
    put_table(store, "manifest/merged.parquet", rows_to_table([failed("r3")]))
    fs, path = store._at("manifest")
    dataset = pyarrow.dataset.dataset(path, format="parquet", filesystem=fs)
    assert dataset.schema.equals(SCHEMA)
    rows = dataset.to_table(columns=["row_id", "status", "losses"]).sort_by("row_id").to_pylist()
    assert rows[0] == {"row_id": "r1", "status": "ok", "losses": [1.0, 0.5]}
    assert [row["status"] for row in rows] == ["ok", "failed", "failed"]


# ---------------------------------------------------------------------------------------------------- forget


def test_failed_rows_are_forgotten_and_can_be_recorded_again(store, manifest):
    manifest.commit(failed("r1"))
    manifest.commit(failed("r2", status="quarantined"))
    manifest.commit(failed("r3"))
    assert manifest.forget(["r2", "r1", "unknown"]) == ["r1", "r2"]
    assert manifest.statuses() == {"r3": "failed"}
    assert manifest.commit(finished(store, "r1"))["status"] == "ok"


def test_ok_rows_are_not_forgotten_and_then_nothing_is(store, manifest):
    manifest.commit(finished(store, "r1"))
    manifest.commit(failed("r2"))
    with pytest.raises(ManifestError, match="1 of the rows to forget are ok: r1"):
        manifest.forget(["r2", "r1"])
    assert manifest.statuses() == {"r1": "ok", "r2": "failed"}


def test_a_row_is_forgotten_in_a_merged_file_and_its_neighbours_stay(store, manifest):
    put_table(store, "manifest/merged.parquet", rows_to_table([failed("r1"), failed("r2"), finished(store, "r3")]))
    manifest.commit(failed("r2"))
    assert manifest.forget(["r2"]) == ["r2"]
    assert manifest.statuses() == {"r1": "failed", "r3": "ok"}


# ---------------------------------------------------------------------------------------------------- verify


def test_a_sound_job_has_no_problems(store, manifest):
    amf, bank = store.put("amf/m1.safetensors", b"amf"), store.put("banks/b1.safetensors", b"bank")
    manifest.commit(finished(store, "r1", amf_uri=amf.uri, bank_uri=bank.uri))
    manifest.commit(failed("r2"))
    manifest.commit(make_row(row_id="r3", status="ok", output_uri=amf.uri, output_sha256=amf.sha256, output_bytes=3))
    assert manifest.verify() == []


def test_a_changed_byte_is_found_by_its_hash_only(store, manifest):
    manifest.commit(finished(store, "r1", b"video"))
    manifest.commit(finished(store, "r2", b"video"))
    store.put("videos/r1.mp4", b"vidEo")
    assert found(manifest) == [("output_sha256", "r1", "videos/r1.mp4")]
    assert hashlib.sha256(b"vidEo").hexdigest() in manifest.verify()[0].detail
    assert found(manifest, check_hashes=False) == []


def test_a_truncated_and_a_deleted_output_are_found_without_hashing(store, manifest):
    manifest.commit(finished(store, "r1"))
    manifest.commit(finished(store, "r2"))
    store.put("videos/r1.mp4", b"vid")
    store.delete("videos/r2.mp4")
    expected = [("output_size", "r1", "videos/r1.mp4"), ("output_missing", "r2", "videos/r2.mp4")]
    assert found(manifest, check_hashes=False) == found(manifest) == expected
    assert manifest.verify()[0].detail == "videos/r1.mp4 has 3 bytes, recorded are 5"


def test_a_missing_amf_and_a_missing_bank_are_found(store, manifest):
    uris = {"amf_uri": store.uri_of("amf/m.safetensors"), "bank_uri": store.uri_of("banks/b.safetensors")}
    manifest.commit(finished(store, "r1", **uris))
    expected = [("amf_missing", "r1", "amf/m.safetensors"), ("bank_missing", "r1", "banks/b.safetensors")]
    assert found(manifest) == expected


def test_files_without_a_record_are_orphans(store, manifest):
    manifest.commit(failed("r1", amf_uri=store.uri_of("amf/m.safetensors")))
    for key in ("amf/m.safetensors", "amf/n.safetensors", "banks/b.safetensors", "videos/x.mp4", "job.yaml"):
        store.put(key, b"x")
    expected = [("orphan", None, key) for key in ("videos/x.mp4", "amf/n.safetensors", "banks/b.safetensors")]
    assert found(manifest) == expected


def test_a_row_with_two_records_is_found(store, manifest):
    manifest.commit(failed("r1"))
    put_table(store, "manifest/merged.parquet", rows_to_table([failed("r1"), failed("r2")]))
    assert found(manifest) == [("row_duplicate", "r1", None)]


def test_an_unreadable_record_is_found_and_its_output_is_not_called_an_orphan(store, manifest):
    manifest.commit(finished(store, "r1"))
    manifest.commit(finished(store, "r2"))
    store.put("videos/r2.mp4", b"")
    store.put("manifest/r1.parquet", b"damaged")
    expected = [("manifest_unreadable", "r1", "manifest/r1.parquet"), ("output_size", "r2", "videos/r2.mp4")]
    assert found(manifest) == expected


def test_a_lost_output_whose_size_was_taken_out_of_its_record_is_missed(store, manifest):
    row = rows_to_table([finished(store, "r1")])
    column = row.column_names.index("output_bytes")
    put_table(store, "manifest/r1.parquet", row.set_column(column, "output_bytes", pa.nulls(1, pa.int64())))
    store.delete("videos/r1.mp4")
    assert found(manifest) == [("output_missing", "r1", "videos/r1.mp4")]


def test_a_moved_job_verifies_and_a_file_lost_on_the_way_is_missed(local_store, tmp_path):
    amf = local_store.put("amf/m.safetensors", b"amf")
    lost = local_store.put("banks/b.safetensors", b"bank")
    manifest = Manifest(local_store)
    manifest.commit(finished(local_store, "r1", amf_uri=amf.uri))
    manifest.commit(finished(local_store, "r2", bank_uri=lost.uri))
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "videos" / "two")  # a root named like an output folder
    moved = Manifest(Store(f"{tmp_path}/videos/two"))
    assert moved.verify() == []
    moved.store.delete("banks/b.safetensors")
    moved.store.delete("videos/r1.mp4")  # the original still has both
    assert found(moved) == [("output_missing", "r1", "videos/r1.mp4"), ("bank_missing", "r2", "banks/b.safetensors")]


def test_a_bank_of_another_job_is_looked_up_where_it_is(store, manifest):
    library = Store(re.sub("one$", "library", store.uri))
    bank = library.put("banks/shared.safetensors", b"bank")
    manifest.commit(finished(store, "r1", bank_uri=bank.uri))
    assert manifest.verify() == []
    library.delete("banks/shared.safetensors")
    assert found(manifest) == [("bank_missing", "r1", "banks/shared.safetensors")]


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("s3://b/run/videos/a.mp4", "videos/a.mp4"),
        ("file:///x/videos/run/amf/0a/m.safetensors", "amf/0a/m.safetensors"),
        ("s3://b/elsewhere/a.mp4", None),
        (None, None),
    ],
)
def test_the_key_is_what_follows_the_root(uri, key):
    assert output_key(uri) == key


# ------------------------------------------------------------------------------------------------- remembering


def reads_of(manifest: Manifest, monkeypatch) -> list[str]:
    keys, original = [], manifest.store.read
    monkeypatch.setattr(manifest.store, "read", lambda key: keys.append(key) or original(key))
    return keys


def test_what_is_remembered_is_not_read_again(manifest, monkeypatch):
    for name in ("a", "b"):
        manifest.commit(failed(name))
    manifest.remember()
    manifest.commit(finished(manifest.store, "c"))
    keys = reads_of(manifest, monkeypatch)
    assert manifest.statuses() == {"a": "failed", "b": "failed", "c": "ok"}
    assert [key for key in keys if key.startswith("manifest/")] == ["manifest/c.parquet"]


def test_a_record_that_changed_after_it_was_remembered_is_read_again(manifest):
    manifest.commit(failed("a"))
    manifest.remember()
    manifest.forget(["a"])
    assert manifest.statuses() == {}
    manifest.commit(finished(manifest.store, "a"))
    assert manifest.statuses() == {"a": "ok"}


def test_what_was_remembered_and_then_merged_counts_once(manifest):
    for name in ("a", "b", "c"):
        manifest.commit(failed(name))
    manifest.remember()
    manifest.compact()
    manifest.commit(failed("d"))
    assert manifest.statuses() == dict.fromkeys("abcd", "failed")


def test_a_memory_with_other_columns_is_no_memory(manifest):
    manifest.commit(failed("a"))
    manifest.remember()
    digest = pq.read_table(pa.BufferReader(manifest.store.read("digest.parquet")))
    manifest.store.put("digest.parquet", parquet_bytes(digest.drop_columns(["node"])))
    assert manifest.statuses() == {"a": "failed"}


@pytest.mark.parametrize(("column", "values"), [("row_id", pa.nulls(1, pa.string())), ("finished_at", NO_TIME)])
def test_a_memory_with_values_that_no_record_has_is_no_memory(manifest, column, values):
    manifest.commit(failed("a"))
    manifest.remember()
    digest = pq.read_table(pa.BufferReader(manifest.store.read("digest.parquet")))
    changed = digest.set_column(digest.column_names.index(column), column, values)
    manifest.store.put("digest.parquet", parquet_bytes(changed))
    assert len(manifest.remembered(manifest.entries())) == 0
    assert manifest.statuses() == {"a": "failed"}


def test_a_status_that_a_memory_has_from_elsewhere_is_a_failure(manifest):
    manifest.commit(failed("a"))
    manifest.remember()
    digest = pq.read_table(pa.BufferReader(manifest.store.read("digest.parquet")))
    column = digest.column_names.index("status")
    manifest.store.put("digest.parquet", parquet_bytes(digest.set_column(column, "status", pa.nulls(1, pa.string()))))
    assert manifest.statuses() == {"a": "failed"}


def test_a_damaged_memory_is_no_memory(manifest):
    manifest.commit(failed("a"))
    manifest.remember()
    manifest.store.put("digest.parquet", b"PAR1 and no more")
    assert manifest.statuses() == {"a": "failed"}


def damaged_digests(digest: bytes) -> Iterator[bytes]:
    """The file cut off, and with a bit flipped in every few bytes of it."""
    yield from (b"", digest[: len(digest) // 2], digest[:-4], b"PAR1" * 3)
    for place in range(0, len(digest), max(1, len(digest) // 60)):
        yield digest[:place] + bytes([digest[place] ^ 0x10]) + digest[place + 1 :]


def test_a_memory_that_is_damaged_anywhere_changes_no_status(local_store, caplog):
    manifest = Manifest(local_store)
    for name in ("a", "b"):
        manifest.commit(failed(name))
    manifest.remember()
    for damaged in damaged_digests(local_store.read("digest.parquet")):
        local_store.put("digest.parquet", damaged)
        assert manifest.statuses() == {"a": "failed", "b": "failed"}
    assert f"{local_store.uri}/digest.parquet is damaged" in caplog.messages[0]
    manifest.remember()
    caplog.clear()
    assert manifest.statuses() == {"a": "failed", "b": "failed"}
    assert not caplog.messages, "it is made anew"
