"""The dataset of a job: the only place that builds one, and it reads like the diagram.

    plan -> work by reference -> read + decode -> extract motion -> fan out -> finish row -> manifest
            (as others end)      (CPU tasks)      (actors)                     (actors)

Every block has one row: a finished row is then a unit of its own, which no other row's failure takes along.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from pipeline.cluster import Need, grows
from pipeline.job import Job, Pool
from pipeline.measurements import Task
from pipeline.plan import WorkRow
from pipeline.source import Entry, Source
from pipeline.stages.evaluate import EvaluateRow
from pipeline.stages.extract import ExtractMotion, FanOut, without_motion
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


def needs(job: Job, todo: Sequence[WorkRow]) -> tuple[dict[str, Need], float]:
    """Return what the pools that make these rows ask of the cluster, and the CPUs of a reader; 0 if none reads."""
    pools = {"generate": _need(job.resources.generate, _GENERATE_GPU_SHARE)}
    if all(row.motion_id is None for row in todo):
        return pools, 0.0
    return {"extract": _need(job.resources.extract, _EXTRACT_GPU_SHARE), **pools}, _READER_CPUS


def evaluation_needs(job: Job) -> tuple[dict[str, Need], float]:
    """Return what the pool that measures rows asks of the cluster; it reads by itself."""
    return {"evaluate": _need(job.resources.evaluate, gpu_shares(job)["evaluate"])}, 0.0


def finished_rows(job: Job, todo: list[WorkRow], model_revision: str) -> Iterator[Row]:
    """Run the rows to do; return each row's id, status, final loss, seconds and error as it is committed."""
    return _as_they_end(*build(job, todo, model_revision))


def evaluated_rows(job: Job, tasks: list[Task]) -> Iterator[Row]:
    """Measure finished rows; return each row's id, status, seconds and error as it is done."""
    _settle_context()
    entries = [
        ({"made": json.dumps(task.row, default=str), "metrics": json.dumps(task.metrics)}, [task.row["row_id"]])
        for task in tasks
    ]
    source = Source(entries, job.resources.most_ahead)
    measured = source.dataset.map(
        EvaluateRow, fn_constructor_kwargs={"job": job}, **_actors(evaluation_needs(job)[0]["evaluate"])
    )
    return _as_they_end(measured, [source])


def build(job: Job, todo: list[WorkRow], model_revision: str) -> tuple[Dataset, list[Source]]:
    """Return the lazy dataset whose consumption does the work, and its sources, which follow what has ended."""
    _settle_context()
    arguments, ahead = {"job": job, "model_revision": model_revision}, job.resources.most_ahead
    pools, _ = needs(job, todo)
    moved = [row for row in todo if row.motion_id is not None]
    unmoved = bank_by_bank([row for row in todo if row.motion_id is None])
    sources: list[Source] = []
    branches: list[Dataset] = []
    if unmoved:
        sources.append(Source([(without_motion(row), [row.row_id]) for row in unmoved], ahead))
        branches.append(sources[-1].dataset)
    if moved:
        sources.append(Source(_by_reference(moved), ahead))
        read = sources[-1].dataset.map(
            read_reference, fn_kwargs={"job": job}, num_cpus=_READER_CPUS, concurrency=_readers()
        )
        extracted = read.map(ExtractMotion, fn_constructor_kwargs=arguments, **_actors(pools["extract"]))
        # A process of its own without a share of the CPUs: it never waits for one that a reader has.
        fanned_out = extracted.flat_map(_called("fan_out", FanOut), compute=ActorPoolStrategy(size=1), num_cpus=0)
        branches.append(fanned_out)
    first, *others = branches
    work = first.union(*others) if others else first
    finished = work.map(
        _called(_FINISHES[job.kind], FinishRow),
        fn_constructor_kwargs=arguments,
        **_actors(pools["generate"]),
    )
    return finished, sources


def _readers() -> int | None:
    """Return how many references are read at a time, None for any number.

    Ray keeps an idle process as long as there is a free CPU for it; more readers than that would be started anew for
    every reference.
    """
    return None if grows() else max(1, int(ray.cluster_resources()["CPU"]) - 1)


def bank_by_bank(rows: list[WorkRow]) -> list[WorkRow]:
    """Put all rows of a bank one after the other: an actor that has read it uses it for those that it gets."""
    return sorted(rows, key=lambda row: row.bank.identity if row.bank else "")


def _called(name: str, stage: type) -> type:
    """Return a stage under a name that says what it does in this job."""
    return type(name, (stage,), {"__doc__": stage.__doc__})


def _as_they_end(dataset: Dataset, sources: list[Source]) -> Iterator[Row]:
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield row
                for source in sources:
                    source.end(row["row_id"])
    finally:
        for source in sources:
            source.close()


def _by_reference(todo: list[WorkRow]) -> list[tuple[Entry, list[str]]]:
    """One entry per reference, with the JSON list of all work on it."""
    ordered = sorted(todo, key=lambda row: row.motion_id or "")
    entries = []
    for motion, grouped in groupby(ordered, key=lambda row: row.motion_id or ""):
        rows = list(grouped)
        work = json.dumps([row.to_json() for row in rows])
        entries.append(({"motion_id": motion, "work": work}, [row.row_id for row in rows]))
    return entries


def _settle_context() -> None:
    """Settle what datasets are made with from here on: every row is a block, as soon as it is there."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # byte: so that a second row never fits


def _need(pool: Pool, gpu_share: float) -> Need:
    shared = gpu_share if ray.cluster_resources().get("GPU", 0) else 0.0
    return Need(pool, _ACTOR_CPUS, shared if pool.gpus == "auto" else pool.gpus)


def _actors(need: Need) -> dict[str, Any]:
    """An actor pool with one row in flight per actor: a row that kills its process takes no other along."""
    least, most = need.pool.bounds
    compute = ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=1)
    return {"compute": compute, "num_cpus": need.cpus, "num_gpus": need.gpus}
