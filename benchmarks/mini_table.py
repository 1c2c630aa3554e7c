"""The comparisons on the embedded models, kept: `python -m benchmarks.mini_table JOB-OUTPUTS --name mini-table`.

Takes jobs that were run and evaluated (`jobs/mini-table.yaml` and `jobs/mini-ablation.yaml` say how), and writes the
table of each, with intervals and paired differences, to benchmarks/results/NAME.json and NAME.png; on stdout it prints
the table as Markdown. Beside all references, those over which the camera rests and pans are told apart: in a pan the
ground moves too, and has more patches than the sprite.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bench import RESULTS, command, commit, machine, write_json
from benchmarks.mini import shot_of
from ditflow.media.plot import plot_intervals
from ditflow.metrics.base import MetricSettings
from ditflow.metrics.statistics import bootstrap_interval
from ditflow.mini.world import sample_pair
from pipeline.comparison import compare
from pipeline.manifest import Manifest
from pipeline.measurements import Measurements
from pipeline.store import Store

SETTINGS = MetricSettings(names=("world", "motion_fidelity"))
FIGURES = ("track_cosine", "position_error", "motion_fidelity", "colour", "shape", "background")
SHOTS = ("rest or zoom", "pan")


def told(store: Store, baseline: str | None) -> dict[str, Any]:
    """Return a job's comparison, and its track cosines by what the camera does."""
    comparison = compare(store, SETTINGS, baseline)
    entries = [entry for entry in comparison.to_dict()["entries"] if entry["figure"] in FIGURES]
    return {"entries": entries, "track cosine by shot": by_shot(store), "settings": comparison.settings}


def by_shot(store: Store) -> dict[str, dict[str, Any]]:
    """Return {method: {shot: mean and interval}} of the track cosine."""
    measured = Measurements(store).values(SETTINGS)
    found: dict[str, dict[str, list[float]]] = {}
    for row in Manifest(store).read(["row_id", "variant", "reference_uri"]).to_pylist():
        shot = SHOTS[_pans(row["reference_uri"])]
        found.setdefault(row["variant"], {}).setdefault(shot, []).append(measured[row["row_id"]]["track_cosine"] or 0.0)
    return {
        variant: {shot: vars(bootstrap_interval(values)) for shot, values in sorted(shots.items())}
        for variant, shots in sorted(found.items())
    }


def _pans(reference_uri: str) -> bool:
    """Whether the camera pans in a clip of `ditflow mini pairs`, whose name ends in its seed."""
    match = re.search(r"pair-(\d+)\.mp4$", reference_uri)
    if match is None:
        raise ValueError(f"{reference_uri} is no clip of `ditflow mini pairs`: expected a name such as pair-0007.mp4")
    return shot_of(sample_pair(int(match[1]), "eval", sprites=1)[0]) == "pan"


def markdown(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all rows: a line for every method, and the figures of every model side by side."""
    shown = ("track_cosine", "motion_fidelity")
    cells = {
        (model, e["variant"], e["figure"]): e["interval"]
        for model, parts in models.items()
        for e in parts["entries"]
        if e["category"] is None
    }
    variants = list(dict.fromkeys(variant for _, variant, _ in cells))
    head = ["", *(f"`{model}`, {figure.replace('_', ' ')}" for model in models for figure in shown)]
    lines = [head, ["---"] * len(head)]
    for variant in variants:
        intervals = [cells[model, variant, figure] for model in models for figure in shown]
        lines.append([variant, *(f"{i['mean']:.2f} [{i['low']:.2f}, {i['high']:.2f}]" for i in intervals)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(models: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the track cosine and the motion fidelity of every method of every model."""
    intervals = [
        (f"{figure.replace('_', ' ')}, {model}", e["variant"], tuple(e["interval"][k] for k in ("mean", "low", "high")))
        for model, parts in models.items()
        for figure in ("track_cosine", "motion_fidelity")
        for e in parts["entries"]
        if e["category"] is None and e["figure"] == figure
    ]
    plot_intervals(intervals, path)


def main() -> None:
    """Keep the tables of the jobs that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini_table", description=__doc__.split("\n\n")[0])
    parser.add_argument("outputs", nargs="+", help="output folders of evaluated jobs, named after their models")
    parser.add_argument("--name", required=True, help="of the files in benchmarks/results")
    parser.add_argument("--baseline", help="the method that others are compared with (default: the plain model)")
    asked = parser.parse_args()
    models = {Path(output).name: told(Store(output), asked.baseline) for output in asked.outputs}
    about = {
        "command": command(),
        "commit": commit(),
        "machine": machine(),
        "told": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(RESULTS / f"{asked.name}.json", {**about, "models": models})
    draw(models, RESULTS / f"{asked.name}.png")
    print(markdown(models))


if __name__ == "__main__":
    main()
