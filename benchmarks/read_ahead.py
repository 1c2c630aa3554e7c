"""How far reading runs ahead of the rows that are made: `python -m benchmarks.read_ahead NAME`.

Runs a job of many tiny references on a Ray of two CPUs through the real graph. Reading and extraction are real; where a
model would work in the last stage, it sleeps, as with a GPU that leaves the CPUs alone. NAME is the key of the figures
in benchmarks/results/read-ahead.json: `before` and `after` keep one run each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import ray
import yaml

import pipeline.graph
from benchmarks.bench import RESULTS, command, machine, write_json
from ditflow.media.video import encode_video
from jobs.spec import load_spec
from pipeline.job import Job
from pipeline.plan import WorkRow, make_plan
from pipeline.run import run_plan
from pipeline.stages.generate import FinishRow
from pipeline.stages.read import Row, read_reference

MINUTE_S = 60.0


def counted_read(row: Row, job: Job) -> Row:
    """Read a reference, and leave a file that says when."""
    folder = _marks(job)
    folder.mkdir(exist_ok=True)
    (folder / row["motion_id"]).write_text(str(time.time()))
    return read_reference(row, job)


class SleepingRow(FinishRow):
    """Ends a row after some seconds of sleep, and says how many references had been read by then."""

    def __call__(self, row: Row) -> Row:
        started = time.perf_counter()
        time.sleep(float(self._job.name))
        read = len(list(_marks(self._job).iterdir()))
        ended = super().__call__(row)
        assert ended["status"] == "ok", ended
        return {**ended, "error_message": str(read), "seconds_total": time.perf_counter() - started}

    def _make(self, work: WorkRow, row: Row) -> dict[str, Any]:
        stored = self._desk.store.put(self._job.key("videos", f"{work.row_id}.mp4"), b"no video")
        return {"output_uri": stored.uri, "output_sha256": stored.sha256, "output_bytes": stored.bytes}

    @property
    def _worker(self) -> None:
        return None


def _marks(job: Job) -> Path:
    return Path(job.output.uri.removeprefix("file://")) / "read"


def measure(folder: Path, references: int, seconds: float, actors: int) -> dict[str, Any]:
    """Run the job and return how far reading was ahead, and how long the last stage's actors waited."""
    _write_references(folder / "references", references)
    spec = load_spec(_spec(folder, seconds, actors))
    plan = make_plan(spec.job, spec.model.revision)
    rows: list[tuple[float, Row]] = []
    begun = time.time()
    run_plan(spec.job, plan, spec.model.revision, spec.yaml, lambda row: rows.append((time.time(), row)))
    first_read = min(float(mark.read_text()) for mark in _marks(spec.job).iterdir())
    busy: Counter[int] = Counter()
    for ended, row in rows:
        within = min(ended, first_read + MINUTE_S) - (ended - row["seconds_total"])
        busy[row["process"]] += max(0.0, within)
    return {
        "references": references,
        "seconds of a row": seconds,
        "generating actors": actors,
        "references read when the first row ended": int(rows[0][1]["error_message"]),
        "seconds from the first reference read to the first row": round(rows[0][0] - first_read, 2),
        "idle share of the generating actors in the first minute": round(1 - busy.total() / MINUTE_S / actors, 3),
        "seconds of the whole job": round(rows[-1][0] - begun, 1),
    }


def _write_references(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for seed in range(count):
        frames = np.random.default_rng(seed).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
        (folder / f"{seed:04d}.mp4").write_bytes(encode_video(frames, fps=8.0))


def _spec(folder: Path, seconds: float, actors: int) -> Path:
    spec = {
        "kind": "synthesize",
        "name": str(seconds),
        "references": {"uri": str(folder / "references"), "frames": 9, "height": 32, "width": 32},
        "prompts": ["a red ball moving over the grass"],
        "method": {"name": "ditflow", "guided_steps": 1, "iterations": 1, "loss": {"entries": "all"}},
        "sampling": {"steps": 2},
        "output": {"uri": str(folder / "out")},
        "resources": {"generate": {"actors": actors}},
        "faults": {"max_failures_in_a_row": 10**6},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(spec))
    return file


def main() -> None:
    """Measure once and keep the figures under a name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.read_ahead", description=__doc__.split("\n\n")[0])
    parser.add_argument("name")
    parser.add_argument("--references", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a row in the last stage")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "read-ahead.json")
    asked = parser.parse_args()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    stages = mock.patch.multiple(pipeline.graph, read_reference=counted_read, FinishRow=SleepingRow)
    with stages, TemporaryDirectory(prefix="ra-") as folder:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        figures = measure(Path(folder), asked.references, asked.seconds, asked.actors)
    print(json.dumps(figures, indent=2))
    about = {"command": command(), "machine": machine(), "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    kept = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    write_json(asked.out, {**kept, asked.name: {**about, **figures}})


if __name__ == "__main__":
    main()
