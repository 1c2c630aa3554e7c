"""Why DiTFlow fails where it fails, and what helps: `python -m benchmarks.mini_failures`.

Nearly all failures are pans, so the pairs are panning ones of the tuning seeds. Each is made with several initial
noises; then it is asked how good the video would be whose loss was the smallest after 1, 2, ... guided steps. Beside
that, with the first noise alone: other ways to guide. Differences are paired, with 95 % bootstrap intervals. Figures go
to benchmarks/results/mini-failures.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from benchmarks.bench import RESULTS, command, commit, machine, write_json
from benchmarks.mini import MODELS, Bench, load, make, score_generation, shot_of, start_workers
from benchmarks.mini_sweep import FIRST_SEED
from ditflow.metrics.statistics import bootstrap_interval, paired_difference
from ditflow.mini.world import render, sample_pair
from ditflow.motion import amf
from ditflow.settings import MethodSettings
from ditflow.types import TokenGrid

SKIPPED = 12
"""Tuning seeds that the sweep of the defaults has seen."""
NOISES = 4
OTHER_NOISE = 100_000
"""Further noises of a pair are those of its seed and multiples of this."""
FIGURES = ("track_cosine", "position_error", "motion_fidelity", "shape")
ONE_NOISE = "one noise"
OCCLUSIONS = "four times the weight around occlusions"
WAYS = {
    ONE_NOISE: MethodSettings(),
    "block 3 alone": MethodSettings(blocks=(3,)),
    "temperature 1": MethodSettings(temperature=1.0),
    OCCLUSIONS: MethodSettings(),
}
"""`one noise` is what the others are held against: the model's defaults."""

Scores = dict[str, Any]


def panning_seeds(count: int) -> list[int]:
    """The first tuning seeds whose reference is a pan."""
    seeds = itertools.count(FIRST_SEED + SKIPPED)
    return list(itertools.islice((s for s in seeds if shot_of(sample_pair(s, "eval", sprites=1)[0]) == "pan"), count))


def pair_scores(model: str, seed: int) -> dict[str, Scores]:
    """Score a pair with every noise and in every way."""
    scores = {f"noise {number}": made(model, seed, MethodSettings(), number) for number in range(NOISES)}
    for name, method in WAYS.items():
        if name == OCCLUSIONS:
            with mock.patch("ditflow.motion.amf.displacement_error", weighted_error):
                scores[name] = made(model, seed, method)
        elif name != ONE_NOISE:
            scores[name] = made(model, seed, method)
    return {ONE_NOISE: scores["noise 0"], **scores}


def made(model: str, seed: int, method: MethodSettings, noise: int = 0) -> Scores:
    """Generate one video; return its figures, and the last loss of every guided step."""
    reference, target = sample_pair(seed, "eval", sprites=1)
    clip = render(reference)
    result = make(load(model), clip, target, method, seed + noise * OTHER_NOISE)
    scores = score_generation(result, clip, target)
    return {**{figure: scores[figure] for figure in FIGURES}, "losses": [step[-1] for step in result.losses]}


def weighted_error(capture: Any, grid: TokenGrid, temperature: float, target: Tensor, weight: Tensor) -> Tensor:
    """`amf.displacement_error` with more weight on vectors whose match does not match back within a patch."""
    match = target.long() + grid.coordinates(target.device).long()
    place = match[..., 1] * grid.width + match[..., 0]
    back = target.long().transpose(0, 1).gather(2, place[..., None].expand(-1, -1, -1, 2))
    occluded = (target.long() + back).abs().amax(dim=-1) > 1
    return _error(capture, grid, temperature, target, weight * (1 + 3 * occluded))


_error = amf.displacement_error


def summary(pairs: Sequence[Mapping[str, Scores]]) -> dict[str, Any]:
    """Means and paired differences of every way, and of the noise that is chosen after each guided step."""
    noises = [[pair[f"noise {number}"] for number in range(NOISES)] for pair in pairs]
    usual = {figure: [float(np.mean([n[figure] for n in of_pair])) for of_pair in noises] for figure in FIGURES}
    steps = len(noises[0][0]["losses"])
    rows = {name: _row([pair[name] for pair in pairs], [pair[ONE_NOISE] for pair in pairs]) for name in WAYS}
    chosen = {
        f"of {NOISES} noises, smallest loss after {step + 1} guided steps": [
            min(of_pair, key=lambda noise: noise["losses"][step]) for of_pair in noises
        ]
        for step in range(steps)
    }
    chosen[f"of {NOISES} noises, the best track"] = [max(n, key=lambda one: one["track_cosine"]) for n in noises]
    baseline = [dict(zip(usual, values, strict=True)) for values in zip(*usual.values(), strict=True)]
    rows[f"any of {NOISES} noises"] = _row(baseline, baseline)
    return rows | {name: _row(scores, baseline) for name, scores in chosen.items()}


def _row(scores: Sequence[Scores], baseline: Sequence[Scores]) -> dict[str, Any]:
    figures = {}
    for figure in FIGURES:
        values, others = ([float(one[figure]) for one in side] for side in (scores, baseline))
        figures[figure] = {
            **vars(bootstrap_interval(values)),
            "difference": vars(paired_difference(values, others)),
            "values": [round(value, 4) for value in values],
        }
    return {**figures, "below 0.8": sum(one["track_cosine"] < 0.8 for one in scores)}


def main() -> None:
    """Measure the models and write the results, beside those of models that are not measured again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini_failures", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=24, help="panning pairs")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "mini-failures.json")
    asked = parser.parse_args()
    results = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    seeds = panning_seeds(asked.pairs)
    with start_workers(asked.workers) as pool:
        for model in asked.models:
            rows = summary(Bench(len(seeds), pool).scores(partial(pair_scores, model), seeds, f"{model}: failures"))
            about = {"command": command(), "commit": commit(), "machine": machine()}
            measured = datetime.now(UTC).isoformat(timespec="seconds")
            results[model] = {**about, "measured": measured, "seeds": seeds, "rows": rows}
            write_json(asked.out, results)
            for name, row in rows.items():
                print(f"{name:52} {_told(row['track_cosine'])}  px {_told(row['position_error'])}  {row['below 0.8']}")


def _told(figure: Mapping[str, Any]) -> str:
    difference = figure["difference"]
    return f"{figure['mean']:.3f} ({difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}])"


if __name__ == "__main__":
    main()
