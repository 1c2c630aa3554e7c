"""Facts about the plan: which rows a job has, what their ids depend on, and which of them are left to do."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby, product
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from handmade import handmade_bank
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.plan
from ditflow.errors import SettingsError
from ditflow.losses.amf import AttentionMotionFlowLoss
from ditflow.settings import ExecutionSettings, MethodSettings, ModelDefaults, MotionSettings, SamplingSettings
from pipeline.faults import Policy
from pipeline.graph import bank_by_bank
from pipeline.job import Banks, Job, Output, Pool, References, Resources, Table
from pipeline.manifest import Manifest
from pipeline.plan import Plan, PlanError, WorkRow, make_plan
from pipeline.record import make_row
from pipeline.store import Store, StoreCredentialsError, StoreError, StoreMissingError, read_uri, sha256_of
from pipeline.tables import read_pairs, read_prompts

DEFAULTS = ModelDefaults(blocks=(1,))
METHOD = MethodSettings(optimize="position").resolve(DEFAULTS)
SAMPLING = SamplingSettings().resolve(DEFAULTS)
REVISION = "revision-1"


def put(folder: Store, files: Mapping[str, bytes]) -> str:
    for name, content in files.items():
        folder.put(name, content)
    return folder.uri


@pytest.fixture
def job(store: Store) -> Job:
    """Two references, two prompts, two seeds, on the storage of the `store` fixture."""
    references = put(Store(f"{store.uri}/refs"), {"a.mp4": b"first", "b.mp4": b"second"})
    return _job(references, f"{store.uri}/out")


@pytest.fixture
def local_job(local_store: Store) -> Job:
    references = put(Store(f"{local_store.uri}/refs"), {"a.mp4": b"first", "b.mp4": b"second"})
    return _job(references, f"{local_store.uri}/out")


def _job(references: str | tuple[str, ...], output: str, **changes: Any) -> Job:
    values = {
        "references": References(references, frames=17, height=64, width=64),
        "prompts": ("a ball", "a star"),
        "seeds": (1, 2),
        "method": METHOD,
        "sampling": SAMPLING,
    }
    return Job("synthesize", "test", Output(output), **{**values, **changes})


def plan(job: Job, revision: str = REVISION, **options: Any) -> Plan:
    return make_plan(job, revision, **options)


def content(row: WorkRow) -> tuple:
    source = row.reference or row.bank
    return (source.uri.rsplit("/", 1)[-1] if source else None, row.prompt, row.seed)


def contents(job: Job) -> list[tuple]:
    return [content(row) for row in plan(job).todo]


def ids(job: Job, revision: str = REVISION) -> list[str]:
    return [row.row_id for row in plan(job, revision).todo]


def motion_ids(job: Job, revision: str = REVISION) -> set[str | None]:
    return {row.motion_id for row in plan(job, revision).todo}


def folder_of(job: Job) -> Path:
    """The local folder of a job's references."""
    assert isinstance(job.references.uri, str)
    return Path(job.references.uri.removeprefix("file://"))


# ------------------------------------------------------------------------------------------------------- pairing


def test_product_is_every_reference_with_every_prompt_and_seed(job):
    names, prompts, seeds = ("a.mp4", "b.mp4"), ("a ball", "a star"), (1, 2)
    assert contents(job) == [(name, prompt, seed) for name in names for prompt in prompts for seed in seeds]
    assert plan(job).total == 8


def test_zip_pairs_one_reference_with_one_prompt_for_every_seed(local_job):
    assert contents(replace(local_job, pairing="zip")) == [
        ("a.mp4", "a ball", 1), ("a.mp4", "a ball", 2), ("b.mp4", "a star", 1), ("b.mp4", "a star", 2)
    ]  # fmt: skip


def test_zip_of_unequal_lengths_is_refused_with_both_lengths(local_job):
    with pytest.raises(PlanError, match="pairing: zip needs .* found 3 prompts for 2"):
        plan(replace(local_job, pairing="zip", prompts=("a", "b", "c")))


def test_an_extraction_is_one_row_per_reference_without_prompt_or_seed(local_job):
    extraction = replace(local_job, kind="extract")
    assert contents(extraction) == [("a.mp4", None, None), ("b.mp4", None, None)]


def test_a_reuse_pairs_banks_and_names_no_reference(local_job, tmp_path):
    banks = put(Store(str(tmp_path / "banks")), {"m.safetensors": b"bank", "notes.txt": b"no bank"})
    rows = plan(replace(local_job, kind="reuse", banks=Banks(banks), prompts=("a ball",), seeds=(5,))).todo
    assert [content(row) for row in rows] == [("m.safetensors", "a ball", 5)]
    assert [(row.reference, row.motion_id) for row in rows] == [(None, None)]


def test_plain_generation_without_references_has_a_row_per_prompt_and_seed(local_job):
    plain = replace(local_job, references=References(), method=replace(METHOD, name="none", loss={}))
    assert [(row.reference, row.prompt, row.seed) for row in plan(plain).todo] == [
        (None, prompt, seed) for prompt in ("a ball", "a star") for seed in (1, 2)
    ]


