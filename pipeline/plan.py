"""The plan: a job's rows of work, with ids made of their content, less those that the manifest has already.

The same content has the same id wherever it lies and whenever it is planned; a changed prompt, seed, setting, model or
reference changes only the ids it touches.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import PurePosixPath
from typing import Any

from pipeline.catalogue import Catalogue, chosen_by_id, chosen_where
from pipeline.job import JOBS_OWN, Job, OwnSettings, Table, content_id
from pipeline.manifest import Manifest
from pipeline.store import (
    MOST_BYTES,
    Store,
    StoreCredentialsError,
    StoreDamagedError,
    StoreError,
    StoreMissingError,
    absolute_uri,
    fingerprint,
    list_uris,
    patiently,
    public_uri,
    sha256_of,
)
from pipeline.tables import PlanError, read_pairs, read_prompts
from pipeline.waits import counted

_HASHES_KEY = "inputs.json"
_HASH_THREADS = 16


@dataclass(frozen=True)
class Input:
    """A reference video or bank. sha256 is None if it could not be read: its rows will fail, and say why.

    uri is what is written down. address is where it is read, with a URL's signature; it never leaves memory. number:
    its place among the job's addresses that are written down alike.
    """

    uri: str
    sha256: str | None
    address: str = field(default="", repr=False)
    number: int = 1

    @classmethod
    def at(cls, address: str, sha256: str | None) -> Input:
        """Return the input at an absolute address."""
        uri = public_uri(address)
        return cls(uri, sha256, "" if address == uri else address)

    @classmethod
    def recorded(cls, uri: str, sha256: str | None) -> Input:
        """Return the input that a manifest names."""
        return cls(uri, sha256, absolute_uri(uri))

    @property
    def source(self) -> str:
        """Where it is read."""
        return self.address or self.uri

    @property
    def identity(self) -> str:
        """Its content if known, else its address."""
        return self.sha256 or (self.uri if self.number == 1 else f"{self.uri}#{self.number}")


@dataclass(frozen=True)
class WorkRow:
    """One piece of work, with one row in the manifest when it has ended."""

    row_id: str
    variant: str = ""
    """Which of the job's methods makes it."""
    reference: Input | None = None
    mask: Input | None = None
    """Of the reference, for the filters of its motion."""
    bank: Input | None = None
    prompt: str | None = None
    category: str | None = None
    """The prompt's class, for tables of results; it decides nothing."""
    seed: int | None = None
    own: OwnSettings = JOBS_OWN
    tags: tuple[str, ...] = ()
    """Of the bank that is made; they decide nothing."""
    motion_id: str | None = None
    """Id of the reference's extracted motion, shared by all rows of the reference."""

    def to_json(self) -> str:
        """Serialise for a column of a dataset."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkRow:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        for name in ("reference", "mask", "bank"):
            values[name] = values[name] and Input(**values[name])
        return cls(**{**values, "own": OwnSettings(**values["own"]), "tags": tuple(values["tags"])})


@dataclass(frozen=True, slots=True)
class Combination:
    """What a row is made of, beside the job's settings: a reference or bank, a prompt, a seed, and its own settings.

    mask: of the reference; it counts only for methods that filter by one.
    """

    source: Input | None
    prompt: str | None = None
    seed: int | None = None
    category: str | None = None
    own: OwnSettings = JOBS_OWN
    tags: tuple[str, ...] = ()
    mask: Input | None = None


@dataclass(frozen=True)
class Plan:
    """All rows of a job, split by what the manifest says."""

    todo: list[WorkRow]
    ended: Mapping[str, int] = field(default_factory=dict)
    """How many of the planned rows have ended, by status."""
    retried: list[str] = field(default_factory=list)
    """Ids of rows to do that have ended before: their records are forgotten when the run begins."""
    duplicates: int = 0
    """Planned rows whose content is that of another row: made once, and of the first one's class."""
    kept: int = 0
    """Rows of the manifest, of earlier plans too, that a run of this plan leaves as they are."""

    @property
    def total(self) -> int:
        """Rows of the job."""
        return len(self.todo) + sum(self.ended.values())

    @property
    def motions(self) -> set[str]:
        """Ids of the motions that the rows to do need."""
        return {row.motion_id for row in self.todo if row.motion_id is not None}

    @property
    def prompts(self) -> set[str]:
        """The prompts of the rows to do."""
        return {row.prompt for row in self.todo if row.prompt is not None}

    def other_texts(self, job: Job) -> dict[str, set[str]]:
        """Return what the text encoder reads beside the prompts of the rows to do, by the keys of the spec."""
        texts: dict[str, set[str]] = defaultdict(set)
        for variant, own in {(row.variant, row.own) for row in self.todo}:
            method = job.variants[variant].with_own(own).method
            if method.zero_shot and job.kind == "synthesize":
                texts["learn_with"].add(method.learn_with)
            if method.learns_positions and (method.zero_shot or job.kind == "build-bank"):
                texts["more_prompts"].update(method.more_prompts)
        if self.todo and job.kind != "extract" and job.sampling.guidance_scale != 1:
            texts["sampling.negative_prompt"].add(job.sampling.negative_prompt)
        return texts

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status, `todo` included."""
        return {"todo": len(self.todo), **self.ended}


def make_plan(job: Job, model_revision: str, retry: Sequence[str] = ()) -> Plan:
    """Plan a job against its manifest. `retry` names statuses whose rows are to be done again.

    Hashes of the inputs are remembered beside the outputs, so that a resumed job reads only what changed.
    Raises PlanError for inputs that make no rows, StoreError from the storage.
    """
    combinations = list(_combinations(job))
    recorded = Manifest(job.store()).statuses()
    planned: set[str] = set()
    todo, retried, ended = [], [], Counter[str]()
    for variant in job.variants:
        planner = _Planner(job, variant, model_revision)
        for made_of in combinations:
            row_id = planner.row_id(made_of)
            if row_id in planned:
                continue
            planned.add(row_id)
            status = recorded.get(row_id)
            if status is not None and status not in retry:
                ended[status] += 1
                continue
            todo.append(planner.work(row_id, made_of))
            if status is not None:
                retried.append(row_id)
    duplicates = len(combinations) * len(job.variants) - len(planned)
    return Plan(todo, ended, retried, duplicates, kept=len(recorded) - len(retried))


class _Planner:
    """Makes the rows of one of a job's methods. Settings are hashed once, for a job has many rows and few settings."""

    def __init__(self, job: Job, variant: str, model_revision: str):
        self._job, self._variant = job.variants[variant], variant
        self._fixed = {"format": job.ROW_FORMAT, "model": model_revision}
        self._uses_mask = _needs_mask(self._job)
        self._settings, self._extraction = cache(self._settings_id), cache(self._extraction_id)

    def row_id(self, made_of: Combination) -> str:
        identity = made_of.source and made_of.source.identity
        settings = self._settings(made_of.own)
        return content_id(
            settings=settings, source=identity, prompt=made_of.prompt, seed=made_of.seed, **self._mask_identity(made_of)
        )

    def work(self, row_id: str, made_of: Combination) -> WorkRow:
        reuses = self._job.kind == "reuse"
        return WorkRow(
            row_id,
            variant=self._variant,
            reference=None if reuses else made_of.source,
            mask=made_of.mask if self._uses_mask else None,
            bank=made_of.source if reuses else None,
            prompt=made_of.prompt,
            category=made_of.category,
            seed=made_of.seed,
            own=made_of.own,
            tags=tuple(dict.fromkeys((*self._job.tags, *made_of.tags))),
            motion_id=None if reuses else self._motion_id(made_of),
        )

    def _motion_id(self, made_of: Combination) -> str | None:
        if not self._job.method.needs_reference:
            return None
        identity = made_of.source and made_of.source.identity
        return content_id(settings=self._extraction(made_of.own), reference=identity, **self._mask_identity(made_of))

    def _mask_identity(self, made_of: Combination) -> dict[str, str]:
        return {"mask": made_of.mask.identity} if self._uses_mask and made_of.mask is not None else {}

    def _settings_id(self, own: OwnSettings) -> str:
        return content_id(kind=self._job.kind, **self._fixed, **self._job.with_own(own).row_settings())

    def _extraction_id(self, own: OwnSettings) -> str:
        return content_id(**self._fixed, **self._job.with_own(own).extraction_settings())


