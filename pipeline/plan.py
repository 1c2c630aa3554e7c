"""The plan: a job's rows of work, with ids made of their content, less those that the manifest has already.

The same content has the same id wherever it lies and whenever it is planned; a changed prompt, seed, setting, model or
reference changes only the ids it touches.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from pipeline.job import Job, Table, content_id
from pipeline.manifest import Manifest
from pipeline.store import Store, StoreMissingError, absolute_uri, fingerprint, list_uris, read_uri, sha256_of

Combination = tuple["Input | None", str | None, int | None]
"""A reference or bank, a prompt and a seed."""
_HASHES_KEY = "inputs.json"
_HASH_THREADS = 16


class PlanError(ValueError):
    """A job's inputs do not make a plan; the message names the key of the spec."""


@dataclass(frozen=True)
class Input:
    """A reference video or bank. sha256 is None if it could not be read: its rows will fail, and say why."""

    uri: str
    sha256: str | None

    @property
    def identity(self) -> str:
        """Its content if known, else its address."""
        return self.sha256 or self.uri


@dataclass(frozen=True)
class WorkRow:
    """One piece of work, with one row in the manifest when it has ended."""

    row_id: str
    variant: str = ""
    """Which of the job's methods makes it."""
    reference: Input | None = None
    bank: Input | None = None
    prompt: str | None = None
    seed: int | None = None
    motion_id: str | None = None
    """Id of the reference's extracted motion, shared by all rows of the reference."""

    def to_json(self) -> str:
        """Serialise for a column of a dataset."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkRow:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        for name in ("reference", "bank"):
            values[name] = values[name] and Input(**values[name])
        return cls(**values)


@dataclass(frozen=True)
class Plan:
    """All rows of a job, split by what the manifest says."""

    todo: list[WorkRow]
    statuses: dict[str, str] = field(default_factory=dict)
    """Status of every planned row that has ended, by row id."""
    retried: list[str] = field(default_factory=list)
    """Ids of rows to do that have ended before: their records are forgotten when the run begins."""
    duplicates: int = 0
    """Planned rows whose content is that of another row: made once."""

    @property
    def total(self) -> int:
        """Rows of the job."""
        return len(self.todo) + len(self.statuses)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status, `todo` included."""
        return {"todo": len(self.todo), **Counter(self.statuses.values())}


def make_plan(job: Job, model_revision: str, retry: Sequence[str] = ()) -> Plan:
    """Plan a job against its manifest. `retry` names statuses whose rows are to be done again.

    Hashes of the inputs are remembered beside the outputs, so that a resumed job reads only what changed.
    Raises PlanError for inputs that make no rows, StoreError from the storage.
    """
    rows = list(_rows(job, model_revision))
    unique = list({row.row_id: row for row in rows}.values())
    recorded = Manifest(Store(job.output.uri, job.storage_options)).statuses()
    ended = {
        row.row_id: recorded[row.row_id]
        for row in unique
        if row.row_id in recorded and recorded[row.row_id] not in retry
    }
    todo = [row for row in unique if row.row_id not in ended]
    retried = [row.row_id for row in todo if row.row_id in recorded]
    return Plan(todo, ended, retried, duplicates=len(rows) - len(unique))


def _rows(job: Job, model_revision: str) -> Iterator[WorkRow]:
    """Every row of the job, with its id."""
    combinations = list(_combinations(job))
    for name, variant in job.variants.items():
        yield from _rows_of_variant(name, variant, model_revision, combinations)


def _rows_of_variant(
    name: str, job: Job, model_revision: str, combinations: Sequence[Combination]
) -> Iterator[WorkRow]:
    settings = {"kind": job.kind, "format": job.ROW_FORMAT, "model": model_revision, **job.row_settings()}
    extraction = {"format": job.ROW_FORMAT, "model": model_revision, **job.extraction_settings()}
    for source, prompt, seed in combinations:
        identity = source.identity if source is not None else None
        row_id = content_id(source=identity, prompt=prompt, seed=seed, **settings)
        if job.kind == "reuse":
            yield WorkRow(row_id, name, bank=source, prompt=prompt, seed=seed)
        else:
            motion_id = content_id(reference=identity, **extraction) if job.method.needs_reference else None
            yield WorkRow(row_id, name, reference=source, prompt=prompt, seed=seed, motion_id=motion_id)


def _combinations(job: Job) -> Iterator[Combination]:
    """References or banks with prompts and seeds, as `pairing` says."""
    if isinstance(job.pairing, Table):
        yield from _paired_by_table(job, job.pairing)
        return
    sources: Sequence[Input | None] = _sources(job)
    if job.kind == "extract":
        yield from ((source, None, None) for source in sources)
        return
    prompts = _prompts(job)
    if job.pairing == "product":
        yield from product(sources, prompts, job.seeds)
        return
    if len(sources) != len(prompts):
        raise PlanError(
            f"pairing: zip needs as many prompts as references or banks, and found {len(prompts)} prompts for "
            f"{len(sources)}. Use pairing: product, or a table that pairs them."
        )
    yield from ((source, prompt, seed) for source, prompt in zip(sources, prompts, strict=True) for seed in job.seeds)