def write_table(store: Store, name: str, columns: Mapping[str, list]) -> str:
    """Write a table as the ending of its name says, and return its URI."""
    table, sink = pa.table(dict(columns)), pa.BufferOutputStream()
    ending = name.rsplit(".", 1)[-1]
    if ending == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    else:
        (pq.write_table if ending == "parquet" else pyarrow.csv.write_csv)(table, sink)
        data = sink.getvalue().to_pybytes()
    return store.put(name, data).uri


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_a_table_pairs_as_its_rows_say_with_names_relative_to_the_references(local_job, local_store, ending):
    columns = {"reference": ["b.mp4", "a.mp4"], "prompt": ["ein Bär, 雪", 'a "quoted", star']}
    pairs = write_table(local_store, f"pairs.{ending}", columns)
    assert contents(replace(local_job, pairing=Table(pairs), prompts=())) == [
        ("b.mp4", "ein Bär, 雪", 1), ("b.mp4", "ein Bär, 雪", 2),
        ("a.mp4", 'a "quoted", star', 1), ("a.mp4", 'a "quoted", star', 2),
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_a_seed_in_a_table_counts_for_its_row_and_an_empty_one_means_the_jobs_seeds(local_job, local_store, ending):
    columns = {"reference": ["a.mp4"] * 3, "prompt": ["x", "y", "z"], "seed": [0, 7, None]}
    pairs = write_table(local_store, f"pairs.{ending}", columns)
    rows = contents(replace(local_job, pairing=Table(pairs)))
    assert [row[1:] for row in rows] == [("x", 0), ("y", 7), ("z", 1), ("z", 2)]


def test_a_table_may_name_another_column_and_absolute_files(local_job, local_store):
    elsewhere = local_store.put("elsewhere/c.mp4", b"third").uri
    path = elsewhere.removeprefix("file://")
    pairs = write_table(local_store, "pairs.csv", {"reference": [elsewhere, path], "text": ["one", "two"]})
    rows = plan(replace(local_job, pairing=Table(pairs, "text"), seeds=(1,))).todo
    assert [(row.reference.uri, row.prompt) for row in rows] == [(elsewhere, "one"), (elsewhere, "two")]


def test_a_table_for_reuse_names_banks(local_job, local_store):
    banks = put(Store(f"{local_store.uri}/banks"), {"m.safetensors": b"bank"})
    pairs = write_table(local_store, "pairs.csv", {"bank": ["m.safetensors"], "prompt": ["a ball"]})
    reuse = replace(local_job, kind="reuse", banks=Banks(banks), pairing=Table(pairs), seeds=(1,))
    assert contents(reuse) == [("m.safetensors", "a ball", 1)]


@pytest.fixture
def reuse(local_job, tmp_path) -> Job:
    """A job that reuses three banks, of which two are tagged."""
    banks = {
        "left": {"move": (-1, 0), "tags": ("pan",)},
        "right": {"move": (1, 0), "tags": ("pan",)},
        "up": {"move": (0, -1)},
    }
    files = {f"{name}.safetensors": handmade_bank(**changes).to_bytes() for name, changes in banks.items()}
    uri = put(Store(str(tmp_path / "banks")), files)
    return replace(local_job, kind="reuse", banks=Banks(uri), prompts=("a ball",), seeds=(1,))


def banks_of(job: Job) -> list[str]:
    return [row.bank.uri.rsplit("/", 1)[-1].removesuffix(".safetensors") for row in plan(job).todo]


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({}, ["left", "right", "up"]),
        ({"ids": ("up", "left")}, ["up", "left"]),
        ({"where": "list_contains(tags, 'pan') AND direction = 0"}, ["right"]),
        ({"where": "true"}, ["left", "right", "up"]),
    ],
    ids=["all", "by id", "by a condition", "by a condition that is true of all"],
)
def test_banks_are_chosen_by_id_or_by_a_condition_on_their_catalogue(reuse, chosen, names):
    job = replace(reuse, banks=replace(reuse.banks, **chosen))
    assert banks_of(job) == names
    assert set(ids(job)) <= set(ids(reuse)), "a row has the id that it has in a job over all banks"
    assert not (Path(str(reuse.banks.uri).removeprefix("file://")) / "index.parquet").exists(), "an input is left alone"


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"ids": ("left", "lefd")}, "^banks.ids: lefd is none of the 3 banks there: left, right, up$"),
        (
            {"where": "mean_displacement > 9"},
            "^banks.where: 'mean_displacement > 9' chooses none of the 3 banks there: left",
        ),
        (
            {"where": "speed > 9"},
            '^banks.where: .*"speed" not found.*expression over the columns id, key, reference_uri',
        ),
        ({"where": "true; DROP TABLE rows"}, "^banks.where: .* is not valid"),
        ({"where": ""}, "^banks.where: .* is not valid"),
    ],
)
def test_a_choice_of_banks_that_is_none_is_refused_with_what_there_is(reuse, chosen, said):
    with pytest.raises(ValueError, match=said):
        plan(replace(reuse, banks=replace(reuse.banks, **chosen)))


@pytest.mark.parametrize(
    ("chosen", "key"),
    [
        ({"ids": ("a",), "where": "true"}, "where"),
        ({"uri": ("one", "two"), "ids": ("a",)}, "uri"),
        ({"uri": "banks", "where": "true", "glob": "*.bank"}, "glob"),
    ],
)
def test_a_choice_that_contradicts_itself_is_refused(chosen, key):
    with pytest.raises(SettingsError) as caught:
        Banks(**{"uri": "banks", **chosen})
    assert caught.value.key == key


def test_a_table_names_banks_by_id_or_by_file(reuse, local_store):
    absolute = f"{reuse.banks.uri}/right.safetensors"
    columns = {"bank": ["up", "left.safetensors", absolute, "up"], "prompt": ["a", "b", "c", "d"]}
    job = replace(reuse, pairing=Table(write_table(local_store, "pairs.csv", columns)))
    assert banks_of(job) == ["up", "left", "right", "up"]
    unknown = write_table(local_store, "more.csv", {"bank": ["down"], "prompt": ["a"]})
    with pytest.raises(ValueError, match="^pairing: down is none of the 3 banks there: left, right, up$"):
        plan(replace(reuse, pairing=Table(unknown)))
    with pytest.raises(PlanError, match="a table of pairs names the banks itself: remove ids and where"):
        plan(replace(job, banks=replace(job.banks, ids=("up",))))


def test_an_exported_folder_and_a_job_s_output_may_be_chosen_from(reuse, tmp_path):
    store = Store(str(tmp_path / "job"))
    store.put("banks/ab/abcd.safetensors", handmade_bank().to_bytes())
    job = replace(reuse, banks=Banks(store.uri, ids=("abcd",)))
    assert [row.bank.uri for row in plan(job).todo] == [store.uri_of("banks/ab/abcd.safetensors")]


def test_a_bank_s_rows_come_one_after_the_other(reuse, local_store):
    columns = {"bank": ["up", "left", "right"] * 3, "prompt": list("abcdefghi")}
    job = replace(reuse, pairing=Table(write_table(local_store, "pairs.csv", columns)))
    in_order = [row.bank.uri for row in bank_by_bank(plan(job).todo)]
    assert [len(list(rows)) for _, rows in groupby(in_order)] == [3, 3, 3]


def test_tags_reach_the_rows_and_decide_no_id(local_job, local_store):
    tagged = replace(local_job, kind="build-bank", tags=("walk", "outdoors"))
    assert ids(tagged) == ids(replace(tagged, tags=()))
    assert {row.tags for row in plan(tagged).todo} == {("walk", "outdoors")}
    columns = {"reference": ["a.mp4", "b.mp4"], "prompt": ["x", "y"], "tags": ["slow; walk;", None]}
    job = replace(tagged, pairing=Table(write_table(local_store, "pairs.csv", columns)), seeds=(1,))
    rows = plan(job).todo
    assert [row.tags for row in rows] == [("walk", "outdoors", "slow"), ("walk", "outdoors")]
    assert WorkRow.from_json(rows[0].to_json()) == rows[0]


@pytest.mark.parametrize("tags", [("a;b",), ("",), (" a",), (101 * "x",)])
def test_a_tag_that_is_none_is_refused(local_job, tags):
    with pytest.raises(SettingsError, match="tags: .*expected words without ';'"):
        replace(local_job, kind="build-bank", tags=tags)


def test_tags_belong_to_banks(local_job):
    with pytest.raises(SettingsError, match="tags: .*none for kind synthesize"):
        replace(local_job, tags=("walk",))


def test_tables_and_relative_names_work_on_s3(s3_store):
    references = put(Store(f"{s3_store.uri}/refs"), {"a.mp4": b"first"})
    pairs = write_table(s3_store, "pairs.parquet", {"reference": ["a.mp4"], "prompt": ["a ball"]})
    job = _job(references, f"{s3_store.uri}/out", pairing=Table(pairs), seeds=(1,))
    assert contents(job) == [("a.mp4", "a ball", 1)]
    assert plan(job).todo[0].reference.uri == f"{references}/a.mp4"


