"""How well the embedded models see motion and keep a clip: `python -m benchmarks.mini` (or `make bench-mini`).

The world's truth is known, so both are measured: reconstruction by the autoencoder, and the attention motion flow of
every block against the true motion. Clips are of the world's held-out split. Means come with 95 % bootstrap intervals
over clips. Figures go to benchmarks/results/mini.json and mini.png. How well the models transfer motion is measured by
the job `jobs/mini-table.yaml` (see `benchmarks.mini_table`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bench import RESULTS, command, machine, write_json
from ditflow import backbones, transfer_motion
from ditflow.backbones.contract import Backbone
from ditflow.metrics.motion_fidelity import NoMotionError, motion_fidelity
from ditflow.metrics.statistics import bootstrap_interval, paired_difference
from ditflow.metrics.trackers import track
from ditflow.mini.measure import Detection, block_scores, detect_sprite, flow_score, position_error, track_cosine
from ditflow.mini.world import Scene, WorldClip, prompt_of, render, sample_pair, sample_scene
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import Transferred

MODELS = ("mini-rotary", "mini-additive")
TRACKER, LEAST_COMMON = "dis", 0.5
"""Of motion fidelity: dense flow keeps small sprites best, and points that move at most now and then do not count."""
Scores = dict[str, float]


# ---- one clip


def reconstruction_scores(model: str, seed: int) -> dict[str, Scores]:
    """PSNR of a held-out clip behind the autoencoder, and what can be read of it before and after."""
    backbone, clip = load(model), render(sample_scene(seed, "eval", sprites=1))
    latents = backbone.encode_video(clip.frames)
    made = backbone.decode_latents(latents, len(clip.frames))
    error = np.square(made.astype(float) - clip.frames).mean()
    seen = {"truth": clip.frames, "reconstruction": made}
    named = {name: _adherence(detect_sprite(frames), clip.scene) for name, frames in seen.items()}
    return {"psnr": {"dB": -10 * math.log10(error / 255**2)}, **named}


def flow_scores(model: str, seed: int) -> dict[str, Scores]:
    """Errors of the attention motion flow of every block, and of two guesses, on a held-out clip; in patches."""
    backbone, clip = load(model), render(sample_scene(seed, "eval"))
    scores = {f"block {block}": score for block, score in enumerate(block_scores(backbone, clip))}
    grid = backbone.layout.grid(backbone.layout.latent_shape(*clip.frames.shape[:3]))
    truth = clip.displacement(grid.frames, grid.height, grid.width)
    rng = np.random.default_rng(seed)
    places = np.stack(np.divmod(np.arange(grid.height * grid.width), grid.width)[::-1], axis=-1)
    anywhere = rng.permuted(np.broadcast_to(places, truth.displacement.shape), axis=2) - places
    guesses = {
        "zero flow": np.zeros_like(truth.displacement),
        "random flow": anywhere,
        "truth in whole patches": np.rint(truth.displacement),
    }
    scores |= {name: flow_score(guess, truth) for name, guess in guesses.items()}
    return {name: _by_shot(asdict(score), shot_of(clip.scene)) for name, score in scores.items()}


def make(
    backbone: Backbone,
    reference: WorldClip,
    target: Scene,
    method: MethodSettings,
    seed: int,
    sampling: SamplingSettings | None = None,
) -> Transferred:
    """Generate the target's looks with the reference's motion."""
    return transfer_motion(
        backbone, prompt_of(target), reference=reference.frames, method=method, sampling=sampling, seed=seed
    )


def score_generation(made: Transferred, reference: WorldClip, target: Scene) -> Scores:
    """Where the sprite went against the reference's, and what the clip shows against what was asked for."""
    assert made.video is not None
    seen, trajectory = detect_sprite(made.video), reference.trajectories[0]
    scores = {
        "track_cosine": track_cosine(seen, trajectory),
        "position_error": position_error(seen, trajectory),
        "motion_fidelity": _fidelity(made.video, reference.frames),
        **_adherence(seen, target),
        "found": float(seen.found.mean()),
        "seconds": sum(made.seconds.values()),
    }
    if made.losses:
        scores |= {"loss_first": made.losses[0][0], "loss_final": made.losses[-1][-1]}
    return scores