def _combinations(job: Job) -> Iterator[Combination]:
    """References or banks with prompts and seeds, as `pairing` says."""
    if isinstance(job.pairing, Table):
        yield from _paired_by_table(job, job.pairing)
        return
    sources: Sequence[Input | None] = _sources(job)
    masks = _masks(job, sources)
    if job.kind == "extract":
        yield from (Combination(source, mask=masks.get(source)) for source in sources)
        return
    prompts = _prompts(job)
    if job.pairing == "zip" and len(sources) != len(prompts):
        raise PlanError(
            f"pairing: zip needs as many prompts as references or banks, and found {len(prompts)} prompts for "
            f"{len(sources)}. Use pairing: product, or a table that pairs them."
        )
    pairs = product(sources, prompts) if job.pairing == "product" else zip(sources, prompts, strict=True)
    for source, (prompt, category) in pairs:
        yield from (Combination(source, prompt, seed, category, mask=masks.get(source)) for seed in job.seeds)


def _paired_by_table(job: Job, table: Table) -> Iterator[Combination]:
    """What the rows of a table say: see `pipeline.tables.Pair`."""
    pairs = read_pairs(job, table)
    names = dict.fromkeys(pair.source for pair in pairs)
    reuses, folders = job.kind == "reuse", job.references.uris
    uris = _bank_uris(job, names) if reuses else {name: _absolute(folders, name) for name in names}
    addresses = list(dict.fromkeys(uris.values()))
    inputs = dict(zip(addresses, _hashed(job, addresses), strict=True))
    masks = _masks(job, list(inputs.values()), [pair.mask for pair in pairs])
    for pair in pairs:
        seeds, source = job.seeds if pair.seed is None else (pair.seed,), inputs[uris[pair.source]]
        mask = masks.get(pair.mask or source)
        yield from (Combination(source, pair.prompt, seed, pair.category, pair.own, pair.tags, mask) for seed in seeds)


