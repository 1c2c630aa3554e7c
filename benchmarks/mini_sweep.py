"""The guidance settings of the embedded models: `python -m benchmarks.mini_sweep`.

One setting after the other is varied, the best value is kept, and the next one is varied from there: block,
temperature, learning rate, guided steps of latent guidance, then the learning rate of position guidance. The other
losses get a block and a learning rate of their own, with DiTFlow's guided steps. The best is the highest mean track
cosine among the values whose generations show what was asked for as often as plain ones do, less 5 points. Pairs are
held-out ones that `benchmarks.mini` does not use. Figures go to benchmarks/results/mini-sweep.json; the values that win
belong in `ditflow/mini/train.py`, in the models' folders, and in `jobs/mini-table.yaml`.
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
START = MethodSettings(blocks=(3,), temperature=2.0, learning_rate=(0.02, 0.01), guided_steps=10)
VARIED: dict[str, Sequence[Any]] = {
    "blocks": [(2,), (3,), (4,), (5,), (3, 4)],
    "temperature": [1.0, 2.0, 4.0],
    "learning_rate": [(0.01, 0.005), (0.02, 0.01), (0.04, 0.02), (0.08, 0.04)],
    "guided_steps": [5, 10, 15, 20],
}
POSITION_RATES = [(0.002, 0.001), (0.01, 0.005), (0.04, 0.02), (0.1, 0.05)]
OTHERS = ("motionclone", "moft", "smm")


def settings_scores(model: str, method: MethodSettings, seed: int) -> dict[str, Scores]:
    """Score one setting on one pair."""
    backbone = load(model)
    reference, target = sample_pair(seed, "eval", sprites=1)
    clip = render(reference)
    return {"": score_generation(make(backbone, clip, target, method, seed), clip, target)}


def sweep(model: str, bench: Bench, others: Sequence[str]) -> dict[str, Any]:
    """Return everything that was tried, and what won."""
    plain = _tried(model, bench, PLAIN, "plain")
    vary = partial(_vary, model, bench, words_kept(plain) - LARGEST_LOSS_OF_WORDS)
    latent, trials = START, []
    for name, values in VARIED.items():
        latent, tried = vary(latent, name, values)
        trials += tried
    position, tried = vary(replace(latent, optimize="position"), "learning_rate", POSITION_RATES)
    trials += tried
    best = {"latent": latent, "position": position}
    for other in others:
        settings = replace(latent, name=other)
        for name in ("blocks", "learning_rate"):
            settings, tried = vary(settings, name, VARIED[name])
            trials += tried
        best[other] = settings
    return {
        "plain": plain,
        "trials": trials,
        "best": {what: {name: getattr(settings, name) for name in VARIED} for what, settings in best.items()},
    }


def _vary(
    model: str, bench: Bench, floor: float, start: MethodSettings, name: str, values: Sequence[Any]
) -> tuple[MethodSettings, list[dict[str, Any]]]:
    """Try the values of one setting; return the settings with the best one, and all trials."""
    settings = [replace(start, **{name: value}) for value in values]
    trials = []
    for setting, value in zip(settings, values, strict=True):
        scores = _tried(model, bench, setting, f"{setting.name} {setting.optimize}, {name} {value}")
        trials.append({"method": setting.name, "optimize": setting.optimize, "varied": name, name: value, **scores})
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
        models = {model: sweep(model, Bench(asked.clips, pool), asked.others) for model in asked.models}
    about = {"command": command(), "measured": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    write_json(asked.out, {**about, "first seed": FIRST_SEED, "clips": asked.clips, "models": models})
    for model, result in models.items():
        for what, settings in result["best"].items():
            print(model, what, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini_sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=16, help="held-out pairs for every setting")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=list(OTHERS), help="losses beside DiTFlow's")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "mini-sweep.json")
    return parser


if __name__ == "__main__":
    main()
