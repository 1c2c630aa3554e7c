"""What a person sees of a finished job: tables that compare its methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ditflow.media.plot import plot_intervals
from jobs.table import printable, stdout_screen
from pipeline.comparison import Comparison, Entry

_MOST_REASONS = 20


def print_comparison(comparison: Comparison) -> None:
    """Print on stdout, for all rows and every class of prompts, a row for every method and a column for every figure.

    Below each mean stands the gain on the baseline, and below the tables why rows have no value.
    """
    console = stdout_screen()
    if not comparison.entries:
        console.print("no row has a value of any figure")
    for category in comparison.categories:
        title = None if comparison.categories == [None] else printable(category or "all prompts")
        table = Table("method", *comparison.figures, box=SIMPLE_HEAD, title=title, title_justify="left")
        for variant in comparison.variants:
            entries = [comparison.at(variant, figure, category) for figure in comparison.figures]
            table.add_row(printable(variant), *map(_comparison_cell, entries))
        console.print(table)
    if comparison.entries:
        console.print(f"means with 95 % bootstrap intervals; below them the paired difference to {comparison.baseline}")
    for why in comparison.unmeasured[:_MOST_REASONS]:
        console.print(f"{why.variant}: {why.rows} rows without {why.metric}: {why.reason}", soft_wrap=True)
    if (more := len(comparison.unmeasured) - _MOST_REASONS) > 0:
        console.print(f"... and {more} more reasons: --json has all of them")


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
        file.write_text(writers[file.suffix](), encoding="utf-8")
    else:
        raise ValueError(f"--table: {file} is not valid: expected a name ending in {', '.join((*writers, '.png'))}")