def _paired_by_table(job: Job, table: Table) -> Iterator[Combination]:
    """Rows of a table with the columns reference (or bank), prompt and, if it varies, seed."""
    column = "bank" if job.kind == "reuse" else "reference"
    rows = read_table(table.uri, job.storage_options).to_pylist()
    missing = {column, table.column} - set(rows[0] if rows else {})
    if missing:
        raise PlanError(f"pairing: {table.uri} has no rows with the column {', '.join(sorted(missing))}")
    for number, row in enumerate(rows, 1):
        _check_pair(table.uri, number, row, column, table.column)
    inputs = {source.uri: source for source in _hashed(job, {_absolute(job, row[column]) for row in rows})}
    for row in rows:
        seeds = job.seeds if row.get("seed") is None else (int(row["seed"]),)
        yield from ((inputs[_absolute(job, row[column])], str(row[table.column]), seed) for seed in seeds)


def _check_pair(uri: str, number: int, row: Mapping[str, Any], source: str, prompt: str) -> None:
    checks = {
        source: ("the name of a file", lambda value: isinstance(value, str) and value != ""),
        prompt: ("a text", lambda value: value not in (None, "")),
        "seed": ("a whole number", lambda value: value is None or (isinstance(value, int | float) and value % 1 == 0)),
    }
    for column, (expected, fits) in checks.items():
        if not fits(row.get(column)):
            raise PlanError(f"pairing: row {number} of {uri} has {column} {row[column]!r}: expected {expected}")


def _absolute(job: Job, name: str) -> str:
    """A table may name files relative to the folder of the references or banks."""
    folders = job.banks.uris if job.kind == "reuse" else job.references.uris
    if "://" in name or name.startswith("/") or len(folders) != 1:
        return absolute_uri(name)
    return absolute_uri(f"{folders[0].rstrip('/')}/{name}")


def _sources(job: Job) -> Sequence[Input | None]:
    """The job's references or banks; one None for a method that needs no reference when none is given."""
    inputs = job.banks if job.kind == "reuse" else job.references
    needed = any(variant.method.needs_reference for variant in job.variants.values())
    if not inputs.uris and not needed and job.kind == "synthesize":
        return [None]
    if not inputs.uris:
        key = "banks" if job.kind == "reuse" else "references"
        raise PlanError(f"{key}.uri: nothing is given: expected a file, a folder, a pattern or a list of these")
    uris: dict[str, None] = {}
    for uri in inputs.uris:
        try:
            uris.update(dict.fromkeys(list_uris(uri, inputs.glob, job.storage_options)))
        except StoreMissingError:
            # A pattern or folder without files is a mistake in the job; one missing file is one failed row.
            if len(inputs.uris) == 1:
                raise
            uris[absolute_uri(uri)] = None
    return _hashed(job, uris)


def _prompts(job: Job) -> list[str]:
    if not isinstance(job.prompts, Table):
        prompts = list(job.prompts)
    else:
        table = read_table(job.prompts.uri, job.storage_options)
        if job.prompts.column not in table.column_names:
            raise PlanError(
                f"prompts.column: {job.prompts.column!r} is not in {job.prompts.uri}; "
                f"it has {', '.join(table.column_names)}"
            )
        prompts = [str(prompt) if prompt is not None else "" for prompt in table[job.prompts.column].to_pylist()]
        if "" in prompts:
            row = prompts.index("") + 1
            raise PlanError(f"prompts: row {row} of {job.prompts.uri} has no {job.prompts.column}: fill or remove it")
    if not prompts:
        raise PlanError("prompts: there is none: expected a list of texts, or {uri: table, column: name}")
    return prompts


def read_table(uri: str, storage_options: Mapping[str, Any]) -> Any:
    """Return a Parquet, CSV or JSON-lines file as a pyarrow table; PlanError for anything else."""
    readers = {
        "parquet": pyarrow.parquet.read_table,
        "csv": pyarrow.csv.read_csv,
        "jsonl": pyarrow.json.read_json,
    }
    ending = uri.rsplit(".", 1)[-1].lower()
    if ending not in readers:
        raise PlanError(f"{uri}: tables are {', '.join('.' + known for known in readers)}, told by their name's ending")
    data = read_uri(uri, storage_options)
    try:
        return readers[ending](io.BytesIO(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise PlanError(f"{uri}: it is no readable {ending} table: {error}") from error


def _hashed(job: Job, uris: Iterable[str]) -> list[Input]:
    """Hash inputs by content, in parallel; the content of an unchanged file is not read again."""
    store = Store(job.output.uri, job.storage_options)
    try:
        known = json.loads(store.read(_HASHES_KEY))
    except StoreMissingError:
        known = {}

    def hashed(uri: str) -> tuple[Input, list[str] | None]:
        try:
            mark = fingerprint(uri, job.storage_options)
            remembered = known.get(uri, [None, None])
            sha256 = remembered[1] if remembered[0] == mark else sha256_of(uri, job.storage_options)
        except StoreMissingError:
            return Input(uri, None), None
        return Input(uri, sha256), [mark, sha256]

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        results = list(pool.map(hashed, uris))
    found = {source.uri: memory for source, memory in results if memory is not None}
    if not found.items() <= known.items():
        store.put(_HASHES_KEY, json.dumps(known | found, indent=0).encode())
    return [source for source, _ in results]
