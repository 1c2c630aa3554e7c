"""Tables that users bring: prompts, and pairs of references and prompts. Parquet, CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from pipeline.job import JOBS_OWN, TAGS, Job, OwnSettings, Table, is_tag
from pipeline.store import public_uri


class PlanError(ValueError):
    """A job's inputs do not make a plan; the message names the key of the spec."""


@dataclass(frozen=True)
class Pair:
    """A row of a table of pairs. Its columns:

    reference: a file, relative to the folder of the references. bank, in its place in a `reuse` job: a file in the
    same way, or the id of a bank. prompt: what the video shows.
    seed: if it varies. category: the prompt's class. start, stop, step: the reference's frames start, start + step,
    ... below stop, as in Python's range; as many of them as the job's videos are long. learn_with: see
    `MethodSettings`. mask: the file of the reference's mask, relative to `references.masks`. tags: more tags of the
    bank that is made, with ";" between them. A column may be missing, and a value may be empty, where the job says the
    same for all rows.
    """

    source: str
    prompt: str
    seed: int | None = None
    category: str | None = None
    own: OwnSettings = JOBS_OWN
    tags: tuple[str, ...] = ()
    mask: str | None = None


_FILE = ("the name of a file", lambda value: isinstance(value, str) and value != "")
_TEXT = ("a text", lambda value: isinstance(value, str) and value != "")
_TEXT_OR_NONE = ("a text, or nothing", lambda value: value is None or isinstance(value, str))


_LEAST, _MOST = -(2**63), 2**63 - 1
"""What a column of the manifest holds."""


def _whole(least: int) -> tuple[str, Callable[[Any], bool]]:
    expected = "a whole number of 64 bits" if least == _LEAST else f"a whole number of at least {least}"
    return (
        expected,
        lambda value: (
            value is None
            or (
                (isinstance(value, int | float) and not isinstance(value, bool))
                and value % 1 == 0
                and least <= value <= _MOST
            )
        ),
    )


_OPTIONAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seed": _whole(_LEAST),
    "category": _TEXT_OR_NONE,
    "start": _whole(0),
    "stop": _whole(1),
    "step": _whole(1),
    "learn_with": _TEXT_OR_NONE,
    "mask": _TEXT_OR_NONE,
    "tags": (f"{TAGS}, with ';' between them", lambda value: value is None or _are_tags(value)),
}


def _are_tags(value: Any) -> bool:
    return isinstance(value, str) and all(map(is_tag, _tags(value)))


def _tags(value: str | None) -> tuple[str, ...]:
    """The words of a column `tags`; spaces around them and empty ones do not count."""
    return tuple(filter(None, (word.strip() for word in (value or "").split(";"))))


def read_pairs(job: Job, table: Table) -> list[Pair]:
    """Return the pairs that a table tells. Raises PlanError, which names the row, for what makes no pair."""
    source = "bank" if job.kind == "reuse" else "reference"
    names, rows = read_table(table.uri, job, {source, table.column})
    missing = {source, table.column} - set(names if rows else ())
    if missing:
        raise PlanError(f"pairing: {table.uri} has no rows with the column {', '.join(sorted(missing))}")
    checks = {source: _FILE, table.column: _TEXT, **_OPTIONAL}
    return [_pair(job, row, checks, f"row {number} of {table.uri}") for number, row in enumerate(rows, 1)]


def _pair(job: Job, row: Mapping[str, Any], checks: Mapping[str, Any], where: str) -> Pair:
    for column, (expected, fits) in checks.items():
        if not fits(row.get(column)):
            raise PlanError(f"pairing: {where} has {column} {row.get(column)!r:.200}: expected {expected}")
    source, prompt, *_ = (row[column] for column in checks if column not in _OPTIONAL)
    numbers = {
        column: None if row.get(column) is None else int(row[column]) for column in ("seed", "start", "stop", "step")
    }
    _check_frames(job, numbers, where)
    own = OwnSettings(numbers["start"], numbers["step"], row.get("learn_with") or None)
    category, mask = row.get("category") or None, row.get("mask") or None
    return Pair(source, prompt, numbers["seed"], category, own, _tags(row.get("tags")), mask)


def _check_frames(job: Job, numbers: Mapping[str, int | None], where: str) -> None:
    """Refuse a range of frames that is shorter than the job's videos."""
    start, stop, step = (numbers[column] for column in ("start", "stop", "step"))
    if stop is None:
        return
    references = job.references
    start, step = references.start if start is None else start, references.stride if step is None else step
    frames = len(range(start, stop, step))
    if frames < references.frames:
        raise PlanError(
            f"pairing: {where} has the {frames} frames range({start}, {stop}, {step}): expected at least the "
            f"{references.frames} of references.frames. Widen the range, or make all videos of the job shorter."
        )


def read_prompts(job: Job, table: Table) -> list[tuple[str, str | None]]:
    """Return the prompts of a table, each with its class if there is a column `category`."""
    names, rows = read_table(table.uri, job, {table.column})
    if table.column not in names:
        raise PlanError(f"prompts.column: {table.column!r} is not in {table.uri}; it has {', '.join(names)}")
    prompts = []
    for number, row in enumerate(rows, 1):
        prompt, category = row[table.column], row.get("category")
        if prompt in (None, ""):
            raise PlanError(f"prompts: row {number} of {table.uri} has no {table.column}: fill or remove it")
        for column, (expected, fits) in {table.column: _TEXT, "category": _OPTIONAL["category"]}.items():
            if not fits(row.get(column)):
                no_utf8 = (
                    ". Bytes are what a column is read as that is no UTF-8" if isinstance(row[column], bytes) else ""
                )
                where = f"prompts: row {number} of {table.uri}"
                raise PlanError(f"{where} has {column} {row[column]!r:.200}: expected {expected}{no_utf8}")
        prompts.append((prompt, category or None))
    return prompts


