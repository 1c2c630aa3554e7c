"""The manifest: one small Parquet file per finished row, `manifest/<row_id>.parquet`, created exactly once.

The existence of that file is what makes a row finished. Any Parquet reader reads the folder as one table.

Compaction. A hundred thousand small files are slow to list and to read, so `compact` merges them into
`manifest/merged-<hash>.parquet`. A merged file is complete before the first of its parts is removed: a row stands in
one file or in two at any moment, and is read once. A reader that finds a listed file gone lists the folder again.

Locations. Rows record absolute URIs, which stop being true when a job's folder is moved or copied. An
output's key is therefore taken from its URI (the part from the last `/videos/`, `/amf/` or `/banks/` on) and
looked up below the root that the manifest itself was read from. Only a file that never was below the recorded
root, such as a bank of another job, is looked up at its absolute URI.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.record import (
    COLUMN_NAMES,
    PHASES,
    SCHEMA,
    SCHEMA_VERSION,
    STATUSES,
    VERSION_KEY,
    check_columns,
    check_row_id,
    make_row,
    rows_to_table,
)
from pipeline.store import (
    Entry,
    Store,
    StoreError,
    StoreForbiddenError,
    StoreMissingError,
    list_uris,
    patiently,
    public_uri,
    sha256_of,
)
from pipeline.waits import counted

FOLDER = "manifest"
JOB_KEY = "job.yaml"
"""The resolved spec of the latest run."""
RUN_KEY = "run.json"
"""What the latest run set out to do, see `pipeline.status.Run`."""
OUTPUT_FOLDERS = ("videos", "amf", "banks")
_OUR_OUTPUT = re.compile(rf"({'|'.join(OUTPUT_FOLDERS)})/([0-9a-f]{{2}}/)?[0-9a-f]{{24}}\.(mp4|safetensors)")
"""See `Job.key` and `content_id`."""
BANK_INDEX_KEY = "banks/index.parquet"
"""Made of the banks, and no output of a row: see `pipeline.catalogue`."""
DIGEST_KEY = "digest.parquet"
"""DIGEST of the rows with a file of their own: a copy, which is trusted only of records left unchanged."""
DIGEST = (
    "row_id", "status", "error_kind", "loss_first", "loss_final", *(f"seconds_{phase}" for phase in PHASES),
    "seconds_total", "peak_memory_bytes", "node", "process", "finished_at",
)  # fmt: skip
"""What planning and watching ask of every row."""
MERGED = "merged-"
_LOGGER = logging.getLogger("ditflow")
READ_THREADS = 16  # waiting for storage, not computing
HASH_THREADS = 4


class ManifestError(RuntimeError):
    """A manifest that cannot be read or must not be changed as asked."""


@dataclass(frozen=True)
class Problem:
    """One finding of `Manifest.verify`.

    `kind` is one of manifest_unreadable, row_duplicate, output_missing, output_size, output_sha256,
    amf_missing, bank_missing, orphan; `row_id` is None where no row is concerned; `key` names the file below
    the root, if known.
    """

    row_id: str | None
    kind: str
    detail: str
    key: str | None = None


class Manifest:
    """The records of one job's output folder. Cheap to pickle, like its store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def commit(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Record how a row ended and return the record that counts, as stored.

        That is the given one, or, when another attempt was faster, the other one's. The row's output must
        already be durable.

        Raises RecordError for a row that `make_row` refuses, StoreError from the storage.
        """
        table = rows_to_table([make_row(**row)])
        row_id = str(row["row_id"])
        if self.store.create(_key(row_id), parquet_bytes(table)):
            return table.to_pylist()[0]
        return self._winner(row_id)

    def read(self, columns: Iterable[str] | None = None) -> Any:
        """Return all rows as a pyarrow Table of SCHEMA, or of the given columns in the given order.

        A row that stands in two files (a single one and a merged one) appears once. Reads every file of the
        folder.

        Raises RecordError for unknown columns, ManifestError for an unreadable file, StoreError from the
        storage.
        """
        wanted = list(COLUMN_NAMES if columns is None else columns)
        check_columns(wanted)
        needed = list(dict.fromkeys(["row_id", *wanted]))
        tables = [table for _, table in self.tables(needed)]
        return once_each(pa.concat_tables([_schema(needed).empty_table(), *tables])).select(wanted)

    @staticmethod
    def empty(columns: Iterable[str]) -> Any:
        """Return a table of these columns without rows."""
        return _schema(columns).empty_table()

    def statuses(self) -> dict[str, str]:
        """Return the status of every recorded row by its id. Records that `remember` has read are not read again."""
        wanted, known = ["row_id", "status"], self.remembered(self.entries())
        read = [table for _, table in self.tables(wanted, known=known["key"].to_pylist())]
        table = pa.concat_tables([known.select(wanted), *read])
        return dict(zip(table["row_id"].to_pylist(), table["status"].to_pylist(), strict=True))

    def remember(self) -> None:
        """Keep DIGEST of all rows with a file of their own, so that the next plan or watch need not read those files.

        For the one run that works on the output.
        """
        # Listed first: a record that changes from now on is another than the one that is listed.
        entries = self.entries()
        known = self.remembered(entries)
        skipped = {*known["key"].to_pylist(), *filter(_is_merged, entries)}
        read = [(key, table) for key, table in self.tables(DIGEST, known=skipped) if key in entries]
        kept = [_with_entry(key, entries[key], table) for key, table in read]
        self.store.put(DIGEST_KEY, parquet_bytes(pa.concat_tables([known, *kept]), checksums=True))

    def remembered(self, entries: Mapping[str, Entry]) -> Any:
        """Return DIGEST of the records that are, by a listing, as `remember` has read them, with their `key`."""
        try:
            data = self.store.read(DIGEST_KEY)
        except StoreMissingError:
            return _DIGEST_SCHEMA.empty_table()
        try:
            digest = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            if not digest.schema.equals(_DIGEST_SCHEMA):
                return _DIGEST_SCHEMA.empty_table()  # of another release
            digest = _readable(digest)
            marks = zip(*(digest[name].to_pylist() for name in _ENTRY), strict=True)
            same = [written is not None and entries.get(key) == Entry(size, written) for key, size, written in marks]
            return digest.filter(pa.array(same, pa.bool_()))
        except Exception as error:  # Arrow has many for a damaged file; this one is only a copy
            told = f"{type(error).__name__}: {error!s:.200}"
            _LOGGER.warning("%s is damaged (%s): the records are read instead", self.store.uri_of(DIGEST_KEY), told)
            return _DIGEST_SCHEMA.empty_table()

    def get(self, row_id: str) -> dict[str, Any] | None:
        """Return one row, or None. One request for a row with a file of its own, a full read otherwise."""
        recorded = self.recorded(row_id)
        if recorded is not None:
            return recorded
        rows = self.read().filter(pc.field("row_id") == row_id).to_pylist()
        return rows[0] if rows else None

    def recorded(self, row_id: str) -> dict[str, Any] | None:
        """Return a row that was recorded since the manifest was merged last, or None; one request.

        Raises ManifestError for a file that is named after the row and has other rows, or none.
        """
        key = _key(row_id)
        try:
            rows = {row["row_id"]: row for row in self.load(key).to_pylist()}
        except StoreMissingError:
            return None
        if row_id not in rows:
            raise ManifestError(f"{key} has no record of its row: it was changed or renamed. Remove it to make the row")
        return rows[row_id]

    def forget(self, row_ids: Iterable[str]) -> list[str]:
        """Remove rows that failed, so that they are tried again, and return the ids removed, sorted.

        Ids without a record are passed over. All or none are removed, unless the storage fails in between.

        Raises ManifestError if one of the rows is ok: its output would be made twice.
        """
        asked = {check_row_id(row_id) for row_id in row_ids}
        files = [(key, table) for key, table in self.tables() if asked & set(table["row_id"].to_pylist())]
        hits = [row for _, table in files for row in table.to_pylist() if row["row_id"] in asked]
        _refuse_ok(hits)
        for key, table in files:
            self._drop(key, table, asked)
        return sorted({row["row_id"] for row in hits})

    def compact(self, rows_per_file: int = 50_000, least: int = 1) -> int:
        """Merge the files of single rows into files of up to so many rows; return how many rows were merged.

        least: nothing is done for fewer files than that.

        For a job at rest: a row that is recorded a second time while its file is merged would stand twice. May be
        interrupted anywhere and called again.

        Raises ManifestError for an unreadable file, which nothing is done to, StoreError from the storage.
        """
        single, merged = self._keys_by_kind()
        if len(single) < least:
            return 0
        known = {row_id for key in merged for row_id in self.load(key, ["row_id"])["row_id"].to_pylist()}
        # What an interrupted merge has left: the row stands in the merged file already.
        done = [key for key in single if _row_id(key) in known]
        left = [key for key in single if _row_id(key) not in known]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(self.store.delete, done))
            for start in range(0, len(left), rows_per_file):
                parts = left[start : start + rows_per_file]
                loaded = counted(pool.map(self.load, parts), "the manifest's rows to be merged", len(parts))
                table = pa.concat_tables(loaded)
                name = sha256("".join(map(_row_id, parts)).encode()).hexdigest()[:24]
                self.store.put(f"{FOLDER}/{MERGED}{name}.parquet", parquet_bytes(table))
                list(counted(pool.map(self.store.delete, parts), "merged files to be removed", len(parts)))
        return len(single)

    def leftovers(self) -> list[Problem]:
        """Return what kills can leave behind: outputs that no record names, and records that stand twice.

        For a job at rest: an output is there before its record is. Only files named as this program names them, and
        none behind a symbolic link: others are somebody's own.
        Raises ManifestError for a folder without a job or without a record, where every output would be one too many,
        and for an unreadable manifest file, since it may name outputs.
        """
        rows = [row for _, table in self.tables() for row in table.to_pylist()]
        if not rows or not self.store.exists(JOB_KEY):
            missing = f"no {JOB_KEY}" if rows else f"no record in {FOLDER}/"
            raise ManifestError(
                f"{self.store.uri}: nothing is removed here: there is {missing}, so nothing says which outputs are one "
                "too many. Most likely it is a folder of outputs alone, or a copy without them: copy them as well."
            )
        single, merged = self._keys_by_kind()
        known = {row_id for key in merged for row_id in self.load(key, ["row_id"])["row_id"].to_pylist()}
        twice = [Problem(_row_id(key), "row_duplicate", f"{key}: merged before", key) for key in single]
        found = [problem for problem in twice if problem.row_id in known]
        found += [orphan for orphan in _orphans(rows, self._output_sizes()) if _OUR_OUTPUT.fullmatch(str(orphan.key))]
        return [problem for problem in found if not self.store.is_linked(str(problem.key))]

    def clean(self) -> list[Problem]:
        """Remove `leftovers`, and return them."""
        left = self.leftovers()
        for problem in left:
            assert problem.key is not None
            self.store.delete(problem.key)
        return left

    def verify(self, check_hashes: bool = True) -> list[Problem]:
        """Compare the records with the files and return every problem found, none for a sound job.

        Outputs whose record is not written yet count as orphans: verify a job that is at rest. Orphans are
        not searched while a manifest file is unreadable, since it may name them.
        """
        unreadable: list[Problem] = []
        tables = list(self.tables(on_error=lambda key, error: unreadable.append(_unreadable(key, error))))
        rows = [row for _, table in tables for row in table.to_pylist()]
        sizes = self._output_sizes()
        finished = [row for row in _distinct(rows) if row["status"] == "ok"]
        problems = [*unreadable, *_duplicates(rows)]
        problems += [problem for row in finished for problem in self._check_files(row, sizes)]
        if check_hashes:
            problems += self._check_hashes(finished, sizes)
        return problems if unreadable else [*problems, *_orphans(rows, sizes)]

    # ------------------------------------------------------------------------------------------ files

    def entries(self) -> dict[str, Entry]:
        """Return what the storage's listing says of every manifest file, by its key."""
        # Names with a leading dot or underscore are for tools, by the convention of Parquet readers.
        return {
            key: entry
            for key, entry in self.store.entries(FOLDER).items()
            if key.endswith(".parquet") and not key.rsplit("/", 1)[-1].startswith((".", "_"))
        }

    def _keys(self) -> list[str]:
        return [*self.entries()]

    def _output_sizes(self) -> dict[str, int]:
        sizes = {key: size for folder in OUTPUT_FOLDERS for key, size in self.store.sizes(folder).items()}
        return {key: size for key, size in sizes.items() if key != BANK_INDEX_KEY}

    def _keys_by_kind(self) -> tuple[list[str], list[str]]:
        """Return the keys of single rows' files, and those of merged ones."""
        keys = self._keys()
        merged = [*filter(_is_merged, keys)]
        return sorted(set(keys) - set(merged)), merged

    def load(self, key: str, columns: Iterable[str] = COLUMN_NAMES) -> Any:
        """Return the rows of one of the manifest's files; StoreMissingError if it is gone."""
        return _decode(key, self.store.read(key), columns)

    def tables(
        self,
        columns: Iterable[str] = COLUMN_NAMES,
        on_error: Callable[[str, ManifestError], None] | None = None,
        known: Collection[str] = (),
    ) -> Iterator[tuple[str, Any]]:
        """Yield every manifest file's key and table, but for those whose key is `known`.

        A file that is gone when it is to be read was forgotten, or merged into one that is new: the folder is
        listed again until none was missed. A row may come twice.
        """
        wanted = list(columns)

        def load(key: str) -> tuple[str, Any, bool]:
            """Return the key, its table if there is one, and whether the file is gone."""
            try:
                return key, self.load(key, wanted), False
            except StoreMissingError:
                return key, None, True
            except ManifestError as error:
                if on_error is None:
                    raise
                on_error(key, error)
                return key, None, False

        read = set(known)
        gone = True
        with ThreadPoolExecutor(READ_THREADS) as pool:
            while gone:
                keys = [key for key in self._keys() if key not in read]
                read.update(keys)
                gone = False
                for key, table, missed in counted(pool.map(load, keys), "the manifest's files to be read", len(keys)):
                    gone = gone or missed
                    if table is not None:
                        yield key, table

    def _winner(self, row_id: str) -> dict[str, Any]:
        winner = self.get(row_id)
        if winner is None:
            raise ManifestError(
                f"row {row_id} was recorded by another attempt and forgotten before it could be read. Two "
                f"runs work on {self.store.uri!r} at the same time: let one end first."
            )
        return winner

    def _drop(self, key: str, table: Any, row_ids: set[str]) -> None:
        kept = table.filter(pc.invert(pc.is_in(table["row_id"], pa.array(sorted(row_ids), pa.string()))))
        if kept.num_rows:
            self.store.put(key, parquet_bytes(kept))
        else:
            self.store.delete(key)

    # ----------------------------------------------------------------------------------------- checks

    def _check_files(self, row: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[Problem]:
        row_id, key = row["row_id"], output_key(row["output_uri"])
        if key is None or key not in sizes:
            yield Problem(row_id, "output_missing", f"no file for output_uri {row['output_uri']!r}", key)
        elif sizes[key] != row["output_bytes"]:
            detail = f"{key} has {sizes[key]} bytes, recorded are {row['output_bytes']}"
            yield Problem(row_id, "output_size", detail, key)
        for column, kind in (("amf_uri", "amf_missing"), ("bank_uri", "bank_missing")):
            if row[column] is not None and not self._present(row[column], row["output_uri"], sizes):
                yield Problem(row_id, kind, f"no file for {column} {row[column]!r}", output_key(row[column]))

    def _present(self, uri: str, output_uri: str, sizes: Mapping[str, int]) -> bool:
        """Tell whether a row's AMF or bank exists: in this job's folder, or where another job left it."""
        if output_key(uri) in sizes:
            return True
        output = output_key(output_uri)
        recorded_root = output_uri.removesuffix(output) if output else None
        if recorded_root is not None and uri.startswith(recorded_root):
            return False
        try:
            return [*map(public_uri, list_uris(uri, storage_options=self.store.storage_options))] == [uri]
        except StoreMissingError:
            return False
        except StoreForbiddenError:  # such as a bank of a signed URL, whose signature is not kept
            return True
        except StoreError as error:  # such as an address of a protocol that is not opened
            if error.transient:
                raise
            return False

    def _check_hashes(self, rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, int]) -> list[Problem]:
        # A file of the wrong size is reported already; reading it would say nothing new.
        keyed = [(output_key(row["output_uri"]) or "", row) for row in rows]
        whole = [row for key, row in keyed if key in sizes and sizes[key] == row["output_bytes"]]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            checked = counted(pool.map(self._check_hash, whole), "the outputs to be hashed", len(whole))
            return [problem for problem in checked if problem is not None]

    def _check_hash(self, row: Mapping[str, Any]) -> Problem | None:
        key = output_key(row["output_uri"])
        assert key is not None
        uri, options = self.store.uri_of(key), self.store.storage_options
        found = patiently(lambda: sha256_of(uri, options), self.store.patience_s)
        if found == row["output_sha256"]:
            return None
        detail = f"{key} has SHA-256 {found}, recorded is {row['output_sha256']}"
        return Problem(row["row_id"], "output_sha256", detail, key)


