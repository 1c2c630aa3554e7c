"""One real job over the whole hostile corpus: every file and every prompt ends as exactly one row that says why."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from hostile import CORPUS, NAMES, PROMPTS, READ, mp4
from running import run, write_spec
from typer.testing import CliRunner

from jobs.cli import app
from jobs.spec import SpecError, load_spec
from pipeline.manifest import Manifest
from pipeline.plan import PlanError, make_plan
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("cluster")

FILES = {name: hostile for name, hostile in CORPUS.items() if not hostile.ask}
"""What asks for nothing special of its own fits into one job."""
PATIENT = {"base_seconds": 0, "max_seconds": 0, "max_failures_in_a_row": 10_000}


def rows_of(folder: Path) -> list[dict]:
    return Manifest(Store(str(folder / "out"))).read().to_pylist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The corpus as one folder of references; a byte more each, where they would be copies of each other."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "references").mkdir()
    for name, hostile in FILES.items():
        (folder / "references" / name).write_bytes(hostile.build())
    for number, name in enumerate(NAMES, 1):
        (folder / "references" / name).write_bytes(mp4() + bytes(number))
    return folder


@pytest.fixture(scope="module")
def finished(folder, cluster) -> Path:
    """The folder after a job that extracts the motion of every file."""
    references = {"uri": str(folder / "references"), "glob": "*", **READ}
    # All entries: at this size the embedded model sees no motion in some of these clips, which would be an error too.
    method = {"name": "ditflow", "loss": {"entries": "all"}, "guided_steps": 2}
    run(write_spec(folder, kind="extract", prompts=[], references=references, method=method, faults=PATIENT))
    return folder


def by_name(folder: Path) -> dict[str, dict]:
    rows = rows_of(folder)
    found = {row["reference_uri"].removeprefix(f"file://{folder}/references/"): row for row in rows}
    assert len(found) == len(rows), "one row for each"
    return found


def test_every_hostile_file_is_one_row_of_the_expected_status(finished):
    rows = by_name(finished)
    assert rows.keys() == {*FILES, *NAMES}
    for name, hostile in FILES.items():
        row = rows[name]
        if hostile.error is None:
            assert row["status"] == "ok", row["error_message"]
            continue
        assert (row["status"], row["error_kind"], row["attempts"]) == ("failed", "permanent", 1), row
        assert row["error_class"] == hostile.error.__name__, row["error_message"]
        assert re.search(hostile.says, row["error_message"]), row["error_message"]


def test_every_name_is_an_ok_row_and_no_file_is_named_after_it(finished):
    rows = by_name(finished)
    assert {rows[name]["status"] for name in NAMES} == {"ok"}
    outputs = {file.name for file in (finished / "out").rglob("*") if file.is_file()}
    assert all(re.fullmatch(r"[0-9a-f]{24}\.(parquet|safetensors)|(job|inputs|run)\.\w+", name) for name in outputs)


def test_the_manifest_is_sound_and_nothing_else_is_there(finished):
    assert Manifest(Store(str(finished / "out"))).verify() == []
    assert not list((finished / "out/attempts").rglob("*.*"))
    assert sorted(path.name for path in finished.iterdir()) == ["job.yaml", "out", "references"]


def test_the_manifest_is_shown_as_a_table_and_as_json_whatever_the_names_are(finished):
    shown = CliRunner().invoke(app, ["manifest", "show", str(finished / "out"), "--status", "failed"])
    assert shown.exit_code == 0, shown.output
    assert "\x1b[31m" not in shown.stdout
    lines = CliRunner().invoke(app, ["manifest", "show", str(finished / "out"), "--json"]).stdout.splitlines()
    assert {json.loads(line)["row_id"] for line in lines} == {row["row_id"] for row in rows_of(finished)}


def test_a_second_run_finds_every_row_ended(finished):
    spec = load_spec(finished / "job.yaml")
    assert make_plan(spec.job, spec.model.revision).todo == []


@pytest.fixture(scope="module")
def prompted(tmp_path_factory, cluster) -> Path:
    """A folder after a job of plain generations, one for every hostile prompt."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    run(
        write_spec(
            folder,
            method={"name": "none"},
            sampling={"steps": 1},
            references={"frames": 9, "height": 32, "width": 32},
            prompts={"uri": str(folder / "prompts.jsonl")},
            faults=PATIENT,
        )
    )
    return folder


def test_every_hostile_prompt_is_an_ok_row_that_holds_it_unchanged(prompted):
    rows = rows_of(prompted)
    assert sorted(row["prompt"] for row in rows) == sorted(PROMPTS)
    assert {row["status"] for row in rows} == {"ok"}, [row["error_message"] for row in rows]
    assert len({row["output_sha256"] for row in rows}) > 1
    assert Manifest(Store(str(prompted / "out"))).verify() == []


def test_any_parquet_reader_reads_the_hostile_prompts(prompted):
    assert sorted(pq.read_table(prompted / "out/manifest")["prompt"].to_pylist()) == sorted(PROMPTS)


def test_prompts_are_shown_without_markup_or_control_characters(prompted):
    shown = CliRunner().invoke(app, ["manifest", "show", str(prompted / "out")])
    assert shown.exit_code == 0, shown.output
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", shown.stdout)


def test_the_same_prompts_written_into_the_spec_are_the_same_rows(prompted):
    values = yaml.safe_load((prompted / "job.yaml").read_text())
    (prompted / "again.yaml").write_text(yaml.safe_dump({**values, "prompts": [*PROMPTS]}))
    spec = load_spec(prompted / "again.yaml")
    assert make_plan(spec.job, spec.model.revision).todo == []
    (prompted / "resolved.yaml").write_text(spec.yaml)
    assert load_spec(prompted / "resolved.yaml").job == spec.job


@pytest.mark.parametrize("escape", [r'"\ud800"', r'"a \udfff b"'])
def test_half_a_surrogate_pair_in_the_spec_is_refused_before_anything_starts(tmp_path, escape):
    (tmp_path / "references").mkdir()
    file = write_spec(tmp_path, prompts=["PROMPT"])
    file.write_text(file.read_text().replace("PROMPT", escape))
    with pytest.raises(SpecError, match=r"job\.yaml:\d+: "):
        load_spec(file)


def test_a_table_of_bytes_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "prompts.csv").write_bytes(b"prompt\ncaf\xe9\n")
    file = write_spec(tmp_path, method={"name": "none"}, references={}, prompts={"uri": str(tmp_path / "prompts.csv")})
    spec = load_spec(file, ["references.frames=9", "references.height=32", "references.width=32"])
    with pytest.raises(PlanError, match="expected a text"):
        make_plan(spec.job, spec.model.revision)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