_TEXTS = {"reference", "bank", "category", "learn_with", "mask", "tags"}
"""Columns that hold texts, whatever these look like: 0001, true and 2024-01-01 are names and prompts too."""
_NUMBERS = {"seed", "start", "stop", "step"}


def read_table(uri: str, job: Job, needed: set[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns' names and the rows of a Parquet, CSV or JSON-lines file; PlanError for anything else.

    needed: columns of texts that the table must have, by which a CSV file's separator is found.
    """
    address, uri = uri, public_uri(uri)
    ending = uri.rsplit(".", 1)[-1].lower()
    if ending not in _READERS:
        raise PlanError(
            f"{uri}: tables are {', '.join('.' + known for known in _READERS)}, told by their name's ending"
        )
    data = job.read(address, MOST_TABLE_BYTES)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PlanError(f"{uri}: it is UTF-16, as some spreadsheets write it. Save it as UTF-8.")
    try:
        names, rows = _READERS[ending](data, needed)
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError, csv.Error) as error:
        raise PlanError(f"{uri}: it is no readable {ending} table: {error}") from error
    texts = _TEXTS | needed
    twice = [name for name, count in Counter(names).items() if count > 1 and name in texts | _NUMBERS]
    if twice:
        raise PlanError(f"{uri}: it has more than one column {twice[0]}, and only one can be meant. Remove the others.")
    return names, [{name: _text(value) if name in texts else value for name, value in row.items()} for row in rows]


def _text(value: Any) -> Any:
    """The text of a column of texts; what cannot be one is left for the checks to refuse."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, _Written):
        return value.text
    if isinstance(value, float) and math.isnan(value):
        return None  # how tables of numbers say that there is none
    return json.dumps(value) if isinstance(value, bool | int | float) else value


_Rows = tuple[list[str], list[dict[str, Any]]]


def _parquet(data: bytes, needed: set[str]) -> _Rows:
    """Read a Parquet file, unless it says that it has more rows than any job: a few bytes can say so, and mean it."""
    file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
    rows = file.metadata.num_rows
    if rows > MOST_ROWS:
        raise pyarrow.ArrowInvalid(f"it has {rows} rows, expected at most {MOST_ROWS}. Split it, a job for each part")
    return _used(file.read(), needed)


def _used(table: Any, needed: set[str]) -> _Rows:
    """The rows of a table, without columns that nobody reads: Python has no values for all that these may hold."""
    used = _TEXTS | _NUMBERS | needed
    places = [place for place, name in enumerate(table.column_names) if name in used]
    return table.column_names, table.select(places).to_pylist() if places else [{}] * table.num_rows


def _csv(data: bytes, needed: set[str]) -> _Rows:
    """Read a CSV file, whose separator is the one that gives it the needed columns: spreadsheets differ."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    data = (data if b"\n" in data else data.replace(b"\r", b"\n")).lstrip(b"\r\n")  # Macs once ended lines by CR
    told = re.match(rb'"?sep=(.)"?\r?\n', data)  # as Excel writes
    data = data[told.end() :] if told else data
    start = data[:_MOST_HEADER_BYTES].decode(errors="replace")
    names = {
        one: next(csv.reader(io.StringIO(start, newline=""), delimiter=one), [])
        for one in (told[1].decode() if told else ",;\t|")
    }
    fitting = [one for one, found in names.items() if needed <= {name.strip() for name in found}]
    separator = [*fitting, *names][0]
    # As bytes, which nobody guesses a type of, and of which each that is no UTF-8 can be named.
    types = {name: pyarrow.binary() for name in names[separator] if name.strip() in _TEXTS | needed}
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            # Quoted values may go over several lines; without this they may not where two of the reader's blocks meet.
            parse_options=pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types),
        )
    except pyarrow.ArrowInvalid as error:
        quotes = f". A value that holds {separator!r} needs quotes" if "Expected" in str(error) else ""
        raise ValueError(f"{error}{quotes}") from error
    return _used(table.rename_columns([name.strip() for name in table.column_names]), needed)


def _json_lines(data: bytes, needed: set[str]) -> _Rows:
    rows = []
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object, parse_float=_Written, parse_constant=_refuse)
            json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no object {{column: value, ...}}")
        rows.append(row)
    if not rows:
        raise ValueError("it is empty")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, [{name: row.get(name) for name in names} for row in rows]


class _Written(float):
    """A number and how it is written: 1.10 is another text than 1.1."""

    def __init__(self, text: str):
        self.text = text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON: expected null or a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object each of whose keys stands once: of two, the last one would win without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
    return values


_READERS: dict[str, Callable[[bytes, set[str]], _Rows]] = {"parquet": _parquet, "csv": _csv, "jsonl": _json_lines}
MOST_ROWS, MOST_TABLE_BYTES = 10_000_000, 1024**3
_MOST_HEADER_BYTES = 2**16