@pytest.mark.parametrize("missing", ["reference", "prompt"])
def test_a_pairing_without_a_needed_column_is_refused_with_its_name(local_job, local_store, missing):
    columns = {"reference": ["a.mp4"], "prompt": ["a ball"]}
    del columns[missing]
    pairs = write_table(local_store, "pairs.csv", columns)
    with pytest.raises(PlanError, match=f"^pairing: .*pairs.csv.*{missing}"):
        plan(replace(local_job, pairing=Table(pairs)))


def test_an_empty_pairing_is_refused(local_job, local_store):
    pairs = write_table(local_store, "pairs.jsonl", {"reference": [], "prompt": []})
    with pytest.raises(PlanError, match=r"pairs\.jsonl"):
        plan(replace(local_job, pairing=Table(pairs)))


@pytest.mark.parametrize(
    "columns",
    [
        {"reference": ["a.mp4"], "prompt": ["x"], "seed": ["first"]},
        {"reference": ["a.mp4", None], "prompt": ["x", "y"]},
        {"reference": ["a.mp4", "b.mp4"], "prompt": ["x", None]},
        {"reference": [["a.mp4"]], "prompt": ["x"]},
        {"reference": ["a.mp4"], "prompt": ["x"], "start": [-1]},
        {"reference": ["a.mp4"], "prompt": ["x"], "step": [0]},
        {"reference": ["a.mp4"], "prompt": ["x"], "step": [1.5]},
        {"reference": ["a.mp4"], "prompt": ["x"], "category": [["scene"]]},
        {"reference": ["a.mp4"], "prompt": ["x"], "start": [4], "stop": [20]},
        {"reference": ["a.mp4"], "prompt": ["x"], "stop": [33], "step": [3]},
    ],
    ids=[
        "a seed that is no number",
        "no reference",
        "no prompt",
        "a reference that is no text",
        "a start before the first frame",
        "a step of nothing",
        "a step between frames",
        "a category that is no text",
        "16 frames for a video of 17",
        "11 frames for a video of 17",
    ],
)
def test_a_pairing_with_a_value_that_makes_no_row_is_refused(local_job, local_store, columns):
    pairs = write_table(local_store, "pairs.parquet", columns)
    with pytest.raises(PlanError, match="pairing"):
        plan(replace(local_job, pairing=Table(pairs)))


def test_a_table_may_choose_the_frames_of_each_row_and_name_the_prompts_class(local_job, local_store):
    columns = {
        "reference": ["a.mp4"] * 4,
        "prompt": ["x"] * 4,
        "category": ["caption", "subject", "scene", None],
        "start": [0, 5, 0, None],
        "stop": [17, 22, 33, None],
        "step": [1, 1, 2, None],
    }
    pairs = write_table(local_store, "pairs.csv", columns)
    paired = replace(local_job, pairing=Table(pairs), seeds=(1,))
    first, later, faster = plan(paired).todo
    assert [(row.own.start, row.own.stride, row.category) for row in (first, later, faster)] == [
        (0, 1, "caption"),
        (5, 1, "subject"),
        (0, 2, "scene"),
    ]
    assert plan(paired).duplicates == 1, "the last row says what the first says"
    for row, frames in ((first, {}), (later, {"start": 5}), (faster, {"stride": 2})):
        same = replace(local_job, references=replace(local_job.references, uri=first.reference.uri, **frames))
        [alike] = plan(replace(same, prompts=("x",), seeds=(1,))).todo
        assert (alike.row_id, alike.motion_id) == (row.row_id, row.motion_id)


def test_a_range_too_short_for_the_videos_is_refused_with_its_row(local_job, local_store):
    pairs = write_table(local_store, "pairs.csv", {"reference": ["a.mp4"] * 2, "prompt": ["x"] * 2, "stop": [17, 16]})
    with pytest.raises(PlanError, match=r"row 2 of .*pairs\.csv has the 16 frames range\(0, 16, 1\).*at least the 17"):
        plan(replace(local_job, pairing=Table(pairs)))


def test_only_zero_shot_methods_learn_with_the_prompt_of_their_row(local_job, local_store):
    columns = {"reference": ["a.mp4"] * 2, "prompt": ["x"] * 2, "learn_with": ["a ball", "a star"]}
    pairs = write_table(local_store, "pairs.csv", columns)
    paired = replace(local_job, pairing=Table(pairs), seeds=(1,))
    learning = replace(METHOD, optimize="position", zero_shot=True)
    assert len(plan(paired).todo) == 1
    zero_shot = replace(paired, method=learning)
    assert len(plan(zero_shot).todo) == 2
    assert ids(zero_shot)[0] == ids(replace(zero_shot, method=replace(learning, learn_with="a ball")))[0]


def test_work_survives_its_way_through_a_dataset(local_job, local_store):
    columns = {"reference": ["a.mp4"], "prompt": ["x"], "category": ["scene"], "start": [3], "learn_with": ["y"]}
    pairs = write_table(local_store, "pairs.csv", columns)
    for row in plan(replace(local_job, pairing=Table(pairs))).todo:
        assert WorkRow.from_json(row.to_json()) == row


# ------------------------------------------------------------------------------------------------------- prompts


def test_a_prompts_table_may_tell_their_classes(local_job, local_store):
    table = write_table(local_store, "prompts.csv", {"prompt": ["x", "y"], "category": ["caption", None]})
    rows = plan(replace(local_job, prompts=Table(table), seeds=(1,))).todo
    assert [(row.prompt, row.category) for row in rows] == [("x", "caption"), ("y", None)] * 2
    assert ids(replace(local_job, prompts=("x", "y"), seeds=(1,))) == [row.row_id for row in rows]


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_prompts_come_from_a_table(local_job, local_store, ending):
    prompts = write_table(local_store, f"prompts.{ending}", {"id": [1, 2], "text": ["ein Bär", "two\nlines"]})
    rows = plan(replace(local_job, prompts=Table(prompts, "text"), seeds=(1,), pairing="zip")).todo
    assert [row.prompt for row in rows] == ["ein Bär", "two\nlines"]


TEXTS = ["0001", "007", "true", "2024-01-01", "1e5", "NA", "null", "0"]


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_what_a_table_calls_a_text_is_one_whatever_it_looks_like(local_job, local_store, ending):
    columns = dict.fromkeys(("reference", "prompt", "category", "learn_with", "tags"), TEXTS)
    pairs = read_pairs(local_job, Table(write_table(local_store, f"pairs.{ending}", columns)))
    told = [(pair.source, pair.prompt, pair.category, pair.own.learn_with, *pair.tags) for pair in pairs]
    assert told == [(text,) * 5 for text in TEXTS]
    prompts = write_table(local_store, f"prompts.{ending}", {"text": TEXTS, "category": TEXTS[::-1]})
    assert read_prompts(local_job, Table(prompts, "text")) == list(zip(TEXTS, TEXTS[::-1], strict=True))