def _needs_mask(job: Job) -> bool:
    """Whether any method of a job filters motion by a mask."""
    motions = [variant.method.motion or variant.motion for variant in job.variants.values()]
    return job.kind != "reuse" and any(motion.needs_mask for motion in motions)


def _masks(
    job: Job, sources: Sequence[Input | None], named: Sequence[str | None] = ()
) -> dict[Input | str | None, Input]:
    """The mask of every reference that has one, and of every name of a mask in a table of pairs.

    A reference without a mask that needs one is a failed row.
    """
    folder, names = job.references.masks, [*dict.fromkeys(filter(None, named))]
    if not _needs_mask(job):
        if folder is not None or names:
            key = "references.masks" if folder is not None else "pairing: the column mask"
            raise PlanError(f"{key}: no filter reads a mask. Add motion: {{filters: [mask]}}, or leave it out.")
        return {}
    if folder is None and not names:
        raise PlanError("references.masks: nothing is given, and a filter of motion needs masks: name a folder of them")
    folders = job.references.uris if folder is None else [folder]
    addresses: dict[Input | str | None, str] = {name: _absolute(folders, name) for name in names}
    if folder is not None:
        addresses.update(_masks_in(folder, job, [source for source in sources if source is not None]))
    inputs = _hashed(job, distinct := [*dict.fromkeys(addresses.values())])
    of_address = dict(zip(distinct, inputs, strict=True))
    return {name: of_address[address] for name, address in addresses.items()}


def _masks_in(folder: str, job: Job, references: Sequence[Input]) -> dict[Input | str | None, str]:
    """Addresses of the masks in a folder by the references that have the same name; of a single file, for all."""
    uris = list_uris(folder, "*", job.storage_options)
    if uris == [absolute_uri(folder)]:
        return dict.fromkeys(references, uris[0])
    stems = [PurePosixPath(public_uri(uri)).stem for uri in uris]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise PlanError(f"references.masks: {folder} has more than one mask named {twice[0]!r:.200}. Remove one.")
    by_stem = dict(zip(stems, uris, strict=True))
    named = {reference: PurePosixPath(reference.uri).stem for reference in references}
    return {reference: by_stem[stem] for reference, stem in named.items() if stem in by_stem}


def _absolute(folders: Sequence[str], name: str) -> str:
    """A table may name files relative to the folder of the references or banks."""
    if re.match(r"[A-Za-z0-9+.-]+://|file:|~?/", name) or len(folders) != 1:
        return absolute_uri(name)
    return absolute_uri(f"{folders[0].rstrip('/')}/{name}")


def _bank_uris(job: Job, names: Iterable[str]) -> dict[str, str]:
    """Where the banks of a table are, by what it calls them: files by the ending of `banks.glob`, or by their ids."""
    if job.banks.chooses:
        raise PlanError("banks: a table of pairs names the banks itself: remove ids and where, or pairing")
    names, ending = list(names), PurePosixPath(job.banks.glob).suffix
    addresses = {name: _absolute(job.banks.uris, name) for name in names}
    uris = {name: uri for name, uri in addresses.items() if public_uri(uri).lower().endswith(ending.lower())}
    ids = [name for name in names if name not in uris]
    if not ids:
        return uris
    if len(job.banks.uris) != 1:
        raise PlanError(f"pairing: the bank {ids[0]!r:.200} is no *{ending}: an id needs one folder of banks.uri")
    return uris | dict(zip(ids, _bank_uris_by_id(job, ids, "pairing"), strict=True))


def _bank_uris_by_id(job: Job, ids: Sequence[str], key: str) -> list[str]:
    catalogue = _catalogue(job)
    return [catalogue.store.uri_of(bank) for bank in chosen_by_id(catalogue.read(), ids, key)["key"].to_pylist()]


def _catalogue(job: Job) -> Catalogue:
    return Catalogue.at(job.banks.uris[0], job.storage_options, job.faults.storage_patience_s)


