"""Facts about the catalogue of banks: it tells what the files say, heals itself, and reads no more than it must."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import handmade_bank

from ditflow.banks.bank import MotionBank
from pipeline.bank_files import check_banks, copy_banks
from pipeline.catalogue import (
    INDEX_KEY,
    SCHEMA,
    Catalogue,
    UnknownBankError,
    bank_id,
    chosen_by_id,
    chosen_where,
)  # fmt: skip
from pipeline.manifest import Manifest, parquet_bytes
from pipeline.record import make_row
from pipeline.store import Store, StoreError, StoreMissingError, StoreUnwritableError


@pytest.fixture
def banks(store: Store) -> Catalogue:
    """Three banks of one folder, on the storage of the `store` fixture."""
    for name, bank in {
        "left": handmade_bank((-2, 0), tags=("pan", "slow")),
        "right": handmade_bank((3, 0), prompt="a star", losses=((0.2,),)),
        "up": handmade_bank((0, -1), tags=("pan",)),
    }.items():
        store.put(f"{name}.safetensors", bank.to_bytes())
    return Catalogue(store)


def ids_of(catalogue: Catalogue) -> list[str]:
    return catalogue.refresh().table["id"].to_pylist()


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The keys of which the beginning is read."""
    keys, read_start = [], Store.read_start
    monkeypatch.setattr(Store, "read_start", lambda self, key, count: keys.append(key) or read_start(self, key, count))
    return keys


def test_a_row_tells_what_the_header_and_the_file_tell(banks):
    row = banks.refresh().table.to_pylist()[0]
    assert row.pop("created") is not None
    assert row == {
        "id": "left", "key": "left.safetensors", "reference_uri": "file:///a.mp4", "reference_sha256": None,
        "model": "mini", "model_revision": "0123", "grid": "3x2x2", "frames": 9, "height": 16, "width": 16, "fps": 8.0,
        "steps": 4, "guided_steps": 2, "method": "ditflow", "optimize": "coordinates", "prompt": "a ball", "seed": 7,
        "loss_first": 1.0, "loss_final": 0.25, "bytes": banks.store.sizes()["left.safetensors"],
        "tags": ["pan", "slow"], "mean_displacement": 2.0, "moving": 1.0, "direction": 180.0, "concentration": 1.0,
        "largest_displacement": 2.0, "pixels_per_second": pytest.approx(2 * 8 / (4 / 16)),
    }  # fmt: skip


def test_the_index_is_a_table_for_any_parquet_reader(local_store):
    local_store.put("a.safetensors", handmade_bank().to_bytes())
    contents = Catalogue(local_store).refresh()
    table = pq.read_table(Path(local_store.uri.removeprefix("file://")) / INDEX_KEY)
    assert table.schema.equals(SCHEMA)
    assert table.equals(contents.table)
    assert all(field.metadata[b"meaning"] for field in table.schema)


def test_only_what_the_index_does_not_know_is_read_again(banks, reads):
    assert ids_of(banks) == ["left", "right", "up"]
    assert sorted(reads) == ["left.safetensors", "right.safetensors", "up.safetensors"]
    reads.clear()
    assert ids_of(banks) == ["left", "right", "up"]
    assert reads == []
    banks.store.put("down.safetensors", handmade_bank((0, 1)).to_bytes())
    banks.store.put("up.safetensors", handmade_bank((0, -1), prompt="a much longer prompt" * 20).to_bytes())
    banks.store.delete("left.safetensors")
    assert ids_of(banks) == ["down", "right", "up"]
    assert sorted(reads) == ["down.safetensors", "up.safetensors"]
    assert banks.refresh().table["prompt"].to_pylist() == ["a ball", "a star", "a much longer prompt" * 20]