def test_unquoted_numbers_and_words_in_a_csv_are_texts_where_texts_belong(local_job, local_store):
    uri = local_store.put("a.csv", b"prompt,category,seed\n007,0,1\ntrue,1,2\n2024-01-01,,\n").uri
    assert read_prompts(local_job, Table(uri)) == [("007", "0"), ("true", "1"), ("2024-01-01", None)]


def test_json_numbers_and_words_in_a_column_of_texts_are_their_texts(local_job, local_store):
    uri = local_store.put("a.jsonl", b'{"prompt": 7, "category": 0}\n\n{"prompt": true}\n').uri
    assert read_prompts(local_job, Table(uri)) == [("7", "0"), ("true", None)]


@pytest.mark.parametrize(
    "text",
    [
        "prompt,category\r007,0\r",
        "\n\r\nprompt\tcategory\n007\t0\n",
        "sep=;\r\nprompt;category\r\n007;0\r\n",
        '"my\nown",prompt,category\n1,007,0\n',
    ],
    ids=["Mac", "empty lines", "Excel", "header of two lines"],
)
def test_a_csv_is_read_however_its_first_lines_look(local_job, local_store, text):
    assert read_prompts(local_job, Table(local_store.put("a.csv", text.encode()).uri)) == [("007", "0")]


def test_numbers_of_json_are_texts_as_they_are_written(local_job, local_store):
    uri = local_store.put("a.jsonl", b'{"prompt": 1.10, "category": 1e5}\n{"prompt": "x", "category": -0}\n').uri
    assert read_prompts(local_job, Table(uri)) == [("1.10", "1e5"), ("x", "0")]


@pytest.mark.parametrize(
    ("type_", "value", "category"),
    [
        (pa.dictionary(pa.int32(), pa.string()), "0", "0"),
        (pa.float64(), float("nan"), None),
    ],
    ids=str,
)
def test_a_column_of_parquet_is_a_text_whatever_its_type(local_job, local_store, type_, value, category):
    columns = {"prompt": ["x"], "category": pa.array([value], type_), "when": pa.array([1], pa.timestamp("ns"))}
    assert read_prompts(local_job, Table(write_table(local_store, "a.parquet", columns))) == [("x", category)]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", "prompt,category\nx,Gr\u00fcn\n".encode("latin-1"), "row 1 of .* has category b'Gr.*no UTF-8"),
        ("a.jsonl", b'{"prompt": "x", "category": ["y"]}\n', r"row 1 of .* has category \['y'\]: expected a text"),
        ("a.jsonl", b'{"prompt": NaN}\n', "line 1: NaN is no JSON"),
        ("a.csv", b"prompt\na cat, on a mat\n", "Expected 1 columns, got 2: .* A value that holds ',' needs quotes"),
    ],
)
def test_what_is_no_text_is_refused_with_its_row(local_job, local_store, name, data, said):
    with pytest.raises(PlanError, match=said):
        read_prompts(local_job, Table(local_store.put(name, data).uri))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_csv_may_have_the_separator_of_any_spreadsheet(local_job, local_store, separator):
    lines = [["\ufeffreference", " prompt", "seed"], ["01", '"a dog, running; fast\t|"', "3"]]
    data = "\r\n".join(map(separator.join, lines)).encode()
    (pair,) = read_pairs(local_job, Table(local_store.put("pairs.csv", data).uri))
    assert (pair.source, pair.prompt, pair.seed) == ("01", "a dog, running; fast\t|", 3)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"prompt,category,prompt\na,b,c\n", "more than one column prompt"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n', "line 2: a key stands twice"),
        ("a.csv", "prompt\na ball\n".encode("utf-16"), "it is UTF-16"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: "),
    ],
)
def test_a_table_that_could_mean_two_things_is_refused(local_job, local_store, name, data, said):
    with pytest.raises(PlanError, match=said):
        read_prompts(local_job, Table(local_store.put(name, data).uri))


def test_true_is_no_seed(local_job, local_store):
    uri = local_store.put("pairs.csv", b"reference,prompt,seed\na.mp4,x,true\n").uri
    with pytest.raises(PlanError, match="row 1 .* has seed True: expected a whole number"):
        read_pairs(local_job, Table(uri))