def _adherence(seen: Detection, asked: Scene) -> Scores:
    look = asked.sprites[0].appearance
    return {
        "colour": float(seen.colour == look.colour),
        "shape": float(seen.shape == look.shape),
        "background": float(seen.background == asked.background.name),
    }


def _fidelity(generated: np.ndarray, reference: np.ndarray) -> float:
    """Motion fidelity; 0 for a generated clip in which nothing moves."""
    try:
        return motion_fidelity(track(generated, TRACKER), track(reference, TRACKER), least_common=LEAST_COMMON)
    except NoMotionError:
        return 0.0


def shot_of(scene: Scene) -> str:
    """What the camera does: `pan`, `zoom` or `rest`."""
    return "pan" if any(scene.camera.pan) else "rest" if scene.camera.zoom == 1 else "zoom"


def _by_shot(scores: Scores, shot: str) -> Scores:
    """Background errors are told apart by what the camera does."""
    ground = {f"{name} ({shot})": value for name, value in scores.items() if name.startswith("ground")}
    return {name: value for name, value in (scores | ground).items() if name in ground or name.startswith("sprite")}


@cache
def load(model: str) -> Backbone:
    """Load a model once a process."""
    return backbones.load(model)


# ---- many clips


@dataclass(frozen=True)
class Bench:
    """Runs a measurement over clips in worker processes."""

    clips: int
    pool: ProcessPoolExecutor

    def measure(self, score: Callable[[str, int], dict[str, Scores]], model: str) -> dict[str, dict[str, Any]]:
        """Score every clip and return {system: {figure: values, mean and interval}}."""
        return summary(self.scores(partial(score, model), range(self.clips), f"{model}: {score.__name__}"))

    def scores(self, score: Callable[[int], Any], seeds: Sequence[int], label: str) -> list[Any]:
        """Score seeds in order, with a line of progress."""
        results, started = [], time.monotonic()
        for result in self.pool.map(score, seeds):
            results.append(result)
            print(f"\r{label} {len(results)}/{len(seeds)}", end="", file=sys.stderr, flush=True)
        print(f", {time.monotonic() - started:.0f} s", file=sys.stderr)
        return results


def start_workers(count: int) -> ProcessPoolExecutor:
    """Start processes that compute with one thread each: small matrices gain nothing from two."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def summary(clips: Sequence[Mapping[str, Scores]]) -> dict[str, dict[str, Any]]:
    """Turn one mapping {system: {figure: value}} per clip into {system: {figure: mean, interval and values}}."""
    systems = _in_order(name for clip in clips for name in clip)
    return {system: _figures([clip[system] for clip in clips]) for system in systems}


def _figures(clips: Sequence[Scores]) -> dict[str, Any]:
    """Sum up every figure that at least one clip has."""
    columns = {
        name: [clip.get(name, math.nan) for clip in clips] for name in _in_order(n for clip in clips for n in clip)
    }
    return {name: _figure(values) for name, values in columns.items() if not all(map(math.isnan, values))}


def _figure(values: Sequence[float]) -> dict[str, Any]:
    """Mean and interval over the clips that have the figure; all values in the order of the clips."""
    known = [value for value in values if not math.isnan(value)]
    rounded = [None if math.isnan(value) else round(value, 4) for value in values]
    return {**_rounded(bootstrap_interval(known)), "values": rounded}


def _rounded(interval: Any) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(interval).items()}


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def gain_on_pans(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return for every block by how much less than no motion it errs on the ground of panning clips, in patches."""
    errors = {name: figures["ground_error (pan)"]["values"] for name, figures in rows.items()}
    panning = [clip for clip, error in enumerate(errors["zero flow"]) if error is not None]
    still = [errors["zero flow"][clip] for clip in panning]
    return {
        name: _rounded(paired_difference(still, [values[clip] for clip in panning]))
        for name, values in errors.items()
        if name.startswith("block")
    }


