"""How well motion targets of other sources and masked ones are followed: `python -m benchmarks.motion_sources`.

`sources`: clips of one sprite, guided by the model's attention and by optical flow. `masks`: references of two sprites
of which a mask shows one; the prompt asks for one sprite, which should follow that one and not the other. Clips are of
the world's held-out split, 32 pairs; means come with 95 % bootstrap intervals. Figures go to
benchmarks/results/motion-sources.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import RESULTS, command, commit, machine, write_json
from benchmarks.mini import Bench, load, make, score_generation, start_workers
from ditflow import transfer_motion
from ditflow.metrics.statistics import bootstrap_interval
from ditflow.mini.measure import detect_sprite, position_error, track_cosine
from ditflow.mini.world import prompt_of, render, sample_pair
from ditflow.settings import MethodSettings, MotionSettings

PART_SEED = {"sources": 0, "masks": 500}
"""First seed of each part's pairs; the sources' are those of the comparison of methods."""
DIFFER = 0.3
"""Two trajectories differ where their cosine is below this."""


def method(source: str | dict[str, Any] = "attention", mask: bool = False, **settings: Any) -> MethodSettings:
    """Return DiTFlow with latents, guided by a motion source."""
    return MethodSettings(motion=MotionSettings(source, ("mask",) if mask else ()), **settings)


SOURCES = {
    "attention": method(),
    "attention, all entries": method(loss={"entries": "all"}),
    "optical flow": method("optical_flow"),
    "optical flow, what rests is compared": method({"optical_flow": {"rest": 0.0}}),
    "optical flow, lost from half a pixel": method({"optical_flow": {"lost_from": 0.5}}),
}
MASKS = {
    "attention, mask": method(mask=True),
    "optical flow, mask": method("optical_flow", mask=True),
    "optical flow, mask of the first frame": method("optical_flow", mask=True),
    "attention, no mask": method(),
}


def source_scores(model: str, ways: Sequence[str], seed: int) -> dict[str, dict[str, float]]:
    """Score a pair of one sprite with every source."""
    reference, target = sample_pair(seed, "eval", sprites=1)
    clip, figures = render(reference), ("track_cosine", "position_error", "motion_fidelity", "shape", "background")
    scores = {}
    for way in ways:
        found = score_generation(make(load(model), clip, target, SOURCES[way], seed), clip, target)
        scores[way] = {figure: found[figure] for figure in figures}
    return scores


def mask_scores(model: str, ways: Sequence[str], seed: int) -> dict[str, dict[str, float]]:
    """Score a video of one sprite that is guided by one of a reference's two: its track against either."""
    reference, target = sample_pair(seed, "eval", sprites=2)
    clip, chosen = render(reference), seed % 2
    mask = clip.masks[chosen].astype(np.uint8)
    one = replace(target, sprites=(target.sprites[chosen],))
    own, other = clip.trajectories[chosen], clip.trajectories[1 - chosen]
    alike = _cosine(own, other)
    scores = {}
    for way in ways:
        seen_mask = mask[:1] if "first frame" in way else mask
        made = transfer_motion(
            load(model), prompt_of(one), reference=clip.frames, mask=seen_mask, method=MASKS[way], seed=seed
        )
        assert made.video is not None
        seen = detect_sprite(made.video)
        found = {"chosen_cosine": track_cosine(seen, own), "chosen_error": position_error(seen, own)}
        if alike < DIFFER:
            found |= {"other_cosine_where_they_differ": track_cosine(seen, other)}
            found |= {"chosen_cosine_where_they_differ": found["chosen_cosine"]}
        scores[way] = found
    return scores


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)))


def summary(pairs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Means and intervals of every figure of every way, with the values of the pairs that have it."""
    rows: dict[str, Any] = {}
    for way in pairs[0]:
        names = dict.fromkeys(figure for pair in pairs for figure in pair[way])
        values = {figure: [pair[way][figure] for pair in pairs if figure in pair[way]] for figure in names}
        rows[way] = {
            figure: {**vars(bootstrap_interval(found)), "values": [round(value, 4) for value in found]}
            for figure, found in values.items()
        }
    return rows


PARTS = {"sources": (source_scores, SOURCES), "masks": (mask_scores, MASKS)}


def main() -> None:
    """Measure the parts that are asked for and write the results, beside those of the other parts and ways."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.motion_sources", description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--ways", nargs="+", help="of the parts (default: all)")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "motion-sources.json")
    asked = parser.parse_args()
    results = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    with start_workers(asked.workers) as pool:
        for part in asked.parts:
            score, ways = PARTS[part]
            chosen = [way for way in ways if asked.ways is None or way in asked.ways]
            seeds = range(PART_SEED[part], PART_SEED[part] + asked.pairs)
            rows = summary(Bench(len(seeds), pool).scores(partial(score, asked.model, chosen), seeds, part))
            measured = {"commit": commit(), "measured": datetime.now(UTC).isoformat(timespec="seconds")}
            about = {"command": command(), "machine": machine(), "model": asked.model}
            kept = results.get(part, {}).get("rows", {})  # of ways that were not asked for now
            rows_now = {way: {**measured, **row} for way, row in rows.items()}
            results[part] = {**about, "rows": {**kept, **rows_now}}
            write_json(asked.out, results)
            for way, row in rows.items():
                found = "  ".join(f"{n} {f['mean']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" for n, f in row.items())
                print(f"{way:40} {found}")


if __name__ == "__main__":
    main()