def test_a_prompts_table_without_the_column_is_told_which_it_has(local_job, local_store):
    prompts = write_table(local_store, "prompts.csv", {"id": [1], "text": ["x"]})
    with pytest.raises(PlanError, match=r"^prompts\.column: 'prompt' is not in .*prompts\.csv; it has id, text"):
        plan(replace(local_job, prompts=Table(prompts)))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("prompts.parquet", b"PAR1 this is none", "no readable parquet table"),
        ("prompts.csv", b"", "no readable csv table"),
        ("prompts.csv", b"prompt,id\nx\ny,2\n", "no readable csv table"),
        ("prompts.jsonl", b'{"prompt": ', "no readable jsonl table"),
        ("prompts.jsonl", b"", "no readable jsonl table"),
        ("prompts.xlsx", b"PK", r"tables are \.parquet, \.csv, \.jsonl"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_its_name(local_job, local_store, name, data, said):
    with pytest.raises(PlanError, match=rf"{name}: .*{said}"):
        plan(replace(local_job, prompts=Table(local_store.put(name, data).uri)))


def test_a_prompts_table_that_does_not_exist_is_a_storage_error(local_job):
    with pytest.raises(StoreMissingError, match=r"none\.csv"):
        plan(replace(local_job, prompts=Table("/none.csv")))


@pytest.mark.parametrize("prompts", [(), "table"])
def test_no_prompts_are_refused(local_job, local_store, prompts):
    if prompts == "table":
        prompts = Table(write_table(local_store, "prompts.csv", {"prompt": pa.array([], pa.string())}))
    with pytest.raises(PlanError, match="^prompts: there is none"):
        plan(replace(local_job, prompts=prompts))


def test_zip_never_moves_prompts_against_references_over_an_empty_prompt(local_job, local_store):
    prompts = write_table(local_store, "prompts.parquet", {"prompt": [None, "of the second", "of the third"]})
    with pytest.raises(PlanError, match="prompts"):
        plan(replace(local_job, prompts=Table(prompts), pairing="zip"))


def test_no_seeds_are_refused(local_job):
    with pytest.raises((PlanError, SettingsError), match="^seeds"):
        plan(replace(local_job, seeds=()))


# ------------------------------------------------------------------------------------------------------- row ids


def test_ids_are_the_same_wherever_the_references_lie_and_whatever_they_are_called(local_job, tmp_path):
    other = put(Store(str(tmp_path / "moved")), {"z.mp4": b"first", "deep.mp4": b"second"})
    moved = replace(local_job, references=replace(local_job.references, uri=other), output=Output(f"{tmp_path}/out2"))
    assert set(ids(moved)) == set(ids(local_job))


def test_ids_are_the_same_on_every_storage(local_job, s3_store):
    references = put(Store(f"{s3_store.uri}/refs"), {"a.mp4": b"first", "b.mp4": b"second"})
    assert ids(_job(references, f"{s3_store.uri}/out")) == ids(local_job)


def test_ids_do_not_depend_on_the_order_of_references_prompts_and_seeds(local_job):
    uri = local_job.references.uri
    swapped = replace(
        local_job,
        references=replace(local_job.references, uri=(f"{uri}/b.mp4", f"{uri}/a.mp4")),
        prompts=("a star", "a ball"),
        seeds=(2, 1),
    )
    assert ids(swapped) != ids(local_job)
    assert set(ids(swapped)) == set(ids(local_job))


def test_a_row_has_the_same_id_however_it_was_paired(local_job, local_store):
    columns = {"reference": ["a.mp4", "b.mp4"], "prompt": ["a ball", "a star"]}
    pairs = write_table(local_store, "pairs.csv", columns)
    assert ids(replace(local_job, pairing=Table(pairs))) == ids(replace(local_job, pairing="zip"))
    assert set(ids(replace(local_job, pairing="zip"))) < set(ids(local_job))


def vary(section: str, **change: Any):
    """A change of some fields of one section of the job."""
    return lambda job: replace(job, **{section: replace(getattr(job, section), **change)})


def test_several_methods_make_every_row_with_each_and_give_it_the_id_that_it_has_alone(local_job):
    other = replace(METHOD, name="smm", optimize="latent", loss={})
    both = plan(replace(local_job, methods={"one": METHOD, "two": other}))
    alone = {name: plan(replace(local_job, method=method)) for name, method in (("one", METHOD), ("two", other))}
    assert both.total == 16
    for name, own in alone.items():
        assert {row.row_id for row in both.todo if row.variant == name} == {row.row_id for row in own.todo}


def test_plain_generation_has_no_motion_and_keeps_its_reference(local_job):
    rows = plan(replace(local_job, method=MethodSettings("none"))).todo
    assert {row.motion_id for row in rows} == {None}
    assert {row.reference.uri.rsplit("/", 1)[-1] for row in rows} == {"a.mp4", "b.mp4"}


MATTERS = {
    "method": vary("method", name="injection", loss={}),
    "optimize": vary("method", optimize="latent"),
    "preset": vary("method", preset="official"),
    "blocks": vary("method", blocks=(0,)),
    "temperature": vary("method", temperature=1.0),
    "guided_steps": vary("method", guided_steps=9),
    "iterations": vary("method", iterations=4),
    "learning_rate": vary("method", learning_rate=(0.002, 0.002)),
    "injection": vary("method", injection=False),
    "injected_steps": vary("method", injected_steps=12),
    "loss": vary("method", loss={"entries": "all"}),
    "loss.threshold": vary("method", loss={"threshold": 0.5}),
    "loss.reference_flow": vary("method", loss={"reference_flow": "soft"}),
    "motion": vary("method", motion=MotionSettings("optical_flow").resolve()),
    "motion.source": vary("method", motion=MotionSettings({"optical_flow": {"frame": "middle"}}).resolve()),
    "measured": vary("method", measured="prediction"),
    "averaged": vary("method", averaged=True),
    "optimizer": vary("method", optimizer="adam-mini"),
    "drafts": vary("method", drafts=2),
    "more_prompts": vary("method", more_prompts=("a ball",)),
    "stay": vary("method", stay=0.1),
    "smooth": vary("method", smooth=0.1),
    "zero_shot": vary("method", zero_shot=True),
    "learn_with": vary("method", learn_with="a ball"),
    "noise_candidates": vary("method", noise_candidates=2),
    "steps": vary("sampling", steps=49),
    "guidance_scale": vary("sampling", guidance_scale=6.0),
    "dynamic_guidance_scale": vary("sampling", dynamic_guidance_scale=True),
    "negative_prompt": vary("sampling", negative_prompt="blurry"),
    "frames": vary("references", frames=13),
    "height": vary("references", height=32),
    "width": vary("references", width=32),
    "start": vary("references", start=1),
    "stride": vary("references", stride=2),
    "fit": vary("references", fit="stretch"),
    "deinterlace": vary("references", deinterlace="off"),
    "fps": vary("output", fps=12.0),
    "dtype": vary("model", dtype="bfloat16"),
    "kind": lambda job: replace(job, kind="build-bank"),
    "prompts": lambda job: replace(job, prompts=("another", "prompt")),
    "seeds": lambda job: replace(job, seeds=(3, 4)),
}

NEEDS = {"optimizer": {"optimize": "coordinates"}, "more_prompts": {"drafts": 2}, "learn_with": {"zero_shot": True}}
"""What else a method has for a setting to be one that it can have."""


def open_to(name: str, job: Job) -> Job:
    """The job as it has to be for a setting to be varied by itself."""
    return vary("method", **NEEDS.get(name, {}))(job)


def test_every_setting_of_the_algorithm_is_among_those_that_are_varied_here():
    sections = (MethodSettings(), SamplingSettings())
    assert {name for section in sections for name in vars(section)} - {"name"} <= set(MATTERS)


@pytest.mark.parametrize("name", MATTERS)
def test_what_decides_the_output_changes_every_id(local_job, name):
    job = open_to(name, local_job)
    assert set(ids(MATTERS[name](job))).isdisjoint(ids(job))


def test_another_model_revision_changes_every_id(local_job):
    assert set(ids(local_job, "revision-2")).isdisjoint(ids(local_job))
    assert motion_ids(local_job, "revision-2").isdisjoint(motion_ids(local_job))


REVISED = {
    "moving entries": ("synthesize", MethodSettings(), True),
    "moving entries, positions of a bank": ("build-bank", MethodSettings(optimize="position"), True),
    "all entries": ("synthesize", MethodSettings(loss={"entries": "all"}), True),
    "another loss": ("synthesize", MethodSettings("moft"), False),
    "injection": ("synthesize", MethodSettings("injection"), False),
    "extraction": ("extract", MethodSettings(), False),
}


@pytest.mark.parametrize(("kind", "method", "touched"), REVISED.values(), ids=REVISED)
def test_a_revised_loss_changes_the_ids_of_the_rows_that_it_guides_and_no_motion(
    local_job, monkeypatch, kind, method, touched
):
    job = replace(local_job, kind=kind, method=method.resolve(DEFAULTS))
    own, motions = ids(job), motion_ids(job)
    monkeypatch.setattr(AttentionMotionFlowLoss, "revision", 2)
    assert set(ids(job)).isdisjoint(own) == touched
    assert motion_ids(job) == motions


def test_a_revised_loss_changes_no_id_of_a_reuse_which_evaluates_none(local_job, tmp_path, monkeypatch):
    banks = put(Store(str(tmp_path / "banks")), {"m.safetensors": b"bank"})
    reuse = replace(local_job, kind="reuse", banks=Banks(banks))
    own = ids(reuse)
    monkeypatch.setattr(AttentionMotionFlowLoss, "revision", 2)
    assert ids(reuse) == own


DOES_NOT_MATTER = {
    "name": lambda job: replace(job, name="another"),
    "output": lambda job: replace(job, output=Output(f"{job.output.uri}-2")),
    "model path": vary("model", path="/copies/mini"),
    "device": vary("model", device="cuda:1"),
    "execution": vary("model", execution=ExecutionSettings(checkpointing="on", cfg="serial")),
    "resources": lambda job: replace(job, resources=Resources(Pool(2), Pool((1, 4), 0.5), threads=1)),
    "faults": lambda job: replace(job, faults=Policy(attempts=9, base_seconds=0)),
    "glob": vary("references", glob="*"),
}


@pytest.mark.parametrize("change", DOES_NOT_MATTER.values(), ids=DOES_NOT_MATTER)
def test_what_only_decides_how_the_work_is_done_changes_no_id(local_job, change):
    assert ids(change(local_job)) == ids(local_job)
    assert motion_ids(change(local_job)) == motion_ids(local_job)


def test_a_prompt_or_a_seed_more_leaves_the_other_ids_as_they_were(local_job):
    before = set(ids(local_job))
    assert before < set(ids(replace(local_job, prompts=("a ball", "a star", "a cube"))))
    assert before < set(ids(replace(local_job, seeds=(1, 2, 3))))


def test_the_size_of_a_reference_does_not_matter_for_reuse_where_the_bank_decides(local_job, tmp_path):
    banks = put(Store(str(tmp_path / "banks")), {"m.safetensors": b"bank"})
    reuse = replace(local_job, kind="reuse", banks=Banks(banks))
    assert ids(reuse) == ids(vary("references", height=32)(reuse))


def test_another_size_of_the_new_videos_changes_every_id_of_a_reuse(local_job, tmp_path):
    banks = put(Store(str(tmp_path / "banks")), {"m.safetensors": b"bank"})
    own = ids(replace(local_job, kind="reuse", banks=Banks(banks)))
    assert set(own).isdisjoint(ids(replace(local_job, kind="reuse", banks=Banks(banks, size=(17, 64, 96)))))


def test_a_changed_reference_changes_only_its_own_rows(job):
    before = {row.row_id: content(row) for row in plan(job).todo}
    Store(job.references.uri).put("b.mp4", b"second, cut anew")
    after = {row.row_id: content(row) for row in plan(job).todo}
    assert sorted(before.values()) == sorted(after.values())
    assert {row[0] for row_id, row in before.items() if row_id in after} == {"a.mp4"}
    assert {row[0] for row_id, row in after.items() if row_id not in before} == {"b.mp4"}


@pytest.mark.parametrize("kind", ["extract", "synthesize", "build-bank"])
def test_ids_are_names_that_any_storage_can_hold(local_job, kind):
    assert all(len(row_id) == 24 and int(row_id, 16) >= 0 for row_id in ids(replace(local_job, kind=kind)))


@pytest.fixture(scope="module")
def shared_job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("plan")
    references = put(Store(str(folder / "refs")), {"a.mp4": b"first"})
    return _job(references, str(folder / "out"))


PROMPTS = st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True)
SEEDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5, unique=True)


