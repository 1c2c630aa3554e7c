"""Facts about the banks that a process keeps in memory."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from handmade import handmade_bank

from ditflow.artifact import ArtifactError
from pipeline.job import Job, Output, Resources
from pipeline.plan import Input
from pipeline.stages.banks import RecentBanks


@pytest.fixture
def job(tmp_path) -> Job:
    return Job("reuse", "test", Output(str(tmp_path / "out")))


def bank_file(folder: Path, name: str) -> Input:
    data = handmade_bank(prompt=name).to_bytes()
    (folder / f"{name}.safetensors").write_bytes(data)
    return Input(f"file://{folder}/{name}.safetensors", sha256(data).hexdigest())


def test_a_bank_is_read_once_however_often_it_is_used(job, tmp_path):
    sources, recent = [bank_file(tmp_path, name) for name in "abc"], RecentBanks(job)
    for source in (*sources, *sources):
        assert recent.get(source).header.prompt == Path(source.uri).stem
    assert (recent.take_loads(), recent.take_loads()) == (3, 0)


def test_banks_that_were_not_used_for_longest_make_room(job, tmp_path):
    sources = {name: bank_file(tmp_path, name) for name in "abc"}
    size = (tmp_path / "a.safetensors").stat().st_size
    recent = RecentBanks(replace(job, resources=Resources(bank_bytes=2 * size)))
    for name, loads in zip("abacab", (1, 1, 0, 1, 0, 1), strict=True):
        recent.get(sources[name])
        assert recent.take_loads() == loads, name


def test_the_bank_that_was_used_last_is_kept_in_any_room(job, tmp_path):
    source, recent = bank_file(tmp_path, "a"), RecentBanks(replace(job, resources=Resources(bank_bytes=0)))
    assert recent.get(source) is recent.get(source)
    assert recent.take_loads() == 1


def test_a_bank_that_is_refused_is_not_kept_and_harms_no_other(job, tmp_path):
    good, bad, recent = bank_file(tmp_path, "a"), tmp_path / "bad.safetensors", RecentBanks(job)
    bad.write_bytes(b"no bank")
    for _ in range(2):
        with pytest.raises(ArtifactError, match="bad.safetensors is not a safetensors file"):
            recent.get(Input(f"file://{bad}", sha256(b"no bank").hexdigest()))
    assert recent.get(good).header.prompt == "a"
    assert recent.take_loads() == 3
