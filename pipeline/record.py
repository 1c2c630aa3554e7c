"""The record: every column of the manifest, its Arrow type, its unit and its meaning, in one table.

A row tells how one planned piece of work ended. `make_row` checks it, `rows_to_table` gives it its types.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipeline.store import redact

SCHEMA_VERSION = 1
VERSION_KEY = b"ditflow_schema_version"

STATUSES = ("ok", "failed", "quarantined")
ERROR_KINDS = ("transient", "permanent", "out_of_memory", "worker_died", "deadline")

_TEXT, _REAL, _TIME = pa.string(), pa.float64(), pa.timestamp("us", tz="UTC")
_SMALL, _LARGE, _LOSS = pa.int32(), pa.int64(), pa.float32()


class RecordError(ValueError):
    """A row that the manifest cannot hold: an unknown column, a wrong type, or a contradiction."""


@dataclass(frozen=True)
class Column:
    """One column: its name, Arrow type, unit ("" for none) and what it means."""

    name: str
    type: Any
    unit: str
    meaning: str


COLUMNS: tuple[Column, ...] = (
    Column("row_id", _TEXT, "", "content hash of everything that decides the output; unique"),
    Column("job", _TEXT, "", "the job's name"),
    Column("kind", _TEXT, "", "extract, synthesize, build-bank or reuse"),
    Column("status", _TEXT, "", "ok, failed, or quarantined: given up because it kept killing its process"),
    Column("reference_uri", _TEXT, "", "the video whose motion is taken; of a reused bank, what it was learned of"),
    Column("reference_sha256", _TEXT, "hex", "hash of the reference's bytes"),
    Column("prompt", _TEXT, "", "what the new video shows"),
    Column("category", _TEXT, "", "the prompt's class, such as caption, subject or scene"),
    Column("negative_prompt", _TEXT, "", "what it should not show"),
    Column("seed", _LARGE, "", "seed of every random draw of this row"),
    Column("variant", _TEXT, "", "the method's name in the job's comparison; of a single method its own"),
    Column("method", _TEXT, "", "none, injection, or the motion loss that guided"),
    Column("optimize", _TEXT, "", "what was optimised: latent, position or coordinates; zero-shot with a reused bank"),
    Column("model", _TEXT, "", "the model's name or folder"),
    Column("model_revision", _TEXT, "", "hash of the model's configuration, weights and vocabulary"),
    Column("spec_json", _TEXT, "JSON", "the resolved settings of this row"),
    Column("output_uri", _TEXT, "", "where the output was written"),
    Column("output_sha256", _TEXT, "hex", "hash of the output's bytes"),
    Column("output_bytes", _LARGE, "bytes", "size of the output"),
    Column("amf_uri", _TEXT, "", "the attention motion flow that guided this row"),
    Column("bank_uri", _TEXT, "", "the motion bank that was written or reused"),
    Column("bank_loads", _SMALL, "banks", "motion banks that the process has read since its row before"),
    Column("frames", _SMALL, "frames", "length of the video"),
    Column("height", _SMALL, "pixels", "height of the video"),
    Column("width", _SMALL, "pixels", "width of the video"),
    Column("fps", _REAL, "frames/second", "frame rate of the video"),
    Column("losses", pa.list_(_LOSS), "", "motion loss, one per optimiser iteration, in order"),
    Column("loss_first", _LOSS, "", "the first of losses"),
    Column("loss_final", _LOSS, "", "the last of losses"),
    Column("seconds_read", _REAL, "seconds", "reading and decoding the reference"),
    Column("seconds_extract", _REAL, "seconds", "extracting the motion signal"),
    Column("seconds_learn", _REAL, "seconds", "learning positions with another prompt, before a zero-shot generation"),
    Column("seconds_guidance", _REAL, "seconds", "optimiser iterations"),
    Column("seconds_denoise", _REAL, "seconds", "denoising steps without the guidance"),
    Column("seconds_decode", _REAL, "seconds", "latents to frames"),
    Column("seconds_encode", _REAL, "seconds", "frames to the video file"),
    Column("seconds_write", _REAL, "seconds", "writing the outputs to storage"),
    Column("seconds_total", _REAL, "seconds", "the whole attempt that ended the row"),
    Column("peak_memory_bytes", _LARGE, "bytes", "highest memory use on the device"),
    Column("device", _TEXT, "", "the device that did the work"),
    Column("node", _TEXT, "", "the machine that did the work"),
    Column("process", _LARGE, "", "number of the process on its machine that did the work"),
    Column("attempts", _SMALL, "attempts", "tries that were begun, this one included"),
    Column("error_kind", _TEXT, "", "transient, permanent, out_of_memory, worker_died or deadline"),
    Column("error_class", _TEXT, "", "class of the error that ended the row"),
    Column("error_message", _TEXT, "", "the error and its causes, without credentials"),
    Column("started_at", _TIME, "UTC", "start of the attempt that ended the row"),
    Column("finished_at", _TIME, "UTC", "end of that attempt, before this record was written"),
    Column("versions_json", _TEXT, "JSON", "versions of the software used"),
    Column("execution_json", _TEXT, "JSON", "how it was run: checkpointing, serial CFG, attention, threads"),
    Column(
        "reference_notes",
        pa.list_(_TEXT),
        "",
        "how the reference was read, where not as usual: skipped frames, uneven rate, deinterlaced, assumed colours",
    ),
    Column("noise_losses", pa.list_(_LOSS), "", "motion loss of each initial noise tried; the smallest one's was used"),
    Column("prompt_tokens", _SMALL, "tokens", "length of the prompt as the text encoder counts it"),
    Column("prompt_cut", pa.bool_(), "", "whether the prompt was longer than what the text encoder reads, and was cut"),
    Column("motion_source", _TEXT, "JSON", "where the motion target comes from, with its settings"),
    Column("motion_filters", _TEXT, "JSON", "what was done to the motion target, in turn"),
    Column("mask_uri", _TEXT, "", "the reference's mask, if a filter read one"),
    Column("mask_sha256", _TEXT, "hex", "hash of the mask's bytes"),
)
PHASES = ("read", "extract", "learn", "guidance", "denoise", "decode", "encode", "write")
"""What a row's time is spent on, in this order: each has a column `seconds_<phase>`."""
COLUMN_NAMES: tuple[str, ...] = tuple(column.name for column in COLUMNS)
SCHEMA: Any = pa.schema(
    [pa.field(c.name, c.type, metadata={"unit": c.unit, "meaning": c.meaning}) for c in COLUMNS],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)