@settings(max_examples=30, deadline=None)
@given(prompts=PROMPTS, seeds=SEEDS)
def test_distinct_prompts_and_seeds_have_distinct_ids_which_are_the_same_at_every_planning(shared_job, prompts, seeds):
    def found(prompts: list[str], seeds: list[int]) -> dict[tuple, str]:
        rows = plan(replace(shared_job, prompts=tuple(prompts), seeds=tuple(seeds))).todo
        return {(row.prompt, row.seed): row.row_id for row in rows}

    first = found(prompts, seeds)
    assert first.keys() == {*product(prompts, seeds)}
    assert len({*first.values()}) == len(first)
    assert found(prompts[::-1], seeds[::-1]) == first
    assert found(prompts[:1], seeds[:1]) == {(prompts[0], seeds[0]): first[prompts[0], seeds[0]]}


def test_a_work_row_comes_back_whole_from_the_column_of_a_dataset(local_job, tmp_path):
    banks = put(Store(str(tmp_path / "banks")), {"m.safetensors": b"bank"})
    for rows in (plan(local_job).todo, plan(replace(local_job, kind="reuse", banks=Banks(banks))).todo):
        assert [WorkRow.from_json(row.to_json()) for row in rows] == rows


# ---------------------------------------------------------------------------------------------------- motion ids


def test_all_rows_of_a_reference_share_one_motion_and_no_two_references_do(local_job):
    by_reference: dict[str, set] = {}
    for row in plan(local_job).todo:
        by_reference.setdefault(row.reference.uri, set()).add(row.motion_id)
    assert [len(found) for found in by_reference.values()] == [1, 1]
    assert len(motion_ids(local_job)) == 2


EXTRACTION = (
    "blocks",
    "loss",
    "loss.threshold",
    "loss.reference_flow",
    "motion",
    "motion.source",
    "injection",
    "method",
    "dtype",
    "frames",
    "height",
    "width",
    "start",
    "stride",
    "fit",
    "deinterlace",
)


@pytest.mark.parametrize("name", EXTRACTION)
def test_what_decides_the_extraction_changes_every_motion(local_job, name):
    assert motion_ids(MATTERS[name](local_job)).isdisjoint(motion_ids(local_job))


@pytest.mark.parametrize("name", sorted(set(MATTERS) - {*EXTRACTION}))
def test_what_decides_the_generation_alone_changes_no_motion(local_job, name):
    job = open_to(name, local_job)
    assert motion_ids(MATTERS[name](job)) == motion_ids(job)


def test_an_extraction_job_extracts_the_motion_that_a_synthesis_uses(local_job):
    assert motion_ids(replace(local_job, kind="extract")) == motion_ids(local_job)


# -------------------------------------------------------------------------------------------------------- inputs


def test_the_same_content_under_two_names_is_made_once_and_counted_as_a_duplicate(local_job):
    (folder_of(local_job) / "copy of a.mp4").write_bytes(b"first")
    planned = plan(local_job)
    assert (planned.total, planned.duplicates) == (8, 4)
    assert len({row.row_id for row in planned.todo}) == 8


def test_a_repeated_prompt_or_seed_is_made_once(local_job):
    planned = plan(replace(local_job, prompts=("a ball", "a ball"), seeds=(1, 1)))
    assert (planned.total, planned.duplicates) == (2, 6)


def test_one_missing_file_among_several_is_a_row_that_will_fail(local_job):
    uris = (f"{local_job.references.uri}/a.mp4", f"{local_job.references.uri}/gone.mp4")
    rows = plan(replace(local_job, references=replace(local_job.references, uri=uris), seeds=(1,))).todo
    found = {row.reference.uri.rsplit("/", 1)[-1]: row.reference.sha256 for row in rows}
    assert found == {"a.mp4": sha256_of(uris[0]), "gone.mp4": None}
    assert len(rows) == 4


