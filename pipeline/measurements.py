"""The measurements of a finished job: `metrics/*.parquet`, a row for every figure of every row of the manifest.

The manifest itself is not rewritten: the files are joined with it by `row_id`. A figure without a value tells why in
`reason`. What was measured with other settings stands beside it, under another `settings_id`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ditflow.metrics import METRICS
from ditflow.metrics.base import MetricSettings
from pipeline.job import content_id
from pipeline.manifest import READ_THREADS, Manifest, is_video, parquet_bytes
from pipeline.store import Store, StoreDamagedError
from pipeline.waits import counted

FOLDER = "metrics"
SCHEMA: Any = pa.schema(
    [
        pa.field("row_id", pa.string(), metadata={"meaning": "row of the manifest"}),
        pa.field("metric", pa.string(), metadata={"meaning": "name of the metric"}),
        pa.field("figure", pa.string(), metadata={"meaning": "name of the number; a metric may have several"}),
        pa.field("value", pa.float64(), metadata={"meaning": "the number; null where there is none"}),
        pa.field("reason", pa.string(), metadata={"meaning": "why there is no number"}),
        pa.field("settings_id", pa.string(), metadata={"meaning": "hash of the settings that matter to the metric"}),
        pa.field("settings_json", pa.string(), metadata={"meaning": "those settings"}),
        pa.field("measured_at", pa.timestamp("us", tz="UTC"), metadata={"meaning": "when"}),
    ]
)


@dataclass(frozen=True)
class Task:
    """A row of the manifest, and the metrics that it has not got yet."""

    row: dict[str, Any]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """One number of a metric, or why there is none."""

    metric: str
    figure: str
    value: float | None
    reason: str | None = None


def settings_of(metric: str, settings: MetricSettings) -> dict[str, Any]:
    """Return the settings that matter to a metric."""
    return {key: getattr(settings, key) for key in METRICS[metric].settings}


def settings_id(metric: str, settings: MetricSettings) -> str:
    """Return the hash of a metric's name and of the settings that matter to it."""
    return content_id(metric=metric, **settings_of(metric, settings))


@dataclass(frozen=True)
class Measurements:
    """The measurements in a job's output folder."""

    store: Store

    def todo(self, settings: MetricSettings) -> list[Task]:
        """Return the finished videos of the job with what is to be measured of them, none for those that have all.

        Videos of one reference come one after the other, so that it is looked at once by each worker.
        """
        done = {(row["row_id"], row["metric"], row["settings_id"]) for row in self.read().to_pylist()}
        wanted = [(name, settings_id(name, settings)) for name in settings.names]
        tasks = []
        rows = Manifest(self.store).read().to_pylist()
        for row in sorted(rows, key=lambda row: (row["reference_sha256"] or "", row["row_id"])):
            if row["status"] == "ok" and is_video(row["output_uri"]):
                missing = tuple(name for name, its_id in wanted if (row["row_id"], name, its_id) not in done)
                tasks += [Task(row, missing)] if missing else []
        return tasks

    def write(self, row_id: str, settings: MetricSettings, figures: Sequence[Figure]) -> None:
        """Keep what was measured of one row."""
        now = datetime.now(UTC)
        rows = [
            {
                "row_id": row_id,
                **asdict(figure),
                "settings_id": settings_id(figure.metric, settings),
                "settings_json": json.dumps(settings_of(figure.metric, settings), sort_keys=True),
                "measured_at": now,
            }
            for figure in figures
        ]
        measured = content_id(settings=sorted({row["settings_id"] for row in rows}))
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        self.store.put(f"{FOLDER}/{row_id}-{measured}.parquet", parquet_bytes(table))

    def read(self) -> Any:
        """Return all measurements as a pyarrow Table of SCHEMA."""
        keys = [key for key in self.store.list(FOLDER) if key.endswith(".parquet")]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            tables = list(counted(pool.map(self._table, keys), "the measurements to be read", len(keys)))
        return pa.concat_tables([SCHEMA.empty_table(), *tables])

    def values(self, settings: MetricSettings) -> dict[str, dict[str, float | None]]:
        """Return {row_id: {figure: value or None}} of what was measured with these settings."""
        return values_by_row(self.taken_with(settings))

    def taken_with(self, settings: MetricSettings) -> list[dict[str, Any]]:
        """Return the measurements that were taken with these settings."""
        wanted = {(name, settings_id(name, settings)) for name in settings.names}
        return [row for row in self.read().to_pylist() if (row["metric"], row["settings_id"]) in wanted]

    def _table(self, key: str) -> Any:
        """Return one file's measurements; StoreDamagedError, which names it, for a file that has none."""
        data = self.store.read(key)
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            table = table.select(SCHEMA.names).cast(SCHEMA)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise StoreDamagedError(
                f"{self.store.uri_of(key)} ({len(data)} bytes) has no measurements that can be read ({error!s:.200}): "
                "it is damaged, or another program wrote it. Remove it, and run `ditflow evaluate` again"
            ) from error
        return table


def values_by_row(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return measurements as {row_id: {figure: value or None}}."""
    values: dict[str, dict[str, float | None]] = {}
    for row in rows:
        values.setdefault(row["row_id"], {})[row["figure"]] = row["value"]
    return values
