"""What a job's measurements say of its methods: means with their uncertainty, and paired differences.

Two methods are compared on the pairs that both made: the same reference, prompt and seed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ditflow.metrics.base import MetricSettings
from ditflow.metrics.statistics import Interval, bootstrap_interval, paired_difference
from pipeline.manifest import Manifest
from pipeline.measurements import Measurements
from pipeline.store import Store

_COLUMNS = ("row_id", "status", "variant", "method", "reference_sha256", "prompt", "seed")


class ComparisonError(ValueError):
    """There is nothing to compare, or not as asked."""


@dataclass(frozen=True)
class Entry:
    """One figure of one method: its mean over rows, and how much it differs from the baseline on the same pairs.

    without: rows that have no value of the figure.
    """

    variant: str
    figure: str
    interval: Interval
    without: int
    difference: Interval | None


@dataclass(frozen=True)
class Comparison:
    """The methods of a job, measured: an entry for every method and figure, methods in alphabetical order."""

    baseline: str
    entries: tuple[Entry, ...]

    @property
    def figures(self) -> list[str]:
        """Names of the figures, in the order of their metrics."""
        return list(dict.fromkeys(entry.figure for entry in self.entries))

    @property
    def variants(self) -> list[str]:
        """Names of the methods."""
        return list(dict.fromkeys(entry.variant for entry in self.entries))

    def at(self, variant: str, figure: str) -> Entry | None:
        """Return an entry, or None where nothing was measured."""
        return next((e for e in self.entries if (e.variant, e.figure) == (variant, figure)), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"baseline": self.baseline, "entries": [asdict(entry) for entry in self.entries]}

    def to_csv(self) -> str:
        """Return a line for every method and figure."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        bounds = ("mean", "low", "high", "count")
        writer.writerow(["variant", "figure", *bounds, "without", *(f"difference_{bound}" for bound in bounds)])
        for entry in self.entries:
            difference = asdict(entry.difference) if entry.difference is not None else dict.fromkeys(bounds)
            values = [asdict(entry.interval)[bound] for bound in bounds]
            writer.writerow([entry.variant, entry.figure, *values, entry.without, *(difference[b] for b in bounds)])
        return text.getvalue()

    def to_latex(self) -> str:
        """Return a tabular with a row for every method and a column for every figure: mean and 95 % interval."""
        figures = [figure.replace("_", " ") for figure in self.figures]
        lines = [
            rf"\begin{{tabular}}{{l{'c' * len(figures)}}}",
            r"\hline",
            " & ".join(["method", *figures]) + r" \\",
            r"\hline",
        ]
        for variant in self.variants:
            cells = [_latex_cell(self.at(variant, figure)) for figure in self.figures]
            lines.append(" & ".join([_latex_text(variant), *cells]) + r" \\")
        return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def compare(store: Store, settings: MetricSettings, baseline: str | None = None) -> Comparison:
    """Compare the methods of a job by what was measured of it.

    baseline: the method that the others are compared with; by default the plain model, if it is among them, else the
    first in alphabetical order. Raises ComparisonError when nothing was measured, or for an unknown baseline.
    """
    rows = [row for row in Manifest(store).read(_COLUMNS).to_pylist() if row["status"] == "ok"]
    measured = Measurements(store).values(settings)
    rows = [row for row in rows if row["row_id"] in measured]
    if not rows:
        raise ComparisonError(
            f"{store.uri}: no row is measured with these settings: expected a finished job with videos"
        )
    methods = {row["variant"] or row["method"]: row["method"] for row in rows}
    variants = sorted(methods)
    if baseline is None:
        baseline = next((variant for variant in variants if methods[variant] == "none"), variants[0])
    if baseline not in variants:
        raise ComparisonError(f"baseline: {baseline!r} is none of the job's methods: {', '.join(variants)}")
    table = _table(rows, measured)
    figures = list(dict.fromkeys(figure for values in measured.values() for figure in values))
    entries = [_entry(table, variant, figure, baseline) for variant in variants for figure in figures]
    return Comparison(baseline, tuple(entry for entry in entries if entry is not None))


Pair = tuple[Any, ...]
_Table = dict[str, dict[Pair, Mapping[str, float | None]]]


def _table(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Mapping[str, float | None]]) -> _Table:
    """Return {method: {pair: figures}}."""
    table: _Table = {}
    for row in rows:
        pair = (row["reference_sha256"], row["prompt"], row["seed"])
        table.setdefault(row["variant"] or row["method"], {})[pair] = measured[row["row_id"]]
    return table


def _entry(table: _Table, variant: str, figure: str, baseline: str) -> Entry | None:
    """Return the entry of a method and a figure, or None if no row has a value."""
    values, others = (_values(table[name], figure) for name in (variant, baseline))
    if not values:
        return None
    shared = sorted(values.keys() & others.keys(), key=str)
    difference = None
    if variant != baseline and shared:
        difference = paired_difference([values[pair] for pair in shared], [others[pair] for pair in shared])
    return Entry(
        variant, figure, bootstrap_interval(list(values.values())), len(table[variant]) - len(values), difference
    )


def _values(pairs: Mapping[Pair, Mapping[str, float | None]], figure: str) -> dict[Pair, float]:
    found = {pair: figures.get(figure) for pair, figures in pairs.items()}
    return {pair: value for pair, value in found.items() if value is not None}


def _latex_cell(entry: Entry | None) -> str:
    if entry is None:
        return "--"
    return rf"{entry.interval.mean:.3f} {{\small [{entry.interval.low:.3f}, {entry.interval.high:.3f}]}}"


def _latex_text(text: str) -> str:
    """Escape what LaTeX would read as a command."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, "\\" + letter if letter in "&%$#_{}" else letter) for letter in text)
