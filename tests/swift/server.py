"""A real S3 server for tests: OpenStack Swift with its S3 API, on loopback, from `.venv-swift`.

Four processes (account, container, object, proxy), one folder as their only disk, and the filter of `faults.py` in
front of the proxy. Linux only; the folder needs a file system with extended attributes.

    with SwiftServer(folder) as server:
        os.environ.update(server.environment)
        server.faults.set([{"status": 503, "rate": 0.5}])
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import pwd
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.session import Session
from swift.faults import Rule

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".venv-swift"
LOOPBACK = "127.0.0.1"
BACKENDS = ("account", "container", "object")
LISTING_PAGE = 100  # keys in one page of a listing; 1,000 on AWS, where it would take as long to fill two
START_SECONDS = 600  # until a process that neither answers nor ends is given up
PATIENCE = 60  # seconds that one process waits for another; Swift's own half seconds are too short on a busy machine

# ------------------------------------------------------------------------------------------- configuration

SWIFT_CONF = """\
[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests
"""

# No workers: each server is the one process that was started, so that killing it kills all of it.
# log_address: there is no such socket, which keeps the tests out of the machine's own log.
COMMON = """\
[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
workers = 0
log_address = {folder}/no-log
log_level = WARNING
conn_timeout = {patience}
node_timeout = {patience}
container_update_timeout = {patience}
"""

BACKEND_CONF = """
[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""

# error_suppression: otherwise an object server that was killed is passed over for a minute after its return.
PROXY_CONF = """
[pipeline:main]
pipeline = faults catch_errors gatekeeper listing_formats s3api tempauth copy slo dlo versioned_writes proxy-server

[filter:faults]
paste.filter_factory = faults:filter_factory
orders = {folder}/orders.json

[filter:s3api]
use = egg:swift#s3api
max_bucket_listing = {page}

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
error_suppression_interval = 0
error_suppression_limit = 1000000

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:listing_formats]
use = egg:swift#listing_formats

[filter:copy]
use = egg:swift#copy

[filter:slo]
use = egg:swift#slo

[filter:dlo]
use = egg:swift#dlo

[filter:versioned_writes]
use = egg:swift#versioned_writes
"""

# What swift-ring-builder's create, add and rebalance do, for the three rings in one process.
MAKE_RINGS = """
import sys
from swift.common.ring import RingBuilder

folder, *servers = sys.argv[1:]
for server in servers:
    kind, port = server.split(":")
    builder = RingBuilder(part_power=1, replicas=1, min_part_hours=0)
    device = {"region": 1, "zone": 1, "device": "disk", "weight": 1, "ip": "127.0.0.1", "port": int(port)}
    builder.add_dev({**device, "replication_ip": "127.0.0.1", "replication_port": int(port)})
    builder.rebalance(seed=1)
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""

# The kernel kills the server when the thread that started it ends, however that came about (PR_SET_PDEATHSIG is 1).
# Not as preexec_fn: the tests' process has threads, and a fork between them may hang.
DIE_WITH_PARENT = """
import ctypes, os, sys

ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class SwiftError(Exception):
    """The server cannot be started here."""


# ------------------------------------------------------------------------------------------------- faults


class Faults:
    """Gives the orders that the filter in the proxy follows, and reads its log."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder
        self.clear()

    def set(self, rules: Iterable[Mapping[str, Any]]) -> None:
        """Order these faults, whose fields are those of `faults.Rule`, and begin a new log."""
        checked = [Rule(**rule) for rule in rules]
        self._log = self._folder / f"requests-{uuid.uuid4().hex}.jsonl"
        self._log.touch()
        fields = [{name: value for name, value in asdict(rule).items() if name[0] != "_"} for rule in checked]
        temporary = self._folder / "orders.json.new"
        temporary.write_text(json.dumps({"log": str(self._log), "rules": fields}))
        temporary.replace(self._folder / "orders.json")

    def clear(self) -> None:
        """Order that nothing fails, and begin a new log."""
        self.set([])

    def requests(self) -> list[dict[str, Any]]:
        """Return method, target ("path?query") and fault (None, or the rule's status) of each request since `set`."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def counts(self) -> Counter[str]:
        """Return how many "requests" there were since `set`, of each method, and with each fault ("503", "lost")."""
        requests = self.requests()
        found = Counter(request["method"] for request in requests)
        found.update(request["fault"] for request in requests if request["fault"])
        found["requests"] = len(requests)
        return found


# ------------------------------------------------------------------------------------------------- server


class SwiftServer:
    """The running server, as a context manager; `folder` must exist and be its own.

    Raises SwiftError if Swift is not installed, the folder's file system has no extended attributes, or a process
    ends while it starts (with the end of its log).
    """

    access_key = "test:tester"
    secret_key = "testing-the-secret"

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).resolve()
        self.ports = dict(zip((*BACKENDS, "proxy"), _free_ports(4), strict=True))
        self.endpoint = f"http://{LOOPBACK}:{self.ports['proxy']}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.faults = Faults(self.folder)
        self._processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> SwiftServer:
        _require_swift()
        _require_attributes(self.folder)
        self._lay_out()
        try:
            for kind in self.ports:
                self._start(kind)
            for kind in self.ports:
                self._wait(kind)
            self._try_out()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes at once: what they have stored goes with the folder."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def new_bucket(self) -> str:
        """Make a bucket and return its name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self._client.create_bucket(Bucket=name)
        return name

    def kill_object_server(self) -> None:
        """End the process that holds the objects' bytes as a power cut would."""
        process = self._processes.pop("object")
        process.kill()
        process.wait()

    def start_object_server(self) -> None:
        """Start it again on the same port and files, unless it runs."""
        if "object" not in self._processes:
            self._start("object")
            self._wait("object")

    def _lay_out(self) -> None:
        (self.folder / "devices" / "disk").mkdir(parents=True, exist_ok=True)
        (self.folder / "swift.conf").write_text(SWIFT_CONF)
        values = {
            "folder": self.folder,
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "secret": self.secret_key,
            "page": LISTING_PAGE,
            "patience": PATIENCE,
        }
        for kind, port in self.ports.items():
            text = COMMON + (PROXY_CONF if kind == "proxy" else BACKEND_CONF)
            (self.folder / f"{kind}.conf").write_text(text.format(kind=kind, port=port, **values))
        servers = [f"{kind}:{self.ports[kind]}" for kind in BACKENDS]
        command = [str(ENVIRONMENT / "bin/python"), "-c", MAKE_RINGS, str(self.folder), *servers]
        subprocess.run(command, check=True, env=_environment())

    def _start(self, kind: str) -> None:
        program = [str(ENVIRONMENT / "bin/python"), str(ENVIRONMENT / f"bin/swift-{kind}-server")]
        command = [*program, str(self.folder / f"{kind}.conf"), "--verbose"]
        with (self.folder / f"{kind}.log").open("ab") as log:
            self._processes[kind] = subprocess.Popen(
                [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), *command],
                env=_environment(PYTHONPATH=str(HERE)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the server
            )

    def _wait(self, kind: str) -> None:
        """Return when the server answers HTTP requests, whatever it says."""
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.ports[kind]):
            ended = self._processes[kind].poll() is not None
            if ended or time.monotonic() > deadline:
                log = (self.folder / f"{kind}.log").read_text(errors="replace")
                what = "ended while it started" if ended else f"gave no answer in {START_SECONDS} s"
                raise SwiftError(f"Swift's {kind} server {what}. The end of its log:\n{log[-3000:]}")
            time.sleep(0.05)

    def _try_out(self) -> None:
        """Raise unless a bucket can be made and an object be stored and read through all four processes."""
        client, bucket = self._client, self.new_bucket()
        client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
        assert client.get_object(Bucket=bucket, Key="ready")["Body"].read() == b"ready"

    @cached_property  # half a second
    def _client(self) -> Any:
        return Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )


def _require_swift() -> None:
    if not (ENVIRONMENT / "bin/swift-proxy-server").exists():
        raise SwiftError(f"Swift is not installed in {ENVIRONMENT}: run `make .venv-swift/installed`")


def _require_attributes(folder: Path) -> None:
    probe = folder / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.metadata", b"x" * 255)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise SwiftError(
            f"the file system of {folder} has no extended attributes, in which Swift keeps what it knows of an object. "
            "Run the tests with --basetemp=... on ext4, xfs or btrfs."
        ) from error
    finally:
        probe.unlink()


def _environment(**changes: str) -> dict[str, str]:
    """The environment for Swift's Python: nothing that would lead it to this one's packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | changes


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]  # all at once, or one port might come twice
    try:
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/")
        connection.getresponse()
        return True
    return False
