"""Facts about hostile inputs: what each file of the corpus comes to, in how much memory, and that names are names."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hostile import CORPUS, NAMES, PROMPTS, READ, mp4

import pipeline.stages.read
from ditflow.errors import SettingsError
from ditflow.media.video import OversizedVideoError, VideoError, read_video
from ditflow.settings import MethodSettings, ModelDefaults, SamplingSettings
from pipeline import tables
from pipeline.faults import Policy, classify
from pipeline.job import Job, Output, References, Table
from pipeline.plan import PlanError, WorkRow, make_plan
from pipeline.stages.read import bounded_memory, read_reference
from pipeline.store import Store, list_uris, read_uri

ROOT = Path(__file__).parents[2]
GIGABYTE = 10**9
MEGABYTE = 10**6


# ------------------------------------------------------------------------------------------------- the corpus


@pytest.fixture(scope="module")
def read() -> dict:
    """What the whole corpus came to in one process of its own."""
    environment = {**os.environ, "PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-m", "hostile"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_file_gives_its_frames_or_says_what_is_wrong_with_it(read, name):
    hostile, outcome = CORPUS[name], read["outcomes"][name]
    if hostile.error is None:
        assert outcome == {"error": None, "message": "9 frames"}
        return
    assert outcome["error"] == hostile.error.__name__, outcome
    assert outcome["message"].startswith(f"{name}: ")
    assert re.search(hostile.says, outcome["message"], re.DOTALL), outcome


def test_the_reader_stays_under_a_gigabyte_over_all_of_them(read):
    assert read["peak_bytes"] < GIGABYTE


def test_an_unusual_video_shows_what_the_plain_one_shows():
    """The square moves to the right in each; fit: stretch, so that odd shapes show all of it."""
    plain = read_video(mp4(), **READ, fit="stretch").frames.astype(int)
    for name in ("ten bits.mkv", "ten bits hevc.mp4", "odd sizes.mkv", "full colour.mkv", "transparent.mkv"):
        frames = read_video(CORPUS[name].build(), **READ, fit="stretch").frames.astype(int)
        assert np.abs(frames - plain).mean() < 8, name


# ----------------------------------------------------------------------------------------------------- limits


def test_memory_is_bounded_within_the_block_and_not_after_it():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), bounded_memory(50 * MEGABYTE):
        np.ones(200 * MEGABYTE, np.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert np.ones(200 * MEGABYTE, np.uint8).all()


def test_memory_that_runs_out_is_a_fault_of_the_video_and_not_worth_another_try():
    data, costs = CORPUS["fragment of millions.mp4"].build(), "more memory than the reader may use"
    with pytest.raises(OversizedVideoError, match=costs) as caught, bounded_memory(50 * MEGABYTE):
        read_video(data, name="x", **READ)
    assert classify(caught.value).kind == "permanent"


def job(folder: Path, **references) -> Job:
    method, sampling = (settings.resolve(ModelDefaults((1,))) for settings in (MethodSettings(), SamplingSettings()))
    wanted = References(str(folder / "references"), **{**READ, **references})
    output = Output(str(folder / "out"))
    return Job("synthesize", "test", output, references=wanted, prompts=("a ball",), method=method, sampling=sampling)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one sound reference."""
    (tmp_path / "references").mkdir()
    (tmp_path / "references/a.mp4").write_bytes(mp4())
    return tmp_path


def reading(job: Job) -> dict:
    """Plan a job of one reference and do its reading; return the row."""
    [work] = make_plan(job, "revision").todo
    return read_reference({"motion_id": work.motion_id, "work": json.dumps([work.to_json()])}, job)


def test_a_reference_within_the_limits_is_read(folder):
    row = reading(job(folder, max_bytes=len(mp4()), max_pixels=48 * 64))
    assert (row["fault"], row["frames"].shape) == ("null", (9, 32, 32, 3))


def test_a_reference_that_is_too_large_is_refused_before_it_is_fetched(folder, monkeypatch):
    monkeypatch.setattr(pipeline.stages.read, "read_unchanged", lambda *_: pytest.fail("it was fetched"))
    row = reading(job(folder, max_bytes=len(mp4()) - 1))
    fault = json.loads(row["fault"])
    assert (fault["kind"], fault["error_class"], fault["attempts"]) == ("permanent", "OversizedVideoError", 1)
    size = len(mp4())
    assert f"a.mp4: the file has {size} bytes, more than the accepted {size - 1}" in fault["message"]
    assert "references.max_bytes" in fault["message"]


