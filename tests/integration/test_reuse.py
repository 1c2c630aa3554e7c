"""A job that reuses many banks on two actors: each bank is read at most once by each, and a bad one costs no other."""

import json
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from running import run, write_spec

from benchmarks.banks import SIZE, learned_like, write_banks
from ditflow.artifact import write_artifact
from ditflow.banks.bank import MotionBank
from pipeline.catalogue import Catalogue
from pipeline.manifest import Manifest
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("cluster")

GOOD, STEPS = 8, 3
METHOD = {"name": "ditflow", "optimize": "coordinates", "guided_steps": 2, "iterations": 1}


@pytest.fixture
def banks(tmp_path) -> Path:
    write_banks(tmp_path / "banks", learned_like(SIZE, STEPS, 2), GOOD)
    return tmp_path / "banks"


def rows_by_bank(folder: Path) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in Manifest(Store(str(folder))).read().to_pylist():
        rows.setdefault(Path(row["bank_uri"]).stem, []).append(row)
    return rows


def spoil(folder: Path) -> dict[str, str]:
    """Add banks that must be refused; return what is said of each."""
    data = (folder / "000000.safetensors").read_bytes()
    bank = MotionBank.from_bytes(data)
    changed = bytearray(data)
    changed[-1] ^= 1
    stranger = replace(bank, header=replace(bank.header, model_revision="other"))
    files = {
        "changed": (bytes(changed), "the SHA-256 of its tensors is"),
        "stranger": (stranger.to_bytes(), "model revision is other"),
        "larger": (learned_like((9, 32, 40), STEPS, 2).to_bytes(), None),
        "newer": (write_artifact("motion bank", 1000, {}, {}), "format 1000.*upgrade ditflow"),
        "pickle": (pickle.dumps([1.0]), "pickles are never read"),
    }
    for name, (content, _) in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return {name: said for name, (_, said) in files.items() if said is not None}


def test_each_actor_reads_a_bank_at_most_once_and_bad_banks_fail_alone(tmp_path, banks):
    refused = spoil(banks)
    spec = write_spec(
        tmp_path,
        kind="reuse",
        references={},
        banks={"uri": str(banks)},
        prompts=["a red ball", "a blue star"],
        method=METHOD,
        resources={"generate": {"actors": 2}},
    )
    _, tally, _ = run(spec)
    rows = rows_by_bank(tmp_path / "out")
    assert (tally.ok, tally.failed) == (2 * (GOOD + 1), 2 * len(refused)), "a bank of another size makes its own size"
    assert {row["width"] for row in rows["larger"]} == {40}
    for name, its_rows in rows.items():
        for row in its_rows:
            assert row["status"] == ("failed" if name in refused else "ok"), row["error_message"]
    for name, said in refused.items():
        assert all(re.search(said, row["error_message"]) for row in rows[name])
        assert {row["error_kind"] for row in rows[name]} == {"permanent"}
    loads: Counter[int] = Counter()
    for row in (row for name in rows.keys() - refused.keys() for row in rows[name]):
        loads[row["process"]] += row["bank_loads"]
    assert len(loads) == 2
    for process, count in loads.items():
        used = [name for name, its in rows.items() if process in {row["process"] for row in its}]
        assert count <= len(set(used) - refused.keys())


def test_banks_of_coordinates_move_videos_of_the_size_that_the_job_asks_for(tmp_path, banks):
    spec = write_spec(
        tmp_path,
        kind="reuse",
        references={},
        banks={"uri": str(banks), "size": [9, 32, 48]},
        prompts=["a red ball"],
        method={},
    )
    _, tally, _ = run(spec)
    assert (tally.ok, tally.failed) == (GOOD, 0)
    for row in Manifest(Store(str(tmp_path / "out"))).read().to_pylist():
        assert (row["frames"], row["height"], row["width"]) == (9, 32, 48)
        assert json.loads(row["spec_json"])["size"] == [9, 32, 48]


def test_a_build_bank_job_leaves_a_catalogue_with_the_motion_and_tags_of_its_banks(tmp_path, references):
    columns = "reference,prompt,tags\nclip-0000.mp4,a red ball,walk;slow\nclip-0001.mp4,a blue star,\n"
    (tmp_path / "pairs.csv").write_text(columns)
    spec = write_spec(
        tmp_path,
        kind="build-bank",
        references={"uri": str(references), "frames": 9, "height": 32, "width": 32, "stride": 2},
        pairing={"uri": str(tmp_path / "pairs.csv")},
        method={**METHOD, "optimize": "position", "preset": "paper"},
        tags=["outdoors"],
    )
    _, tally, _ = run(spec)
    assert tally.ok == 2
    contents = Catalogue.at(str(tmp_path / "out"), {}).read()
    assert not contents.stale, "the run has written it"
    assert sorted(contents.table["tags"].to_pylist()) == [["outdoors"], ["outdoors", "walk", "slow"]]
    for row in contents.table.to_pylist():
        bank = MotionBank.from_bytes((tmp_path / "out/banks" / row["key"]).read_bytes())
        assert row["mean_displacement"] == bank.header.motion.mean_displacement > 0
        assert row["pixels_per_second"] > 0
        assert (row["method"], row["optimize"], row["seed"]) == ("ditflow", "position", 1)
    assert Manifest(Store(str(tmp_path / "out"))).verify() == []
