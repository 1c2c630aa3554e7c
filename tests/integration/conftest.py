"""One S3 endpoint, one embedded Ray cluster and one folder of real reference videos for all integration tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from swift.server import SwiftServer

from jobs.clips import render_clips
from pipeline.run import connect


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket on a loopback S3 server; address and credentials are in the environment, as in production."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    changes = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": SwiftServer.access_key,  # moto takes any; workers keep those they began with
        "AWS_SECRET_ACCESS_KEY": SwiftServer.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir("integration")
    yield "integration"
    server.stop()
    S3FileSystem.clear_instance_cache()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="session")
def cluster(s3_bucket: str) -> Iterator[None]:
    """Workers inherit the environment that Ray was started in: the S3 endpoint comes first."""
    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    render_clips(folder, count=4, seed=0)
    return folder


@pytest.fixture(scope="session")
def swift_server(tmp_path_factory) -> Iterator[SwiftServer]:
    with SwiftServer(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture
def swift(swift_server: SwiftServer, monkeypatch, tmp_path) -> Iterator[SwiftServer]:
    """A second S3 server, a real one that can fail; for this test alone the environment points at it."""
    from s3fs import S3FileSystem

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    files = {"AWS_CONFIG_FILE": "no-config", "AWS_SHARED_CREDENTIALS_FILE": "no-credentials"}
    paths = {name: str(tmp_path / file) for name, file in files.items()}
    for name, value in {**swift_server.environment, **paths, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # an instance keeps the endpoint and credentials it began with
    yield swift_server
    swift_server.faults.clear()
    swift_server.start_object_server()
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def swift_bucket(swift: SwiftServer) -> str:
    name = swift.new_bucket()
    swift.faults.clear()  # the log of requests begins with the test's own
    return name
