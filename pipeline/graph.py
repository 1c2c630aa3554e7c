"""The dataset of a job: the only place that builds one, and it reads like the diagram.

    plan -> work by reference -> read + decode -> extract motion -> fan out -> finish row -> manifest
                                 (CPU tasks)      (actors)                     (actors)

Every block has one row: a finished row is then a unit of its own, which no other row's failure takes along.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from pipeline.job import Job, Pool
from pipeline.measurements import Task
from pipeline.plan import WorkRow
from pipeline.stages.evaluate import EvaluateRow
from pipeline.stages.extract import ExtractMotion, fan_out, without_motion
from pipeline.stages.generate import FinishRow
from pipeline.stages.read import Row, read_reference

# Logical CPUs. Small, so that both pools and the readers fit on any machine: actors live on their GPU, or on as many
# threads as `resources.threads` says. Different, or Ray would fuse the readers into the actors and decode on the GPU's
# time.
_READER_CPUS, _ACTOR_CPUS = 0.5, 0.25
# On one GPU both pools live side by side: extraction is a small part of the work.
_EXTRACT_GPU_SHARE, _GENERATE_GPU_SHARE = 0.2, 0.8
# What the last stage does, as Ray's dashboard and the titles of its processes call it: they take the class's name.
_FINISHES = {
    "extract": "RecordMotion",
    "synthesize": "GenerateVideo",
    "build-bank": "LearnBank",
    "reuse": "ReuseBank",
}
# For metrics whose device is a GPU: CLIP and CoTracker leave room for another.
_EVALUATE_GPU_SHARE = 0.5


def gpu_shares(job: Job) -> dict[str, float]:
    """Return what an actor of each pool takes of a GPU where its `gpus` are `auto` and there are GPUs."""
    return {
        "extract": _EXTRACT_GPU_SHARE,
        "generate": _GENERATE_GPU_SHARE,
        "evaluate": 0.0 if job.metrics.device == "cpu" else _EVALUATE_GPU_SHARE,
    }


def finished_rows(job: Job, todo: list[WorkRow], model_revision: str) -> Iterator[Row]:
    """Run the rows to do; return each row's id, status, final loss, seconds and error as it is committed."""
    return _as_they_end(build(job, todo, model_revision))


def evaluated_rows(job: Job, tasks: list[Task]) -> Iterator[Row]:
    """Measure finished rows; return each row's id, status, seconds and error as it is done."""
    rows = [{"made": json.dumps(task.row, default=str), "metrics": json.dumps(task.metrics)} for task in tasks]
    gpu_share = 0.0 if job.metrics.device == "cpu" else _EVALUATE_GPU_SHARE
    measured = _one_row_blocks(rows).map(
        EvaluateRow, fn_constructor_kwargs={"job": job}, **_actors(job.resources.evaluate, gpu_share)
    )
    return _as_they_end(measured)


def build(job: Job, todo: list[WorkRow], model_revision: str) -> Dataset:
    """Return the lazy dataset whose consumption does the work."""
    arguments = {"job": job, "model_revision": model_revision}
    moved = [row for row in todo if row.motion_id is not None]
    unmoved = bank_by_bank([row for row in todo if row.motion_id is None])
    sources: list[Dataset] = []
    if unmoved:
        sources.append(_one_row_blocks([without_motion(row) for row in unmoved]))
    if moved:
        references = _one_row_blocks(_by_reference(moved))
        read = references.map(read_reference, fn_kwargs={"job": job}, num_cpus=_READER_CPUS)
        extracted = read.map(
            ExtractMotion,
            fn_constructor_kwargs=arguments,
            **_actors(job.resources.extract, _EXTRACT_GPU_SHARE),
        )
        sources.append(extracted.flat_map(fan_out, num_cpus=_READER_CPUS).repartition(target_num_rows_per_block=1))
    first, *others = sources
    work = first.union(*others) if others else first
    return work.map(
        _called(_FINISHES[job.kind], FinishRow),
        fn_constructor_kwargs=arguments,
        **_actors(job.resources.generate, _GENERATE_GPU_SHARE),
    )


def bank_by_bank(rows: list[WorkRow]) -> list[WorkRow]:
    """Put all rows of a bank one after the other: an actor that has read it uses it for those that it gets."""
    return sorted(rows, key=lambda row: row.bank.identity if row.bank else "")


def _called(name: str, stage: type[FinishRow]) -> type[FinishRow]:
    """Return a stage under a name that says what it does in this job."""
    return type(name, (stage,), {"__doc__": stage.__doc__})


def _as_they_end(dataset: Dataset) -> Iterator[Row]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _by_reference(todo: list[WorkRow]) -> list[Row]:
    """One row per reference, with the JSON list of all work on it."""
    ordered = sorted(todo, key=lambda row: row.motion_id or "")
    grouped = groupby(ordered, key=lambda row: row.motion_id or "")
    return [{"motion_id": motion, "work": json.dumps([row.to_json() for row in rows])} for motion, rows in grouped]


def _one_row_blocks(rows: list[Row]) -> Dataset:
    DataContext.get_current().enable_progress_bars = False  # a dataset keeps the context that it was made in
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _actors(pool: Pool, gpu_share: float) -> dict[str, Any]:
    """An actor pool with one row in flight per actor: a row that kills its process takes no other along."""
    least, most = pool.bounds
    shared = gpu_share if ray.cluster_resources().get("GPU", 0) else 0.0
    gpus = shared if pool.gpus == "auto" else pool.gpus
    compute = ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=1)
    return {"compute": compute, "num_cpus": _ACTOR_CPUS, "num_gpus": gpus}