def test_a_bank_that_was_replaced_by_one_of_the_same_size_is_read_again(local_store):
    local_store.put("a.safetensors", handmade_bank(prompt="one").to_bytes())
    catalogue, file = Catalogue(local_store), Path(local_store.uri.removeprefix("file://")) / "a.safetensors"
    catalogue.refresh()
    local_store.put("a.safetensors", handmade_bank(prompt="two").to_bytes())
    os.utime(file, (1, 1))
    assert catalogue.refresh().table["prompt"].to_pylist() == ["two"]


@pytest.mark.parametrize("index", [b"", b"PAR1 no table", None], ids=["empty", "damaged", "of other columns"])
def test_an_index_that_is_none_is_made_anew(banks, index):
    if index is None:
        index = parquet_bytes(pa.table({"id": ["gone"]}))
    banks.store.put(INDEX_KEY, index)
    contents = banks.refresh()
    assert contents.stale
    assert contents.table.num_rows == 3
    assert not banks.refresh().stale


def test_reading_leaves_the_index_as_it_is(banks):
    assert banks.read().stale
    assert not banks.store.exists(INDEX_KEY)


def test_a_bank_that_may_not_be_read_is_left_out_and_the_others_are_not(s3, s3_store):
    for name in ("left", "right"):
        s3_store.put(f"{name}.safetensors", handmade_bank().to_bytes())
    s3.fail(403, "InvalidObjectState", lambda request: request.startswith("GET") and "left.safetensors" in request)
    contents = Catalogue(s3_store).read()
    assert contents.table["id"].to_pylist() == ["right"]
    assert "archived (Glacier)" in contents.refused["left.safetensors"]
    count, (problem,) = check_banks(s3_store.uri, {})
    assert (count, problem.key) == (2, "left.safetensors")


def test_what_cannot_be_read_or_listed_in_a_folder_of_banks_is_left_out_with_the_reason(local_store, monkeypatch):
    put_banks = {"a.safetensors": (1, 0), "B.SAFETENSORS": (2, 0)}
    for name, motion in put_banks.items():
        local_store.put(name, handmade_bank(motion).to_bytes())
    folder = Path(local_store.uri.removeprefix("file://"))
    (folder / "self.safetensors").symlink_to("self.safetensors")
    (folder / "lost+found").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    contents = Catalogue(local_store).read()
    assert contents.table["id"].to_pylist() == ["B", "a"]
    assert "symbolic links" in contents.refused["self.safetensors"]
    assert contents.refused["lost+found"] == "it cannot be listed: Permission denied"
    count, problems = check_banks(local_store.uri, {})
    assert (count, sorted(problem.key for problem in problems)) == (3, ["lost+found", "self.safetensors"])
    with pytest.raises(StoreError):
        local_store.list()  # an output that cannot be listed is not one without rows


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(banks, monkeypatch):
    def refuse(*_):
        raise StoreUnwritableError("read-only")

    monkeypatch.setattr(Store, "put", refuse)
    contents = banks.refresh()
    assert (contents.table.num_rows, contents.unwritten) == (3, "read-only")


def test_a_long_header_is_read_whole_and_no_tensor_is(local_store, monkeypatch):
    bank = handmade_bank(losses=(tuple(float(n) / 3 for n in range(5000)),))
    local_store.put("a.safetensors", bank.to_bytes())
    monkeypatch.setattr(Store, "read", lambda self, key: pytest.fail(key) if key != INDEX_KEY else missing(key))
    contents = Catalogue(local_store).refresh()
    assert contents.table["loss_final"].to_pylist() == [4999 / 3]


def missing(key: str) -> bytes:
    raise StoreMissingError(key)


def test_files_that_are_no_banks_are_left_out_with_the_reason(banks):
    data = handmade_bank().to_bytes()
    damaged = data.replace(b"a ball", b"a bell")
    for name, content in {"empty": b"", "text": b"no bank at all", "cut": data[:-1], "damaged": damaged}.items():
        banks.store.put(f"{name}.safetensors", content)
    banks.store.put("notes.txt", b"no bank either")
    contents = banks.refresh()
    assert contents.table["id"].to_pylist() == ["left", "right", "up"]
    assert sorted(contents.refused) == [f"{name}.safetensors" for name in ("cut", "damaged", "empty", "text")]
    assert "by its header: it is damaged or cut off" in contents.refused["cut.safetensors"]
    assert "the SHA-256 of its header" in contents.refused["damaged.safetensors"]


