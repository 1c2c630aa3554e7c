"""The guidance settings of the embedded models: `python -m benchmarks.mini_sweep`.

One setting after the other is varied, the best value is kept, and the next one is varied from there: block,
temperature, learning rate, guided steps of latent guidance, then the learning rate of position guidance. The best is
the highest mean track cosine among the values whose generations show what was asked for as often as plain ones do,
less 5 points. Pairs are held-out ones that `benchmarks.mini` does not use. Figures go to
benchmarks/results/mini-sweep.json; the values that won stand in `ditflow/mini/train.py` and in the models' folders.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench import RESULTS, command, machine, write_json
from benchmarks.mini import MODELS, Bench, Scores, load, make, score_generation, start_workers, summary
from ditflow.mini.world import render, sample_pair
from ditflow.settings import MethodSettings

FIRST_SEED = 2000
LARGEST_LOSS_OF_WORDS = 0.05
PLAIN = MethodSettings(name="none")
START = MethodSettings(blocks=(5,), temperature=2.0, learning_rate=(0.02, 0.01), guided_steps=10)
VARIED: dict[str, Sequence[Any]] = {
    "blocks": [(0,), (1,), (2,), (3,), (4,), (5,), (4, 5)],
    "temperature": [1.0, 2.0, 4.0, 8.0],
    "learning_rate": [(0.01, 0.005), (0.02, 0.01), (0.04, 0.02), (0.08, 0.04)],
    "guided_steps": [5, 10, 15, 20, 30],
}
POSITION_RATES = [(0.001, 0.0005), (0.002, 0.001), (0.005, 0.0025), (0.01, 0.005), (0.02, 0.01), (0.04, 0.02)]


def settings_scores(model: str, method: MethodSettings, seed: int) -> dict[str, Scores]:
    """Score one setting on one pair."""
    backbone = load(model)
    reference, target = sample_pair(seed, "eval", sprites=1)
    clip = render(reference)
    return {"": score_generation(make(backbone, clip, target, method, seed), clip, target)}


def sweep(model: str, bench: Bench) -> dict[str, Any]:
    """Return everything that was tried, and what won."""
    plain = _tried(model, bench, PLAIN, "plain")
    floor = words_kept(plain) - LARGEST_LOSS_OF_WORDS
    best, trials = START, []
    for name, values in VARIED.items():
        best, tried = _vary(model, bench, best, name, values, floor)
        trials += tried
    position, tried = _vary(model, bench, replace(best, optimize="position"), "learning_rate", POSITION_RATES, floor)
    chosen = {name: getattr(best, name) for name in VARIED}
    return {
        "plain": plain,
        "trials": trials + tried,
        "latent": chosen,
        "position": {"learning_rate": position.learning_rate},
    }


def _vary(
    model: str, bench: Bench, start: MethodSettings, name: str, values: Sequence[Any], floor: float
) -> tuple[MethodSettings, list[dict[str, Any]]]:
    """Try the values of one setting; return the settings with the best one, and all trials."""
    settings = [replace(start, **{name: value}) for value in values]
    trials = []
    for setting, value in zip(settings, values, strict=True):
        scores = _tried(model, bench, setting, f"{setting.optimize}, {name} {value}")
        trials.append({"optimize": setting.optimize, "varied": name, name: value, **scores})
    worth = [trial["track_cosine"]["mean"] if words_kept(trial) >= floor else -1.0 for trial in trials]
    return settings[worth.index(max(worth))], trials


def _tried(model: str, bench: Bench, method: MethodSettings, label: str) -> dict[str, Any]:
    seeds = range(FIRST_SEED, FIRST_SEED + bench.clips)
    scores = summary(bench.scores(partial(settings_scores, model, method), seeds, f"{model}: {label}"))[""]
    print(f"  track cosine {scores['track_cosine']['mean']:.3f}, words kept {words_kept(scores):.3f}", flush=True)
    return scores


def words_kept(scores: dict[str, Any]) -> float:
    """Return the share of colours, shapes and backgrounds that are as asked for."""
    return sum(scores[word]["mean"] for word in ("colour", "shape", "background")) / 3


def main() -> None:
    """Sweep the models and write the results."""
    asked = _parser().parse_args()
    with start_workers(asked.workers) as pool:
        models = {model: sweep(model, Bench(asked.clips, pool)) for model in asked.models}
    about = {"command": command(), "measured": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    write_json(asked.out, {**about, "first seed": FIRST_SEED, "clips": asked.clips, "models": models})
    for model, result in models.items():
        print(model, result["latent"], result["position"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini_sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=16, help="held-out pairs for every setting")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "mini-sweep.json")
    return parser


if __name__ == "__main__":
    main()
