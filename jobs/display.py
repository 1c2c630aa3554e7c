"""What a person sees of a job: progress, status, tables."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from ditflow.plot import plot_intervals
from jobs.table import FILE_WIDTH, printable
from pipeline.comparison import Comparison, Entry
from pipeline.manifest import Manifest
from pipeline.run import RUN_KEY
from pipeline.store import Store, StoreMissingError


class RowProgress:
    """A progress bar over a job's rows: rows done, loss of the newest, rows per hour, time left."""

    def __init__(self, name: str, rows: int, screen: Console):
        self._rows, self._done = rows, 0
        self._newest_loss = ""
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows {task.fields[facts]}"),
            console=screen,
            disable=rows == 0,
        )
        self._task: TaskID = self._progress.add_task(name, total=rows, facts="starting")

    def __enter__(self) -> RowProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Count one more row that has ended."""
        self._done += 1
        per_hour = self._done / (time.monotonic() - self._started) * 3600
        left = (self._rows - self._done) / per_hour * 3600
        if row["loss_final"] is not None:
            self._newest_loss = f"loss {row['loss_final']:.4f}, "
        facts = f"{self._newest_loss}{per_hour:.0f} rows/h, {_duration(left)} left"
        self._progress.update(self._task, advance=1, facts=facts)
        if row["status"] != "ok":
            told = printable(str(row["error_message"]))
            self._progress.console.print(f"{row['status']} {row['row_id']}: {told}", markup=False)


def job_status(store: Store) -> dict[str, Any]:
    """Return counts by status, losses, rows per hour of the latest run and seconds left, from the output alone."""
    table = Manifest(store).read(["status", "loss_first", "loss_final", "seconds_total", "finished_at"])
    rows = table.to_pylist()
    try:
        run = json.loads(store.read(RUN_KEY))
    except StoreMissingError:
        run = {"planned": len(rows), "started_at": 0.0}
    started = datetime.fromtimestamp(run["started_at"], UTC)
    recent = sorted(row["finished_at"] for row in rows if row["finished_at"] and row["finished_at"] >= started)
    elapsed = (recent[-1] - started).total_seconds() if recent else 0.0
    per_hour = len(recent) / elapsed * 3600 if elapsed > 0 else None
    left = max(run["planned"] - len(rows), 0)
    return {
        "planned": run["planned"],
        "todo": left,
        **dict(Counter(row["status"] for row in rows)),
        "mean_loss_first": _mean([row["loss_first"] for row in rows]),
        "mean_loss_final": _mean([row["loss_final"] for row in rows]),
        "mean_seconds": _mean([row["seconds_total"] for row in rows]),
        "rows_per_hour": per_hour,
        "seconds_left": left / per_hour * 3600 if per_hour else None,
    }


def print_status(facts: Mapping[str, Any], screen: Console) -> None:
    """Print what `job_status` found, one fact a line."""
    for name, value in facts.items():
        if value is not None:
            shown = (
                _duration(value) if name == "seconds_left" else f"{value:.4g}" if isinstance(value, float) else value
            )
            screen.print(f"{name.replace('_', ' '):>16}  {shown}")


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def print_comparison(comparison: Comparison) -> None:
    """Print on stdout, for all rows and every class of prompts, a row for every method and a column for every figure.

    Below each mean stands the gain on the baseline.
    """
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    for category in comparison.categories:
        title = None if comparison.categories == [None] else category or "all prompts"
        table = Table("method", *comparison.figures, box=SIMPLE_HEAD, title=title, title_justify="left")
        for variant in comparison.variants:
            entries = [comparison.at(variant, figure, category) for figure in comparison.figures]
            table.add_row(variant, *map(_comparison_cell, entries))
        console.print(table)
    console.print(f"means with 95 % bootstrap intervals; below them the paired difference to {comparison.baseline}")


def _comparison_cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    lines = [
        f"{entry.interval.mean:.3f} [{entry.interval.low:.3f}, {entry.interval.high:.3f}] n={entry.interval.count}"
    ]
    if entry.difference is not None:
        difference = entry.difference
        lines.append(f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]")
    if entry.without:
        lines.append(f"{entry.without} rows without a value")
    return "\n".join(lines)


def write_comparison(comparison: Comparison, file: Path) -> None:
    """Write the table as .csv, .tex, .json or, as a chart, .png; ValueError for another ending."""
    writers: dict[str, Callable[[], str]] = {
        ".csv": comparison.to_csv,
        ".tex": comparison.to_latex,
        ".json": lambda: json.dumps(comparison.to_dict(), indent=1),
    }
    if file.suffix == ".png":
        of_all = [entry for entry in comparison.entries if entry.category is None]
        entries = [(entry.figure, entry.variant, entry.interval) for entry in of_all]
        plot_intervals([(figure, name, (i.mean, i.low, i.high)) for figure, name, i in entries], file)
    elif file.suffix in writers:
        file.write_text(writers[file.suffix]())
    else:
        raise ValueError(f"--table: {file} is not valid: expected a name ending in {', '.join((*writers, '.png'))}")