def _sources(job: Job) -> Sequence[Input | None]:
    """The job's references or banks; one None for a method that needs no reference when none is given."""
    inputs = job.banks if job.kind == "reuse" else job.references
    needed = any(variant.method.needs_reference for variant in job.variants.values())
    if not inputs.uris and not needed and job.kind == "synthesize":
        return [None]
    if not inputs.uris:
        key = "banks" if job.kind == "reuse" else "references"
        raise PlanError(f"{key}.uri: nothing is given: expected a file, a folder, a pattern or a list of these")
    if job.kind == "reuse" and job.banks.chooses:
        return _hashed(job, _chosen_banks(job))
    uris: dict[str, None] = {}
    for uri in inputs.uris:
        try:
            uris.update(dict.fromkeys(list_uris(uri, inputs.glob, job.storage_options)))
        except StoreError as error:
            # What is wrong with all that is asked for is a mistake in the job; with one of several, a failed row.
            if len(inputs.uris) == 1 or isinstance(error, StoreCredentialsError):
                raise
            uris[absolute_uri(uri)] = None
    return _hashed(job, uris)


def _chosen_banks(job: Job) -> list[str]:
    """The banks that `ids` or `where` choose."""
    if job.banks.where is None:
        return _bank_uris_by_id(job, job.banks.ids, "banks.ids")
    catalogue = _catalogue(job)
    rows = chosen_where(catalogue.read(), job.banks.where, "banks.where")
    return [catalogue.store.uri_of(bank) for bank in rows["key"].to_pylist()]


def _prompts(job: Job) -> list[tuple[str, str | None]]:
    """The prompts, each with its class if a table tells one."""
    prompts: list[tuple[str, str | None]]
    if isinstance(job.prompts, Table):
        prompts = read_prompts(job, job.prompts)
    else:
        prompts = [(text, None) for text in job.prompts]
    if not prompts:
        raise PlanError("prompts: there is none: expected a list of texts, or {uri: table, column: name}")
    return prompts


def _remembered_hashes(store: Store) -> dict[str, Any]:
    """Return what was hashed before: mark and hash by address. A memory that is damaged is begun anew."""

    def checked(known: dict[str, Any]) -> dict[str, Any]:
        for mark, sha256 in known.values():
            if not isinstance(mark, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
                raise ValueError(f"it has {sha256!r:.100} for a hash")
        return known

    try:
        return store.read_record(_HASHES_KEY, checked, "the inputs are hashed anew")
    except StoreMissingError:
        return {}
    except StoreDamagedError as error:
        logging.getLogger("ditflow").warning("%s", error)
        return {}


def _hashed(job: Job, uris: Iterable[str]) -> list[Input]:
    """Hash inputs by content, in parallel; the content of an unchanged file is not read again.

    An input that cannot be read is nobody else's concern: its rows will fail. If it was read before, they are the rows
    of what was read then, so that those that are done stay done when a signed URL has expired.
    Raises StoreError when the storage takes no credentials, or when none can be reached.
    """
    store = job.store()
    known = _remembered_hashes(store)

    most = MOST_BYTES if job.kind == "reuse" else job.references.max_bytes

    sources = list(_numbered(uris))
    alike = {source.uri for source in sources if source.number > 1}
    known = {uri: memory for uri, memory in known.items() if uri not in alike}  # it would be that of any of them

    def content_hash(uri: str) -> str:
        return patiently(lambda: sha256_of(uri, job.storage_options, most), job.faults.storage_patience_s)

    def hashed(source: Input) -> tuple[Input, list[str] | StoreError]:
        address, remembered = source.source, known.get(source.uri, [None, None])
        try:
            mark = patiently(lambda: fingerprint(address, job.storage_options, most), job.faults.storage_patience_s)
            sha256 = remembered[1] if remembered[0] == mark else content_hash(address)
        except StoreCredentialsError:
            raise
        except StoreMissingError as error:
            return source, error
        except StoreError as error:
            return replace(source, sha256=remembered[1]), error
        return replace(source, sha256=sha256), [mark, sha256]

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        results = list(counted(pool.map(hashed, sources), "the inputs to be hashed", len(sources)))
    away = [outcome for _, outcome in results if isinstance(outcome, StoreError) and outcome.transient]
    if away and len(away) == len(results):
        raise away[0]
    found = {source.uri: memory for source, memory in results if isinstance(memory, list) and source.uri not in alike}
    if not found.items() <= known.items():
        store.put(_HASHES_KEY, json.dumps(known | found, indent=0).encode())
    return [source for source, _ in results]


def _numbered(addresses: Iterable[str]) -> Iterator[Input]:
    """Return the input at each address, numbered among those that differ only in what is not written down."""
    seen = Counter[str]()
    for address in addresses:
        source = Input.at(address, None)
        seen[source.uri] += 1
        yield replace(source, number=seen[source.uri])
