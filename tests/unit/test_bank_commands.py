"""Facts about `ditflow bank list|show|verify|export`, on banks by hand."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from handmade import handmade_bank
from PIL import Image
from test_cli import ditflow, errors_of, lines_of

from ditflow.artifact import write_artifact
from ditflow.banks.bank import MotionBank
from pipeline.store import Store, StoreUnwritableError


@pytest.fixture
def job(tmp_path) -> Path:
    """The output of a job with three banks."""
    banks = {
        "left": handmade_bank((-2, 0), tags=("pan", "slow")),
        "right": handmade_bank((3, 0), losses=((0.2, 0.1),)),
        "up": handmade_bank((0, -1), tags=("pan",), prompt="a star\x1b[31m"),
    }
    for name, bank in banks.items():
        Store(str(tmp_path / "job")).put(f"banks/{name}.safetensors", bank.to_bytes())
    return tmp_path / "job"


def ids(*options: object) -> list[str]:
    return [row["id"] for row in lines_of(ditflow("bank", "list", *options, "--json"))]


def test_banks_are_listed_filtered_sorted_and_limited(job):
    assert ids(job) == ids(job / "banks") == ["left", "right", "up"]
    assert ids(job, "--where", "list_contains(tags, 'pan') AND mean_displacement > 1") == ["left"]
    assert ids(job, "--sort", "loss_final") == ["right", "left", "up"]
    assert ids(job, "--sort", "-mean_displacement", "--limit", 2) == ["right", "left"]
    assert ids(job, "--where", "false") == []


def test_a_listed_bank_has_its_address_and_every_column(job):
    row = lines_of(ditflow("bank", "list", job, "--json"))[0]
    assert row["uri"] == f"file://{job}/banks/left.safetensors"
    assert (row["bytes"], row["direction"]) == ((job / "banks/left.safetensors").stat().st_size, 180)


def test_the_table_for_people_has_a_line_for_each_bank_and_commands_no_terminal(job):
    shown = ditflow("bank", "list", job)
    assert all(name in shown.stdout for name in ("left", "right", "up", "pan; slow"))
    assert "\x1b[31m" not in shown.stdout
    assert "3 of 3 banks" in shown.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--where", "speed > 1"), "--where: 'speed > 1' is not valid: .*\"speed\".*the columns id, key"),
        (("--where", "true; SELECT 1"), "--where: .* is not valid"),
        (("--sort", "speed"), "--sort: 'speed' is not valid: expected one of id, key"),
    ],
)
def test_a_wrong_listing_is_one_clear_line_and_status_2(job, options, said):
    (error,) = errors_of(ditflow("bank", "list", job, *options, status=2))
    assert re.search(said, error)


def test_a_damaged_bank_is_left_out_of_the_list_and_named(job):
    (job / "banks/text.safetensors").write_bytes(b"no bank")
    result = ditflow("bank", "list", job)
    assert "left out: " in result.stderr
    assert "text.safetensors is not a safetensors file" in result.stderr


def test_a_folder_that_cannot_be_written_to_is_listed_and_said_so(job, monkeypatch):
    def refuse(*_):
        raise StoreUnwritableError("cannot write: read-only")

    monkeypatch.setattr(Store, "put", refuse)
    result = ditflow("bank", "list", job)
    assert "right" in result.stdout
    assert "not kept for the next time: cannot write: read-only" in result.stderr


def test_listing_known_banks_loads_no_model_code(job):
    """What makes it quick: torch alone takes seconds to import."""
    ditflow("bank", "list", job)
    program = (
        "import sys; from jobs.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(' '.join({'torch', 'ditflow', 'ray', 'diffusers'} & sys.modules.keys()) or 0)"
    )
    options = ["bank", "list", str(job), "--where", "moving > 0", "--sort", "id", "--json"]
    result = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, check=False)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 3), result.stderr


def test_show_tells_all_that_a_bank_says_of_itself(job):
    shown = json.loads(ditflow("bank", "show", job / "banks/left.safetensors").stdout)
    assert (shown["model"], shown["tags"], shown["optimize"]) == ("mini", ["pan", "slow"], "coordinates")
    assert shown["motion"]["direction"] == 180
    assert shown["bytes"] == (job / "banks/left.safetensors").stat().st_size
    assert shown["tensor_bytes"] == {"key": 288, "query": 288, "flow": 16}


def test_show_draws_the_flow_and_says_when_there_is_none(job, tmp_path):
    plot = tmp_path / "flow.png"
    ditflow("bank", "show", job / "banks/left.safetensors", "--plot", plot)
    with Image.open(plot) as picture:
        assert picture.format == "PNG"
    bank = handmade_bank()
    bare = replace(bank, flow=None, header=replace(bank.header, motion=None, method={"name": "smm"}))
    (tmp_path / "bare.safetensors").write_bytes(bare.to_bytes())
    (error,) = errors_of(ditflow("bank", "show", tmp_path / "bare.safetensors", "--plot", plot, status=2))
    assert "has no flow: it was learned by smm" in error


def test_verify_is_silent_about_sound_banks_and_has_a_line_for_each_problem(job):
    assert ditflow("bank", "verify", job).stdout == ""
    (job / "banks/pickle.safetensors").write_bytes(pickle.dumps([1.0]))
    data = bytearray((job / "banks/up.safetensors").read_bytes())
    data[-1] ^= 1
    (job / "banks/up.safetensors").write_bytes(data)
    result = ditflow("bank", "verify", job, status=1)
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["pickle.safetensors", "up.safetensors"]
    assert "4 banks, 2 problems" in result.stderr
    found = lines_of(ditflow("bank", "verify", job / "banks/up.safetensors", "--json", status=1))
    assert [problem["key"] for problem in found] == ["up.safetensors"]


def test_export_copies_the_chosen_banks_and_their_catalogue(job, tmp_path):
    target = tmp_path / "walks"
    result = ditflow("bank", "export", job, target, "--where", "list_contains(tags, 'pan')")
    assert "2 banks copied" in result.stderr
    assert sorted(file.name for file in target.iterdir()) == ["index.parquet", "left.safetensors", "up.safetensors"]
    assert (target / "up.safetensors").read_bytes() == (job / "banks/up.safetensors").read_bytes()
    assert ids(target) == ["left", "up"]
    (error,) = errors_of(ditflow("bank", "export", job, target, "--where", "moving > 2", status=2))
    assert "--where: 'moving > 2' chooses none of the 3 banks there" in error


@pytest.mark.parametrize("command", [("show",), ("verify",), ("list",)])
def test_what_is_not_there_is_one_clear_line_and_status_2(tmp_path, command):
    (error,) = errors_of(ditflow("bank", *command, tmp_path / "mistyped.safetensors", status=2))
    assert "mistyped" in error


def changed(bank: MotionBank) -> bytes:
    data = bytearray(bank.to_bytes())
    data[-1] ^= 1
    return bytes(data)


REFUSED = {
    "one byte changed": (changed, "the SHA-256 of its tensors"),
    "another model's": (lambda bank: bank.to_bytes(), "model revision is 0123, the generation's is"),
    "a newer format": (lambda bank: write_artifact("motion bank", 1000, {}, {}), "upgrade ditflow"),
    "a pickle": (lambda bank: pickle.dumps([1.0]), "pickles are never read"),
}


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_a_bank_that_must_not_be_used_is_refused_with_status_2(tmp_path, content, said):
    (tmp_path / "bank.safetensors").write_bytes(content(handmade_bank()))
    arguments = ("transfer", "--bank", tmp_path / "bank.safetensors", "a ball", "-o", tmp_path / "out.mp4")
    (error,) = errors_of(ditflow(*arguments, status=2))
    assert said in error
    assert not (tmp_path / "out.mp4").exists()
