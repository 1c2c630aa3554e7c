"""What becomes of a job when everything fails: `python -m benchmarks.reliability` with tests/ on the path.

`make chaos` runs it. Every part runs real jobs of the embedded model against a real S3 server (OpenStack Swift on
loopback), or plans against a manifest of a million rows. Figures go to benchmarks/results/reliability.json, each part
with the command that measured it; parts that are not run again keep theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from chaos.storm import Storm, draw_kills
from running import run, write_spec
from swift.server import SwiftServer

from benchmarks.bench import RESULTS, command, machine, write_json
from benchmarks.fuzz.targets import TARGETS
from benchmarks.hostile import as_markdown, hostile_table
from jobs.spec import load_spec
from pipeline.job import Job, Output
from pipeline.manifest import MERGED, Manifest, parquet_bytes
from pipeline.plan import make_plan
from pipeline.record import SCHEMA, make_row, rows_to_table
from pipeline.run import ROWS_REMEMBERED, connect
from pipeline.status import Watch
from pipeline.store import Store

CHAOS_ROWS, CHAOS_KILLS, CHAOS_SEED = 160, 35, 0
STORM_S, STORM = 60.0, {"status": 503, "rate": 0.5}
PLANNED_ROWS, ROWS_PER_FILE, RESUMED_ROWS = 1_000_000, 50_000, 10_000
FUZZ_S = 600.0


# ---- kills


def chaos(folder: Path, swift: SwiftServer) -> dict[str, Any]:
    """A job under kills of every kind, two of its rows poison, against the same job in peace."""
    connect()
    storm = Storm(folder, swift, CHAOS_ROWS, CHAOS_SEED)
    report = storm.run(draw_kills(CHAOS_KILLS, CHAOS_ROWS, CHAOS_SEED))
    calm = storm.undisturbed()
    told = {**asdict(report), "kills": dict(report.kills)}
    outputs = told.pop("outputs")
    return {**told, "outputs identical to an undisturbed run's": outputs == calm, "outputs compared": len(calm)}


# ---- storage


def storm_of_503(folder: Path, swift: SwiftServer) -> dict[str, Any]:
    """A job whose storage answers every second request with 503 for a minute."""
    connect()
    spec = _job_on(swift, folder, seeds=list(range(12)))
    swift.faults.set([STORM])
    timer = threading.Timer(STORM_S, swift.faults.clear)
    counts: Counter[str] = Counter()
    started = time.monotonic()
    timer.start()
    watcher = threading.Thread(target=_keep_counts, args=(swift, counts, started + STORM_S - 1), daemon=True)
    watcher.start()
    _, tally, _ = run(spec)
    timer.join()
    seconds = time.monotonic() - started
    return {**asdict(tally), "requests in the storm": counts["requests"], "503s": counts["503"], "seconds": seconds}


def _keep_counts(swift: SwiftServer, counts: Counter[str], until: float) -> None:
    while time.monotonic() < until:
        time.sleep(1)
        with suppress(OSError, ValueError):
            found = swift.faults.counts()
            if found["503"]:
                counts.clear()
                counts.update(found)


def refusal(folder: Path, swift: SwiftServer) -> dict[str, Any]:
    """A job whose storage refuses everything from its second row on: seconds until it stops, and its message."""
    spec = _job_on(swift, folder, seeds=list(range(100)))
    driver = subprocess.Popen([sys.executable, "-m", "jobs", "run", str(spec)], stderr=subprocess.PIPE, text=True)
    manifest = Manifest(Store(load_spec(spec).job.output.uri))
    while len(manifest.statuses()) < 2:
        time.sleep(0.2)
    swift.faults.set([{"status": 403}])
    refused = time.monotonic()
    _, errors = driver.communicate()
    seconds = time.monotonic() - refused
    swift.faults.clear()
    messages = [line for line in errors.splitlines() if line.startswith("error")]
    return {"seconds until it stopped": seconds, "exit status": driver.returncode, "messages": messages}


def _job_on(swift: SwiftServer, folder: Path, **changes: Any) -> Path:
    from jobs.clips import render_clips

    render_clips(folder / "references", count=1, seed=0)
    bucket = f"s3://{swift.new_bucket()}"
    clip = next((folder / "references").glob("*.mp4"))
    stored = Store(f"{bucket}/references").put(clip.name, clip)
    size = {"frames": 9, "height": 32, "width": 32, "stride": 2}
    return write_spec(folder, references={"uri": stored.uri, **size}, output={"uri": f"{bucket}/out"}, **changes)


# ---- planning


def planning(folder: Path, swift: SwiftServer) -> dict[str, Any]:
    """Planning a job of a million rows against a manifest that has them all, and memory, in a process of its own."""
    job = _large_job(folder, PLANNED_ROWS)
    _record(job.store(), _ids(job))
    return _alone("plan", folder, PLANNED_ROWS)


def plan_once(folder: Path, rows: int) -> dict[str, Any]:
    """Plan the large job in `folder`; return rows, seconds and peak memory in MiB."""
    job = _large_job(folder, rows)
    before, started = _peak_mib(), time.perf_counter()
    plan = make_plan(job, "revision")
    seconds = time.perf_counter() - started
    per_million = seconds / rows * 1e6
    return {
        "rows": plan.total,
        "ended": plan.ended,
        "seconds": round(seconds, 2),
        "peak MiB": _peak_mib(),
        "peak MiB before": before,
        "seconds for ten million, projected": round(10 * per_million, 1),
    }


def watching(folder: Path, swift: SwiftServer) -> dict[str, Any]:
    """What `ditflow status` reads, in a process of its own: of a million rows, and of ten thousand before merging."""
    merged, single = _large_job(folder, PLANNED_ROWS), _large_job(folder, RESUMED_ROWS)
    _record(merged.store(), _ids(merged))
    _commit(Manifest(single.store()), _ids(single))
    return {"merged": _alone("look", folder, PLANNED_ROWS), "single": _alone("look", folder, RESUMED_ROWS)}


def look_once(folder: Path, rows: int) -> dict[str, Any]:
    """Look at the large job in `folder`, and once more; return rows, seconds and peak memory in MiB."""
    watch, before, started = Watch(_large_job(folder, rows).store()), _peak_mib(), time.perf_counter()
    status = watch.look()
    first, started = time.perf_counter() - started, time.perf_counter()
    watch.look()
    return {
        "rows": sum(status.counts.values()),
        "seconds": round(first, 2),
        "seconds, again": round(time.perf_counter() - started, 2),
        "peak MiB": _peak_mib(),
        "peak MiB before": before,
    }


def resume(folder: Path, swift: SwiftServer) -> dict[str, Any]:
    """What a job of ten thousand rows, all but none of them ended, costs before the first row that is left begins."""
    job = _large_job(folder, RESUMED_ROWS)
    ids, manifest = _ids(job), Manifest(job.store())
    remembered = len(ids) - ROWS_REMEMBERED + 1  # as a run leaves them that is killed at the worst moment
    for some in (ids[:remembered], ids[remembered:]):
        if some[0] != ids[0]:
            manifest.remember()
        _commit(manifest, some)
    started = time.perf_counter()
    plan = make_plan(job, "revision")
    single = time.perf_counter() - started
    Manifest(job.store()).compact()
    started = time.perf_counter()
    make_plan(job, "revision")
    merged = time.perf_counter() - started
    return {"rows": plan.total, "seconds, after a kill": round(single, 3), "seconds, merged": round(merged, 3)}


def _large_job(folder: Path, rows: int) -> Job:
    spec = load_spec(write_spec(folder, method={"name": "none"}, references={"frames": 9, "height": 32, "width": 32}))
    prompts = tuple(f"prompt {number}" for number in range(1000))
    seeds = tuple(range(rows // len(prompts)))
    return replace(spec.job, prompts=prompts, seeds=seeds, output=Output(str(folder / f"large-{rows}")))


def _ids(job: Job) -> list[str]:
    return [row.row_id for row in make_plan(job, "revision").todo]


def _ended(row_id: str) -> dict[str, Any]:
    output = {"output_uri": f"s3://bucket/videos/{row_id}.mp4", "output_sha256": "0" * 64, "output_bytes": 1}
    return make_row(row_id=row_id, status="ok", prompt="a red ball", losses=[1.0] * 50, spec_json="{}", **output)


def _commit(manifest: Manifest, ids: list[str]) -> None:
    """Write rows as actors do, each into a file of its own."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda row_id: manifest.commit(_ended(row_id)), ids))


