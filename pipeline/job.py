"""A job, fully resolved: what `jobs/spec.py` reads from YAML and every stage works by.

Plain frozen dataclasses, cheap to send to workers. Field names are the keys of the job spec.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from ditflow.errors import SettingsError
from ditflow.media.video import MAX_PIXELS_PER_FRAME, Deinterlacing
from ditflow.metrics.base import MetricSettings
from ditflow.parts import extraction_settings
from ditflow.settings import ExecutionSettings, MethodSettings, MotionSettings, SamplingSettings, settings_dict
from pipeline.faults import Policy
from pipeline.logs import LogSettings
from pipeline.manifest import RUN_KEY
from pipeline.store import MOST_BYTES, Store, StoreError, local_folder, read_uri

TAGS = "words without ';' and without spaces around them, of at most 100 characters"
KINDS = ("extract", "synthesize", "build-bank", "reuse", "evaluate")
DEFAULT_FPS = 8.0
"""Frames per second of a video without a reference: what CogVideoX was trained on."""


@dataclass(frozen=True)
class Model:
    """Which model, and how it is run. See `ditflow.backbones.load` and `ExecutionSettings`.

    path: mini, a diffusers folder, such a folder on object storage (s3://...), or a hub id.
    """

    path: str = "mini"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    download: bool = False
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)


@dataclass(frozen=True)
class References:
    """Where reference videos are, and which frames of them are used, at which size.

    uri: a file, a folder with `glob`, a pattern, or a list of these. masks: for the filters of `motion`, a folder of
    masks, of which `walk.png` is that of `walk.mp4`, or one mask for all; see `ditflow.media.mask.read_mask`. fit:
    `crop` scales to cover and crops the centre, so that motion keeps its direction; `stretch` changes the aspect ratio.
    deinterlace: `bwdif` makes one frame of each interlaced one and leaves others as they are; `off` leaves both fields
    woven together.

    A reference beyond a limit is a failed row, not a failed job; limits decide no row's id. max_bytes: of a file,
    looked up before it is fetched. max_pixels: of a coded frame, looked up before one is decoded. max_memory_bytes:
    what reading one reference may take, its file included; for the codecs whose frames are large, and against indices
    that speak of millions of frames.
    """

    uri: str | tuple[str, ...] = ()
    glob: str = "*.mp4"
    frames: int = 49
    height: int = 480
    width: int = 720
    start: int = 0
    stride: int = 1
    fit: Literal["crop", "stretch"] = "crop"
    deinterlace: Deinterlacing = "bwdif"
    max_bytes: int = 256 * 1024**2
    max_pixels: int = MAX_PIXELS_PER_FRAME
    max_memory_bytes: int = 512 * 1024**2
    masks: str | None = None

    def __post_init__(self) -> None:
        least = {"frames": 2, "height": 8, "width": 8, "start": 0, "stride": 1, "max_bytes": 1, "max_pixels": 1}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise SettingsError(key, getattr(self, key), f"at least {value}")
        # A file that comes over a network is there twice for a moment: in pieces, and as a whole.
        if self.max_memory_bytes < 2 * self.max_bytes:
            expected = f"at least twice max_bytes, {2 * self.max_bytes}"
            raise SettingsError("max_memory_bytes", self.max_memory_bytes, expected)

    @property
    def uris(self) -> tuple[str, ...]:
        """The URIs as a tuple, however many were given."""
        return (self.uri,) if isinstance(self.uri, str) else self.uri

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the videos that are made."""
        return (self.frames, self.height, self.width)


@dataclass(frozen=True)
class Banks:
    """Where the motion banks of a `reuse` job are, and which of them are used.

    uri: a file, a folder with `glob`, a pattern, or a list of these. ids and where choose from one folder of banks, or
    from the output of a `build-bank` job: ids names them, where is a condition in SQL on the columns of the catalogue
    (`pipeline.catalogue`), such as "mean_displacement > 1 AND list_contains(tags, 'walk')". size: frames, height and
    width of the new videos, if not each bank's own: moves of coordinates are stretched then.
    """

    uri: str | tuple[str, ...] = ()
    glob: str = "*.safetensors"
    ids: tuple[str, ...] = ()
    where: str | None = None
    size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if not self.chooses:
            return
        if self.ids and self.where is not None:
            raise SettingsError("where", self.where, "nothing beside ids: put `AND id IN ('...')` into the condition")
        if self.glob != Banks.glob:
            raise SettingsError("glob", self.glob, "nothing beside ids or where: every bank below the folder is seen")
        if len(self.uris) != 1:
            raise SettingsError("uri", self.uri, "one folder of banks, for ids or where to choose from")

    @property
    def chooses(self) -> bool:
        """Whether banks are chosen by what the catalogue says of them."""
        return bool(self.ids) or self.where is not None

    @property
    def uris(self) -> tuple[str, ...]:
        """The URIs as a tuple, however many were given."""
        return (self.uri,) if isinstance(self.uri, str) else self.uri


@dataclass(frozen=True)
class Table:
    """A Parquet, CSV or JSON-lines file; CSV by whichever of , ; | and tab gives the columns that it must have.

    As prompts, `column` holds them; a column `category` may tell their classes. As pairing, see `pipeline.tables.Pair`.
    """

    uri: str
    column: str = "prompt"


@dataclass(frozen=True)
class Output:
    """Where everything is written.

    fps: frames per second of the videos (None: the reference's). spread: outputs lie in 256 folders, named by the first
    two digits of their ids, because file systems are slow with folders of millions (None: in jobs of 100,000 rows).
    bank_error: how much of what a bank has learned may be left out to make it small, as a share of each part's size (0:
    everything is kept); see `MotionBank.compressed`.
    """

    uri: str
    fps: float | None = None
    spread: bool | None = None
    bank_error: float = 0.03

    def __post_init__(self) -> None:
        if not 0 <= self.bank_error < 1:
            raise SettingsError("bank_error", self.bank_error, "a share of 1: 0 or more, and below 1")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise SettingsError("fps", self.fps, "above 0 and at most 240")


@dataclass(frozen=True)
class Pool:
    """One actor pool. actors: how many, or [least, most]. gpus: of each actor; `auto` shares every GPU there is."""

    actors: int | tuple[int, int] = 1
    gpus: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        least, most = self.bounds
        if not 1 <= least <= most:
            raise SettingsError("actors", self.actors, "a count of at least 1, or [least, most]")
        if self.gpus != "auto" and self.gpus < 0:
            raise SettingsError("gpus", self.gpus, "auto, or a number of at least 0, such as 0.5 or 1")

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and most actors."""
        return (self.actors, self.actors) if isinstance(self.actors, int) else self.actors


@dataclass(frozen=True)
class Cache:
    """Where each machine keeps copies of remote references and models (None: ditflow's own folder), and how much."""

    folder: str | None = None
    max_bytes: int = 100 * 1024**3

    def __post_init__(self) -> None:
        try:
            if self.folder is not None:
                local_folder(self.folder)
        except StoreError as error:
            raise SettingsError("folder", self.folder, f"a folder of this machine ({error})") from error
        if self.max_bytes < 0:
            raise SettingsError("max_bytes", self.max_bytes, "bytes, 0 or more")


@dataclass(frozen=True)
class Resources:
    """The actor pools. threads: CPU threads of torch in each actor (None: the CPUs that the driver may use, its
    quota included, shared out).

    read_ahead: references, or rows that need none, that are under way at a time, from being read to the end of their
    last row (None: twice as many as all pools have actors, at least 8). More only takes memory; fewer than the actors
    of the last stage leaves some of them idle.
    bank_bytes: motion banks that each actor of a `reuse` job keeps in memory, by the size of their files; the one that
    was used last is always kept.
    """

    extract: Pool = field(default_factory=Pool)
    generate: Pool = field(default_factory=Pool)
    evaluate: Pool = field(default_factory=Pool)
    threads: int | None = None
    cache: Cache = field(default_factory=Cache)
    bank_bytes: int = 2 * 1024**3
    read_ahead: int | None = None

    def __post_init__(self) -> None:
        if self.read_ahead is not None and self.read_ahead < 1:
            raise SettingsError("read_ahead", self.read_ahead, "at least 1, or null")
        if self.bank_bytes < 0:
            raise SettingsError("bank_bytes", self.bank_bytes, "bytes, 0 or more")
        if self.threads is not None and self.threads < 1:
            raise SettingsError("threads", self.threads, "at least 1, or null")

    @property
    def most_ahead(self) -> int:
        """`read_ahead`, with its default."""
        pools = (self.extract, self.generate, self.evaluate)
        return self.read_ahead or max(8, 2 * sum(pool.bounds[1] for pool in pools))


@dataclass(frozen=True)
class OwnSettings:
    """What a table of pairs sets for one row alone; None leaves what the job says."""

    start: int | None = None
    stride: int | None = None
    learn_with: str | None = None


JOBS_OWN = OwnSettings()
"""A row that sets nothing for itself."""


@dataclass(frozen=True)
class Job:
    """One job. `method`, `methods` and `sampling` are resolved: nothing in them is None.

    method: in YAML, what it leaves out is the model's default; before that, for banks, what serves them best:
    `optimize: coordinates`, `preset: lasting`. methods: several methods to compare, by names of your own: every row is
    made with each of them. They take from `method` what they leave out. motion: where the motion target comes from, of
    every method that does not say otherwise. tags: words of your own for the banks of a `build-bank` job; they decide
    no row's id.
    log: json, text or off, with a level if it is not info: json:debug; see `pipeline.logs`.
    """

    kind: Literal["extract", "synthesize", "build-bank", "reuse", "evaluate"]
    name: str
    output: Output
    model: Model = field(default_factory=Model)
    references: References = field(default_factory=References)
    banks: Banks = field(default_factory=Banks)
    prompts: tuple[str, ...] | Table = ()
    pairing: Literal["product", "zip"] | Table = "product"
    seeds: tuple[int, ...] = (0,)
    method: MethodSettings = field(default_factory=MethodSettings)
    methods: dict[str, MethodSettings] = field(default_factory=dict)
    motion: MotionSettings = field(default_factory=MotionSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    metrics: MetricSettings = field(default_factory=MetricSettings)
    resources: Resources = field(default_factory=Resources)
    faults: Policy = field(default_factory=Policy)
    storage_options: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    log: str | Literal[False] | None = None

    def __post_init__(self) -> None:
        LogSettings.parse(self.log, "log")
        if not self.name.isprintable() or not 0 < len(self.name) <= _LONGEST_NAME:
            expected = f"1 to {_LONGEST_NAME} characters in one line, without control characters"
            raise SettingsError("name", self.name, expected)
        if not all(map(is_tag, self.tags)):
            raise SettingsError("tags", self.tags, TAGS)
        if self.tags and self.kind != "build-bank":
            raise SettingsError("tags", self.tags, f"none for kind {self.kind}: banks alone have tags")
        if not self.seeds or not all(-(2**63) <= seed < 2**63 for seed in self.seeds):
            raise SettingsError("seeds", self.seeds, "one or more whole numbers of 64 bits")

    ROW_FORMAT: ClassVar[int] = 2
    """Raised when the same settings come to mean other bytes in all rows; a loss has a revision of its own."""

    @cached_property
    def variants(self) -> dict[str, Job]:
        """The job with each of its methods alone, by the method's name."""
        if not self.methods:
            return {self.method.name: self}
        return {name: replace(self, method=method, methods={}) for name, method in self.methods.items()}

    def key(self, folder: str, name: str) -> str:
        """Return where the output `name` of a folder is stored; it begins with the id of its row or motion."""
        return f"{folder}/{name[:2]}/{name}" if self.output.spread else f"{folder}/{name}"

    def store(self) -> Store:
        """Return the job's output folder, which waits out errors that pass by themselves."""
        return Store(self.output.uri, self.storage_options, self.faults.storage_patience_s)

    def read(self, uri: str, most: int = MOST_BYTES) -> bytes:
        """Return the bytes of an input; StoreError if they cannot be had with the patience of the job, or are more."""
        return read_uri(uri, self.storage_options, self.faults.storage_patience_s, most)

    @property
    def addresses(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Every place that the job reads or writes, but its model, with the keys that name it."""
        yield ("output", "uri"), self.output.uri
        yield from ((("references", "uri"), uri) for uri in self.references.uris)
        yield from ((("banks", "uri"), uri) for uri in self.banks.uris)
        if self.references.masks is not None:
            yield ("references", "masks"), self.references.masks
        for key in ("prompts", "pairing"):
            value = getattr(self, key)
            if isinstance(value, Table):
                yield (key, "uri"), value.uri
        for key in ("clip", "tracker_weights"):
            weights = getattr(self.metrics, key)
            if weights is not None:
                yield ("metrics", key), weights

    def with_own(self, own: OwnSettings) -> Job:
        """Return the job with the settings of one row. Only a zero-shot method learns with another prompt."""
        frames = {key: value for key in ("start", "stride") if (value := getattr(own, key)) is not None}
        method = self.method
        if method.zero_shot and own.learn_with is not None:
            method = replace(method, learn_with=own.learn_with)
        return replace(self, references=replace(self.references, **frames), method=method)

    def row_settings(self) -> dict[str, Any]:
        """Every setting that decides a row's output, as JSON values."""
        return {
            "method": settings_dict(self.method),
            "loss_revision": self._loss_revision(),
            "sampling": settings_dict(self.sampling),
            "video": None if self.kind == "reuse" else self._video_settings(),
            "fps": self.output.fps,
            "dtype": self.model.dtype,
            **({"bank_error": self.output.bank_error} if self.kind == "build-bank" else {}),
            **({"size": self.banks.size and list(self.banks.size)} if self.kind == "reuse" else {}),
        }

    def _loss_revision(self) -> int | None:
        """Version of the motion loss that guides; None where none is evaluated."""
        if not self.method.has_loss or self.kind not in ("synthesize", "build-bank"):
            return None
        return self.method.make_loss().revision

    def _video_settings(self) -> dict[str, Any]:
        """Which frames of a reference are used; with `reuse` the bank, or `banks.size`, decides."""
        keys = ("frames", "height", "width", "start", "stride", "fit", "deinterlace")
        return {key: getattr(self.references, key) for key in keys}

    def extraction_settings(self) -> dict[str, Any]:
        """Every setting that decides what is extracted from a reference."""
        method, loss = settings_dict(self.method), self.method.make_loss() if self.method.has_loss else None
        return {
            "loss": loss and {self.method.name: extraction_settings(loss)},
            "blocks": method["blocks"],
            "motion": method["motion"],
            "latents": self.method.injects,
            "video": self._video_settings(),
            "dtype": self.model.dtype,
        }


@dataclass(frozen=True)
class RunningJob(Job):
    """A job that a run is at work on: its output has the run's RUN_KEY, and is not made anew when it is gone."""

    @classmethod
    def of(cls, job: Job) -> RunningJob:
        """Return the job once its run has begun."""
        return cls(**{one.name: getattr(job, one.name) for one in fields(job)})

    def store(self) -> Store:
        """Return the job's output folder, which waits out errors that pass by themselves."""
        return Store(self.output.uri, self.storage_options, self.faults.storage_patience_s, needs=RUN_KEY)


_LONGEST_NAME = 200


def is_tag(text: str) -> bool:
    """Whether a text can be a tag: see TAGS."""
    return 0 < len(text) <= 100 and ";" not in text and text == text.strip()


def content_id(**content: Any) -> str:
    """Hash of JSON values: 24 hex digits, the same for the same content."""
    return hashlib.sha256(_CANONICAL.encode(content).encode()).hexdigest()[:24]


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