_NEEDED = {
    "ok": ("output_uri", "output_sha256", "output_bytes"),
    "failed": ("error_kind", "error_class", "error_message"),
    "quarantined": ("error_kind", "error_class", "error_message"),
}
_REDACTED = ("error_message", "reference_uri", "mask_uri", "output_uri", "amf_uri", "bank_uri")


def make_row(**values: Any) -> dict[str, Any]:
    """Return a manifest row with every column, in order; columns not given are None.

    Credentials in URIs and in the error message are replaced by `***`.

    Raises RecordError for unknown columns, unknown statuses or error kinds, a row id that cannot be a file
    name, times without a time zone, an ok row without its output, and a failed or quarantined row without its
    error.
    """
    check_columns(values)
    row = {name: values.get(name) for name in COLUMN_NAMES}
    check_row_id(row["row_id"])
    _check_choice(row, "status", STATUSES)
    if row["error_kind"] is not None:
        _check_choice(row, "error_kind", ERROR_KINDS)
    _check_needed(row)
    for name in ("started_at", "finished_at"):
        row[name] = _utc(name, row[name])
    for name in _REDACTED:
        if isinstance(text := row[name], str):
            row[name] = redact(text)
    return row


def recorded_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a row's `spec_json`, with `method` and `video` (None: no reference video was read).

    A record may have been changed by hand or by another program. Settings that cannot be read are empty, and
    `unreadable` says why.
    """
    from ditflow.media.video import is_selection  # which loads torch, as a quick look at a manifest need not

    empty: dict[str, Any] = {"method": {}, "video": None}
    if row["spec_json"] is None:
        return empty
    try:
        settings = {**empty, **json.loads(row["spec_json"])}
    except (ValueError, TypeError, RecursionError) as error:
        return {**empty, "unreadable": f"its spec_json cannot be read: {error}"}
    if not isinstance(settings["method"], dict) or not (settings["video"] is None or is_selection(settings["video"])):
        return {**empty, "unreadable": "its spec_json has another `method` or `video` than this program writes"}
    return settings


def rows_to_table(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return the rows as a pyarrow Table of SCHEMA. Raises RecordError naming the column of a wrong type."""
    rows = list(rows)
    arrays = [_array(column, [row[column.name] for row in rows]) for column in COLUMNS]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def check_columns(names: Iterable[str]) -> None:
    """Raise RecordError that names the nearest valid column for any name that is no column."""
    unknown = [name for name in names if name not in COLUMN_NAMES]
    if unknown:
        hints = [f"{name!r}{_nearest(name)}" for name in unknown]
        raise RecordError(f"unknown manifest columns: {', '.join(hints)}. Valid: {', '.join(COLUMN_NAMES)}.")


def check_row_id(row_id: Any) -> str:
    """Return `row_id` if it can be a file name in any storage. Raises RecordError otherwise."""
    if not isinstance(row_id, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", row_id):
        raise RecordError(
            f"row_id is {row_id!r}; expected up to 200 letters, digits, '-', '_' and '.', such as a hex "
            "hash: it names files in the output folder."
        )
    return row_id


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, COLUMN_NAMES, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _check_choice(row: Mapping[str, Any], name: str, valid: tuple[str, ...]) -> None:
    if row[name] not in valid:
        raise RecordError(f"row {row['row_id']}: {name} is {row[name]!r}; valid: {', '.join(valid)}.")


def _check_needed(row: Mapping[str, Any]) -> None:
    missing = [name for name in _NEEDED[row["status"]] if row[name] is None]
    if missing:
        raise RecordError(
            f"row {row['row_id']}: status {row['status']!r} without {', '.join(missing)}. "
            + ("Write the output first, then its record." if row["status"] == "ok" else "Say why the row failed.")
        )
    if row["status"] == "ok" and row["error_kind"] is not None:
        raise RecordError(
            f"row {row['row_id']}: status 'ok' with error_kind {row['error_kind']!r}: it is one or the other."
        )


def _utc(name: str, value: Any) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise RecordError(f"{name} is {value!r}; expected a datetime with a time zone: datetime.now(timezone.utc).")
    return value.astimezone(UTC)


def _array(column: Column, values: list[Any]) -> Any:
    try:
        return pa.array(values, column.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        raise RecordError(
            f"column {column.name!r} holds {', '.join(kinds)}; expected {column.type} ({column.meaning}): {error}"
        ) from error
