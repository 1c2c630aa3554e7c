"""Facts about what reads strangers' files and damaged outputs: values, or the documented error that names the file."""

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.mutations import json_structure, mutated_value, parquet_structure
from benchmarks.fuzz.search import Search, fuzz
from benchmarks.fuzz.targets import TARGETS
from ditflow.media.video import VideoError

EXAMPLES = {
    "spec": 60, "bank": 150, "motion": 60, "video": 60, "digest": 20, "inputs": 30, "run": 20, "lease": 20,
    "attempts": 20, "record": 15, "model": 10, "hashes": 30,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_downloads():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_or_refused_with_the_documented_error(name):
    search = Search(TARGETS[name], seed=1)

    @settings(max_examples=EXAMPLES[name], deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(number=st.integers(0, 2**32))
    def reads(number):
        assert search.read(search.input(number)) in ("ok", *_names(TARGETS[name].documented))

    reads()
    assert search.messages > (3 if TARGETS[name].documented else 1), "the mutations reach different parts of the reader"


def _names(errors: Iterable[type[Exception]]) -> set[str]:
    return {name for error in errors for name in (error.__name__, *_names(error.__subclasses__()))}


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_themselves_are_read_or_refused_with_the_documented_error(name):
    target = TARGETS[name]
    search = Search(target, seed=0)
    outcomes = {search.read(seed) for seed in target.seeds()}
    assert "ok" in outcomes


def test_the_same_number_is_the_same_input():
    one, other = (Search(TARGETS["bank"], seed=3) for _ in range(2))
    assert [one.input(number) for number in range(50)] == [other.input(number) for number in range(50)]
    assert Search(TARGETS["bank"], seed=4).input(0) != one.input(0)


@given(number=st.integers(0, 2**32))
def test_a_mutated_value_leaves_its_original_alone(number):
    value = {"a": [1, {"b": 2}], "c": {"d": [3]}}
    mutated_value(value, random.Random(number))
    assert value == {"a": [1, {"b": 2}], "c": {"d": [3]}}


@pytest.mark.parametrize(("mutation", "name"), [(json_structure, "run"), (parquet_structure, "record")])
def test_a_mutated_structure_is_mostly_one_that_can_be_parsed(mutation, name):
    seed = TARGETS[name].seeds()[0]
    changed = [mutation(seed, random.Random(number)) for number in range(40)]
    assert len(set(changed)) > 30
    starts = {"run": (b"{", b"[", b'"'), "record": (b"PAR1",)}[name]
    assert sum(data.startswith(starts) for data in changed) > 20


def refuse_everything(data: bytes) -> None:
    raise VideoError("clip.mp4: no")


def refuse_without_a_name(data: bytes) -> None:
    raise VideoError("no")


def crash(data: bytes) -> None:
    raise ZeroDivisionError("a crash that nobody documented")


def die(data: bytes) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGABRT)


@pytest.mark.parametrize(
    ("read", "finding"),
    [
        (refuse_everything, None),
        (refuse_without_a_name, "input 0: AssertionError: clip.mp4 is not named: no"),
        (crash, "input 0: ZeroDivisionError"),
        (die, "died of signal 6"),
    ],
)
def test_a_search_ends_at_the_first_undocumented_end_and_keeps_its_input(tmp_path, monkeypatch, read, finding):
    monkeypatch.setitem(TARGETS, "video", replace(TARGETS["video"], read=read, seeds=lambda: [b"seed"]))
    monkeypatch.setattr("benchmarks.fuzz.search._seeds_of", lambda name: (b"seed",))
    report = fuzz("video", 0.5, seed=0, folder=tmp_path)
    assert (finding or "") in (report.finding or "")
    assert (report.finding is None) == (finding is None)
    kept = list(tmp_path.iterdir())
    assert [str(file) for file in kept] == ([report.saved] if finding else [])
    assert finding is not None or report.outcomes["VideoError"] == report.inputs > 0
