"""Ray heads that are no part of a test's own process, started and ended by it."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from jobs.spec import PRESETS

STARTS = 3
TOKEN = uuid.uuid4().hex
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
PORTS += ("metrics-export-port", "ray-client-server-port")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def environment(token: str | None = TOKEN) -> dict[str, str]:
    """That of a machine of the cluster: this checkout's software, its token, and no word of another cluster."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables["PYTHONPATH"] = str(PRESETS.parent)
    return {**variables, "RAY_AUTH_MODE": "token", **({"RAY_AUTH_TOKEN": token} if token else {})}


def new_options(folder: str, dashboard: bool) -> dict[str, object]:
    """Options of `ray start` for a head on ports of its own. folder: short, for sockets lie in it."""
    return {
        **dict(zip(PORTS, free_ports(len(PORTS)), strict=True)),
        "dashboard-host": "127.0.0.1",
        "include-dashboard": str(dashboard).lower(),
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "object-store-memory": 100_000_000,
        "temp-dir": folder,
    }


def started(options: dict[str, object], answers: Callable[[], bool], log: Path, **variables: str) -> psutil.Popen:
    """A head that answers. On a busy machine Ray gives up its start after half a minute: it is tried again."""
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    for _ in range(STARTS):
        with log.open("a") as stream:
            ray = psutil.Popen(command, env={**environment(), **variables}, stdout=stream, stderr=subprocess.STDOUT)
        if _is_up(answers, ray, log):
            return ray
        end(ray)
    raise AssertionError(log.read_text())


def _is_up(answers: Callable[[], bool], ray: psutil.Popen, log: Path) -> bool:
    """Wait until a head has started and answers; False if it ended before."""
    while ray.poll() is None:
        with suppress(requests.RequestException):
            if "Ray runtime started" in log.read_text() and answers():
                return True
        time.sleep(1)
    return False


def end(process: psutil.Popen) -> None:
    """End a process and all that it has started."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, timeout=20)