@pytest.mark.parametrize(
    "header",
    [
        {"prompt": "\ud800"},
        {"provenance": {"size": [1, 16, 16], "reference_fps": 8.0}},
    ],
    ids=["a text that is none", "a video without a length"],
)
def test_a_header_that_makes_no_row_is_left_out_with_the_reason(banks, header):
    banks.store.put("odd.safetensors", handmade_bank(**header).to_bytes())
    contents = banks.refresh()
    assert contents.table["id"].to_pylist() == ["left", "right", "up"]
    assert "makes no row of the catalogue" in contents.refused["odd.safetensors"]


def test_a_job_s_output_and_its_folder_of_banks_have_the_same_catalogue(store):
    store.put("banks/ab/abcd.safetensors", handmade_bank().to_bytes())
    store.put("banks/0a1b.safetensors", handmade_bank().to_bytes())
    for uri in (store.uri, store.uri_of("banks")):
        catalogue = Catalogue.at(uri, {})
        assert catalogue.store.uri == store.uri_of("banks")
        assert ids_of(catalogue) == ["0a1b", "abcd"], "folders of a job with very many rows are no part of an id"
    assert not [problem for problem in Manifest(store).verify() if problem.key == "banks/index.parquet"], "no orphan"


@pytest.mark.parametrize(
    ("key", "id_"),
    [
        ("a.safetensors", "a"),
        ("ab/abcd.safetensors", "abcd"),
        ("ab/cd.safetensors", "ab/cd"),
        ("a.b.safetensors", "a.b"),
    ],
)
def test_an_id_is_the_name_of_the_file(key, id_):
    assert bank_id(key) == id_


def test_a_folder_without_banks_is_said_to_have_none(store):
    with pytest.raises(StoreMissingError, match="there are no motion banks"):
        Catalogue.at(store.uri, {}).read()


def test_a_bank_of_a_loss_without_displacement_has_no_statistics(local_store):
    bank = handmade_bank()
    bare = MotionBank(replace(bank.header, motion=None, provenance={}, losses=()), bank.parts)
    local_store.put("a.safetensors", bare.to_bytes())
    (row,) = Catalogue(local_store).refresh().table.to_pylist()
    nothing = ("mean_displacement", "pixels_per_second", "direction", "loss_first", "frames", "seed", "fps")
    assert {row[name] for name in nothing} == {None}
    assert (row["tags"], row["guided_steps"]) == ([], 2)


# ----------------------------------------------------------------------------------------------------- choosing


def test_banks_are_chosen_by_ids_in_their_order_and_each_once(banks):
    rows = chosen_by_id(banks.read(), ["up", "left", "up"], "banks.ids")
    assert rows["id"].to_pylist() == ["up", "left"]


def test_an_unknown_id_is_answered_with_what_there_is(banks):
    with pytest.raises(UnknownBankError, match="^banks.ids: lefd is none of the 3 banks there: left, right, up$"):
        chosen_by_id(banks.read(), ["left", "lefd"], "banks.ids")


def test_an_id_of_two_banks_is_no_choice(local_store):
    for key in ("ab/abc.safetensors", "abc.safetensors"):
        local_store.put(key, handmade_bank().to_bytes())
    with pytest.raises(UnknownBankError, match="abc is the id of 2 banks: ab/abc.safetensors, abc.safetensors"):
        chosen_by_id(Catalogue(local_store).read(), ["abc"], "banks.ids")


def test_banks_are_chosen_by_what_the_catalogue_says_of_them(banks):
    rows = chosen_where(banks.read(), "list_contains(tags, 'pan') AND direction = 90", "banks.where")
    assert rows["id"].to_pylist() == ["up"]


