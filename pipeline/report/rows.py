"""The rows of a manifest as the page takes them in: a small index of all, and everything in files of some hundred.

A row's file does not change when later rows end or are measured: they come behind it, and figures are in the index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from pipeline.comparison import method_names, pair_of
from pipeline.job import content_id
from pipeline.manifest import is_video, output_key
from pipeline.plan import Input
from pipeline.record import STATUSES, recorded_settings
from pipeline.report.summary import PHASES, Figures

ROWS_PER_FILE = 200
_NARROW = (
    "row_id", "status", "variant", "method", "model_revision", "reference_uri", "reference_sha256", "bank_uri",
    "amf_uri", "prompt", "category", "seed", "spec_json", "loss_first", "loss_final", "seconds_total", "fps",
    "started_at", "finished_at", *(f"seconds_{phase}" for phase in PHASES),
)  # fmt: skip


@dataclass(frozen=True)
class UsedReference:
    """A reference video, and which of its frames were used."""

    source: Input
    video: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The same for all rows that use the same frames at the same size."""
        return content_id(sha256=self.source.sha256, video=self.video)


class Codes:
    """Numbers values in the order in which they come: texts that repeat are written once."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        """Return the number of a value."""
        return self._numbers.setdefault(value, len(self._numbers))

    @property
    def values(self) -> list[Any]:
        """The values, in the order of their numbers."""
        return list(self._numbers)


@dataclass(frozen=True)
class Rows:
    """A manifest's rows in the order in which they ended. names: the method of each, by row id."""

    table: Any
    names: Mapping[str, str]
    _settings: Codes = field(default_factory=Codes, repr=False)

    @classmethod
    def of(cls, manifest: Any) -> Rows:
        """Return the rows of a manifest's table."""
        table = manifest.sort_by([("finished_at", "ascending"), ("row_id", "ascending")])
        columns = ["row_id", "variant", "method", "model_revision", "spec_json", "started_at"]
        names, _ = method_names(table.select(columns).to_pylist())
        return cls(table, names)

    @cached_property
    def _narrow(self) -> list[dict[str, Any]]:
        return self.table.select(list(_NARROW)).to_pylist()

    def references(self) -> dict[str, UsedReference]:
        """Return the references that were used, by their ids."""
        found = (used_reference(row) for row in self._narrow)
        return {reference.id: reference for reference in found if reference is not None}

    def motions(self) -> dict[str, str]:
        """Return the URIs of the flows that guided rows, by their ids."""
        found = ((motion_id(row), row["amf_uri"]) for row in self._narrow)
        return {its_id: uri for its_id, uri in found if its_id is not None}

    def pages(self) -> Iterator[list[dict[str, Any]]]:
        """Yield all that is shown of the rows, `ROWS_PER_FILE` at a time."""
        for start in range(0, self.table.num_rows, ROWS_PER_FILE):
            rows = self.table.slice(start, ROWS_PER_FILE).to_pylist()
            yield [self._shown(row) for row in rows]

    def index(self, figures: Figures) -> dict[str, Any]:
        """Return what is needed of every row to find and to sort it, column by column; call it after `pages`."""
        newest = self._narrow[-1]
        codes = {name: Codes() for name in ("variant", "category", "prompt", "reference", "pair")}
        of_row: dict[str, Callable[[dict[str, Any]], Any]] = {
            "id": lambda row: row["row_id"],
            "status": lambda row: STATUSES.index(row["status"]),
            "variant": lambda row: codes["variant"](self.names[row["row_id"]]),
            "category": lambda row: codes["category"](row["category"]),
            "prompt": lambda row: codes["prompt"](row["prompt"]),
            "reference": lambda row: codes["reference"](_name(row["reference_uri"])),
            "pair": lambda row: codes["pair"](json.dumps(pair_of(row))),
            "loss_first": lambda row: row["loss_first"],
            "loss_final": lambda row: row["loss_final"],
            "seconds": _spent,
        }
        columns = {name: [value(row) for row in self._narrow] for name, value in of_row.items()}
        measured = [[figures.at(row["row_id"], name) for row in self._narrow] for name in figures.names]
        job = self.table.select(["job", "kind", "model"]).slice(self.table.num_rows - 1).to_pylist()[0]
        return {
            **job,
            "finished": str(newest["finished_at"] or ""),
            "statuses": list(STATUSES),
            **{f"{name}s": codes[name].values for name in ("variant", "prompt")},
            "categories": codes["category"].values,
            "referenceNames": codes["reference"].values,
            "phases": list(PHASES),
            "settings": [json.loads(text) for text in self._settings.values],
            "rows": columns,
            "figures": [{"name": name, "settings": figures.settings[name]} for name in figures.names],
            "measured": measured,
        }

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return what a row's card shows."""
        settings = recorded_settings(row)
        method, video = settings["method"], settings["video"] or {}
        return {
            **{name: row[name] for name in ("kind", "prompt", "category", "seed", "losses", "device", "node")},
            **{name: row[name] for name in ("attempts", "peak_memory_bytes", "frames", "height", "width", "fps")},
            "id": row["row_id"],
            "status": row["status"],
            "variant": self.names[row["row_id"]],
            "output": _relative(row["output_uri"]),
            "isVideo": is_video(row["output_uri"]),
            "bank": _name(row["bank_uri"]),
            "reference": reference.id if (reference := used_reference(row)) else None,
            "referenceUri": row["reference_uri"],
            "referenceName": _name(row["reference_uri"]),
            "motion": motion_id(row),
            "iterations": method.get("iterations"),
            "own": {"learn_with": method.get("learn_with"), "start": video.get("start"), "stride": video.get("stride")},
            "settings": self._settings(_shared_settings(row, settings)),
            "seconds": [row[f"seconds_{phase}"] for phase in PHASES],
            "total": row["seconds_total"],
            "finished": str(row["finished_at"] or ""),
            "error": _error(row, settings),
        }


