"""What many banks cost: `python -m benchmarks.banks`.

`catalogue` asks for some of thousands of banks, with and without an index, as a user does: a process of its own.
`loads` reuses hundreds of banks on two actors and counts in the manifest how often a bank was read. Figures go to
benchmarks/results/banks.json, each part with the command that measured it; parts that are not run again keep theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import RESULTS, command, machine, write_json
from ditflow import backbones
from ditflow.banks.bank import BankHeader, MotionBank
from ditflow.types import TokenGrid
from jobs.spec import load_spec
from pipeline.manifest import Manifest
from pipeline.plan import make_plan
from pipeline.run import run_plan
from pipeline.store import Store

CATALOGUED, ROUNDS = 2000, 5
REUSED, ACTORS, PROMPTS = 200, 2, 2
WHERE = "mean_displacement > 1 AND loss_final < 0.2 AND list_contains(tags, 'walk')"
SIZE, STEPS = (9, 32, 32), 3


def learned_like(size: tuple[int, int, int], steps: int, guided_steps: int) -> MotionBank:
    """A bank as mini learns it by coordinates, with latents and a flow, of random numbers."""
    backbone = backbones.load("mini")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(backbone.layout.latent_shape(*size), generator=generator)
    grid = backbone.layout.grid(latents.shape)
    start = backbone.positions(grid).zero("coordinates")
    changes = [
        {part: 0.1 * torch.randn(value.shape, generator=generator) for part, value in start.items()}
        for _ in range(guided_steps)
    ]
    header = BankHeader(
        backbone.name,
        backbone.revision,
        (grid.frames, grid.height, grid.width),
        steps,
        tuple(level.timestep for level in backbone.schedule(steps, grid).levels[:guided_steps]),
        backbone.positions(grid).name,
        "coordinates",
        {"name": "ditflow", "optimize": "coordinates"},
        provenance={"size": list(size), "fps": 8.0, "reference_fps": 8.0},
    )
    return MotionBank.from_steps(header, changes, latents, _flow(grid, generator))


def _flow(grid: TokenGrid, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-2, 3, (grid.frames - 1, grid.patches, 2), generator=generator, dtype=torch.int8)


def write_banks(folder: Path, bank: MotionBank, count: int) -> int:
    """Write so many banks, which differ in what the catalogue tells of them; return the bytes of one."""
    folder.mkdir(parents=True)
    for number in range(count):
        losses, tags = ((1.0, number / count),), ("walk",) if number % 3 == 0 else ()
        header = replace(bank.header, prompt=f"a ball, number {number}", losses=losses, tags=tags)
        data = replace(bank, header=header).to_bytes()
        (folder / f"{number:06}.safetensors").write_bytes(data)
    return len(data)


# ---- the catalogue


def catalogue(folder: Path, count: int) -> dict[str, Any]:
    """Seconds of `ditflow bank list --where ...`, wall and CPU: without an index, and then with one."""
    size = write_banks(folder / "banks", learned_like((17, 64, 64), 50, 10), count)
    first, *others = (_listing(folder) for _ in range(ROUNDS + 1))
    return {
        "banks": count,
        "bytes of a bank": size,
        "chosen": others[0]["chosen"],
        "without an index": first,
        "with an index": others,
        "with an index, median wall seconds": sorted(one["wall seconds"] for one in others)[ROUNDS // 2],
        "with an index, median CPU seconds": sorted(one["CPU seconds"] for one in others)[ROUNDS // 2],
    }


def _listing(folder: Path) -> dict[str, Any]:
    before, started = _children_seconds(), time.perf_counter()
    arguments = [sys.executable, "-m", "jobs", "bank", "list", str(folder), "--where", WHERE, "--json"]
    answer = subprocess.run(arguments, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - started
    return {
        "wall seconds": round(wall, 2),
        "CPU seconds": round(_children_seconds() - before, 2),
        "chosen": len(answer.stdout.splitlines()),
    }


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- reuse


def loads(folder: Path, count: int) -> dict[str, Any]:
    """How often each bank was read by each actor of a job that reuses all of them with two prompts."""
    write_banks(folder / "banks", learned_like(SIZE, STEPS, 2), count)
    spec = load_spec(_reuse_spec(folder))
    plan = make_plan(spec.job, spec.model.revision)
    tally = run_plan(spec.job, plan, spec.model.revision, spec.yaml, lambda row: None)
    rows = Manifest(Store(str(folder / "out"))).read(["status", "bank_uri", "bank_loads", "process"]).to_pylist()
    by_actor: Counter[int] = Counter()
    pairs = {(row["bank_uri"], row["process"]) for row in rows}
    for row in rows:
        by_actor[row["process"]] += row["bank_loads"]
    return {
        "banks": count,
        "rows": len(rows),
        "rows ok": tally.ok,
        "actors": len(by_actor),
        "loads by actor": sorted(by_actor.values()),
        "pairs of a bank and an actor that used it": len(pairs),
        "loads per bank and actor that used it": sum(by_actor.values()) / len(pairs),
        "banks that both actors used": len(pairs) - count,
    }


def _reuse_spec(folder: Path) -> Path:
    values = {
        "kind": "reuse",
        "name": "loads",
        "model": {"path": "mini"},
        "banks": {"uri": str(folder / "banks")},
        "prompts": [f"a red ball, take {take}" for take in range(PROMPTS)],
        "method": {"name": "ditflow", "optimize": "coordinates", "guided_steps": 2},
        "sampling": {"steps": STEPS},
        "output": {"uri": str(folder / "out")},
        "resources": {"generate": {"actors": ACTORS}},
    }
    file = folder / "job.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


PARTS: dict[str, tuple[Callable[[Path, int], dict[str, Any]], int]] = {
    "catalogue": (catalogue, CATALOGUED),
    "loads": (loads, REUSED),
}


def main() -> None:
    """Measure the parts that are asked for, and keep the figures of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts; all, if none is named")
    parser.add_argument("--banks", type=int, help="how many, in place of the part's own number")
    parser.add_argument("--out", type=Path, default=RESULTS / "banks.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in options.parts or PARTS:
        measure, count = PARTS[name]
        about = {"command": command(), "machine": machine()}
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), options.banks or count)
        content[name] = {**about, "measured": datetime.now(UTC).isoformat(timespec="seconds"), **found}
        print(json.dumps({name: found}, indent=1))
    write_json(options.out, content)


if __name__ == "__main__":
    main()
