"""Handing a job to a cluster: `ditflow submit`.

To `ray`, a cluster that runs, by Ray's job API; to `kuberay`, a Kubernetes cluster that makes one for every run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.kuberay import Manifest, Manifests, SubmissionError, Wish, as_yaml, render
from jobs.profile import SAMPLE_REGISTRY, Profile, load_profile
from jobs.shipping import LaunchError, pack
from jobs.table import Screen
from pipeline.store import redact
from pipeline.waits import waiting

_INTERRUPTED = 130


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Of `ray`: its address, whether to wait for the end, and the id of a job to follow in place of a new one. Of
    `kuberay`: the cluster's profile, how the job is to be run there, and whether to print the manifests only.
    """

    to: str
    job: Path | None
    overrides: tuple[str, ...]
    address: str | None
    wait: bool
    follow: str | None
    profile: Path
    wish: Wish
    dry_run: bool


def start(request: Request, screen: Screen) -> int:
    """Do what was asked for; return the exit status. Raises SpecError, SubmissionError and LaunchError."""
    _check(request)
    if request.to == "kuberay":
        assert request.job is not None
        _to_kuberay(request.job, request, screen.print)
        return 0
    return _to_ray(request, screen)


def _check(request: Request) -> None:
    """Raise SubmissionError for a request that says too little, or what cannot be done together."""
    if request.to not in ("ray", "kuberay"):
        raise SubmissionError(f"--to: {request.to!r} is not valid: expected ray or kuberay")
    ray = {"--follow": request.follow is not None, "--no-wait": not request.wait}
    wish = request.wish
    kubernetes = {"--schedule": wish.schedule, "--queue": wish.queue, "--name": wish.name, "--dry-run": request.dry_run}
    for option, given in (ray if request.to == "kuberay" else kubernetes).items():
        if given:
            other = "ray" if request.to == "kuberay" else "kuberay"
            raise SubmissionError(f"{option} is not valid with --to {request.to}: it belongs to --to {other}")
    if (request.job is None) != (request.follow is not None):
        raise SubmissionError("expected a job spec, or --follow ID of a job that was submitted, and not both")


# --------------------------------------------------------------------------------------------- a cluster that runs


def _to_ray(request: Request, screen: Screen) -> int:
    """Start a job, or take one up again, and follow it to its end; return its exit status."""
    from jobs import jobapi

    client = jobapi.connect(request.address)
    job_id = request.follow
    if job_id is None:
        assert request.job is not None
        job_id = jobapi.submit(client, request.job, request.overrides)
    again = redact(f"ditflow submit --follow {job_id} --address {request.address}")
    if not request.wait:
        print(job_id)
        screen.print(f"follow it: {again}")
        return 0
    screen.print(f"job {job_id}; it goes on without you: {again}")
    try:
        return jobapi.follow(client, job_id, _show, screen.print)
    except KeyboardInterrupt:
        screen.print(f"the job goes on. Follow it again: {again}. Stop it: ray job stop {job_id}")
        return _INTERRUPTED


def _show(log: str) -> None:
    print(log, end="", flush=True)


# -------------------------------------------------------------------------------------------------- Kubernetes


def _to_kuberay(job: Path, request: Request, say: Callable[[str], Any]) -> None:
    """Apply a job's manifests with kubectl, or print them."""
    profile = load_profile(request.profile)
    shipment = pack(job, request.overrides, profile.volumes.values(), profile.has_gpus)
    manifests = render(shipment, profile, request.wish)
    if request.dry_run:
        sys.stdout.buffer.write(manifests.to_yaml().encode())  # YAML is UTF-8, whatever the terminal is
        return
    if profile.image.startswith(SAMPLE_REGISTRY):
        raise SubmissionError(
            f"{request.profile}: image: {profile.image!r} is the sample's, which nobody can fetch: build "
            "infra/docker/Dockerfile, push it to a registry that the cluster reaches, and name it in a profile of yours"
        )
    _apply(manifests, profile, say)
    _tell(profile, request.wish, manifests, say)


def _apply(manifests: Manifests, profile: Profile, say: Callable[[str], Any]) -> None:
    for verb, some in (("apply", manifests.applied), ("create", manifests.created)):
        if some:
            for line in _kubectl([verb, "-f", "-"], some, profile).splitlines():
                say(line)


def _kubectl(arguments: list[str], manifests: list[Manifest], profile: Profile) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise LaunchError(
            "there is no kubectl on the PATH: install it, or print the manifests (--dry-run) and apply them elsewhere"
        )
    context = ["--context", profile.context] if profile.context else []
    with waiting(lambda: f"kubectl {' '.join([*context, *arguments])} to end"):
        done = subprocess.run(
            [kubectl, *context, *arguments],
            input=as_yaml(manifests),
            capture_output=True,
            encoding="utf-8",  # as YAML is, whatever the terminal is
            errors="replace",
            check=False,
        )
    if done.returncode:
        raise LaunchError(
            f"kubectl {' '.join([*context, *arguments])} failed with exit status {done.returncode}: "
            f"{done.stderr.strip()}\nCheck the cluster that kubectl speaks to (kubectl config current-context), that "
            f"the namespace {profile.namespace} is there, and KubeRay installed (kubectl get crd rayjobs.ray.io)"
        )
    return done.stdout


def _tell(profile: Profile, wish: Wish, manifests: Manifests, say: Callable[[str], Any]) -> None:
    name = manifests.applied[0]["metadata"]["labels"]["app.kubernetes.io/instance"]
    which = f"-n {profile.namespace} -l app.kubernetes.io/instance={name}"
    if wish.schedule is None:
        say(f"look at it: kubectl get rayjob {which}")
    else:
        kind = "raycronjob" if wish.cron == "raycronjob" else "cronjob"
        say(f"look at it: kubectl get {kind},rayjob {which}")
        say(f"end it: kubectl delete {kind} -n {profile.namespace} {name}")