def output_key(uri: str | None) -> str | None:
    """Return the key below a job's root that a recorded URI stands for, wherever that root was, or None."""
    starts = [(uri or "").rfind(f"/{folder}/") for folder in OUTPUT_FOLDERS]
    return uri[max(starts) + 1 :] if uri and max(starts) >= 0 else None


def is_video(uri: str | None) -> bool:
    """Tell whether a recorded URI is that of a video."""
    return (output_key(uri) or "").startswith("videos/")


def _key(row_id: str) -> str:
    return f"{FOLDER}/{check_row_id(row_id)}.parquet"


def _row_id(key: str) -> str:
    """The row that a file of a single row is named after."""
    return key.removeprefix(f"{FOLDER}/").removesuffix(".parquet")


def _is_merged(key: str) -> bool:
    return _row_id(key).startswith(MERGED)


# ------------------------------------------------------------------------------------------------- Parquet


def parquet_bytes(table: Any, checksums: bool = False) -> bytes:
    """Return a table as the content of a Parquet file. checksums: of its pages, by which a reader can see damage."""
    sink = pa.BufferOutputStream()
    # Dictionaries and statistics would double the size of a file with one row.
    several = table.num_rows > 1
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=several,
        write_statistics=several,
        write_page_checksum=checksums,
    )
    return sink.getvalue().to_pybytes()


