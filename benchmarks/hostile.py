"""What hostile inputs come to, and at what cost: `python -m benchmarks.hostile` with tests/ on the path.

Every file of the corpus is read as a job's reader reads it, each in a process of its own that has loaded what a Ray
worker loads; names and prompts are planned; specs are loaded and planned. What came is what the manifest's row says,
or the refusal before anything starts. Peaks count the whole process, libraries included. Figures go to
benchmarks/results/hostile.json.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from hostile import CORPUS, NAMES, PROMPTS, READ, SPECS, mp4

from ditflow.media.video import read_video
from pipeline.faults import classify
from pipeline.job import References
from pipeline.stages.read import bounded_memory

ROOT = Path(__file__).parents[1]
MESSAGE_CHARACTERS = 300


@dataclass(frozen=True)
class Came:
    """What came of one input. status: ok, failed (a row of the manifest) or refused (nothing starts)."""

    input: str
    bytes: int
    status: str
    error_kind: str | None = None
    error_class: str | None = None
    message: str = ""
    seconds: float = 0.0
    """Of the processor."""
    wall_seconds: float = 0.0
    peak_bytes: int = 0


def hostile_table() -> list[dict[str, Any]]:
    """Return what came of every input, in a process that has loaded nothing else."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.hostile", "--rows"], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    )
    done.check_returncode()
    return [json.loads(line) for line in done.stdout.splitlines()]


# --------------------------------------------------------------------------------------------------- what is done


def inputs() -> Iterator[tuple[str, bytes, Callable[[bytes], str]]]:
    """Yield every input: what it is called, its bytes, and what is to be done with them."""
    for name, hostile in CORPUS.items():
        yield f"file: {name}", hostile.build(), partial(_read, {**READ, **hostile.ask})
    for number, name in enumerate(NAMES):
        yield f"name: {name!r}", mp4() + bytes(number), partial(_read_named, name)
    for prompt in PROMPTS:
        yield f"prompt: {_shortened(prompt)}", prompt.encode(), _plan_prompt
    for name, spec in SPECS.items():
        yield f"spec: {name}", spec.build().encode(), _plan_spec


def _read(ask: dict[str, Any], data: bytes) -> str:
    with bounded_memory(References.max_memory_bytes):
        clip = read_video(data, name="the reference", **ask)
    return f"{len(clip.frames)} frames"


def _read_named(name: str, data: bytes) -> str:
    from pipeline.store import list_uris, read_uri

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        [uri] = list_uris(folder, "*.mp4")
        return _read(READ, read_uri(uri))


def _plan_prompt(data: bytes) -> str:
    """Through a table, which can hold every text."""
    from hostile import spec

    from jobs.spec import load_spec
    from pipeline.plan import make_plan

    with tempfile.TemporaryDirectory() as folder:
        table, file = Path(folder) / "prompts.jsonl", Path(folder) / "job.yaml"
        table.write_text(json.dumps({"prompt": data.decode()}) + "\n")
        file.write_text(spec(f"{{uri: {table}}}").replace("OUT", f"{folder}/out"))
        ready = load_spec(file)
        [row] = make_plan(ready.job, ready.model.revision).todo
    assert row.prompt == data.decode()
    return "a row, the prompt unchanged"


def _plan_spec(data: bytes) -> str:
    from jobs.spec import load_spec
    from pipeline.plan import make_plan

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.yaml"
        file.write_bytes(data.replace(b"uri: OUT", f"uri: {folder}/out".encode()))
        started = time.process_time()
        ready = load_spec(file)
        loaded = time.process_time()
        plan = make_plan(ready.job, ready.model.revision)
        seconds = f"loaded in {loaded - started:.1f} s, planned in {time.process_time() - loaded:.1f} s"
        return f"{len(plan.todo)} rows, {seconds}"


# ------------------------------------------------------------------------------------------------- how it is measured


def measured(name: str, data: bytes, work: Callable[[bytes], str]) -> Came:
    """Do the work in a forked process and return what came of it, and what it cost."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            json.dump(asdict(_came(name, data, work)), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        text = told.read()
    _, status = os.waitpid(child, 0)
    return Came(**json.loads(text)) if text else Came(name, len(data), "died", message=f"its process: status {status}")


def _came(name: str, data: bytes, work: Callable[[bytes], str]) -> Came:
    error_kind = error_class = None
    started, wall = time.process_time(), time.perf_counter()
    try:
        status, message = "ok", work(data)
    except Exception as error:
        fault = classify(error)
        status, error_kind, error_class, message = "failed", fault.kind, fault.error_class, fault.message
    if error_class in ("SpecError", "PlanError"):
        status, error_kind = "refused", None
    return Came(
        name,
        len(data),
        status,
        error_kind,
        error_class,
        _shortened(_without_folder(message), MESSAGE_CHARACTERS),
        round(time.process_time() - started, 3),
        round(time.perf_counter() - wall, 3),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _without_folder(message: str) -> str:
    """Return a message without the temporary folder in which the input lay."""
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", message)


def _shortened(text: str, most: int = 40) -> str:
    shown = repr(text)[1:-1]
    return shown if len(shown) <= most else f"{shown[:most]}... ({len(text)} characters)"


def _print_rows() -> None:
    """Print what came as JSON lines; every input's process is a copy of this one, which has what a worker has."""
    import av

    import jobs.spec  # noqa: F401
    import pipeline.graph  # noqa: F401

    av.logging.set_level(av.logging.PANIC)
    for name, data, work in inputs():
        print(json.dumps(asdict(measured(name, data, work))), flush=True)


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'input':48}{'bytes':>10} {'came':8}{'kind':10}{'MB':>6}{'s':>7}  message")
    for row in rows:
        kind, peak = row["error_kind"] or "", row["peak_bytes"] / 1e6
        line = f"{row['input']:48.47}{row['bytes']:>10} {row['status']:8}{kind:10}{peak:6.0f}{row['seconds']:7.2f}"
        print(f"{line}  {row['error_class'] or ''} {row['message']}"[:200])
    print(f"\nlargest peak: {max(row['peak_bytes'] for row in rows) / 1e6:.0f} MB")


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table for people: every input, and its row or its message."""
    lines = ["# What becomes of hostile input", "", "Made by `python -m benchmarks.reliability --parts hostile`.", ""]
    lines += ["| input | comes to | peak MB | |", "|---|---|---|---|"]
    for row in rows:
        came = " ".join(filter(None, [row["status"], row["error_kind"], row["error_class"]]))
        cells = [row["input"], came, f"{row['peak_bytes'] / 1e6:.0f}", row["message"]]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    """A text that is no markup, in a cell of a table."""
    return html.escape(text).replace("|", "&#124;").replace("\n", " ").replace("*", "&#42;").replace("_", "&#95;")


def main() -> None:
    """Measure all, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", action="store_true", help="print JSON lines only")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.rows:
        _print_rows()
        return
    # Not above: what it loads would count as the reader's memory.
    from benchmarks.bench import RESULTS, command, machine, write_json

    rows = hostile_table()
    print_table(rows)
    about = {"command": command(), "measured": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    write_json(asked.out or RESULTS / "hostile.json", {**about, "rows": rows})


if __name__ == "__main__":
    main()
