"""The catalogue of a folder of motion banks: `index.parquet`, one row for each bank, made of the banks' headers.

The bank files are the truth. Whoever reads the catalogue lists the folder, reads the headers of the banks that the
index does not know, or knows with another size or time, and leaves out those whose file is gone; so a folder that was
copied, added to or has no index is one like any other. Where the storage tells times in whole seconds, as S3 does, a
bank that replaces one of the same size within a second of its making is taken for the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.conditions import rows_where
from pipeline.manifest import READ_THREADS, parquet_bytes
from pipeline.store import Entry, Store, StoreCredentialsError, StoreError, StoreMissingError
from pipeline.waits import counted

if TYPE_CHECKING:
    from ditflow.banks.bank import BankHeader

INDEX_KEY = "index.parquet"
ENDING = ".safetensors"
_FIRST_BYTES = 32 * 1024
"""Read of a bank whose header is looked for: most headers are shorter."""
_TEXT, _REAL, _WHOLE = pa.string(), pa.float64(), pa.int64()
_MEANINGS: dict[str, tuple[Any, str]] = {
    "id": (_TEXT, "name of the bank: its file's, without the ending"),
    "key": (_TEXT, "the bank's file, below the folder that the catalogue is in"),
    "reference_uri": (_TEXT, "the video whose motion it has"),
    "reference_sha256": (_TEXT, "hash of that video's bytes"),
    "model": (_TEXT, "the model's name or folder"),
    "model_revision": (_TEXT, "hash of the model"),
    "grid": (_TEXT, "latent frames x rows x columns of patches"),
    "frames": (_WHOLE, "length of the video"),
    "height": (_WHOLE, "height of the video in pixels"),
    "width": (_WHOLE, "width of the video in pixels"),
    "fps": (_REAL, "frames per second of the videos that are made with it"),
    "steps": (_WHOLE, "denoising steps of the schedule that it was learned in"),
    "guided_steps": (_WHOLE, "steps that it has positions for"),
    "method": (_TEXT, "the motion loss"),
    "optimize": (_TEXT, "what was learned: position or coordinates"),
    "prompt": (_TEXT, "what it was learned with"),
    "seed": (_WHOLE, "seed that it was learned with"),
    "loss_first": (_REAL, "the first loss"),
    "loss_final": (_REAL, "the last loss"),
    "bytes": (_WHOLE, "size of the file"),
    "created": (pa.timestamp("us", tz="UTC"), "when the file was written there"),
    "tags": (pa.list_(_TEXT), "words of the user's own"),
    "mean_displacement": (_REAL, "mean length of the reference's motion, in patches per latent frame"),
    "pixels_per_second": (_REAL, "the same in pixels of the video per second of the reference; null without its rate"),
    "moving": (_REAL, "share of the patches that move"),
    "direction": (_REAL, "of the motion, in degrees: 0 right, 90 up, 180 left, 270 down; null if there is none"),
    "concentration": (_REAL, "how far all of it goes that way: 0 all ways, 1 one way"),
    "largest_displacement": (_REAL, "greatest length, in patches per latent frame"),
}
SCHEMA: Any = pa.schema(
    [pa.field(name, type_, metadata={"meaning": meaning}) for name, (type_, meaning) in _MEANINGS.items()]
)


@dataclass(frozen=True)
class Contents:
    """What a folder of banks holds.

    table: a row of SCHEMA for every bank, by id. refused: what is said of files that are no banks, by key. stale:
    whether the index says something else. unwritten: why the index could not be written, if it could not.
    """

    table: Any
    refused: Mapping[str, str]
    stale: bool
    unwritten: str | None = None


class Catalogue:
    """The banks in a folder, at any depth."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def at(cls, uri: str, storage_options: Mapping[str, Any], patience_s: float = 0.0) -> Catalogue:
        """Return the catalogue of a folder of banks, or of the banks in a job's output folder."""
        store = Store(uri, storage_options, patience_s)
        if store.exists("job.yaml") or store.sizes("banks"):
            store = Store(store.uri_of("banks"), storage_options, patience_s)
        return cls(store)

    def files(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return what the storage says of the files of banks, and the folders that cannot be listed with the reason."""
        closed: dict[str, str] = {}
        entries = self.store.entries(closed=closed)
        return {key: entry for key, entry in entries.items() if is_bank(key)}, closed

    def read(self) -> Contents:
        """Return what the folder holds now. The index is left as it is.

        Raises StoreMissingError if there is no bank, StoreError from the storage.
        """
        found, closed = self.files()
        if not found:
            raise StoreMissingError(f"there are no motion banks (*{ENDING}) in {self.store.uri}. Check its spelling.")
        index = self._index()
        known = {row["key"]: row for row in index.to_pylist()}
        kept = [row for key, row in known.items() if key in found and _unchanged(row, found[key])]
        new = sorted(found.keys() - {row["key"] for row in kept})
        with ThreadPoolExecutor(READ_THREADS) as pool:
            read = counted(pool.map(lambda key: self._row(key, found[key]), new), "the banks to be read", len(new))
            outcomes = dict(zip(new, read, strict=True))
        refused = closed | {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, str)}
        rows = [*kept, *(outcome for outcome in outcomes.values() if not isinstance(outcome, str))]
        table = pa.Table.from_pylist(sorted(rows, key=lambda row: (row["id"], row["key"])), schema=SCHEMA)
        return Contents(table, refused, stale=not table.equals(index))

    def refresh(self) -> Contents:
        """Return what the folder holds now, and write the index if it says something else.

        A folder that cannot be written to is no error: `unwritten` tells. Raises as `read` does.
        """
        contents = self.read()
        if contents.stale:
            try:
                self.store.put(INDEX_KEY, parquet_bytes(contents.table))
            except StoreError as error:
                return replace(contents, unwritten=str(error))
        return contents

    def _index(self) -> Any:
        """Return the index as it stands; empty where there is none, or one of another version."""
        try:
            table = pq.read_table(pa.BufferReader(self.store.read(INDEX_KEY)))
            return table if table.schema.equals(SCHEMA) else SCHEMA.empty_table()
        except (StoreMissingError, pa.ArrowException, OSError, ValueError):
            return SCHEMA.empty_table()

    def _row(self, key: str, entry: Entry) -> dict[str, Any] | str:
        """Return a bank's row, or what is wrong with the file."""
        # The algorithm takes seconds to import; where the index knows every bank, it is not needed.
        from ditflow.artifact import MAX_HEADER_BYTES, ArtifactError, header_end
        from ditflow.banks.bank import MotionBank

        name = self.store.uri_of(key)
        try:
            readable = entry.bytes or entry.written is None
            start = self.store.read_start(key, _FIRST_BYTES) if readable else b""
            if len(start) < header_end(start) <= min(entry.bytes, 8 + MAX_HEADER_BYTES):
                start = self.store.read_start(key, header_end(start))
            row = _row_of(key, entry, MotionBank.read_header(start, name, entry.bytes))
            pa.Table.from_pylist([row], schema=SCHEMA)
        except StoreError as error:
            if error.transient or isinstance(error, StoreCredentialsError):
                raise
            return str(error)
        except ArtifactError as error:
            return str(error)
        except (ValueError, ArithmeticError, pa.ArrowException) as error:
            return f"{name} has a header that makes no row of the catalogue ({error}): it is damaged"
        return row


def _unchanged(row: Mapping[str, Any], entry: Entry) -> bool:
    return (row["bytes"], row["created"]) == (entry.bytes, entry.written)


def is_bank(key: str) -> bool:
    """Whether a file is a bank by its name."""
    return key.lower().endswith(ENDING)


def bank_id(key: str) -> str:
    """Return the id of the bank in a file: its name without the ending, and without the folder `ab/` of `ab...`."""
    return re.sub(r"^(..)/(?=\1)", "", key[: -len(ENDING)])


def _row_of(key: str, entry: Entry, header: BankHeader) -> dict[str, Any]:
    from ditflow.motion import pixels_per_second

    provenance, motion, speed = header.provenance, header.motion, None
    frames, height, width = provenance.get("size") or (None, None, None)
    rate = provenance.get("reference_fps")
    if motion and frames and height and width and rate:
        size = (frames, height, width)
        speed = pixels_per_second(float(motion.mean_displacement), header.grid, size, float(rate))
    losses = [loss for step in header.losses for loss in step]
    return {
        "id": bank_id(key),
        "key": key,
        **{name: provenance.get(name) for name in ("reference_uri", "reference_sha256", "fps", "seed")},
        **{name: getattr(header, name) for name in ("model", "model_revision", "steps", "prompt")},
        "grid": "x".join(map(str, header.grid)),
        **{"frames": frames, "height": height, "width": width},
        "guided_steps": len(header.timesteps),
        "method": str(header.method.get("name")),
        "optimize": str(header.method.get("optimize")),
        "loss_first": losses[0] if losses else None,
        "loss_final": losses[-1] if losses else None,
        **{"bytes": entry.bytes, "created": entry.written, "tags": list(header.tags)},
        **(vars(motion) if motion else dict.fromkeys(_MOTION)),
        "pixels_per_second": speed,
    }


_MOTION = ("mean_displacement", "moving", "direction", "concentration", "largest_displacement")


# ----------------------------------------------------------------------------------------------------- choosing


class UnknownBankError(ValueError):
    """A bank was asked for that is not there, or banks that no bank is like."""


def chosen_where(contents: Contents, where: str, key: str) -> Any:
    """Return the rows of the banks that a condition chooses; UnknownBankError if it chooses none.

    key: what the user calls the condition. Raises ConditionError for what is none.
    """
    rows = rows_where(contents.table, where, key)
    if not rows.num_rows:
        raise UnknownBankError(f"{key}: {where!r:.300} chooses none of {_overview(contents)}")
    return rows


def chosen_by_id(contents: Contents, ids: Iterable[str], key: str) -> Any:
    """Return the rows of the banks with these ids, in their order; UnknownBankError names ids that there are not."""
    places: dict[str, list[int]] = {}
    for place, id_ in enumerate(contents.table["id"].to_pylist()):
        places.setdefault(id_, []).append(place)
    wanted = list(dict.fromkeys(ids))
    if unknown := [id_ for id_ in wanted if id_ not in places]:
        raise UnknownBankError(f"{key}: {_some(unknown)} is none of {_overview(contents)}")
    if twice := [id_ for id_ in wanted if len(places[id_]) > 1]:
        keys = contents.table.take(places[twice[0]])["key"].to_pylist()
        raise UnknownBankError(f"{key}: {twice[0]} is the id of {len(keys)} banks: {_some(keys)}. Rename all but one")
    return contents.table.take(pa.array([places[id_][0] for id_ in wanted], pa.int64()))


def _overview(contents: Contents) -> str:
    """What there is to choose from, in a line."""
    refused = f"; {len(contents.refused)} more files are no banks or damaged" if contents.refused else ""
    return f"the {contents.table.num_rows} banks there: {_some(contents.table['id'].to_pylist())}{refused}"


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = [f"{name:.200}" for name in names[:most]]
    return ", ".join([*shown, *([f"... ({len(names)} in all)"] if len(names) > most else [])])
