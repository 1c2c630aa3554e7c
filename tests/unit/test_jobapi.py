"""Facts about following a job, by Ray's own client against a server that answers as its job API does and breaks off."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from jobs import jobapi
from jobs.shipping import LaunchError

LOG = ["a line\n", "another line\n", "the third ", "line\n", "and the last\n"]
JOB = "raysubmit_one"


class JobApi:
    """One job, whose log is cut off after so many pieces at each connection; it ends when its log was read whole."""

    def __init__(self, cuts: list[int], ends: dict):
        self.cuts, self.ends, self.connections, self.ended = list(cuts), ends, 0, False
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        self.address = ""
        threading.Thread(target=self._serve, daemon=True).start()
        assert self.ready.wait(60)

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._start())
        self.loop.run_forever()

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_get("/api/version", self._version)
        application.router.add_get("/api/jobs/{id}", self._info)
        application.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        self.runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        self.ready.set()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"ray_version": "2.60.0"})

    async def _info(self, request: web.Request) -> web.Response:
        if request.match_info["id"] != JOB:
            return web.Response(status=404, text=f"Job {request.match_info['id']} does not exist")
        state = self.ends if self.ended else {"status": "RUNNING"}
        return web.json_response({"type": "SUBMISSION", "submission_id": JOB, "entrypoint": "ditflow run", **state})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.connections += 1
        cut = self.cuts.pop(0) if self.cuts else len(LOG)
        for piece in LOG[:cut]:
            await socket.send_str(piece)
        if cut < len(LOG):
            assert request.transport is not None
            request.transport.abort()
        else:
            self.ended = True
            await socket.close()
        return socket

    def stop(self) -> None:
        """Answer no more; may be asked for again."""
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(60)


@pytest.fixture
def api(request, monkeypatch) -> Iterator[JobApi]:
    monkeypatch.setattr(jobapi, "SECONDS_BETWEEN_LOOKS", 0.01)
    server = JobApi(**request.param)
    yield server
    server.stop()


def follow(api: JobApi, job: str = JOB) -> tuple[int, str, list[str]]:
    shown, said = [], []
    status = jobapi.follow(jobapi.connect(api.address), job, shown.append, said.append)
    return status, "".join(shown), said


WELL = {"status": "SUCCEEDED", "message": "Job finished successfully."}
ENDS = {
    "well": (WELL, 0),
    "with failed rows": ({"status": "FAILED", "message": "exit code 3", "driver_exit_code": 3}, 3),
    "with a wrong request": ({"status": "FAILED", "driver_exit_code": 2}, 2),
    "without a process": ({"status": "FAILED", "message": "the head is gone"}, 1),
    "stopped": ({"status": "STOPPED", "message": "by somebody"}, 1),
}


@pytest.mark.parametrize(
    ("api", "status"), [({"cuts": [], "ends": end}, s) for end, s in ENDS.values()], indirect=["api"], ids=ENDS
)
def test_a_job_that_ends_gives_its_status(api, status):
    found, shown, said = follow(api)
    assert found == status
    assert shown == "".join(LOG)
    assert said[-1].startswith(f"{JOB}: {api.ends['status']}")


@pytest.mark.parametrize("api", [{"cuts": [2, 0, 4], "ends": WELL}], indirect=True)
def test_a_connection_that_breaks_is_made_again_and_every_line_is_shown_once(api):
    status, shown, _ = follow(api)
    assert (status, shown) == (0, "".join(LOG))
    assert api.connections >= 4


@pytest.mark.parametrize("api", [{"cuts": [], "ends": WELL}], indirect=True)
def test_a_job_that_the_cluster_does_not_know_is_told(api):
    with pytest.raises(LaunchError, match="knows no job raysubmit_two"):
        follow(api, "raysubmit_two")


@pytest.mark.parametrize("api", [{"cuts": [1], "ends": WELL}], indirect=True)
def test_a_cluster_that_stays_away_is_given_up(api, monkeypatch):
    monkeypatch.setattr(jobapi, "_PATIENCE_S", 0)
    client = jobapi.connect(api.address)
    api.stop()
    with pytest.raises(LaunchError, match="has not answered"):
        jobapi.follow(client, JOB, lambda log: None, lambda text: None)


@pytest.mark.parametrize("api", [{"cuts": [1, 2, 3, 1, 0], "ends": WELL}], indirect=True)
def test_breaks_of_a_cluster_that_answers_between_them_are_no_silence(api, monkeypatch):
    monkeypatch.setattr(jobapi, "_PATIENCE_S", 0)
    assert follow(api)[:2] == (0, "".join(LOG))


@pytest.mark.parametrize("api", [{"cuts": [2] * 1000, "ends": WELL}], indirect=True)
def test_a_log_that_stays_broken_keeps_nobody_from_the_status(api, monkeypatch):
    monkeypatch.setattr(jobapi, "_PATIENCE_S", 0.2)
    api.ended = True
    status, shown, said = follow(api)
    assert (status, shown) == (0, "".join(LOG[:2]))
    assert "The end of its log could not be read" in said[-1]


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("api", [{"cuts": [], "ends": WELL}], indirect=True)
def test_an_event_loop_that_runs_already_is_an_error_and_no_broken_connection(api):
    async def inside() -> None:
        follow(api)

    with pytest.raises(RuntimeError, match="running event loop"):
        asyncio.run(inside())