def test_a_reference_with_too_many_pixels_is_refused_by_its_header(folder):
    fault = json.loads(reading(job(folder, max_pixels=48 * 64 - 1))["fault"])
    assert (fault["kind"], fault["error_class"]) == ("permanent", "OversizedVideoError")
    assert "64x48 pixels, more than the accepted 3071" in fault["message"]
    assert "references.max_pixels" in fault["message"]


def test_a_reference_whose_index_fills_the_memory_is_one_failed_row(folder):
    (folder / "references/a.mp4").write_bytes(CORPUS["fragment of millions.mp4"].build())
    fault = json.loads(reading(job(folder))["fault"])
    assert (fault["kind"], fault["error_class"], fault["attempts"]) == ("permanent", "OversizedVideoError", 1)
    assert "references.max_memory_bytes" in fault["message"]


def test_a_start_far_into_a_frame_bomb_is_ended_by_the_deadline_and_is_one_failed_row(folder):
    """Two hundred thousand frames are decoded on the way to the first that is wanted."""
    (folder / "references/a.mp4").write_bytes(CORPUS["frame bomb from far.gif"].build())
    hasty = replace(job(folder, start=500_000), faults=Policy(row_deadline_s=0.1))
    [work] = make_plan(hasty, "revision").todo
    row = {"motion_id": work.motion_id, "work": json.dumps([work.to_json()])}
    child = os.fork()
    if child == 0:
        read_reference(row, hasty)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    fault = json.loads(read_reference(row, hasty)["fault"])
    assert (fault["kind"], fault["attempts"]) == ("deadline", 1)


def test_a_missing_reference_is_told_in_the_storages_words(folder):
    wanted = job(folder)
    [work] = make_plan(wanted, "revision").todo
    (folder / "references/a.mp4").unlink()
    row = read_reference({"motion_id": work.motion_id, "work": json.dumps([work.to_json()])}, wanted)
    assert json.loads(row["fault"])["error_class"] == "StoreMissingError"


def test_limits_decide_no_id(folder):
    def ids(**limits: int) -> list[tuple]:
        return [(row.row_id, row.motion_id) for row in make_plan(job(folder, **limits), "revision").todo]

    assert ids() == ids(max_bytes=10**6) == ids(max_pixels=10**4) == ids(max_memory_bytes=2 * 10**9)


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_memory_bytes": 10**6}, "max_memory_bytes"),
        ({"max_bytes": 10**9}, "max_memory_bytes"),
    ],
)
def test_limits_that_let_nothing_through_are_refused(limits, key):
    with pytest.raises(SettingsError) as caught:
        References(**limits)
    assert caught.value.key == key


# ------------------------------------------------------------------------------------------------------ names


@pytest.fixture
def named(tmp_path) -> Path:
    """The same job's folder, with a reference for each of the names; one byte more each, so that none is a copy."""
    (tmp_path / "references").mkdir()
    for number, name in enumerate(NAMES):
        (tmp_path / "references" / name).write_bytes(mp4() + bytes(number))
    return tmp_path


def test_every_file_is_found_and_read_whatever_it_is_called(named):
    uris = list_uris(str(named / "references"), "*.mp4")
    assert {uri.rsplit("/", 1)[-1] for uri in uris} == {*NAMES}
    for uri in uris:
        assert read_uri(uri) == Path(uri.removeprefix("file://")).read_bytes()
        assert list_uris(uri) == [uri]


def test_every_name_is_planned_and_travels_unchanged(named):
    rows = make_plan(job(named), "revision").todo
    assert {row.reference.uri.rsplit("/", 1)[-1] for row in rows} == {*NAMES}
    assert [WorkRow.from_json(row.to_json()) for row in rows] == rows
    assert all(re.fullmatch("[0-9a-f]{24}", row.row_id) for row in rows)


def test_a_name_that_leads_out_of_the_folder_is_a_path_like_any_other(folder):
    """It is the job's owner who writes the table; what it names may be missing, which is one failed row."""
    (folder / "outside.mp4").write_bytes(mp4())
    names = ["../outside.mp4", "../../../../../../../../../../nowhere.mp4", "./a.mp4"]
    table = folder / "pairs.csv"
    table.write_text("reference,prompt\n" + "".join(f"{name},a ball\n" for name in names))
    rows = make_plan(replace(job(folder), pairing=Table(str(table))), "revision").todo
    found = {row.reference.uri: row.reference.sha256 is not None for row in rows}
    assert found[f"file://{folder}/outside.mp4"]
    assert not found["file:///nowhere.mp4"]