def test_a_condition_that_chooses_nothing_is_answered_with_what_there_is(banks):
    with pytest.raises(
        UnknownBankError, match="^banks.where: 'loss_final > 5' chooses none of the 3 banks there: left"
    ):
        chosen_where(banks.read(), "loss_final > 5", "banks.where")


# ------------------------------------------------------------------------------------------------ checks, copies


def job_of(store: Store, *names: str) -> None:
    """A build-bank job's output, with its manifest."""
    for name in names:
        stored = store.put(f"banks/{name}.safetensors", handmade_bank(prompt=name).to_bytes())
        output = {"output_uri": stored.uri, "output_sha256": stored.sha256, "output_bytes": stored.bytes}
        Manifest(store).commit(make_row(row_id=name, kind="build-bank", status="ok", bank_uri=stored.uri, **output))


def test_sound_banks_have_no_problems(store):
    job_of(store, "a", "b")
    for uri in (store.uri, store.uri_of("banks")):
        assert check_banks(uri, {}) == (2, [])
    assert check_banks(store.uri_of("banks/a.safetensors"), {}) == (1, [])


def test_every_problem_of_every_bank_is_found(store):
    job_of(store, "damaged", "gone", "replaced", "sound")
    data = bytearray(store.read("banks/damaged.safetensors"))
    data[-1] ^= 1
    store.put("banks/damaged.safetensors", bytes(data))
    store.put("banks/replaced.safetensors", handmade_bank(prompt="another").to_bytes())
    store.put("banks/pickle.safetensors", b"\x80\x04K\x01.")
    store.delete("banks/gone.safetensors")
    count, problems = check_banks(store.uri, {})
    said = {problem.key: problem.detail for problem in problems}
    assert count == 4
    assert sorted(said) == [f"{name}.safetensors" for name in ("damaged", "gone", "pickle", "replaced")]
    assert "the SHA-256 of its tensors" in said["damaged.safetensors"]
    assert "replaced by another bank" in said["replaced.safetensors"]
    assert "pickles are never read" in said["pickle.safetensors"]
    assert "it is gone" in said["gone.safetensors"]
    assert check_banks(store.uri_of("banks/damaged.safetensors"), {})[1] == [problems[0]]


def test_a_bank_that_is_not_there_is_said_to_be_missing(store):
    with pytest.raises(StoreMissingError, match="there is no motion bank"):
        check_banks(store.uri_of("none.safetensors"), {})


def test_chosen_banks_are_copied_byte_for_byte_with_a_catalogue_of_their_own(banks, tmp_path):
    target = Store(str(tmp_path / "walks"))
    rows = chosen_where(banks.read(), "list_contains(tags, 'pan')", "--where")
    for _ in range(2):
        assert sorted(copy_banks(banks, rows, target)) == ["left.safetensors", "up.safetensors"]
    assert target.list() == [INDEX_KEY, "left.safetensors", "up.safetensors"]
    assert target.read("up.safetensors") == banks.store.read("up.safetensors")
    assert not Catalogue.at(target.uri, {}).read().stale


def test_a_copy_replaces_no_other_bank(banks, tmp_path):
    target = Store(str(tmp_path / "walks"))
    target.put("left.safetensors", handmade_bank(prompt="mine").to_bytes())
    with pytest.raises(ValueError, match=r"left.safetensors is there and is another bank"):
        list(copy_banks(banks, banks.read().table, target))
    assert MotionBank.from_bytes(target.read("left.safetensors")).header.prompt == "mine"


def test_two_banks_of_one_name_are_not_copied_into_one_folder(local_store, tmp_path):
    for key in ("a/x.safetensors", "b/x.safetensors"):
        local_store.put(key, handmade_bank().to_bytes())
    catalogue = Catalogue(local_store)
    with pytest.raises(ValueError, match="x.safetensors is the name of 2 banks"):
        list(copy_banks(catalogue, catalogue.read().table, Store(str(tmp_path / "walks"))))
