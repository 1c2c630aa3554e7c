"""What a job's measurements say of its methods: means with their uncertainty, and paired differences.

Two methods are compared on the pairs that both made: the same frames of the same reference, prompt and seed. Where
prompts have classes, the methods are compared over all rows, and then over the rows of each class.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ditflow.metrics.base import MetricSettings
from ditflow.metrics.statistics import Interval, bootstrap_interval, paired_difference
from pipeline.manifest import Manifest
from pipeline.measurements import Measurements, values_by_row
from pipeline.record import recorded_settings
from pipeline.store import Store

COLUMNS = (
    "row_id",
    "status",
    "variant",
    "method",
    "model_revision",
    "reference_sha256",
    "bank_uri",
    "prompt",
    "category",
    "seed",
    "spec_json",
    "started_at",
)
"""What of a manifest's rows a comparison looks at."""


class ComparisonError(ValueError):
    """There is nothing to compare, or not as asked."""


@dataclass(frozen=True)
class Entry:
    """One figure of one method: its mean over rows, and how much it differs from the baseline on the same pairs.

    category: the class of prompts that was looked at, None for all rows. without: rows that have no value of the
    figure.
    """

    variant: str
    category: str | None
    figure: str
    interval: Interval
    without: int
    difference: Interval | None


@dataclass(frozen=True)
class Unmeasured:
    """Why some rows of a method have no value of a metric, and how many rows that is."""

    variant: str
    metric: str
    reason: str
    rows: int


