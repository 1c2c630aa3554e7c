"""Feeds mutated inputs to what reads strangers' files: `python -m benchmarks.fuzz video --seconds 600`.

Three readers: the job spec, motion banks, and the video reader. Each input is a sound file with a few changes: bits,
bytes, pieces cut out, doubled or taken from another file, and values of its structure put in the place of others. An
input that leads to a message not heard before is mutated further, so that the search goes on where something happened.

Reading may succeed or raise the reader's documented error. The first input that does anything else ends the search
and is saved: another exception, a process that dies, 20 seconds of processor time, a gigabyte of memory. The work is
done in a child process, and input N of a seed is always the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml

from ditflow.artifact import ArtifactError, sealed
from ditflow.bank import BankHeader, MotionBank
from ditflow.types import TokenGrid
from ditflow.video import VideoError, read_video
from jobs.spec import PRESETS, SpecError, load_spec
from jobs.yaml12 import Dumper, Loader
from pipeline.job import References
from pipeline.stages.read import bounded_memory

CPU_SECONDS = 20
WALL_SECONDS = 600
"""Of one input: a machine with other work to do may give a process a hundredth of its time."""
MEMORY_BYTES = 2**30
MOST_SEEDS = 300
LARGEST_SEED = 60_000
Mutation = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """One reader: what it reads, what it does, and the one error that it may raise."""

    name: str
    seeds: Callable[[], list[bytes]]
    mutations: Sequence[Mutation]
    read: Callable[[bytes], Any]
    documented: type[Exception]
    ending: str


@dataclass
class Report:
    """How a search went; `finding` is what ended it early."""

    target: str
    inputs: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    """Messages that differ in more than numbers and quoted values."""
    seconds: float = 0.0
    finding: str | None = None
    saved: str | None = None


# ------------------------------------------------------------------------------------------- mutations of bytes

_INTERESTING = (0, 1, 2, 7, 8, 127, 128, 255, 256, 4096, 65535, 1 << 20, 1 << 24, 1 << 26, 2**31 - 1, 2**31, 2**32 - 1)


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(data: bytes, rng: random.Random) -> bytes:
    place, count = _piece(data, rng, 16)
    return data[:place] + rng.randbytes(count) + data[place + count :]


def set_number(data: bytes, rng: random.Random) -> bytes:
    """A count, size or offset of another magnitude, in either byte order."""
    packed = struct.pack(rng.choice("<>") + "I", rng.choice(_INTERESTING))[: rng.choice((1, 2, 4))]
    place = rng.randrange(len(data) + 1)
    return data[:place] + packed + data[place + len(packed) :]


def set_number_of_box(data: bytes, rng: random.Random) -> bytes:
    """The same, close behind a name of four letters: the fields of an mp4 or avi."""
    names = [match.end() for match in re.finditer(rb"[A-Za-z]{3}[A-Za-z0-9]", data)]
    if not names:
        return data
    place = rng.choice(names) + 4 * rng.randrange(-2, 8)
    packed = struct.pack(rng.choice("<>") + "I", rng.choice(_INTERESTING))
    return data[: max(0, place)] + packed + data[max(0, place) + 4 :]


def cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    place, count = _piece(data, rng, 4096)
    return data[:place] + data[place + count :]


def double(data: bytes, rng: random.Random) -> bytes:
    place, count = _piece(data, rng, 4096)
    return data[: place + count] + data[place : place + count] * rng.choice((1, 2, 100)) + data[place + count :]


def _piece(data: bytes, rng: random.Random, most: int) -> tuple[int, int]:
    place = rng.randrange(len(data) + 1)
    return place, rng.randint(0, min(most, len(data) - place))


BYTES: tuple[Mutation, ...] = (flip_bits, set_bytes, set_number, cut_off, cut_out, double)


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one input and the end of another."""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


# --------------------------------------------------------------------------------------- mutations of structures

_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", " ",
    "auto", "none", "\0", "a" * 10_000, "../../x", "s3://", "file://", "{}", "é🐆\u202e", "\ud800", "2024-13-45", [],
    [[]], {}, {"": ""}, [None], [1, "a", None], {"uri": []}, {"a": {"b": {"c": []}}}, list(range(1000)),
)  # fmt: skip


