"""What the reuse of a bank costs: `python -m benchmarks.reuse_cost`.

A clip of the embedded model is generated plainly, with a bank, and with a bank whose reference is injected, in turns in
one process; told are ratios of CPU seconds within a round, because other load hardly changes those. The bank is the
default one. Figures go to benchmarks/results/reuse-cost.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench import RESULTS, command, machine, write_json
from benchmarks.mini import MODELS, load
from ditflow import transfer_motion
from ditflow.banks.bank import MotionBank
from ditflow.mini.world import render, sample_pair
from ditflow.motion.reference import extract_motion
from ditflow.settings import MethodSettings
from ditflow.transfer import learn_bank

PROMPT = "a red striped ball moving over the grass"
LEARNED = MethodSettings(optimize="coordinates", preset="lasting", drafts=1, iterations=1)
"""How much was learned does not change what reuse costs."""
WITHOUT = MethodSettings(optimize="coordinates", injection=False)


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Return the ratios of every round, and their medians."""
    backbone, clip = load(model), render(sample_pair(0, "eval", sprites=1)[0]).frames
    motion = extract_motion(backbone, clip, LEARNED)
    bank = learn_bank(backbone, PROMPT, reference=motion, size=clip.shape[:3], method=LEARNED).bank
    sides: dict[str, tuple[MotionBank | None, MethodSettings]] = {
        "plain": (None, MethodSettings(name="none")),
        "reuse": (bank, WITHOUT),
        "reuse with injection": (bank, LEARNED),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first one warms up
        for name, (source, method) in sides.items():
            started = time.process_time()
            transfer_motion(backbone, PROMPT, reference=source, size=clip.shape[:3], method=method, seed=number)
            seconds[name].append(time.process_time() - started)
    plain = np.array(seconds["plain"][1:])
    ratios = {name: (np.array(own[1:]) / plain).round(4).tolist() for name, own in seconds.items() if name != "plain"}
    medians = {name: round(statistics.median(values), 4) for name, values in ratios.items()}
    return {"median ratio to plain": medians, "ratios": ratios, "CPU seconds": seconds}


def main() -> None:
    """Measure the models and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse_cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULTS / "reuse-cost.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    measured = {model: measure(model, asked.rounds) for model in asked.models}
    for model, figures in measured.items():
        print(model, figures["median ratio to plain"])
    about = {"command": command(), "machine": machine(), "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(asked.out, {**about, "models": measured})


if __name__ == "__main__":
    main()
