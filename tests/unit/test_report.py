"""Facts about the files of a report; what a browser makes of them stands in tests/browser."""

import base64
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gallery import (
    FAILED,
    FPS,
    FRAMES,
    GRID,
    SIDE,
    add_many,
    add_motion,
    add_reference,
    add_row,
    clip,
    displacement,
    job_of,
    row,
    row_id,
    used,
)
from typer.testing import CliRunner

import pipeline.report.clips as clips
from ditflow.media.video import probe_video
from ditflow.metrics.base import MetricSettings
from jobs.cli import app
from pipeline.comparison import compare
from pipeline.faults import Policy
from pipeline.job import References
from pipeline.manifest import Manifest
from pipeline.measurements import Figure, Measurements
from pipeline.record import COLUMN_NAMES
from pipeline.report import Report, ReportError, write_report
from pipeline.report.rows import ROWS_PER_FILE
from pipeline.store import Store, StoreError

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "a\u2028b\u2029c",
    "]]>--><!--",
    "&lt;b&gt; ' \" \\ ` ${1}",
    "{{ 7 * 7 }} \x00\x1b[31m é 日本",
]


@pytest.fixture
def local(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def values_of(store: Store, name: str) -> list:
    """What a data file hands to the page."""
    code = store.read(f"report/{name}").decode("ascii")
    function, arguments = re.fullmatch(r"ditflowReport\.(\w+)\((.*)\);\n", code, re.DOTALL).groups()
    assert function in ("index", "page", "motion")
    return json.loads(f"[{arguments}]")


def index_of(store: Store) -> dict:
    [name] = re.findall(r'src="(data/index-\w+\.js)"', store.read("report/index.html").decode())
    [index] = values_of(store, name)
    return index


def rows_of(store: Store) -> list[dict]:
    """All that the page shows of the rows, in the order of the index."""
    pages = [values_of(store, name) for name in index_of(store)["pages"]]
    assert [number for number, _ in pages] == [*range(len(pages))]
    return [row for _, rows in pages for row in rows]


def report(store: Store, references: bool = True) -> Report:
    return write_report(job_of(store), references)


# ---------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_of_others_reaches_the_page_as_it_is_and_can_end_no_script(local, text):
    add_row(local, 1, prompt=text, category=text, variant=text, job=text)
    add_row(local, 2, **{**FAILED, "error_message": text, "reference_uri": f"file:///refs/{text}.mp4"})
    report(local)
    done, failed = rows_of(local)
    assert (done["prompt"], done["category"], done["variant"]) == (text, text, text)
    assert failed["error"]["message"] == text
    for key in local.list("report/data"):
        assert not re.search(rb"[<>&\x80-\xff]", local.read(key)), key


def test_the_page_itself_escapes_the_names_of_job_and_model(local):
    add_row(local, 1, job="<b>bold</b>", model="<i>&amp;")
    report(local)
    html = local.read("report/index.html").decode()
    assert "<b>bold" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "&lt;i&gt;&amp;amp;" in html


def test_no_credential_reaches_any_file(local, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hidden-in-plain-sight")
    spec = json.dumps({"method": {"name": "none"}, "sampling": {"negative_prompt": "token=abcdef"}, "video": None})
    add_row(local, 1, prompt="hidden-in-plain-sight AKIAABCDEFGHIJKLMNOP", spec_json=spec, node="hidden-in-plain-sight")
    add_row(local, 2, job="hidden-in-plain-sight", model="https://me:pa55word@host/model", variant="password=pa55word")
    report(local)
    found = b"".join(local.read(key) for key in local.list("report"))
    for secret in (b"hidden-in-plain-sight", b"AKIAABCDEFGH", b"pa55word", b"abcdef"):
        assert secret not in found, secret
    assert b"***" in found


def edit(store: Store, number: int, change) -> None:
    """Change the record of a row behind the program's back."""
    key = f"manifest/{row_id(number)}.parquet"
    table = pq.read_table(pa.BufferReader(store.read(key)))
    sink = pa.BufferOutputStream()
    pq.write_table(change(table), sink)
    store.put(key, sink.getvalue().to_pybytes())


def with_value(column: str, value):
    return lambda table: table.set_column(
        table.column_names.index(column), table.schema.field(column), pa.array([value], table.schema.field(column).type)
    )


SETTINGS = [
    "{",
    "[1]",
    "null",
    "[" * 100_000,
    '{"method": 1}',
    '{"video": {"frames": 9}}',
    '{"method": {}, "video": {"name": "/etc/passwd"}}',
]


@pytest.mark.parametrize("text", SETTINGS, ids=range(len(SETTINGS)))
def test_a_record_with_settings_that_cannot_be_read_is_shown_as_such_beside_the_others(local, tmp_path, text):
    reference = used(add_reference(tmp_path))
    for number in (1, 2):
        add_row(local, number, **reference)
    edit(local, 1, with_value("spec_json", text))
    report(local)
    damaged, sound = sorted(rows_of(local), key=lambda shown: shown["id"])
    assert (damaged["error"]["kind"], damaged["reference"]) == ("unreadable", None)
    assert "spec_json" in damaged["error"]["message"]
    assert sound["error"] is None
    assert sound["reference"] is not None


@pytest.mark.parametrize("column", [name for name in COLUMN_NAMES if name not in ("row_id", "status")])
@pytest.mark.parametrize("change", ["null", "missing"])
def test_a_record_without_one_of_its_values_is_shown_with_the_others(local, column, change):
    add_row(local, 1)
    add_row(local, 2, **FAILED)
    edit(local, 1, with_value(column, None) if change == "null" else lambda table: table.drop_columns([column]))
    assert report(local).rows == 2
    assert len(rows_of(local)) == 2


def test_a_record_with_a_status_of_no_kind_counts_as_failed(local):
    add_row(local, 1)
    add_row(local, 2)
    edit(local, 1, with_value("status", "done"))
    report(local)
    assert Manifest(local).statuses() == {row_id(1): "failed", row_id(2): "ok"}
    assert sorted(index_of(local)["rows"]["status"]) == [0, 1]


def test_numbers_that_json_does_not_know_are_null(local):
    add_row(local, 1, losses=[1.0, float("nan"), float("inf")], loss_final=float("nan"))
    report(local)
    assert rows_of(local)[0]["losses"] == [1.0, None, None]
    assert index_of(local)["rows"]["loss_final"] == [None]


# ---------------------------------------------------------------------------------------------------- rows


def test_rows_lie_in_files_of_some_hundred_and_the_index_tells_where(local):
    count = 2 * ROWS_PER_FILE + 50
    add_many(local, [row(local, number, prompt=f"prompt {number % 3}") for number in reversed(range(count))])
    report(local)
    index = index_of(local)
    sizes = [len(values_of(local, name)[1]) for name in index["pages"]]
    assert sizes == [ROWS_PER_FILE, ROWS_PER_FILE, 50]
    assert [row["id"] for row in rows_of(local)] == index["rows"]["id"] == [row_id(number) for number in range(count)]
    assert index["prompts"] == ["prompt 0", "prompt 1", "prompt 2"], "texts that repeat are written once"
    assert [index["prompts"][code] for code in index["rows"]["prompt"]] == [row["prompt"] for row in rows_of(local)]


def test_later_rows_and_measurements_leave_the_files_of_earlier_rows_as_they_are(local):
    add_many(local, [row(local, number) for number in range(ROWS_PER_FILE + 5)])
    first = report(local)
    before = index_of(local)["pages"]
    add_row(local, 1000)
    Measurements(local).write(row_id(0), MetricSettings(), [Figure("warp_error", "warp_error", 2.0)])
    second = report(local)
    after = index_of(local)["pages"]
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert (second.written, second.removed) == (3, 2), "the last file of rows, the index and the page"
    assert second.kept == first.written - 3
    assert {name.removeprefix("report/") for name in local.list("report/data")} == {
        *after,
        *re.findall(r"data/index-\w+\.js", local.read("report/index.html").decode()),
    }


def test_a_report_of_the_same_rows_writes_nothing(store):
    add_row(store, 1, video=clip(), amf_uri=add_motion(store))
    assert report(store).written > 5
    again = report(store)
    assert (again.written, again.removed) == (0, 0)


def test_the_page_is_written_last(local, monkeypatch, tmp_path):
    add_row(local, 1, **used(add_reference(tmp_path)), amf_uri=add_motion(local))
    keys, real = [], Store.put

    def put(store, key, data):
        keys.append(key)
        return real(store, key, data)

    monkeypatch.setattr(Store, "put", put)
    report(local)
    assert keys[-1] == "report/index.html"
    assert len(keys) == len(set(keys)) > 8


def test_a_file_that_others_put_beside_the_page_stays(local):
    add_row(local, 1)
    local.put("report/notes.txt", b"mine")
    local.put("report/data/old.js", b"old")
    report(local)
    assert local.exists("report/notes.txt")
    assert not local.exists("report/data/old.js")


def test_outputs_are_named_relative_to_the_page_wherever_the_job_was_run(local):
    add_row(local, 1, output_uri="s3://elsewhere/runs/videos/0a/0a1b.mp4")
    add_row(local, 2, kind="build-bank", output_uri="s3://elsewhere/runs/banks/b.safetensors")
    add_row(local, 3, **FAILED)
    report(local)
    assert [(row["output"], row["isVideo"]) for row in rows_of(local)] == [
        ("../videos/0a/0a1b.mp4", True),
        ("../banks/b.safetensors", False),
        (None, False),
    ]


def test_rows_of_one_reference_prompt_and_seed_are_told_to_belong_together(local):
    for number, variant in enumerate(("flow", "plain", "flow")):
        add_row(local, number, variant=variant, prompt="a ball", seed=number // 2)
    report(local)
    assert index_of(local)["rows"]["pair"] == [0, 0, 1]


def test_settings_that_rows_share_are_written_once(local):
    for number in range(3):
        spec = json.loads(row(local, 1)["spec_json"])
        spec["method"]["learn_with"] = f"other prompt {number}"
        add_row(local, number, spec_json=json.dumps(spec))
    report(local)
    assert len(index_of(local)["settings"]) == 1
    assert [row["own"]["learn_with"] for row in rows_of(local)] == [f"other prompt {number}" for number in range(3)]


def test_a_job_without_a_row_has_no_report(local):
    local.put("job.yaml", b"")
    with pytest.raises(ReportError, match="no row has ended"):
        report(local)


# ---------------------------------------------------------------------------------------------------- references


def test_a_reference_is_shown_by_the_frames_that_were_used(local, tmp_path):
    reference = used(add_reference(tmp_path))
    spec = json.loads(row(local, 1)["spec_json"])
    shorter = {**spec, "video": {**spec["video"], "frames": 4, "stride": 2}}
    add_row(local, 1, **reference)
    add_row(local, 2, **reference, variant="other")
    add_row(local, 3, **reference, spec_json=json.dumps(shorter))
    report(local)
    first, second, third = (row["reference"] for row in rows_of(local))
    assert first == second != third
    assert local.list("report/references") == sorted(f"report/references/{name}.mp4" for name in {first, third})
    video = probe_video(local.read(f"report/references/{first}.mp4"))
    assert (video.frames, video.height, video.width, video.fps) == (FRAMES, SIDE, SIDE, FPS)
    assert probe_video(local.read(f"report/references/{third}.mp4")).frames == 4
    assert index_of(local)["references"] == {first: None, third: None}


def test_a_reference_that_is_gone_gives_a_note_and_one_that_was_read_before_is_kept(local, tmp_path):
    kept, gone = add_reference(tmp_path, "kept.mp4"), add_reference(tmp_path, "gone.mp4")
    gone.write_bytes(gone.read_bytes() + b"\0" * 8)  # another content, so another reference
    add_row(local, 1, **used(kept))
    report(local)
    add_row(local, 2, **used(gone))
    kept.unlink()
    gone.unlink()
    told = report(local)
    notes = [index_of(local)["references"][row["reference"]] for row in rows_of(local)]
    assert notes[0] is None
    assert "gone.mp4" in notes[1]
    assert "does not exist" in notes[1]
    assert list(told.without_reference.values()) == [notes[1]]


def test_a_reference_that_has_changed_or_is_too_large_or_no_video_gives_a_note(local, tmp_path):
    changed, large = add_reference(tmp_path, "changed.mp4"), add_reference(tmp_path, "large.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    large.write_bytes(large.read_bytes() + b"\0" * 50_000)
    for number, file in enumerate((changed, large, text)):
        add_row(local, number, **used(file))
    changed.write_bytes(add_reference(tmp_path, "other.mp4").read_bytes() + b"\0")
    write_report(job_of(local, references=References(max_bytes=40_000)), True)
    notes = [index_of(local)["references"][row["reference"]] for row in rows_of(local)]
    for note, cause in zip(notes, ("changed after", "more than the accepted 40000", "not a video"), strict=True):
        assert cause in note


def test_without_references_none_is_read_and_those_of_an_earlier_report_stay(local, tmp_path, monkeypatch):
    add_row(local, 1, **used(add_reference(tmp_path)))
    report(local)

    def refuse(*_):
        raise AssertionError("a reference was read")

    monkeypatch.setattr(clips, "read_clip", refuse)
    other = add_reference(tmp_path, "other.mp4")
    other.write_bytes(other.read_bytes() + b"\0")
    add_row(local, 2, **used(other))
    report(local, references=False)
    notes = [index_of(local)["references"][row["reference"]] for row in rows_of(local)]
    assert notes[0] is None
    assert "--no-references" in notes[1]
    assert len(local.list("report/references")) == 1


def test_storage_that_is_away_is_waited_for_once_and_not_for_every_reference(local, tmp_path, monkeypatch):
    patience = []

    def away(source, settings, job):
        patience.append(job.faults.storage_patience_s)
        raise StoreError(f"cannot read {source.uri}", transient=True)

    monkeypatch.setattr(clips, "read_clip", away)
    for number in range(3):
        add_row(local, number, reference_uri=f"s3://away/{number}.mp4", reference_sha256=f"{number}" * 64)
    write_report(job_of(local, faults=Policy(storage_patience_s=7.0)), True)
    assert patience == [7.0, 0.0, 0.0]


# ---------------------------------------------------------------------------------------------------- motion


def test_the_arrows_are_the_moves_from_every_latent_frame_to_the_next(local):
    add_row(local, 1, amf_uri=add_motion(local, "a0"))
    report(local)
    its_id, motion = values_of(local, "motions/a0.js")
    moves = np.frombuffer(base64.b64decode(motion["moves"]), "<i2") / motion["unit"]
    assert its_id == rows_of(local)[0]["motion"] == "a0"
    assert motion["grid"] == [GRID.frames, GRID.height, GRID.width]
    expected = displacement().numpy()
    expected = np.stack([expected[n, n + 1] for n in range(GRID.frames - 1)])
    np.testing.assert_array_equal(moves.reshape(expected.shape), expected)


def test_only_the_flow_of_attention_is_drawn_and_only_where_it_is_there(local):
    add_row(local, 1, amf_uri=add_motion(local, "a1", loss="smm"), method="smm")
    add_row(local, 2, amf_uri=local.uri_of("amf/gone.safetensors"))
    local.put("amf/broken.safetensors", b"nonsense")
    add_row(local, 3, amf_uri=local.uri_of("amf/broken.safetensors"))
    report(local)
    assert index_of(local)["motions"] == []
    assert [row["motion"] for row in rows_of(local)] == [None, "gone", "broken"]


# ---------------------------------------------------------------------------------------------------- the whole


def test_the_summary_has_the_figures_of_evaluate(local):
    for number in range(8):
        add_row(local, number, variant=("flow", "plain")[number % 2], prompt="a ball", seed=number // 2)
        Measurements(local).write(row_id(number), MetricSettings(), [Figure("warp_error", "warp_error", float(number))])
    report(local)
    index = index_of(local)
    expected = compare(local, MetricSettings(names=("warp_error",))).to_dict()["entries"]
    assert json.dumps(index["summary"]["figures"]) == json.dumps(expected)
    assert index["measured"] == [[float(number) for number in range(8)]]


def test_of_a_metric_with_several_settings_the_page_shows_the_latest(local):
    add_row(local, 1)
    for value, tracker in ((0.25, "dis"), (0.75, "lucas-kanade")):
        settings = MetricSettings(names=("motion_fidelity",), tracker=tracker)
        Measurements(local).write(row_id(1), settings, [Figure("motion_fidelity", "motion_fidelity", value)])
    report(local)
    index = index_of(local)
    assert index["measured"] == [[0.75]]
    assert index["figures"][0]["settings"]["tracker"] == "lucas-kanade"


def test_a_figure_without_a_value_is_none(local):
    for number in (1, 2):
        add_row(local, number)
    settings = MetricSettings(names=("warp_error",))
    Measurements(local).write(row_id(1), settings, [Figure("warp_error", "warp_error", None, "too short")])
    Measurements(local).write(row_id(2), settings, [Figure("warp_error", "warp_error", 3.0)])
    report(local)
    assert index_of(local)["measured"] == [[None, 3.0]]


def test_seconds_and_losses_are_summed_up_by_method_over_finished_rows(local):
    add_row(local, 1, seconds_guidance=2.0, seconds_denoise=1.0, loss_first=2.0, loss_final=1.0)
    add_row(local, 2, seconds_guidance=4.0, seconds_denoise=None, loss_first=4.0, loss_final=3.0)
    add_row(local, 3, **{**FAILED, "seconds_guidance": 100.0})
    add_row(local, 4, variant="plain", method="none", losses=[], loss_first=None, loss_final=None)
    report(local)
    index = index_of(local)
    seconds = {
        entry["variant"]: dict(zip(index["phases"], entry["means"], strict=True))
        for entry in index["summary"]["seconds"]
    }
    assert (seconds["flow"]["guidance"], seconds["flow"]["denoise"], seconds["flow"]["read"]) == (3.0, 0.5, 0.0)
    assert index["rows"]["seconds"] == [3.0, 4.0, 101.0, 4.0], "the phases of each row together"
    [losses] = index["summary"]["losses"]
    assert (losses["variant"], losses["from"], losses["to"], losses["medians"]) == ("flow", 1.0, 4.0, [3.0, 2.0])
    assert (sum(losses["first"]), sum(losses["final"])) == (2, 2)
    assert {(e["variant"], e["status"], e["rows"]) for e in index["summary"]["statuses"]} == {
        ("flow", "ok", 2),
        ("flow", "failed", 1),
        ("plain", "ok", 1),
    }


def test_a_report_leaves_the_job_sound(local, tmp_path):
    add_row(local, 1, **FAILED)
    report(local)
    assert Manifest(local).verify() == []


def test_object_storage_is_told_what_kind_of_file_each_is(s3_store, tmp_path):
    add_row(s3_store, 1, **used(add_reference(tmp_path)))
    report(s3_store)
    fs, root = s3_store._at("")
    kinds = {key.rsplit(".", 1)[-1]: fs.info(f"{root}/{key}")["ContentType"] for key in s3_store.list("report")}
    assert kinds == {
        "html": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "mp4": "video/mp4",
    }


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_the_report_and_tells_where_it_is(local, tmp_path):
    add_row(local, 1, reference_uri="file:///nowhere/gone.mp4", reference_sha256="0" * 64)
    result = CliRunner().invoke(app, ["report", local.uri, "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["uri"] == local.uri_of("report/index.html")
    assert told["rows"] == 1
    assert "gone.mp4" in result.stderr
    assert "usual limits" in result.stderr, "the folder has no job.yaml"


def test_the_command_refuses_a_job_without_rows(local):
    local.put("job.yaml", b"kind: synthesize")
    result = CliRunner().invoke(app, ["report", local.uri])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no row has ended" in result.stderr


def test_references_are_read_with_the_limits_of_the_jobs_own_spec(local, tmp_path):
    add_row(local, 1, **used(add_reference(tmp_path)))
    spec = "{kind: synthesize, name: x, output: {uri: gone}, references: {uri: gone, max_bytes: 10}}"
    local.put("job.yaml", spec.encode())
    result = CliRunner().invoke(app, ["report", local.uri, "--json"])
    assert result.exit_code == 0, result.stderr
    [note] = json.loads(result.stdout)["without_reference"].values()
    assert "more than the accepted 10" in note