def _decode(key: str, data: bytes, columns: Iterable[str]) -> Any:
    """Return a manifest file's rows with the given columns. Raises ManifestError if it is none."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            _check_version(key, file.schema_arrow)
            return _readable(_conform(file.read(columns=list(columns), use_threads=False), columns))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # KeyError: a column that is there twice
        raise ManifestError(
            f"{key} ({len(data)} bytes) is no readable manifest file: {error}. It was damaged or written by "
            "another program. `ditflow manifest verify` lists all such files; a row whose file is removed "
            "is made again."
        ) from error


def _check_version(key: str, schema: Any) -> None:
    if "row_id" not in schema.names or "status" not in schema.names:
        raise ValueError(f"it has no row_id and status, but {', '.join(schema.names[:5]) or 'no columns'}")
    version = int((schema.metadata or {}).get(VERSION_KEY, SCHEMA_VERSION))  # DuckDB drops it when it rewrites
    if version > SCHEMA_VERSION:
        raise ManifestError(
            f"{key} has manifest version {version}, this program knows {SCHEMA_VERSION}: it was written by "
            "a newer release. Use that release, or a newer one."
        )


def _conform(table: Any, columns: Iterable[str]) -> Any:
    """Return the table with exactly these columns; those that an older release did not write are null."""
    schema = _schema(columns)
    present = set(table.column_names)
    arrays = [
        table[field.name].cast(field.type) if field.name in present else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _readable(table: Any) -> Any:
    """Return the rows, of which those that somebody gave another status than the known ones have failed.

    Raises ValueError for rows without an id, for strings that are not UTF-8, and for times that datetime cannot hold.
    """
    table.validate(full=True)
    for field in table.schema:
        if pa.types.is_timestamp(field.type):
            times = table[field.name]
            if pc.any(pc.or_(pc.less(times, _FIRST_TIME), pc.greater(times, _LAST_TIME))).as_py():
                raise ValueError(f"{field.name} is not within the years 1 to 9999")
    if "row_id" in table.column_names and table["row_id"].null_count:
        raise ValueError(f"{table['row_id'].null_count} of its rows have no row_id")
    if "status" not in table.column_names:
        return table
    known = pc.is_in(table["status"], value_set=pa.array(STATUSES))
    place = table.column_names.index("status")
    return table.set_column(place, table.schema.field("status"), pc.if_else(known, table["status"], "failed"))


_FIRST_TIME, _LAST_TIME = (
    pa.scalar(time.replace(tzinfo=UTC), pa.timestamp("us", tz="UTC")) for time in (datetime.min, datetime.max)
)


def _schema(columns: Iterable[str]) -> Any:
    return pa.schema([SCHEMA.field(name) for name in columns], metadata=SCHEMA.metadata)


_ENTRY = ("key", "bytes", "written")
"""Of the file that a digest's row was read from."""
_DIGEST_SCHEMA = pa.schema(
    [*zip(_ENTRY, (pa.string(), pa.int64(), pa.timestamp("us", tz="UTC")), strict=True), *_schema(DIGEST)]
)


