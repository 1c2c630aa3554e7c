"""The kinds of files that strangers and damaged outputs bring, each with sound ones and with what reads them.

A file of a job's output is read where it lies, among others that are sound, by what the commands call: plan, status,
report, verify and run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.fuzz.mutations import (
    BYTES,
    Mutation,
    artifact_structure,
    artifact_types,
    artifact_values,
    json_structure,
    lines_structure,
    parquet_structure,
    set_number_of_box,
    yaml_structure,
    yaml_tokens,
)
from ditflow import backbones
from ditflow.artifact import ArtifactError
from ditflow.backbones import ModelConfigError, ModelNotFoundError
from ditflow.backbones.revision import folder_revision
from ditflow.banks.bank import BankHeader, MotionBank
from ditflow.media.video import VideoError, read_video
from ditflow.metrics.base import MetricSettings
from ditflow.mini import mini_folder
from ditflow.motion.reference import MotionReference
from ditflow.types import TokenGrid
from jobs.spec import PRESETS, SpecError, load_spec
from jobs.status import show_status
from jobs.table import Screen, print_rows
from pipeline.faults import Ledger
from pipeline.job import Job, Output, References, content_id
from pipeline.lease import Lease
from pipeline.manifest import DIGEST_KEY, JOB_KEY, RUN_KEY, Manifest, ManifestError
from pipeline.measurements import Measurements
from pipeline.plan import make_plan
from pipeline.record import COLUMN_NAMES
from pipeline.report import write_report
from pipeline.report.folder import ReportFolder
from pipeline.report.motions import write_motions
from pipeline.stages.read import bounded_memory
from pipeline.status import Run, longest_at_work, whereabouts
from pipeline.store import Store, StoreDamagedError

LARGEST_SEED = 60_000


@dataclass(frozen=True)
class Target:
    """A kind of file, what reads it, and the errors that reading may raise: none, if the file is only a memory.

    file: how it is called; every error has to name it.
    """

    name: str
    file: str
    seeds: Callable[[], list[bytes]]
    mutations: Sequence[Mutation]
    read: Callable[[bytes], Any]
    documented: tuple[type[Exception], ...] = ()


@cache
def _workplace() -> Any:
    return tempfile.TemporaryDirectory(prefix="ditflow-fuzz-")  # until this process ends


def workplace() -> Path:
    """Return the folder in which files are read: the same for all inputs."""
    return Path(_workplace().name)


# ---------------------------------------------------------------------------------------------------- the spec


def spec_seeds() -> list[bytes]:
    texts = [file.read_bytes() for file in sorted(PRESETS.glob("*.yaml"))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.yaml"
        resolved = []
        for text in texts:
            file.write_bytes(text)
            with suppress(SpecError):  # its model is not on this machine
                resolved.append(load_spec(file).yaml.encode())
    return [*texts, *resolved]


def read_spec(data: bytes) -> None:
    file = workplace() / "job.yaml"
    file.write_bytes(data)
    with patch("jobs.spec.local_model", lambda job: job.model.path):  # models on object storage are not fetched
        load_spec(file)


# ------------------------------------------------------------------------------------------- banks and motions


def bank_seeds() -> list[bytes]:
    provenance = {"size": [9, 32, 32], "fps": 8.0, "reference_uri": "file:///a.mp4", "seed": 1}
    method = {"name": "ditflow", "blocks": [1], "learning_rate": [0.002, 0.001]}
    losses = ((1.0, 0.5), (0.4, 0.3))
    header = BankHeader(
        "mini", "0123", (3, 2, 2), 4, (999, 749), "rotary", "position", method, 3, "a ball", losses,
        tags=("pan",), provenance=provenance,
    )  # fmt: skip
    rotary = [{part: torch.ones(12, 2) for part in ("query_cos", "query_sin", "key_cos", "key_sin")} for _ in "ab"]
    additive = [{"additive": torch.ones(12, 4)} for _ in "ab"]
    coordinates = [{"query": torch.ones(12, 3), "key": torch.ones(12, 3)} for _ in "ab"]
    latents, flow = torch.zeros(1, 3, 2, 4, 4), torch.ones(2, 4, 2, dtype=torch.int8)
    banks = (
        MotionBank.from_steps(header, rotary, latents, flow),
        MotionBank.from_steps(replace(header, positions="additive"), additive),
        MotionBank.from_steps(replace(header, optimize="coordinates"), coordinates),
    )
    return [bank.to_bytes() for bank in (*banks, banks[0].compressed(0.1))]


def read_bank(data: bytes) -> None:
    bank = MotionBank.from_bytes(data, "bank.safetensors")
    for step in range(bank.guided_steps):
        assert {len(change) for change in bank.offsets(step).values()} == {TokenGrid(*bank.header.grid).tokens}


def motion_seeds() -> list[bytes]:
    grid, flow = TokenGrid(3, 2, 2), torch.zeros(3, 3, 4, 2, dtype=torch.int8)
    hard = MotionReference(grid, "revision", "ditflow", {3: {"displacement": flow}}, torch.zeros(1, 3, 2, 4, 4), 8.0)
    soft = MotionReference(grid, "revision", "ditflow", {3: {"displacement": flow.half()}}, None, None, ("a note",))
    return [motion.to_bytes() for motion in (hard, soft, MotionReference(grid, "revision", None, {}, None))]


def read_motion(data: bytes) -> None:
    store = an_output(**{MOTION_KEY: data})
    uri = store.uri_of(MOTION_KEY)
    write_motions(ReportFolder(store), {"a0": uri})
    motion = MotionReference.from_bytes(store.read(MOTION_KEY), uri)
    assert motion.flow is None or len(motion.flow) == motion.grid.frames - 1


# --------------------------------------------------------------------------------------------------- the video


def video_seeds() -> list[bytes]:
    _with_tests()
    from hostile import CORPUS

    built = (hostile.build() for hostile in CORPUS.values())
    return [data for data in built if len(data) <= LARGEST_SEED]


def read_any_video(data: bytes) -> None:
    with bounded_memory(References.max_memory_bytes):
        read_video(data, frames=9, height=32, width=32, stride=2, name="clip.mp4")


def _with_tests() -> None:
    sys.path.append(str(Path(__file__).parents[2] / "tests"))


# ------------------------------------------------------------------------------------------------- the output

REVISION = "0123456789abcdef"
WORK_ID = "0123456789abcdef01234567"
TRY_KEY, LAST_WORDS_KEY = f"attempts/{WORK_ID}/001.json", f"attempts/{WORK_ID}/last-words"
LEASE_KEY, MOTION_KEY, INPUTS_KEY = "lease/000001.json", "amf/a0.safetensors", "inputs.json"
RECORD_ID = content_id(number=0)
RECORD_KEY = f"manifest/{RECORD_ID}.parquet"
"""Of a row that is ok."""


@cache
def sound_output() -> Mapping[str, tuple[bytes, int]]:
    """Return the files of the output of a run that was killed, by their keys, with the times of their last change."""
    _with_tests()
    from gallery import FAILED, add_motion, add_reference, add_row, used

    folder = workplace() / "output"
    store, reference = Store(str(folder)), used(add_reference(workplace()))
    add_row(store, 0, **reference, amf_uri=add_motion(store), reference_notes=["assumed colours"])
    add_row(store, 1, **reference, **FAILED)
    add_row(store, 2, **{**FAILED, "status": "quarantined", "error_kind": "worker_died", "spec_json": None})
    Manifest(store).remember()
    make_plan(a_job(store), REVISION)
    store.put(JOB_KEY, b"kind: extract\n")
    store.put(RUN_KEY, Run(9, 1767225600.0, todo=7, kept=2, motions=1, notes=("no room",)).to_json())
    Ledger(store).begin(WORK_ID, {"stage": "generate", "node": "a", "pid": 1})
    Ledger(store).note(WORK_ID, "CUDA error")
    with Lease(store):
        return {key: ((folder / key).read_bytes(), (folder / key).stat().st_mtime_ns) for key in store.list()}


def a_job(store: Store) -> Job:
    references = References(str(workplace() / "square.mp4"), frames=9, height=32, width=32)
    return Job("extract", "fuzz", Output(store.uri), references=references)


def an_output(**changed: bytes) -> Store:
    """Return the output with other bytes in some of its files."""
    folder = workplace() / "output"
    shutil.rmtree(folder, ignore_errors=True)
    for key, (data, written) in sound_output().items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(changed.get(key, data))
        if key not in changed:
            os.utime(folder / key, ns=(written, written))  # a digest is only of records that are unchanged
    return Store(str(folder))


def file_of_output(key: str) -> Callable[[], list[bytes]]:
    """Return what returns a file of the output as the one sound example of its kind."""
    return lambda: [sound_output()[key][0]]


def detect_sprite(store: Store) -> None:
    """Plan, and show the status, as text and as JSON."""
    make_plan(a_job(store), REVISION)
    with redirect_stdout(StringIO()) as out:
        for as_json in (False, True):
            show_status(store, Screen(file=out, width=200), as_json, every_s=None)


def read_digest(data: bytes) -> None:
    store = an_output(**{DIGEST_KEY: data})
    detect_sprite(store)
    Manifest(store).remember()


def read_inputs(data: bytes) -> None:
    make_plan(a_job(an_output(**{INPUTS_KEY: data})), REVISION)


def read_run(data: bytes) -> None:
    detect_sprite(an_output(**{RUN_KEY: data}))


def read_lease(data: bytes) -> None:
    store = an_output(**{LEASE_KEY: data})
    detect_sprite(store)
    with Lease(store, on_wait=lambda holder: print(holder, file=StringIO()), sleep=lambda seconds: None) as lease:
        lease.check()


def read_attempts(data: bytes) -> None:
    store = an_output(**{TRY_KEY: data, LAST_WORDS_KEY: data})
    ledger = Ledger(store)
    assert ledger.begin(WORK_ID, {}) == 2
    ledger.noted(WORK_ID)
    store.delete(TRY_KEY.replace("001", "002"))
    detect_sprite(store)
    whereabouts(store, [WORK_ID])
    longest_at_work(store, time.time())


def record_seeds() -> list[bytes]:
    return [data for key, (data, _) in sound_output().items() if key.startswith("manifest/")]


def read_record(data: bytes) -> None:
    store = an_output(**{RECORD_KEY: data})
    manifest = Manifest(store)
    manifest.verify()
    manifest.get(RECORD_ID)
    detect_sprite(store)
    with redirect_stdout(StringIO()):
        print_rows(COLUMN_NAMES, manifest.read().to_pylist())
    write_report(a_job(store), references=False)
    Measurements(store).todo(MetricSettings())


# ------------------------------------------------------------------------------------------------- models, and hashes

CONFIGURATIONS = (
    "model_index.json", "ditflow.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip


def model_seeds() -> list[bytes]:
    """Return the configurations of the embedded models: a line for each, with its name, a space, and its JSON."""

    def line(file: Path, name: str) -> str:
        return f"{name} {json.dumps(json.loads(file.read_bytes()))}"

    folders = [mini_folder(model) for model in ("mini-rotary", "mini-additive")]
    return ["\n".join(line(folder / name, name) for name in CONFIGURATIONS).encode() for folder in folders]


def a_model(configurations: Mapping[str, bytes]) -> Path:
    """Return the folder of an embedded model that has these configurations, and no others."""
    folder = workplace() / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(mini_folder("mini"), folder, copy_function=os.symlink)
    for name in CONFIGURATIONS:
        (folder / name).unlink()
        if name in configurations:
            (folder / name).write_bytes(configurations[name])
    return folder


def read_model(data: bytes) -> None:
    lines = (line.partition(b" ") for line in data.split(b"\n"))
    folder = str(a_model({name.decode(errors="replace"): text for name, _, text in lines}))
    with patch.dict(os.environ, DITFLOW_CACHE=str(workplace() / "cache")):
        backbones.identify(folder)
        backbones.read_text_limit(folder)
        backbones.load(folder, device="cpu")


def hashes_seeds() -> list[bytes]:
    file = workplace() / "cache" / HASHES
    with patch.dict(os.environ, DITFLOW_CACHE=str(file.parent)):
        folder_revision(mini_folder("mini"))
    return [file.read_bytes()]


HASHES = "file-hashes.json"


def read_hashes(data: bytes) -> None:
    file = workplace() / "cache" / HASHES
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    with patch.dict(os.environ, DITFLOW_CACHE=str(file.parent)):
        folder_revision(mini_folder("mini"))


JSON = (*BYTES, *(json_structure,) * 6)
PARQUET = (*BYTES, *(parquet_structure,) * 6)
ARTIFACT = (*BYTES, *(artifact_structure,) * 3, artifact_types, artifact_values)
DAMAGED = (StoreDamagedError,)
MODEL = (ModelConfigError, ModelNotFoundError)

TARGETS = {
    target.name: target
    for target in (
        Target("spec", "job.yaml", spec_seeds, (*BYTES, *(yaml_structure,) * 2, yaml_tokens), read_spec, (SpecError,)),
        Target("bank", "bank.safetensors", bank_seeds, ARTIFACT, read_bank, (ArtifactError,)),
        Target("motion", MOTION_KEY, motion_seeds, ARTIFACT, read_motion, (ArtifactError,)),
        Target("video", "clip.mp4", video_seeds, (*BYTES, *(set_number_of_box,) * 2), read_any_video, (VideoError,)),
        Target("digest", DIGEST_KEY, file_of_output(DIGEST_KEY), PARQUET, read_digest),
        Target("inputs", INPUTS_KEY, file_of_output(INPUTS_KEY), JSON, read_inputs),
        Target("run", RUN_KEY, file_of_output(RUN_KEY), JSON, read_run, DAMAGED),
        Target("lease", LEASE_KEY, file_of_output(LEASE_KEY), JSON, read_lease, DAMAGED),
        Target("attempts", TRY_KEY, file_of_output(TRY_KEY), JSON, read_attempts, DAMAGED),
        Target("record", RECORD_KEY, record_seeds, PARQUET, read_record, (ManifestError,)),
        Target("model", "/model", model_seeds, (*BYTES, *(lines_structure,) * 8), read_model, MODEL),
        Target("hashes", HASHES, hashes_seeds, JSON, read_hashes),
    )
}
