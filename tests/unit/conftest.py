"""Shared fixtures: a real S3 protocol endpoint on loopback, and a `store` fixture on both kinds of storage."""

import contextlib
import http.client
import http.server
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest

from pipeline.store import Store

LOOPBACK = "127.0.0.1"


@dataclass
class S3Server:
    """An S3 endpoint by moto that can be told to misbehave.

    `fail(status, code, when)` answers requests with an error; `requests` lists "METHOD path?query" as received.
    """

    endpoint: str
    requests: list[str] = field(default_factory=list)
    failing: Callable[[str], bool] | None = None
    answer: tuple[int, str] = (503, "SlowDown")

    def fail(self, status: int, code: str, when: Callable[[str], bool] = lambda request: True) -> None:
        self.answer, self.failing = (status, code), when

    def heal(self) -> None:
        self.failing = None
        self.requests.clear()

    def new_bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        connection = http.client.HTTPConnection(self.endpoint.removeprefix("http://"))
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
        connection.close()
        return name

    def fill(self, uri: str, keys: Iterable[str]) -> None:
        """Put empty objects below an s3:// URI without a request for each."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for key in keys:
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, f"{prefix}/{key}", b"")

    def wrap(self, application: Callable) -> Callable:
        # moto checks If-None-Match and stores in two steps; S3 does both at once, so requests go one by one here.
        lock = threading.Lock()

        def wrapped(environ: dict, start_response: Callable) -> list[bytes]:
            query = environ.get("QUERY_STRING")
            request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}" + (f"?{query}" if query else "")
            self.requests.append(request)
            if self.failing and self.failing(request):
                return self._refuse(environ, start_response)
            with lock:
                return list(application(environ, start_response))

        return wrapped

    def _refuse(self, environ: dict, start_response: Callable) -> list[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = self.answer
        start_response(f"{status} {code}", [("Content-Type", "application/xml")])
        body = f"<Error><Code>{code}</Code><Message>injected {code}</Message></Error>"
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body.encode()]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # an instance keeps the endpoint and credentials it began with
    moto = ThreadedMotoServer(LOOPBACK, port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    server = S3Server(f"http://{host}:{port}")
    moto._server.app = server.wrap(moto._server.app)
    yield server
    S3FileSystem.clear_instance_cache()
    moto.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[S3Server]:
    """The endpoint, with the environment pointing at it as a user's would."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    environment = {
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test-run",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
        "NO_PROXY": LOOPBACK,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3_server.heal()
    yield s3_server
    s3_server.heal()


@pytest.fixture
def s3_store(s3: S3Server) -> Store:
    return Store(f"s3://{s3.new_bucket()}/runs/one")


@pytest.fixture
def local_store(tmp_path) -> Store:
    return Store(str(tmp_path / "runs" / "one"))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store, once on a local folder and once on S3."""
    return request.getfixturevalue(f"{request.param}_store")


class Web(dict):
    """A web server of files by name, each bytes, or a function that answers a request. `requests` lists what came."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.ending = threading.Event()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.requests.append(f"{self.command} {self.path}")
                answer = web.get(self.path.lstrip("/").split("?")[0])
                if callable(answer):
                    self.close_connection = True
                    self.send_response(200)
                    with contextlib.suppress(OSError):  # the client had enough
                        answer(self)
                    return
                self.send_response(404 if answer is None else 200)
                self.send_header("Content-Length", str(len(answer or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(answer or b"")

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self.server.server_port}"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("NO_PROXY", LOOPBACK)
    web = Web()
    thread = threading.Thread(target=web.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield web
    web.ending.set()
    web.server.shutdown()
    web.server.server_close()