def test_two_missing_files_are_two_rows(local_job):
    uris = tuple(f"{local_job.references.uri}/{name}.mp4" for name in ("gone", "lost"))
    assert plan(replace(local_job, references=replace(local_job.references, uri=uris))).total == 8


def test_a_missing_file_in_a_pairing_is_a_row_that_will_fail(local_job, local_store):
    pairs = write_table(local_store, "pairs.csv", {"reference": ["a.mp4", "gone.mp4"], "prompt": ["x", "y"]})
    rows = plan(replace(local_job, pairing=Table(pairs), seeds=(1,))).todo
    assert [row.reference.sha256 is None for row in rows] == [False, True]


@pytest.mark.parametrize("end", ["gone.mp4", "none/*.mp4", "*.mov"])
def test_a_single_uri_that_names_nothing_is_refused(local_job, end):
    uri = f"{local_job.references.uri}/{end}"
    with pytest.raises(StoreMissingError, match="does not exist" if end == "gone.mp4" else "no file matches"):
        plan(replace(local_job, references=replace(local_job.references, uri=uri)))


@pytest.mark.parametrize(("kind", "key"), [("synthesize", "references"), ("reuse", "banks"), ("extract", "references")])
def test_a_job_without_inputs_is_told_which_key_is_missing(local_job, kind, key):
    with pytest.raises(PlanError, match=rf"^{key}\.uri: nothing is given"):
        plan(replace(local_job, kind=kind, references=References()))


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files whose content was read for its hash."""
    read: list[str] = []

    def counted(uri: str, *rest: Any) -> str:
        read.append(uri.rsplit("/", 1)[-1])
        return sha256_of(uri, *rest)

    monkeypatch.setattr(pipeline.plan, "sha256_of", counted)
    return read


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(job, hashed):
    first = ids(job)
    assert sorted(hashed) == ["a.mp4", "b.mp4"]
    hashed.clear()
    assert ids(job) == first
    assert hashed == []
    Store(job.references.uri).put("b.mp4", b"second, cut anew")
    assert ids(job) != first
    assert hashed == ["b.mp4"]


def test_a_file_that_comes_later_is_read_and_the_others_are_not(local_job, hashed):
    plan(local_job)
    hashed.clear()
    (folder_of(local_job) / "c.mp4").write_bytes(b"third")
    assert plan(local_job).total == 12
    assert hashed == ["c.mp4"]


def test_the_hashes_are_remembered_beside_the_outputs_and_not_rewritten_in_vain(local_job):
    plan(local_job)
    memory = Path(local_job.output.uri.removeprefix("file://")) / "inputs.json"
    hashes = {uri.rsplit("/", 1)[-1]: sha256 for uri, (_, sha256) in json.loads(memory.read_bytes()).items()}
    assert hashes == {name: sha256_of(str(folder_of(local_job) / name)) for name in ("a.mp4", "b.mp4")}
    written = memory.stat().st_mtime_ns
    plan(local_job)
    assert memory.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"file:///a.mp4": 5}',
        b'{"file:///a.mp4": ["1", "no hash"]}',
    ],
    ids=range(8),
)
def test_a_damaged_memory_of_hashes_is_made_anew_with_a_warning(local_job, caplog, damaged):
    before = [row.row_id for row in plan(local_job).todo]
    store = local_job.store()
    memory = store.read("inputs.json")
    store.put("inputs.json", damaged)
    assert [row.row_id for row in plan(local_job).todo] == before
    assert store.read("inputs.json") == memory
    (warning,) = caplog.messages
    assert re.search(r"inputs\.json \([0-9]+ bytes\) is damaged .*: the inputs are hashed anew", warning)


def test_a_reference_without_an_end_or_of_a_refused_protocol_costs_its_rows_and_no_others(local_job, web):
    def endless(answer):
        answer.end_headers()
        while answer.command == "GET":
            answer.wfile.write(bytes(65536))

    web["endless.mp4"] = endless
    table = Path(local_job.output.uri.removeprefix("file://")).parent / "pairs.jsonl"
    table.parent.mkdir(parents=True, exist_ok=True)
    names = ["a.mp4", f"{web.url}/endless.mp4", f"filecache::{web.url}/a", "s3:/bucket/a.mp4"]
    table.write_text("\n".join(json.dumps({"reference": name, "prompt": "a ball"}) for name in names))
    references = replace(local_job.references, max_bytes=1_000_000)
    todo = plan(replace(local_job, pairing=Table(str(table)), references=references, seeds=(1,))).todo
    assert [row.reference.sha256 is not None for row in todo] == [True, False, False, False]
    assert not any(request.endswith("/a") for request in web.requests)


def test_planning_writes_nothing_but_the_hashes(job):
    plan(job)
    assert Store(job.output.uri).list() == ["inputs.json"]


# ------------------------------------------------------------------------------------------- what is left to do


def commit(job: Job, row_id: str, status: str) -> None:
    fault = {"error_kind": "permanent", "error_class": "ValueError", "error_message": "no"}
    output = {"output_uri": f"{job.output.uri}/videos/{row_id}.mp4", "output_sha256": "0", "output_bytes": 1}
    Manifest(Store(job.output.uri)).commit(
        make_row(row_id=row_id, status=status, **(output if status == "ok" else fault))
    )


@pytest.fixture
def ended(job: Job) -> dict[str, str]:
    """Rows that have ended, by their status."""
    statuses = ("ok", "failed", "quarantined")
    rows = dict(zip(statuses, ids(job), strict=False))
    for status, row_id in rows.items():
        commit(job, row_id, status)
    return rows


def test_a_row_that_has_ended_is_not_done_again(job, ended):
    planned = plan(job)
    assert (planned.total, len(planned.todo)) == (8, 5)
    assert {row.row_id for row in planned.todo}.isdisjoint(ended.values())
    assert planned.counts == {"todo": 5, "ok": 1, "failed": 1, "quarantined": 1}
    assert planned.retried == []


@pytest.mark.parametrize("retry", [("failed",), ("quarantined",), ("failed", "quarantined")])
def test_a_retry_does_the_rows_with_these_statuses_again_and_lists_them(job, ended, retry):
    planned = plan(job, retry=retry)
    again = [ended[status] for status in retry]
    assert sorted(planned.retried) == sorted(again)
    assert set(again) < {row.row_id for row in planned.todo}
    assert set(planned.ended) == {*ended} - {*retry}
    assert planned.total == 8


def test_rows_of_other_jobs_in_the_same_manifest_are_not_counted(local_job):
    commit(local_job, "of-another-job", "ok")
    assert plan(local_job).counts == {"todo": 8}


def test_when_all_rows_have_ended_nothing_is_left(local_job):
    for row_id in ids(local_job):
        commit(local_job, row_id, "ok")
    assert (plan(local_job).todo, plan(local_job).counts) == ([], {"todo": 0, "ok": 8})


def test_a_changed_setting_leaves_all_rows_to_do_and_the_way_back_none(local_job):
    for row_id in ids(local_job):
        commit(local_job, row_id, "ok")
    assert len(plan(MATTERS["steps"](local_job)).todo) == 8
    assert plan(local_job).todo == []


def test_credentials_in_the_storage_options_are_refused_before_anything_is_read(local_job, hashed):
    with pytest.raises(StoreError, match="credentials"):
        plan(replace(local_job, storage_options={"key": "AKIA", "secret": "hidden"}))
    assert hashed == []


# ----------------------------------------------------------------------------------------------- odd and signed inputs


def reference_rows(job: Job) -> dict[str, str | None]:
    return {row.reference.uri.rsplit("/", 1)[-1]: row.reference.sha256 for row in plan(job).todo}


def test_an_entry_that_cannot_be_read_costs_its_own_rows_only(local_job):
    folder = folder_of(local_job)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "gone.mp4").symlink_to("nowhere")
    known = reference_rows(local_job)
    assert [name for name, sha256 in known.items() if sha256 is None] == ["gone.mp4", "pipe.mp4", "self.mp4"]
    assert known["a.mp4"] is not None


def test_one_of_several_addresses_that_makes_no_sense_costs_its_own_rows_only(local_job):
    uris = (f"{local_job.references.uri}/a.mp4", "nonsense://x/b.mp4", f"{local_job.references.uri}/*.mov")
    found = reference_rows(replace(local_job, references=replace(local_job.references, uri=uris)))
    assert {name: sha256 is None for name, sha256 in found.items()} == {"a.mp4": False, "b.mp4": True, "*.mov": True}


def test_a_table_may_name_files_by_any_address(local_job, local_store, monkeypatch):
    folder = folder_of(local_job)
    monkeypatch.setenv("HOME", str(folder))
    names = ["~/a.mp4", f"file:{folder}/a.mp4", f"FILE://localhost{folder}/a.mp4", "./a.mp4"]
    pairs = write_table(local_store, "p q.csv", {"reference": names, "prompt": list("wxyz")})
    rows = plan(replace(local_job, pairing=Table(pairs.replace("p q", "p%20q")), seeds=(1,))).todo
    assert {row.reference.uri for row in rows} == {f"file://{folder}/a.mp4"}


@pytest.mark.parametrize("name", ["what?.safetensors", "walk.SAFETENSORS"])
def test_a_bank_of_a_table_is_a_file_by_its_ending(local_job, local_store, tmp_path, name):
    banks = put(Store(str(tmp_path / "banks")), {name: b"bank"})
    pairs = write_table(local_store, "pairs.csv", {"bank": [name], "prompt": ["a ball"]})
    reuse = replace(local_job, kind="reuse", banks=Banks(banks), pairing=Table(pairs), prompts=())
    assert {row.bank.uri for row in plan(reuse).todo} == {f"{banks}/{name}"}


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidObjectState"])
def test_a_refused_object_costs_its_own_rows_only(s3, s3_store, code):
    references = put(Store(f"{s3_store.uri}/refs"), {"a.mp4": b"first", "b.mp4": b"second"})
    job = _job(references, f"{s3_store.uri}/out")
    s3.fail(403, code, lambda request: request.startswith("GET") and request.endswith("/refs/b.mp4"))
    assert {name: sha256 is None for name, sha256 in reference_rows(job).items()} == {"a.mp4": False, "b.mp4": True}


def test_credentials_that_the_storage_does_not_take_stop_the_plan(s3, s3_store):
    references = put(Store(f"{s3_store.uri}/refs"), {"a.mp4": b"first", "b.mp4": b"second"})
    job = _job(references, f"{s3_store.uri}/out")
    s3.fail(403, "ExpiredToken", lambda request: request.startswith("GET") and request.endswith("/refs/b.mp4"))
    with pytest.raises(StoreCredentialsError):
        plan(job)


def test_a_name_that_is_no_utf8_makes_rows_that_a_manifest_can_hold(local_job):
    name = os.fsencode(folder_of(local_job)) + b"/caf\xe9.mp4"
    Path(os.fsdecode(name)).write_bytes(b"third")
    row = next(row for row in plan(local_job).todo if "caf" in row.reference.uri)
    assert row.reference.uri.encode().endswith(b"/caf%E9.mp4")
    travelled = WorkRow.from_json(row.to_json().encode().decode())
    assert read_uri(travelled.reference.source) == b"third"


@pytest.fixture
def signed(tmp_path) -> Iterator[Callable[[str], str]]:
    """A web server that gives a file to those who know its signature: returns the address of a file with one."""
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"first")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            super().do_GET() if "X-Token=valid" in self.path else self.send_error(403)

        def do_HEAD(self) -> None:  # a URL is signed for one method
            self.send_error(403)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield lambda signature, name="a.mp4": f"http://127.0.0.1:{server.server_port}/{name}?X-Token={signature}"
        server.shutdown()


def test_a_signature_is_in_no_file_and_decides_no_id(signed, local_job):
    def job(signature: str) -> Job:
        return replace(local_job, references=replace(local_job.references, uri=signed(signature)), seeds=(1,))

    first, again = plan(job("valid-1")), plan(job("valid-2"))
    assert [row.row_id for row in first.todo] == [row.row_id for row in again.todo]
    source = first.todo[0].reference
    assert (source.uri, source.source) == (signed("").split("?")[0], signed("valid-1"))
    assert source.sha256 == sha256(b"first").hexdigest()
    assert "valid" not in repr(source)
    assert all(b"valid" not in local_job.store().read(key) for key in local_job.store().list())


def test_rows_keep_their_ids_when_a_signature_has_expired(signed, local_job):
    def ids_with(signature: str) -> list[str]:
        uris = (signed(signature), signed(signature, "gone.mp4"))
        return ids(replace(local_job, references=replace(local_job.references, uri=uris)))

    assert ids_with("valid") == ids_with("expired")


def test_a_table_may_hold_signed_addresses_and_have_one(signed, local_job, local_store, tmp_path):
    write_table(Store(str(tmp_path / "web")), "pairs.csv", {"reference": [signed("valid")], "prompt": ["x"]})
    job = replace(local_job, pairing=Table(signed("valid", "pairs.csv")), seeds=(1,))
    assert [row.reference.uri for row in plan(job).todo] == [signed("").split("?")[0]]


def test_addresses_that_are_written_down_alike_make_a_row_each(signed, local_job):
    uris = tuple(signed(signature) for signature in ("valid&id=1", "gone&id=1", "gone&id=2"))
    references = replace(local_job.references, uri=uris)
    job = replace(local_job, references=references, prompts=("a ball",), seeds=(1,))
    read, *unread = plan(job).todo
    assert [row.reference.sha256 for row in unread] == [None, None]
    assert len({row.row_id for row in (read, *unread)}) == len({row.motion_id for row in (read, *unread)}) == 3
    assert plan(job).todo == [read, *unread], "nothing that was remembered of one is taken for another"