def guided_clip_seconds(model: str, rounds: int = 5) -> dict[str, Any]:
    """Seconds of a guided clip from pixels to pixels, alone on this machine; a first one warms up."""
    backbone, (reference, target) = backbones.load(model), sample_pair(0, "eval", sprites=1)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        make(backbone, render(reference), target, MethodSettings(), seed=0)
        seconds.append(round(time.perf_counter() - started, 2))
    return {"threads": torch.get_num_threads(), "median": sorted(seconds[1:])[rounds // 2], "values": seconds[1:]}


# ---- what is told


def print_table(model: str, parts: Mapping[str, Any]) -> None:
    """Print the figures that matter, with their intervals."""
    psnr = parts["reconstruction"]["rows"]["psnr"]["dB"]
    print(f"\n{model}\nreconstruction PSNR {_told(psnr)} dB")
    flow = ("sprite_error", "sprite_within", "ground_length (rest)", "ground_error (pan)")
    print_rows(parts["flow"]["rows"], flow)
    for name, gain in parts["flow"]["gain on pans"].items():
        print(f"{name}: nearer to the ground's motion under a pan than no motion by {_told(gain)} patches")
    print(f"a guided clip takes {parts[SECONDS]['median']} s")


def print_rows(rows: Mapping[str, Any], figures: Sequence[str]) -> None:
    """Print a row for every system and a column for every figure."""
    print(f"\n{'':24}" + "".join(f"{figure:>24}" for figure in figures))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{_told(row.get(figure)):>24}" for figure in figures))


def _told(figure: Mapping[str, float] | None) -> str:
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]" if figure else "-"


def draw_chart(models: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the motion flow's errors by block, for every model."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (model, parts) in enumerate(models.items()):
        blocks = {name: row["sprite_error"] for name, row in parts["flow"]["rows"].items()}
        _draw_points(axes, blocks, (number - (len(models) - 1) / 2) * 0.3, model)
    axes.set_title("flow error on sprites, in patches (less is better)", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_points(axes: Axes, figures: Mapping[str, Mapping[str, float]], offset: float, label: str) -> None:
    """Draw means with their intervals, one under the other."""
    places = np.arange(len(figures)) + offset
    means = np.array([figure["mean"] for figure in figures.values()])
    bounds = np.array([[figure["low"], figure["high"]] for figure in figures.values()]).T
    axes.errorbar(means, places, xerr=np.abs(bounds - means), fmt="o", markersize=4, capsize=2, label=label)
    axes.set_yticks(range(len(figures)), list(figures), fontsize=8)
    axes.set_ylim(len(figures) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")


# ---- the command


SCORES = {"reconstruction": reconstruction_scores, "flow": flow_scores}
SECONDS = "guided clip seconds"
PARTS = (*SCORES, SECONDS)


def main() -> None:
    """Measure the models and write the results, beside those of models and parts that are not measured again."""
    asked = _parser().parse_args()
    for model in asked.models:
        measured = measure(model, asked)
        models = json.loads(asked.out.read_text())["models"] if asked.out.is_file() else {}
        models[model] = {**models.get(model, {}), **measured}
        write_json(asked.out, {"models": models})
        if set(PARTS) <= set(models[model]):
            print_table(model, models[model])
        whole = {name: parts for name, parts in models.items() if set(PARTS) <= set(parts)}
        draw_chart(whole, asked.out.with_suffix(".png"))


def measure(model: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Return how well a model sees and reconstructs, each part with the command that measured it."""
    parts: dict[str, Any] = {}
    about = {"command": command(), "machine": machine(), "clips": asked.clips}
    with start_workers(asked.workers) as pool:
        bench = Bench(asked.clips, pool)
        for name, score in SCORES.items():
            if name in asked.parts:
                parts[name] = {**about, "measured": _now(), "rows": bench.measure(score, model)}
    if "flow" in parts:
        parts["flow"]["gain on pans"] = gain_on_pans(parts["flow"]["rows"])
    if SECONDS in asked.parts:
        parts[SECONDS] = {**about, "measured": _now(), **guided_clip_seconds(model)}
    return parts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=64, help="held-out clips")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="embedded models or model folders")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default: all)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "mini.json")
    return parser


if __name__ == "__main__":
    main()