@pytest.mark.parametrize("key", ["../up.mp4", "a/../../b", "/etc/passwd", "a//b", "", "a\0b", ".", "a/."])
def test_no_key_leaves_the_output_folder(tmp_path, key):
    from pipeline.store import StoreError

    with pytest.raises(StoreError, match="not a plain relative path"):
        Store(str(tmp_path)).put(key, b"")


# ---------------------------------------------------------------------------------------------------- prompts


def write_prompts(folder: Path, ending: str, prompts: tuple[str, ...]) -> Table:
    file = folder / f"prompts.{ending}"
    table = pa.table({"prompt": prompts})
    if ending == "parquet":
        pq.write_table(table, file)
    elif ending == "csv":
        pyarrow.csv.write_csv(table, file)
    else:
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return Table(str(file))


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_every_prompt_comes_from_a_table_as_it_was_written(folder, ending):
    table = write_prompts(folder, ending, PROMPTS)
    rows = make_plan(replace(job(folder), prompts=table), "revision").todo
    assert [row.prompt for row in rows] == [*PROMPTS]
    assert [WorkRow.from_json(row.to_json()).prompt for row in rows] == [*PROMPTS]


def test_a_quoted_line_break_may_stand_anywhere_in_a_large_csv(folder):
    prompts = tuple(f"first line {number}\nsecond line " + "x" * 997 for number in range(5000))
    table = write_prompts(folder, "csv", prompts)
    assert [text for text, _ in tables.read_prompts(job(folder), table)] == [*prompts]


def parquet_of_no_text() -> bytes:
    """A column that says it is text, and holds the bytes ff fe."""
    offsets, content = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": pa.Array.from_buffers(pa.string(), 1, [None, offsets, content])}), sink)
    return sink.getvalue().to_pybytes()


NOT_UTF8 = b"caf\xe9 on the corner"
NO_PROMPTS = {
    "latin-1 in csv": ("a.csv", b"prompt\n" + NOT_UTF8 + b"\n", "expected a text"),
    "latin-1 in jsonl": ("a.jsonl", b'{"prompt": "' + NOT_UTF8 + b'"}\n', "no readable jsonl|expected a text"),
    "half a surrogate pair in jsonl": ("a.jsonl", b'{"prompt": "\\ud800"}\n', "no readable jsonl table"),
    "invalid text in parquet": ("a.parquet", parquet_of_no_text(), "no readable parquet table"),
    "a list for a prompt": ("a.jsonl", b'{"prompt": ["a", "b"]}\n', r"row 1 .*\['a', 'b'\]: expected a text"),
    "a mapping for a prompt": ("a.jsonl", b'{"prompt": {"a": 1}}\n', "expected a text"),
    "a list for a row": ("a.jsonl", b"[1, 2]\n", "no readable jsonl table"),
    "nested without end": ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "no readable jsonl table"),
    "web page": ("a.parquet", b"<html></html>", "no readable parquet table"),
}


@pytest.mark.parametrize(("name", "data", "says"), NO_PROMPTS.values(), ids=NO_PROMPTS)
def test_a_table_whose_prompts_are_no_texts_is_refused_when_the_job_is_planned(folder, name, data, says):
    (folder / name).write_bytes(data)
    with pytest.raises(PlanError, match=says) as caught:
        make_plan(replace(job(folder), prompts=Table(str(folder / name))), "revision")
    assert len(str(caught.value)) < 1000


def test_a_table_that_says_it_has_billions_of_rows_is_refused_unread(folder, monkeypatch):
    table = write_prompts(folder, "parquet", PROMPTS)
    monkeypatch.setattr(tables, "MOST_ROWS", len(PROMPTS) - 1)
    with pytest.raises(PlanError, match=f"it has {len(PROMPTS)} rows, expected at most {len(PROMPTS) - 1}"):
        make_plan(replace(job(folder), prompts=table), "revision")


@pytest.mark.parametrize("column", ["seed", "start", "stop", "step"])
def test_a_number_in_a_table_that_the_manifest_cannot_hold_is_refused(folder, column):
    file = folder / "pairs.parquet"
    numbers = pa.array([2**63], pa.uint64())
    pq.write_table(pa.table({"reference": ["a.mp4"], "prompt": ["x"], column: numbers}), file)
    with pytest.raises(PlanError, match=f"row 1 .* has {column} 9223372036854775808: expected a whole number"):
        make_plan(replace(job(folder), pairing=Table(str(file))), "revision")


def test_every_error_of_the_corpus_is_a_documented_one():
    assert all(hostile.error is None or issubclass(hostile.error, VideoError) for hostile in CORPUS.values())