def mutated_value(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """Return a value with one part, somewhere within it, replaced, renamed, doubled or dropped."""
    if isinstance(value, dict) and value and rng.random() < 0.9 - depth / 20:
        key = rng.choice([*value])
        return _mutated_mapping(dict(value), key, rng, depth)
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        part = mutated_value(value[place], rng, depth + 1)
        return value[:place] + [part] * rng.choice((0, 1, 1, 1, 2, 50)) + value[place + 1 :]
    return rng.choice(_ODD)


def _mutated_mapping(value: dict[Any, Any], key: Any, rng: random.Random, depth: int) -> dict[Any, Any]:
    kind = rng.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1:
        value[rng.choice(("", "x", 5, None, True, str(key) + "s", str(key)[1:]))] = value.pop(key)
    elif kind == 2:
        value[key] = value[rng.choice([*value])]
    else:
        value[key] = mutated_value(value[key], rng, depth + 1)
    return value


# ---------------------------------------------------------------------------------------------------- the spec


def spec_seeds() -> list[bytes]:
    texts = [file.read_bytes() for file in sorted(PRESETS.glob("*.yaml"))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.yaml"
        resolved = []
        for text in texts:
            file.write_bytes(text)
            with suppress(SpecError):  # its model is not on this machine
                resolved.append(load_spec(file).yaml.encode())
    return [*texts, *resolved]


def spec_structure(data: bytes, rng: random.Random) -> bytes:
    try:
        values = yaml.load(data, Loader)
    except Exception:
        return flip_bits(data, rng)
    for _ in range(rng.choice((1, 1, 2, 5))):
        values = mutated_value(values, rng)
    try:
        text = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=rng.random() < 0.5)
        return text.encode(errors="replace")
    except (yaml.YAMLError, RecursionError):
        return data


_TOKENS = (
    b": ", b"- ", b"\n", b"  ", b"\t", b"#", b"&a ", b"*a", b"<<: *a\n", b"!!python/name:os.system ", b"!!binary ",
    b"!!timestamp ", b"!!set ", b"!!int ", b"!!float ", b"!!bool ", b"!!null ", b"!x ", b"? ", b"| ", b"> ", b"~",
    b"%YAML 9.9\n", b"---\n", b"...\n", b"[", b"]", b"{", b"}", b",", b"'", b'"', b'"\\ud800"', b'"\\0"', b"0x",
    b"1e999", b".inf", b".nan", b"2024-13-45", b"1:99:99", b"9" * 5000, b"[" * 60, b"\xff", b"\xef\xbb\xbf",
    b"\x00", b"\xc2\x85", b"\xe2\x80\xa8",
)  # fmt: skip


def spec_tokens(data: bytes, rng: random.Random) -> bytes:
    """Signs of YAML where they may not be."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(data) + 1)
        data = data[:place] + rng.choice(_TOKENS) + data[place + rng.choice((0, 0, 1)) :]
    return data


def read_spec(data: bytes) -> None:
    file = Path(tempfile.gettempdir()) / f"fuzz-{os.getpid()}.yaml"
    file.write_bytes(data)
    try:
        with patch("jobs.spec.local_model", lambda job: job.model.path):  # models on object storage are not fetched
            load_spec(file)
    finally:
        file.unlink()


# ---------------------------------------------------------------------------------------------------- the bank


def bank_seeds() -> list[bytes]:
    provenance = {"size": [9, 32, 32], "fps": 8.0, "reference_uri": "file:///a.mp4", "seed": 1}
    method = {"name": "ditflow", "blocks": [1], "learning_rate": [0.002, 0.001]}
    losses = ((1.0, 0.5), (0.4, 0.3))
    header = BankHeader(
        "mini", "0123", (3, 2, 2), 4, (999, 749), method, 3, "a ball", losses, tags=("pan",), provenance=provenance
    )
    rotary = [{part: torch.ones(12, 2) for part in ("query_cos", "query_sin", "key_cos", "key_sin")} for _ in "ab"]
    additive = [{"additive": torch.ones(12, 4)} for _ in "ab"]
    coordinates = [{"query": torch.ones(12, 3), "key": torch.ones(12, 3)} for _ in "ab"]
    latents, flow = torch.zeros(1, 3, 2, 4, 4), torch.ones(2, 4, 2, dtype=torch.int8)
    banks = (
        MotionBank.of(header, rotary, latents, flow),
        MotionBank.of(header, additive),
        MotionBank.of(header, coordinates),
    )
    return [bank.to_bytes() for bank in (*banks, banks[0].compacted(0.1))]


def bank_structure(data: bytes, rng: random.Random) -> bytes:
    """Another header of safetensors, or another one of ours within it, of the right length and mostly with its hash."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        if rng.random() < 0.7:
            ours = mutated_value(json.loads(header["__metadata__"]["ditflow"]), rng)
            header["__metadata__"]["ditflow"] = rng.choice((json.dumps(ours), json.dumps(ours), repr(ours), "[" * 5000))
        else:
            header = mutated_value(header, rng)
        text = json.dumps(header).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return flip_bits(data, rng)
    return _mostly_sealed(len(text).to_bytes(8, "little") + text + data[8 + length :], rng)


def _mostly_sealed(data: bytes, rng: random.Random) -> bytes:
    """With the hashes of what it is now: nothing gets past a wrong one."""
    return sealed(data) if rng.random() < 0.8 else data


def bank_values(data: bytes, rng: random.Random) -> bytes:
    """Bits of the tensors, or of anything else, with the hashes that they have then."""
    return _mostly_sealed(flip_bits(data, rng), rng)


_TYPES = (b"F64", b"F32", b"F16", b"BF16", b"I64", b"BOOL", b"F8_E4M3", b"F8_E8M0", b"F4", b"C64", b"U64", b"X")


def bank_types(data: bytes, rng: random.Random) -> bytes:
    """A tensor of another type, its length as it was."""
    mutated = data.replace(b'"F32"', (b'"' + rng.choice(_TYPES) + b'"').ljust(5), rng.randint(1, 9))
    return _mostly_sealed(mutated, rng)


def read_bank(data: bytes) -> None:
    bank = MotionBank.from_bytes(data)
    for step in range(bank.guided_steps):
        assert {len(change) for change in bank.change(step).values()} == {TokenGrid(*bank.header.grid).tokens}


# --------------------------------------------------------------------------------------------------- the video


def video_seeds() -> list[bytes]:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from hostile import CORPUS

    built = (hostile.build() for hostile in CORPUS.values())
    return [data for data in built if len(data) <= LARGEST_SEED]


def read_any_video(data: bytes) -> None:
    with bounded_memory(References.max_memory_bytes):
        read_video(data, frames=9, height=32, width=32, stride=2)


TARGETS = {
    target.name: target
    for target in (
        Target("spec", spec_seeds, (*BYTES, spec_structure, spec_structure, spec_tokens), read_spec, SpecError, "yaml"),
        Target(
            "bank",
            bank_seeds,
            (*BYTES, bank_structure, bank_structure, bank_structure, bank_types, bank_values),
            read_bank,
            ArtifactError,
            "safetensors",
        ),
        Target("video", video_seeds, (*BYTES, set_number_of_box, set_number_of_box), read_any_video, VideoError, "bin"),
    )
}


# -------------------------------------------------------------------------------------------------- the search


class Search:
    """Makes one input after the other, reads it, and mutates those further that led to something new."""

    def __init__(self, target: Target, seed: int):
        self._target, self._seed = target, seed
        self._seeds, self._heard = list(_seeds_of(target.name)), set[str]()

    def input(self, number: int) -> bytes:
        """Return an input; the same for the same number, as long as those before it were read."""
        rng = random.Random(f"{self._target.name} {self._seed} {number}")
        # Half of the time one that is sound: what was mutated again and again is refused at its first byte.
        data = rng.choice(rng.choice((_seeds_of(self._target.name), self._seeds)))
        if rng.random() < 0.1:
            data = splice(data, rng.choice(self._seeds), rng)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            data = rng.choice(self._target.mutations)(data, rng)
        return data

    def read(self, data: bytes) -> str:
        """Read an input and return how that ended: ok, or the documented error. Raises any other error."""
        try:
            self._target.read(data)
        except self._target.documented as error:
            self._learn(f"{type(error).__name__} {error}", data)
            return type(error).__name__
        self._learn("ok", data)
        return "ok"

    @property
    def messages(self) -> int:
        """How many different messages were heard."""
        return len(self._heard)

    def _learn(self, message: str, data: bytes) -> None:
        shape = re.sub(r"\d+|'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "", message)[:200]
        if shape not in self._heard and len(self._seeds) < MOST_SEEDS and len(data) <= LARGEST_SEED:
            self._seeds.append(data)
        self._heard.add(shape)


@cache
def _seeds_of(target: str) -> tuple[bytes, ...]:
    return tuple(TARGETS[target].seeds())


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> Report:
    """Search for so long in a child process; what ends it early is in the report, and its input in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    current = folder / f"{name}-{seed}.{TARGETS[name].ending}"
    report, started = Report(name), time.monotonic()
    _seeds_of(name)  # made once, before the child is
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(TARGETS[name], seconds, seed, current, writer)
    os.close(writer)
    with os.fdopen(reader) as lines:
        for line in _watched(lines, child):
            told = json.loads(line)
            report.inputs, report.messages = told["inputs"], told["messages"]
            report.outcomes = told["outcomes"]
            report.finding = told.get("finding")
    _, status = os.waitpid(child, 0)
    report.seconds = round(time.monotonic() - started, 1)
    if os.WIFSIGNALED(status) and report.finding is None:
        report.finding = _DEATHS.get(os.WTERMSIG(status), f"the process died of signal {os.WTERMSIG(status)}")
    if report.finding is None:
        current.unlink(missing_ok=True)
    else:
        report.saved = str(current)
    return report


_DEATHS: dict[int, str] = {
    signal.SIGPROF: f"one input took more than {CPU_SECONDS} seconds of processor time",
    signal.SIGKILL: f"one input took more than {WALL_SECONDS} seconds without doing anything, or the memory of all",
}


def _watched(lines: Any, child: int) -> Iterator[str]:
    """Yield what the child tells; end it if it says nothing for too long."""
    while True:
        previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.alarm(WALL_SECONDS)
        line = lines.readline()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        if not line:
            return
        yield line


def _work(target: Target, seconds: float, seed: int, current: Path, writer: int) -> None:
    """Read inputs until the time is over or one of them does what it may not; never returns."""
    search, number, finding = Search(target, seed), 0, None
    ends, base, told = time.monotonic() + seconds, _peak_bytes(), time.monotonic()
    counts: Counter[str] = Counter()
    with os.fdopen(writer, "w", buffering=1) as out:
        while finding is None and time.monotonic() < ends:
            data = search.input(number)
            current.write_bytes(data)
            number += 1
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                with bounded_memory(2 * MEMORY_BYTES):
                    counts[search.read(data)] += 1
            except BaseException as error:
                finding = f"input {number - 1}: {type(error).__name__}: {error}"[:2000]
            signal.setitimer(signal.ITIMER_PROF, 0)
            if finding is None and _peak_bytes() - base > MEMORY_BYTES:
                finding = f"input {number - 1}: it took {(_peak_bytes() - base) >> 20} MiB of memory"
            if finding or time.monotonic() - told > 1 or time.monotonic() >= ends:
                told = time.monotonic()
                about = {"inputs": number, "messages": search.messages, "outcomes": counts, "finding": finding}
                out.write(json.dumps(about) + "\n")
    os._exit(0)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Search for the time given, and say what came."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="which readers; all, if none is named")
    parser.add_argument("--seconds", type=float, default=600, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/fuzz"), help="where an offending input is saved")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a mutated spec may allow downloads
    _silence()
    findings = 0
    for name in asked.targets or TARGETS:
        report = fuzz(name, asked.seconds, asked.seed, asked.folder)
        print(json.dumps(asdict(report)), flush=True)
        findings += report.finding is not None
    sys.exit(findings)


def _silence() -> None:
    """FFmpeg's log has nothing to say of files that are meant to be broken."""
    import av

    av.logging.set_level(av.logging.PANIC)


if __name__ == "__main__":
    main()
