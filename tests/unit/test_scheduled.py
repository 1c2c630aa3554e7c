"""Facts about the pod of a schedule, against an HTTP server that answers as Kubernetes' API does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.scheduled import FAILED, NO_ANSWER, REFUSED, SUCCEEDED, Api, main, named, run_to_end

RUN = {"kind": "RayJob", "metadata": {"name": "nightly", "namespace": "video", "labels": {"a": "b"}}, "spec": {}}
PLACE = "/apis/ray.io/v1/namespaces/video/rayjobs"
TOKEN = "the-token-of-the-account"


class Cluster(ThreadingHTTPServer):
    """Keeps RayJobs; each look at one shows its next status, and the last one from then on."""

    def __init__(self, statuses: list[dict], refuses: int = 0, stumbles: int = 0):
        super().__init__(("127.0.0.1", 0), Answers)
        self.statuses, self.refuses, self.stumbles = list(statuses), refuses, stumbles
        self.runs: dict[str, dict] = {}
        self.created, self.tokens = 0, set()


class Answers(BaseHTTPRequestHandler):
    server: Cluster

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._stumbles():
            return
        name = body["metadata"]["name"]
        if self.server.refuses:
            self._answer(self.server.refuses, {"message": "rayjobs.ray.io is forbidden"})
        elif self.path != PLACE:
            self._answer(404, {})
        elif name in self.server.runs:
            self._answer(409, {"message": "already exists"})
        else:
            self.server.runs[name] = body
            self.server.created += 1
            self._answer(201, body)

    def do_GET(self) -> None:
        if self._stumbles():
            return
        name = self.path.removeprefix(f"{PLACE}/")
        if name not in self.server.runs:
            return self._answer(404, {"message": "not found"})
        statuses = self.server.statuses
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        self._answer(200, {**self.server.runs[name], "status": status})

    def _stumbles(self) -> bool:
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.stumbles:
            self.server.stumbles -= 1
            self._answer(503, {})
            return True
        return False

    def _answer(self, code: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def status(state: str, job: str = "") -> dict:
    return {"jobDeploymentStatus": state, "jobStatus": job}


@pytest.fixture
def cluster(request) -> Iterator[Cluster]:
    server = Cluster(**request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(cluster, tmp_path: Path) -> Api:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return Api(f"http://127.0.0.1:{cluster.server_port}", tmp_path)


def outcome(api: Api) -> tuple[int, list[str]]:
    said: list[str] = []
    return run_to_end(api, named(RUN, "nightly-29000000", "uid-1"), said.append, lambda: None), said


ENDS = {
    "succeeds": ([status("Running", "RUNNING"), status("Complete", "SUCCEEDED")], 0),
    "fails": ([status("Initializing"), status("Failed", "FAILED")], 1),
    "is tried again": ([status("Retrying"), status("Complete", "SUCCEEDED")], 0),
    "waits in a queue": ([{}, status("Suspended"), status("Running", "RUNNING"), status("Complete", "SUCCEEDED")], 0),
    "was stopped": ([status("Complete", "STOPPED")], 1),
}


@pytest.mark.parametrize(
    ("cluster", "expected"), [({"statuses": s}, e) for s, e in ENDS.values()], indirect=["cluster"], ids=ENDS
)
def test_the_pod_waits_for_the_run_and_ends_as_it_ends(cluster, api, expected):
    code, said = outcome(api)
    assert code == expected
    assert cluster.created == 1
    assert cluster.statuses[1:] == []
    assert len(set(said)) == len(said)
    assert cluster.tokens == {f"Bearer {TOKEN}"}


ENDED = {"statuses": [status("Complete", "SUCCEEDED")]}


@pytest.mark.parametrize("cluster", [ENDED], indirect=True)
def test_the_run_is_called_and_owned_as_the_job_of_its_date(cluster, api):
    outcome(api)
    metadata = cluster.runs["nightly-29000000"]["metadata"]
    (owner,) = metadata["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "nightly-29000000", "uid-1")
    assert metadata["labels"] == RUN["metadata"]["labels"]


@pytest.mark.parametrize("cluster", [ENDED], indirect=True)
def test_a_pod_in_the_place_of_another_follows_the_run_that_is_there(cluster, api):
    assert [outcome(api)[0] for _ in range(2)] == [0, 0]
    assert cluster.created == 1


@pytest.mark.parametrize("cluster", [{**ENDED, "refuses": 403}], indirect=True)
def test_a_refusal_is_told_with_its_reason(cluster, api):
    code, said = outcome(api)
    assert code == 2
    assert "403" in said[0]
    assert "forbidden" in said[0]


@pytest.mark.parametrize("cluster", [{**ENDED, "stumbles": 2}], indirect=True)
def test_a_cluster_that_stumbles_is_waited_for(cluster, api):
    assert outcome(api)[0] == 0
    assert cluster.created == 1


@pytest.mark.parametrize("cluster", [{"statuses": [status("Running")]}], indirect=True)
def test_a_run_that_somebody_deletes_is_a_failed_one(cluster, api):
    def delete() -> None:
        cluster.runs.clear()

    said: list[str] = []
    assert run_to_end(api, named(RUN, "nightly-29000000", "uid-1"), said.append, delete) == 1
    assert "was deleted" in said[-1]


@pytest.mark.parametrize("cluster", [{**ENDED, "stumbles": 1000}], indirect=True)
def test_no_answer_is_not_the_end_of_a_run(cluster, tmp_path, monkeypatch):
    """The Job fails for good on the statuses of a run that has ended, and on no other."""
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "run.yaml").write_text(json.dumps(RUN))
    for name, value in {"JOB_NAME": "n", "JOB_UID": "u", "KUBERNETES_SERVICE_HOST": "h"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT_HTTPS", "443")
    monkeypatch.setattr("sys.argv", ["scheduled", str(tmp_path / "run.yaml")])
    api = Api(f"http://127.0.0.1:{cluster.server_port}", tmp_path, patience_s=0)
    monkeypatch.setattr("jobs.scheduled.Api", lambda address: api)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == NO_ANSWER
    assert NO_ANSWER not in (SUCCEEDED, FAILED, REFUSED)