@dataclass(frozen=True)
class Comparison:
    """The methods of a job, measured: an entry for every method, class of prompts and figure, in alphabetical order.

    settings: of every method, as its rows have them. Rows of one method with other settings, from an earlier version
    of the job, stand apart under a numbered name. unmeasured: the commonest reason first.
    """

    baseline: str
    entries: tuple[Entry, ...]
    settings: Mapping[str, Mapping[str, Any]]
    unmeasured: tuple[Unmeasured, ...] = ()

    @property
    def figures(self) -> list[str]:
        """Names of the figures, in the order of their metrics."""
        return list(dict.fromkeys(entry.figure for entry in self.entries))

    @property
    def variants(self) -> list[str]:
        """Names of the methods."""
        return list(dict.fromkeys(entry.variant for entry in self.entries))

    @property
    def categories(self) -> list[str | None]:
        """The classes of prompts, None (all rows) first."""
        return list(dict.fromkeys(entry.category for entry in self.entries))

    def at(self, variant: str, figure: str, category: str | None = None) -> Entry | None:
        """Return an entry, or None where nothing was measured."""
        wanted = (variant, category, figure)
        return next((e for e in self.entries if (e.variant, e.category, e.figure) == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        entries = [asdict(entry) for entry in self.entries]
        unmeasured = [asdict(reason) for reason in self.unmeasured]
        return {"baseline": self.baseline, "entries": entries, "unmeasured": unmeasured, "settings": self.settings}

    def to_csv(self) -> str:
        """Return a line for every method, class of prompts ("" for all rows) and figure."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        bounds = ("mean", "low", "high", "count")
        writer.writerow(
            ["variant", "category", "figure", *bounds, "without", *(f"difference_{bound}" for bound in bounds)]
        )
        for entry in self.entries:
            difference = asdict(entry.difference) if entry.difference is not None else dict.fromkeys(bounds)
            values = [asdict(entry.interval)[bound] for bound in bounds]
            what = [entry.variant, entry.category or "", entry.figure]
            writer.writerow([*what, *values, entry.without, *(difference[b] for b in bounds)])
        return text.getvalue()

    def to_latex(self) -> str:
        """Return a tabular with a row for every method and a column for every figure: mean and 95 % interval.

        Every class of prompts has rows of its own, below a line with its name.
        """
        figures = [figure.replace("_", " ") for figure in self.figures]
        lines = [
            rf"\begin{{tabular}}{{l{'c' * len(figures)}}}",
            r"\hline",
            " & ".join(["method", *figures]) + r" \\",
            r"\hline",
        ]
        for category in self.categories:
            if category is not None:
                name = rf"\multicolumn{{{1 + len(figures)}}}{{l}}{{\emph{{{_latex_text(category)}}}}}"
                lines += [r"\hline", name + r" \\"]
            for variant in self.variants:
                cells = [_latex_cell(self.at(variant, figure, category)) for figure in self.figures]
                lines.append(" & ".join([_latex_text(variant), *cells]) + r" \\")
        return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def compare(store: Store, settings: MetricSettings, baseline: str | None = None) -> Comparison:
    """Compare the methods of a job by what was measured of it.

    baseline: the method that the others are compared with; by default the plain model, if it is among them, else the
    first in alphabetical order. Raises ComparisonError when nothing was measured, or for an unknown baseline.
    """
    rows = [row for row in Manifest(store).read(COLUMNS).to_pylist() if row["status"] == "ok"]
    measurements = Measurements(store).taken_with(settings)
    try:
        comparison = compare_rows(rows, values_by_row(measurements), baseline)
    except ComparisonError as error:
        raise ComparisonError(f"{store.uri}: {error}") from error
    names, _ = method_names([row for row in rows if row["row_id"] in {taken["row_id"] for taken in measurements}])
    reasons = Counter(
        (names[taken["row_id"]], taken["metric"], taken["reason"])
        for taken in measurements
        if taken["value"] is None and taken["row_id"] in names
    )
    return replace(comparison, unmeasured=tuple(Unmeasured(*why, count) for why, count in reasons.most_common()))


def compare_rows(
    rows: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Mapping[str, float | None]],
    baseline: str | None = None,
) -> Comparison:
    """Compare methods by their finished rows, of which `COLUMNS` are known, as `compare` does.

    measured: {row_id: {figure: value or None}}.
    """
    rows = [row for row in rows if row["row_id"] in measured]
    if not rows:
        raise ComparisonError("no row is measured with these settings: expected a finished job with videos")
    names, settings_of = method_names(rows)
    plain = {names[row["row_id"]] for row in rows if row["method"] == "none"}
    variants = sorted(settings_of)
    if baseline is None:
        baseline = min(plain, default=variants[0])
    if baseline not in variants:
        raise ComparisonError(f"baseline: {baseline!r} is none of the job's methods: {', '.join(variants)}")
    figures = list(dict.fromkeys(figure for values in measured.values() for figure in values))
    classes = [None, *sorted({row["category"] for row in rows} - {None})]
    pairs = {row["row_id"]: pair_of(row) for row in rows}
    entries = []
    for category in classes:
        table: _Table = {}
        for row in rows:
            if category in (None, row["category"]):
                row_id = row["row_id"]
                table.setdefault(names[row_id], {})[pairs[row_id]] = measured[row_id]
        entries += [_entry(table, variant, category, figure, baseline) for variant in variants for figure in figures]
    found = tuple(entry for entry in entries if entry is not None)
    return Comparison(baseline, found, settings_of)


Pair = tuple[Any, ...]
_Table = dict[str, dict[Pair, Mapping[str, float | None]]]
"""{method: {pair: figures}}"""


def method_names(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return {row_id: name of its method} and {name: settings} of rows of which `COLUMNS` are known.

    Where one name has had several settings, all but the first are numbered.
    """
    known: dict[str, list[dict[str, Any]]] = {}
    names, settings_of = {}, {}
    for row in sorted(rows, key=lambda row: (row["started_at"] is not None, row["started_at"])):
        variant, settings = row["variant"] or row["method"] or "unknown", _settings(row)
        versions = known.setdefault(variant, [])
        if settings not in versions:
            versions.append(settings)
        number = versions.index(settings) + 1
        name = names[row["row_id"]] = variant if number == 1 else f"{variant} ({number})"
        settings_of[name] = settings
    return names, settings_of


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row shares with all others of its method: not its frames, nor the prompt that it learns with."""
    settings = recorded_settings(row)
    method = {key: value for key, value in settings["method"].items() if key != "learn_with"}
    video = settings["video"] and {k: v for k, v in settings["video"].items() if k not in ("start", "stride")}
    return {**settings, "method": method, "video": video, "model_revision": row["model_revision"]}


def pair_of(row: Mapping[str, Any]) -> Pair:
    """Return what rows of different methods have in common if they are to be compared."""
    video = json.dumps(recorded_settings(row)["video"])
    return (row["reference_sha256"] or row["bank_uri"], video, row["prompt"], row["seed"])


def _entry(table: _Table, variant: str, category: str | None, figure: str, baseline: str) -> Entry | None:
    """Return the entry of a method and a figure, or None if no row has a value."""
    values, others = (_values(table.get(name, {}), figure) for name in (variant, baseline))
    if not values:
        return None
    shared = sorted(values.keys() & others.keys(), key=str)
    difference = None
    if variant != baseline and shared:
        difference = paired_difference([values[pair] for pair in shared], [others[pair] for pair in shared])
    without = len(table[variant]) - len(values)
    return Entry(variant, category, figure, bootstrap_interval(list(values.values())), without, difference)


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