def _error(row: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return why there is no result, or why a record tells less than it should; None for a sound row that is ok."""
    if "unreadable" in settings:
        return {"kind": "unreadable", "class": "record", "message": f"{settings['unreadable']}. It was changed by hand"}
    return None if row["status"] == "ok" else {part: row[f"error_{part}"] for part in ("kind", "class", "message")}


def used_reference(row: Mapping[str, Any]) -> UsedReference | None:
    """Return the frames of a reference that a row used, or None for a row without one."""
    video = recorded_settings(row)["video"]
    if row["reference_uri"] is None or video is None:
        return None
    return UsedReference(Input.recorded(row["reference_uri"], row["reference_sha256"]), video)


def motion_id(row: Mapping[str, Any]) -> str | None:
    """Return the id of the attention motion flow that guided a row, None where there is none, or another signal."""
    if row["amf_uri"] is None or row["method"] != "ditflow":
        return None
    return PurePosixPath(row["amf_uri"]).stem


def _shared_settings(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return, as JSON, what a row shares with others of its method."""
    own = {"method": ("learn_with",), "video": ("start", "stride")}
    sections = {
        name: {key: item for key, item in section.items() if key not in own.get(name, ())}
        if isinstance(section, dict)
        else section
        for name, section in settings.items()
    }
    texts = {name: row[f"{name}_json"] for name in ("execution", "versions")}
    about = {name: _json_or_text(text) for name, text in texts.items() if text}
    model = {"name": row["model"], "revision": row["model_revision"], "negative_prompt": row["negative_prompt"]}
    return json.dumps({**sections, "model": model, **about}, sort_keys=True)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _spent(row: Mapping[str, Any]) -> float | None:
    """Return the seconds that a row took: of all phases, or, of a row that has come to none, of its last attempt."""
    phases = [seconds for phase in PHASES if (seconds := row[f"seconds_{phase}"]) is not None]
    return sum(phases) if phases else row["seconds_total"]


def _relative(uri: str | None) -> str | None:
    """Return an output's place relative to the page."""
    key = output_key(uri)
    return f"../{key}" if key else None


def _name(uri: str | None) -> str | None:
    return None if uri is None else PurePosixPath(uri).name
