"""The Ray cluster that a job runs on: whether it can be reached, and how many actors it has room for."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS

from ditflow.errors import SettingsError
from pipeline.job import Pool

ANSWERS_WITHIN_S = 15.0
_CONNECTS_WITHIN_S = 5.0
_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""A socket of Ray's below its folder, for a process with the highest number that Linux gives."""


_NOT_YET = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")
_EPSILON = 1e-6
"""Shares of CPUs and GPUs are floats."""


class ClusterError(RuntimeError):
    """The cluster cannot be used."""


def check_address() -> None:
    """Raise ValueError for a RAY_ADDRESS that names no cluster, ClusterError for one where none answers.

    One that has answered is not asked again by this process.
    """
    _check(os.environ.get("RAY_ADDRESS", ""))


@cache
def _check(address: str) -> None:
    if address in ("", "auto", "local"):  # Ray finds or starts one itself
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "://" in address.removeprefix("ray://") or not host or not port.isdecimal():
        raise ValueError(
            f"RAY_ADDRESS: {address!r} is not valid: expected the address of a cluster's head, such as head:6379. One "
            "with http:// is that of its dashboard, which takes jobs by `ditflow submit`. Without RAY_ADDRESS the job "
            "runs on this machine."
        )
    failures: list[str] = ["it took the connection, and did not answer as a Ray cluster does"]
    asking = threading.Thread(target=_ask, args=(address, host.strip("[]"), int(port), failures), daemon=True)
    with stderr_silenced():
        asking.start()
        asking.join(ANSWERS_WITHIN_S)
    if failures:
        raise ClusterError(
            f"RAY_ADDRESS: no Ray cluster answers at {address}: {failures[-1]}. Start one (ray start --head, or ray up "
            "infra/aws/cluster.yaml), or unset RAY_ADDRESS to run on this machine."
        )


def _ask(address: str, host: str, port: int, failures: list[str]) -> None:
    """Ask a cluster's head whether it is one; leave what went wrong in `failures`, or nothing."""
    try:
        socket.create_connection((host, port), _CONNECTS_WITHIN_S).close()
        if not address.startswith("ray://"):
            ray._raylet.GcsClient(address=address)
    except Exception as error:
        failures.append(" ".join(str(error).split()))
    else:
        failures.clear()


@contextmanager
def stderr_silenced() -> Iterator[None]:
    """Drop what native code writes to stderr; errors of Ray's start are exceptions and come through."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def session_folder() -> str:
    """Return where an embedded Ray keeps its sockets and logs: a folder whose name is short enough for a socket's.

    Below RAY_TMPDIR or TMPDIR, as Ray does it, or else below /tmp. Raises ClusterError if no folder will do.
    """
    asked = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    folders = [Path(asked).absolute() / "ray", Path("/tmp/ray"), Path(f"/tmp/ray-{os.getuid()}")]
    for folder in folders:
        if len(os.fsencode(folder / _LONGEST_SOCKET)) <= _SOCKET_PATH_BYTES and _is_writable(folder):
            return str(folder)
    raise ClusterError(
        f"no folder for Ray's sockets and logs: {', '.join(map(str, folders))}: expected one that can be written to, "
        f"with a name of at most {_SOCKET_PATH_BYTES - len(_LONGEST_SOCKET) - 1} bytes. Set RAY_TMPDIR to a short one."
    )


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder, buffering=0) as probe:
            return bool(probe.write(bytes(4096)))  # a full disk takes a file, but nothing into it
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------- room


@dataclass(frozen=True)
class Need:
    """What an actor pool asks of a cluster, and what each of its actors takes there."""

    pool: Pool
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


Machines = Sequence[Mapping[str, float]]
"""What each machine of a cluster has, by Ray's names: CPU and GPU."""


def pools_with_room(needs: Mapping[str, Need], reader_cpus: float) -> tuple[dict[str, Pool], list[str]]:
    """Return the pools as the cluster has room for them, and what is to be said of it.

    Of [least, most] actors no more are kept than find room beside the least of the other pools and one reader. On a
    cluster that grows all are kept: its autoscaler is asked for what is missing.

    Raises SettingsError for a pool whose least does not find room on a cluster that does not grow.
    """
    machines: Machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = actors_with_room(machines, needs, reader_cpus)
    pools, notes = {}, []
    for name, need in needs.items():
        (least, most), key = need.pool.bounds, f"resources.{name}.actors"
        pools[name] = need.pool
        if found[name] < least:
            if not grows():
                raise _too_many(name, need, found[name], machines)
            notes.append(
                f"{key}: waiting for the cluster to grow: {least} actors need {need} each, and {found[name]} find room "
                f"on {_described(machines)}"
            )
        elif found[name] < most and not grows():
            pools[name] = replace(need.pool, actors=(least, found[name]))
            notes.append(
                f"{key}: at most {found[name]} of {most} actors: no more find room on {_described(machines)}, with "
                f"{need} each, beside the other stages"
            )
    return pools, notes


