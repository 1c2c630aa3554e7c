"""The guidance settings of the embedded models: `python -m benchmarks.mini_sweep`.

Part `defaults` looks for the model's defaults of `ditflow`. Part `scale` varies the scale of classifier-free guidance
of plain generations. The values that win belong in `ditflow/mini/training/kinds.py` and in the models'
folders.

Part `losses` gives every other motion loss the same chances for the comparison in `jobs/mini-table.yaml`. In both
parts one setting after the other is varied, from the best of the one before: first the block, then the learning rate,
and for `ditflow` also that of position guidance.

The best scale is that whose generations show best what was asked for; else the best is the highest mean track cosine
among the values that keep this, less 5 points. Pairs are held-out ones that `benchmarks.mini` does not use. Figures go
to benchmarks/results/mini-sweep.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench import RESULTS, command, commit, machine, write_json
from benchmarks.mini import MODELS, Bench, Scores, load, make, score_generation, start_workers, summary
from ditflow.mini.world import render, sample_pair
from ditflow.settings import MethodSettings, SamplingSettings

FIRST_SEED = 2000
PLAIN_CLIPS = 3
"""Times as many clips for the scale of classifier-free guidance: what they show is a matter of yes and no."""
LARGEST_LOSS_OF_WORDS = 0.05
PLAIN = MethodSettings(name="none")
START = MethodSettings(blocks=(3,), temperature=2.0, learning_rate=(0.02, 0.01), guided_steps=10)
GUIDANCE_SCALES = (5.0, 7.0, 9.0, 12.0)
BLOCKS = [(2,), (3,), (4,), (5,), (3, 4)]
LATENT_RATES = [(0.01, 0.005), (0.02, 0.01), (0.04, 0.02), (0.08, 0.04), (0.16, 0.08)]
POSITION_RATES = [(0.002, 0.001), (0.01, 0.005), (0.04, 0.02), (0.1, 0.05)]
LOSSES = ("motionclone", "moft", "smm")


def settings_scores(model: str, method: MethodSettings, sampling: SamplingSettings, seed: int) -> dict[str, Scores]:
    """Score one setting on one pair."""
    backbone = load(model)
    reference, target = sample_pair(seed, "eval", sprites=1)
    clip = render(reference)
    made = make(backbone, clip, target, method, seed, sampling=sampling)
    return {"": score_generation(made, clip, target)}


class Sweep:
    """The sweep of one model: everything that was tried, each setting once."""

    def __init__(self, model: str, bench: Bench):
        self.model, self._bench = model, bench
        self._sampling, self._floor = SamplingSettings(), 0.0
        self._scores: dict[MethodSettings, dict[str, Any]] = {}
        self.trials: list[dict[str, Any]] = []

    def choose_guidance_scale(self, values: Sequence[float]) -> float:
        """Keep the scale with which plain generations show best what was asked for; they set what the others keep."""
        kept = {}
        for value in values:
            self._sampling = SamplingSettings(guidance_scale=value)
            seeds = range(FIRST_SEED, FIRST_SEED + PLAIN_CLIPS * self._bench.clips)
            scores = self._measure(PLAIN, seeds, f"plain, guidance_scale {value}")
            self.trials.append({"method": "none", "varied": "guidance_scale", "guidance_scale": value, **scores})
            kept[value] = words_kept(scores)
        best = max(kept, key=lambda value: kept[value])
        self._sampling, self._floor = SamplingSettings(guidance_scale=best), kept[best] - LARGEST_LOSS_OF_WORDS
        return best

    def vary(self, start: MethodSettings, name: str, values: Sequence[Any]) -> MethodSettings:
        """Try the values of one setting and return the settings with the best one."""
        settings = [replace(start, **{name: value}) for value in values]
        worth = []
        for setting, value in zip(settings, values, strict=True):
            scores = self._tried(setting, f"{setting.name} {setting.optimize}, {name} {value}")
            tried = {"method": setting.name, "optimize": setting.optimize, "varied": name, name: value}
            self.trials.append({**tried, **scores})
            worth.append(scores["track_cosine"]["mean"] if words_kept(scores) >= self._floor else -1.0)
        return settings[worth.index(max(worth))]

    def _tried(self, method: MethodSettings, label: str) -> dict[str, Any]:
        if method not in self._scores:
            seeds = range(FIRST_SEED, FIRST_SEED + self._bench.clips)
            self._scores[method] = self._measure(method, seeds, label)
        return self._scores[method]

    def _measure(self, method: MethodSettings, seeds: Sequence[int], label: str) -> dict[str, Any]:
        score = partial(settings_scores, self.model, method, self._sampling)
        scores = summary(self._bench.scores(score, seeds, f"{self.model}: {label}"))[""]
        print(f"  track cosine {scores['track_cosine']['mean']:.3f}, words kept {words_kept(scores):.3f}", flush=True)
        return scores


def sweep_scale(trials: Sweep) -> dict[str, Any]:
    """Return the best guidance scale."""
    return {"guidance_scale": trials.choose_guidance_scale(GUIDANCE_SCALES)}


def sweep_defaults(trials: Sweep) -> dict[str, Any]:
    """Return the best settings of latent and of position guidance."""
    trials.choose_guidance_scale([load(trials.model).defaults.guidance_scale])
    latent = trials.vary(trials.vary(START, "blocks", BLOCKS), "learning_rate", LATENT_RATES)
    position = trials.vary(replace(latent, optimize="position"), "learning_rate", POSITION_RATES)
    return {"latent": _settings(latent), "position": _settings(position)}


def sweep_losses(trials: Sweep) -> dict[str, Any]:
    """Return the best settings of every loss but `ditflow`."""
    trials.choose_guidance_scale([load(trials.model).defaults.guidance_scale])
    best = {}
    for loss in LOSSES:
        method = MethodSettings(name=loss).resolve(load(trials.model).defaults)
        best[loss] = _settings(trials.vary(trials.vary(method, "blocks", BLOCKS), "learning_rate", LATENT_RATES))
    return best


def _settings(method: MethodSettings) -> dict[str, Any]:
    return {"blocks": method.blocks, "learning_rate": method.learning_rate}


PARTS = {"scale": sweep_scale, "defaults": sweep_defaults, "losses": sweep_losses}


def words_kept(scores: dict[str, Any]) -> float:
    """Return the share of colours, shapes and backgrounds that are as asked for."""
    return sum(scores[word]["mean"] for word in ("colour", "shape", "background")) / 3


def main() -> None:
    """Sweep the models and write the results, beside those of models and parts that are not swept again."""
    asked = _parser().parse_args()
    with start_workers(asked.workers) as pool:
        for model, part in itertools.product(asked.models, asked.parts):
            trials = Sweep(model, Bench(asked.clips, pool))
            best = PARTS[part](trials)
            about = {
                "command": command(),
                "commit": commit(),
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            swept = {**about, "machine": machine(), "clips": asked.clips, "trials": trials.trials, "best": best}
            models = json.loads(asked.out.read_text())["models"] if asked.out.is_file() else {}
            models[model] = {**models.get(model, {}), part: swept}
            write_json(asked.out, {"first seed": FIRST_SEED, "models": models})
            for what, settings in best.items():
                print(model, what, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini_sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=16, help="held-out pairs for every setting")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "mini-sweep.json")
    return parser


if __name__ == "__main__":
    main()