def _record(store: Store, ids: list[str]) -> None:
    """Write rows as compaction would have left them."""
    one = rows_to_table([_ended("row")])
    for start in range(0, len(ids), ROWS_PER_FILE):
        part = ids[start : start + ROWS_PER_FILE]
        table = one.take(pa.array([0] * len(part))).set_column(0, SCHEMA.field("row_id"), pa.array(part, pa.string()))
        store.put(f"manifest/{MERGED}{start:012d}.parquet", parquet_bytes(table))


def _alone(name: str, folder: Path, rows: int) -> dict[str, Any]:
    """Return what one of ALONE tells in a process of its own."""
    arguments = [sys.executable, "-m", "benchmarks.reliability", "--alone", name, str(folder), str(rows)]
    return json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _peak_mib() -> int:
    """This program's own: what getrusage tells of a new process includes the one that started it."""
    peak = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert peak is not None, "Linux tells it"
    return int(peak[1]) // 1024


# ---- hostile input


def hostile(folder: Path, swift: SwiftServer) -> list[dict[str, Any]]:
    """Every kind of hostile input: its row or its message, and the reader's memory."""
    rows = hostile_table()
    (RESULTS / "hostile.md").write_text(as_markdown(rows))
    return rows


def fuzzing(folder: Path, swift: SwiftServer) -> list[dict[str, Any]]:
    """Feed mutated files to every reader of strangers' files, ten minutes each, side by side."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuzz", target, "--seconds", str(FUZZ_S), "--folder", str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for target in TARGETS
    ]
    return [json.loads(reader.communicate()[0]) for reader in running]


# ---- the command

PARTS: dict[str, Callable[[Path, SwiftServer], Any]] = {
    "chaos": chaos,
    "storm": storm_of_503,
    "refusal": refusal,
    "planning": planning,
    "watching": watching,
    "resume": resume,
    "hostile": hostile,
    "fuzzing": fuzzing,
}
ALONE = {"plan": plan_once, "look": look_once}


def main() -> None:
    """Measure the parts that are asked for and write them among the others."""
    asked = _parser().parse_args()
    if asked.alone is not None:
        name, folder, rows = asked.alone
        print(json.dumps(ALONE[name](Path(folder), int(rows))))
        return
    results = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder, SwiftServer(_made(Path(folder) / "swift")) as swift:
        os.environ.update(swift.environment)
        for name in asked.parts:
            figures = PARTS[name](_made(Path(folder) / name), swift)
            about = {"command": command(), "measured": datetime.now(UTC).isoformat(timespec="seconds")}
            results[name] = {**about, "machine": machine(), "figures": figures}
            write_json(asked.out, results)
            print(name, json.dumps(figures, indent=1, default=str))
    ray.shutdown()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.json")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