def actors_with_room(machines: Machines, needs: Mapping[str, Need], reader_cpus: float) -> dict[str, int]:
    """Return how many actors of each pool, at most those asked for, find room beside each other and one reader.

    First the least of every pool, then one more of each in turn.
    """
    room = _Room(machines)
    found = dict.fromkeys(needs, 0)
    if not room.take(reader_cpus):
        return found
    for name, need in needs.items():
        while found[name] < need.pool.bounds[0] and room.take(need.cpus, need.gpus):
            found[name] += 1
    growing = [*needs]
    while growing:
        growing = [
            name
            for name in growing
            if needs[name].pool.bounds[0] <= found[name] < needs[name].pool.bounds[1]
            and room.take(needs[name].cpus, needs[name].gpus)
        ]
        for name in growing:
            found[name] += 1
    return found


class _Room:
    """What is free on the machines of a cluster, as actors take their places."""

    def __init__(self, machines: Machines):
        # Those without GPUs first: what needs none goes there if it can, as Ray has it.
        machines = sorted(machines, key=lambda machine: machine.get("GPU", 0.0))
        self._cpus = [machine.get("CPU", 0.0) for machine in machines]
        self._gpus = [[1.0] * int(machine.get("GPU", 0)) for machine in machines]

    def take(self, cpus: float, gpus: float = 0.0) -> bool:
        """Take a place on a machine, on whole GPUs or on a share of one; return whether there was any."""
        share, count = min(gpus, 1.0), math.ceil(gpus)
        for number, devices in enumerate(self._gpus):
            # The fullest that will do, so that what asks for more finds it.
            fitting = sorted((free, at) for at, free in enumerate(devices) if free > share - _EPSILON)[:count]
            if self._cpus[number] > cpus - _EPSILON and len(fitting) == count:
                self._cpus[number] -= cpus
                for _, at in fitting:
                    devices[at] -= share
                return True
        return False


def grows() -> bool:
    """Return whether an autoscaler may add machines to the cluster.

    Its second version is known by a mark that Ray's head sets, and a name of its kind on each machine. KubeRay gives
    these names on clusters that do not grow as well. The first version writes a report into the head's store; where
    machines are only watched, each has a kind of its own there.
    """
    in_groups = any(ray._raylet.RAY_NODE_GROUP_KEY in node["Labels"] for node in ray.nodes())
    second = _in_heads_store(ray._raylet.GCS_AUTOSCALER_V2_ENABLED_KEY, ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE)
    kinds = _reported_kinds()
    if second == b"1" or not kinds:  # without a report the first version has only just begun, if it is there
        return in_groups
    return not all(map(_ONLY_WATCHED.fullmatch, kinds))


_ONLY_WATCHED = re.compile(r"node_[0-9a-f]{56}")
"""A kind of machine that Ray makes of a machine's id."""


def _in_heads_store(key: str, namespace: str | None = None) -> bytes | None:
    """Return what Ray's head keeps under a key, by a client of our own: Ray's may have been reset meanwhile."""
    head = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    return head.internal_kv_get(key.encode(), namespace.encode() if namespace else None, timeout=ANSWERS_WITHIN_S)


def _reported_kinds() -> set[str]:
    """Return the kinds of machines that an autoscaler of the first version has reported last."""
    status = _in_heads_store(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(status).get("autoscaler_report") if status else None
    if not report:
        return set()
    named = [kind for _, kind, *_ in (*report["pending_nodes"], *report["failed_nodes"])]
    return {*report["active_nodes"], *(report["idle_nodes"] or ()), *report["pending_launches"], *named}


def _too_many(name: str, need: Need, found: int, machines: Machines) -> SettingsError:
    has = f"the cluster has {_described(machines)}"
    if need.gpus and not _Room(machines).take(need.cpus, need.gpus):
        largest = max((machine.get("GPU", 0.0) for machine in machines), default=0.0)
        expected = f"at most {largest:g}, what one machine has: {has}"
        return SettingsError(f"resources.{name}.gpus", need.pool.gpus, f"{expected}. On a CPU it is 0")
    expected = f"at most {found}: each takes {need}, other stages take their part, and {has}"
    advice = f". Write [1, {need.pool.bounds[1]}] for as many as there is room for" if found else ""
    return SettingsError(f"resources.{name}.actors", need.pool.actors, expected + advice)


def _described(machines: Machines) -> str:
    cpus, gpus = (sum(machine.get(kind, 0.0) for machine in machines) for kind in ("CPU", "GPU"))
    return f"{len(machines)} machines with {cpus:g} CPUs and {gpus:g} GPUs"


# ---------------------------------------------------------------------------------------------------- waiting


def unplaced_actors() -> list[str]:
    """Return which processes of this driver have no place yet, one text for each stage, and what is free."""
    if not ray.is_initialized():
        return ["the Ray cluster to start"]
    try:
        own = ray.get_runtime_context().get_job_id()
        actors = [actor for actor in ray._private.state.actors().values() if actor["JobID"] == own]
        total, free = ray.cluster_resources(), ray.available_resources()
    except (RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
        return [f"the Ray cluster to answer: {error}"]
    left = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    waiting = Counter(actor["ActorClassName"] for actor in actors if actor["State"] in _NOT_YET)
    return [f"{count} x {name} to get its place and start (free: {left})" for name, count in waiting.items()]