def _with_entry(key: str, entry: Entry, table: Any) -> Any:
    """Return a file's rows as rows of a digest."""
    columns = [
        pa.array([value] * len(table), _DIGEST_SCHEMA.field(name).type)
        for name, value in zip(_ENTRY, (key, entry.bytes, entry.written), strict=True)
    ]
    return pa.Table.from_arrays([*columns, *table.columns], schema=_DIGEST_SCHEMA)


def once_each(table: Any) -> Any:
    """Return the table with the first of the rows of each id, in order."""
    numbered = pa.table({"row_id": table["row_id"], "position": pa.array(range(table.num_rows), pa.int64())})
    firsts = numbered.group_by("row_id").aggregate([("position", "min")])["position_min"]
    return table if len(firsts) == table.num_rows else table.take(pa.array(sorted(firsts.to_pylist())))


# ------------------------------------------------------------------------------------------------- findings


def _refuse_ok(rows: Iterable[Mapping[str, Any]]) -> None:
    finished = sorted({row["row_id"] for row in rows if row["status"] == "ok"})
    if finished:
        raise ManifestError(
            f"{len(finished)} of the rows to forget are ok: {', '.join(finished[:5])}. Only failed and "
            "quarantined rows can be retried; to make an output again, change the row or use another "
            "output folder."
        )


def _unreadable(key: str, error: Exception) -> Problem:
    row_id = key.rsplit("/", 1)[-1].removesuffix(".parquet")
    return Problem(row_id, "manifest_unreadable", f"{error} Orphans were not searched for.", key)


def _distinct(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["row_id"], row)
    return list(first.values())


def _duplicates(rows: Iterable[Mapping[str, Any]]) -> list[Problem]:
    counts = Counter(row["row_id"] for row in rows)
    return [
        Problem(row_id, "row_duplicate", f"{count} records of this row")
        for row_id, count in sorted(counts.items())
        if count > 1
    ]


def _orphans(rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, int]) -> list[Problem]:
    named = {output_key(row[column]) for row in rows for column in ("output_uri", "amf_uri", "bank_uri")}
    return [
        Problem(None, "orphan", f"{key} ({size} bytes): no record names it", key)
        for key, size in sizes.items()
        if key not in named
    ]
