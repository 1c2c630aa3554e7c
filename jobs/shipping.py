"""A job spec on its way to a cluster: checked here, where its model need not be, and made ready for there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ditflow.backbones import MINI
from jobs.spec import CheckedSpec, SpecError, check_spec
from jobs.yaml12 import dump
from pipeline.job import Job
from pipeline.store import Store, StoreError

SPEC_FILE = "job.yaml"


class LaunchError(RuntimeError):
    """A cluster, or the tool that speaks to it, did not do what it was asked to."""


@dataclass(frozen=True)
class Shipment:
    """A job and the text of the spec that the cluster is given."""

    job: Job
    text: str


def pack(path: Path, overrides: Iterable[str], shared: Iterable[str], gpus: bool) -> Shipment:
    """Return a job spec as it goes to a cluster that reaches object storage and the folders `shared`.

    gpus: the cluster's workers have GPUs, but perhaps not yet: actors then ask for their shares of one, which makes an
    autoscaler bring the first; with `auto` they would take what is there when the job begins.
    Raises SpecError, also for what the cluster cannot reach.
    """
    spec = check_spec(path, overrides)
    mistakes = [*_unreachable(spec, tuple(shared)), *_credentials(spec)]
    if mistakes:
        raise SpecError("\n".join(mistakes))
    values = _with_gpu_shares(spec) if gpus else spec.values
    return Shipment(spec.job, dump(values))


def _unreachable(spec: CheckedSpec, shared: tuple[str, ...]) -> Iterator[str]:
    for keys, uri in spec.job.addresses:
        if "://" not in uri.removeprefix("file://") and not _is_below(uri.removeprefix("file://"), shared):
            there = f"or a path below {', '.join(shared)}" if shared else "(the cluster has no volumes)"
            yield spec.mistake(keys, f"{uri!r} is on this machine: expected what the cluster reaches, s3://... {there}")
    model = spec.job.model.path
    if model in MINI or "://" in model or _is_below(model, shared):
        return
    if Path(model).exists() or model.startswith(("/", ".", "~")):
        yield spec.mistake(
            ["model", "path"], f"{model!r} is on this machine: expected mini, s3://..., or a path on a volume"
        )
    elif not spec.job.model.download:
        yield spec.mistake(
            ["model", "path"],
            f"{model!r} is the id of a hub, which the cluster does not have: expected one on a volume, s3://... or "
            "model.download: true (every node then fetches it)",
        )


def _is_below(path: str, folders: tuple[str, ...]) -> bool:
    place = PurePosixPath(path)
    return ".." not in place.parts and any(place.is_relative_to(folder) for folder in folders)


def _credentials(spec: CheckedSpec) -> Iterator[str]:
    """Credentials among the storage options or in a URI, which everybody who may look at the cluster would see."""
    for keys, uri in spec.job.addresses:
        if "://" in uri:
            try:
                Store(uri, spec.job.storage_options)
            except StoreError as error:
                yield spec.mistake(keys, str(error))


def _with_gpu_shares(spec: CheckedSpec) -> dict[str, Any]:
    """Return the spec's values with a share of a GPU for each pool whose `gpus` are `auto`."""
    from pipeline.graph import gpu_shares

    resources = spec.values.get("resources") or {}
    pools = {
        pool: {**(resources.get(pool) or {}), "gpus": share}
        for pool, share in gpu_shares(spec.job).items()
        if share and getattr(spec.job.resources, pool).gpus == "auto"
    }
    return {**spec.values, "resources": {**resources, **pools}}
