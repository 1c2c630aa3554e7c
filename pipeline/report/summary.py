"""What a page says of a job as a whole: figures of its methods, where the time goes, how far losses came down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.comparison import COLUMNS, ComparisonError, compare_rows
from pipeline.measurements import Measurements
from pipeline.record import PHASES
from pipeline.store import Store

_BINS = 24


@dataclass(frozen=True)
class Figures:
    """Figures of a job's rows: values by row id and name, and by name the settings with which they were measured."""

    values: Mapping[str, Mapping[str, float | None]]
    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the figures, in alphabetical order."""
        return sorted(self.settings)

    def at(self, row_id: str, name: str) -> float | None:
        """Return a row's figure, or None."""
        return self.values.get(row_id, {}).get(name)


def newest_figures(store: Store) -> Figures:
    """Return what was measured of a job; of a metric that was taken with several settings, the latest ones'."""
    rows = Measurements(store).read().to_pylist()
    newest: dict[str, tuple[Any, str]] = {}
    for row in rows:
        newest[row["metric"]] = max(newest.get(row["metric"], (row["measured_at"], "")), _measured(row))
    chosen = [row for row in rows if row["settings_id"] == newest[row["metric"]][1]]
    values: dict[str, dict[str, float | None]] = {}
    for row in chosen:
        values.setdefault(row["row_id"], {})[row["figure"]] = row["value"]
    # A metric without a value stands under its own name; that is a figure only if some row has one.
    known = {row["figure"]: row["settings_json"] for row in chosen if row["value"] is not None}
    return Figures(values, {name: json.loads(text) for name, text in known.items()})


def _measured(row: Mapping[str, Any]) -> tuple[Any, str]:
    return row["measured_at"], row["settings_id"]


def summarise(table: Any, names: Mapping[str, str], figures: Figures) -> dict[str, Any]:
    """Return the summary of rows, a manifest's table, whose methods have these names."""
    variants = sorted(set(names.values()))
    name_of = np.array([names[row_id] for row_id in table["row_id"].to_pylist()])
    statuses = Counter(zip(name_of.tolist(), table["status"].to_pylist(), strict=True))
    finished = pc.equal(table["status"], "ok").to_numpy()
    chosen = {variant: finished & (name_of == variant) for variant in variants}
    return {
        "statuses": [{"variant": variant, "status": status, "rows": n} for (variant, status), n in statuses.items()],
        "figures": _compared(table, figures),
        "seconds": [{"variant": variant, "means": _seconds(table, rows)} for variant, rows in chosen.items()],
        "losses": [
            {"variant": variant, **spread}
            for variant, rows in chosen.items()
            if (spread := _spread_of_losses(table, rows)) is not None
        ],
    }


def _compared(table: Any, figures: Figures) -> list[dict[str, Any]]:
    """Return mean and interval of every figure, method and class of prompts."""
    rows = [row for row in table.select(list(COLUMNS)).to_pylist() if row["status"] == "ok"]
    try:
        return [asdict(entry) for entry in compare_rows(rows, figures.values).entries]
    except ComparisonError:
        return []


def _seconds(table: Any, rows: np.ndarray) -> list[float]:
    """Return the mean seconds of every phase; a phase that a row does not have took it none."""
    columns = (table[f"seconds_{phase}"].fill_null(0.0).to_numpy() for phase in PHASES)
    return [float(np.nanmean(column[rows])) if rows.any() else 0.0 for column in columns]


def _spread_of_losses(table: Any, rows: np.ndarray) -> dict[str, Any] | None:
    """Return histograms of first and final losses over one range, or None for a method without."""
    first, final = (_known(table[name].to_numpy(), rows) for name in ("loss_first", "loss_final"))
    if not len(first) or not len(final):
        return None
    bounds = (float(min(first.min(), final.min())), float(max(first.max(), final.max())))
    counted: Sequence[np.ndarray] = [np.histogram(values, _BINS, bounds)[0] for values in (first, final)]
    return {
        "from": bounds[0],
        "to": bounds[1],
        "first": counted[0].tolist(),
        "final": counted[1].tolist(),
        "medians": [float(np.median(first)), float(np.median(final))],
    }


def _known(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    chosen = values[rows].astype(float)
    return chosen[np.isfinite(chosen)]
