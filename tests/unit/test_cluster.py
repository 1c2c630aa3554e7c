"""Facts about the cluster that a job runs on: its address, its folder, and how many actors find room."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

import pipeline.cluster
import pipeline.run
from pipeline.cluster import ClusterError, Need, actors_with_room, check_address, grows, session_folder
from pipeline.job import Pool
from pipeline.run import connect

ROOT = Path(__file__).parents[2]


def need(actors, gpus: float = 0.0) -> Need:
    return Need(Pool(actors=actors), 0.25, gpus)


GPU_NODE = {"CPU": 8.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("machines", "generate", "found"),
    [
        ([{"CPU": 2.0}], need(8), 5),  # 2 CPUs less half a one for a reader and a quarter for the extraction
        ([{"CPU": 2.0}], need((1, 8)), 5),
        ([{"CPU": 64.0}], need((1, 8)), 8),
        ([{"CPU": 1.0}], need(1), 1),
        ([{"CPU": 0.25}], need(1), 0),  # not even a reader
        ([], need(1), 0),
        ([GPU_NODE] * 2, need((1, 8), gpus=0.8), 2),
        ([GPU_NODE] * 2, need((1, 8), gpus=0.6), 2),  # two shares of 0.6 do not fit one GPU, though 1.2 of 2 are free
        ([GPU_NODE] * 2, need((1, 8), gpus=2.0), 0),  # two GPUs, on two machines
        ([{"CPU": 8.0, "GPU": 4.0}], need((1, 8), gpus=2.0), 2),
        ([{"CPU": 0.25, "GPU": 8.0}, {"CPU": 4.0}], need(1, gpus=1.0), 1),  # its GPUs are not where the CPUs are
        ([{"CPU": 4.0}], need(1, gpus=1.0), 0),
    ],
)
def test_as_many_actors_find_room_as_ray_would_place(machines, generate, found):
    assert actors_with_room(machines, {"extract": need(1), "generate": generate}, 0.5)["generate"] == found


def test_every_pool_gets_its_least_before_any_grows():
    found = actors_with_room([{"CPU": 2.0}], {"extract": need((1, 8)), "generate": need((3, 8))}, 0.5)
    assert found == {"extract": 2, "generate": 4}


def test_rows_without_a_reference_need_no_reader():
    assert actors_with_room([{"CPU": 2.0}], {"generate": need(8)}, 0.0) == {"generate": 8}


# ------------------------------------------------------------------------------------------------- RAY_ADDRESS


@pytest.mark.parametrize(
    "address", ["http://head:8265", "https://head", "head", "head:", ":6379", "s3://head:1", "head:x"]
)
def test_an_address_that_names_no_cluster_is_refused_with_the_variable(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS: .*expected .*head:6379"):
        check_address()


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_what_ray_looks_for_itself_is_let_through(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    check_address()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}"])
def test_an_address_where_nobody_listens_is_one_line(monkeypatch, form):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        address = form.format(server.server_port)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=r"^RAY_ADDRESS: no Ray cluster answers at .*refused.*unset") as refused:
        check_address()
    assert "\n" not in str(refused.value)


def test_a_server_that_is_no_ray_cluster_is_one_line_too(monkeypatch):
    monkeypatch.setattr(pipeline.cluster, "ANSWERS_WITHIN_S", 1.0)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_port}")
        with pytest.raises(ClusterError, match="took the connection, and did not answer as a Ray cluster"):
            check_address()
        server.shutdown()


def test_an_unknown_host_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "no-such-host.invalid:6379")
    with pytest.raises(ClusterError, match=r"no-such-host\.invalid:6379"):
        check_address()


# ------------------------------------------------------------------------------------------------- its folder


def test_a_folder_with_a_short_name_is_used_as_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/d")
    assert session_folder() == "/tmp/d/ray"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_or_closed_folder_is_replaced_by_one_that_fits_a_socket(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for asked in (tmp_path / ("long-" * 17), Path("/proc/none")):
        monkeypatch.setenv(variable, str(asked))
        assert session_folder().startswith("/tmp/ray")


def test_without_any_folder_the_variable_to_set_is_named(monkeypatch):
    monkeypatch.setattr(pipeline.cluster, "_SOCKET_PATH_BYTES", 20)
    with pytest.raises(ClusterError, match="Set RAY_TMPDIR"):
        session_folder()


# ------------------------------------------------------------------------------------------------------- uv run


def test_under_uv_run_workers_are_started_as_always(tmp_path):
    """A shell under the name of uv, whose first argument is `run`: that is how Ray knows it."""
    (tmp_path / "uv").symlink_to("/bin/bash")
    code = (
        "import pipeline.run; from ray._private.worker import _maybe_modify_runtime_env as env; "
        "from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline as uv; "
        "print(bool(uv()), env({}, False))"
    )
    (tmp_path / "run").write_text(f'"{sys.executable}" -c "{code}"; exit $?\n')
    command = [str(tmp_path / "uv"), "run"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ENABLE_UV")}
    paths = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env={**environment, **paths}, capture_output=True, text=True)
    assert ended.stdout.split("\n")[0] == "True {}", ended.stderr


# ------------------------------------------------------------------------------------------------ an autoscaler

WATCHED = f"node_{'0a' * 28}"


def report(**changes) -> str:
    """What an autoscaler of the first version writes down."""
    nothing = {"active_nodes": {}, "idle_nodes": None, "pending_nodes": [], "pending_launches": {}, "failed_nodes": []}
    return json.dumps({"autoscaler_report": {**nothing, **changes}})


@pytest.mark.parametrize(
    ("group", "second", "status", "expected"),
    [
        (None, None, None, False),
        (None, None, report(active_nodes={WATCHED: 1}), False),  # `ray start`: machines are only watched
        (None, None, report(active_nodes={"ray.head.default": 1}), True),  # `ray up` with the first version
        (None, None, report(pending_launches={"worker": 2}), True),
        (None, None, report(pending_nodes=[["10.0.0.1", "worker", "launching"]]), True),
        (None, None, report(active_nodes={WATCHED: 1, "node_a": 1}), True),  # somebody's own name
        ("headgroup", None, report(active_nodes={WATCHED: 1}), False),  # KubeRay without an autoscaler names groups
        ("headgroup", b"0", report(active_nodes={"headgroup": 1}), True),  # KubeRay with the first version
        ("headgroup", b"1", None, True),  # the second version
        (None, b"1", report(active_nodes={WATCHED: 1}), False),  # the second version watches
        ("headgroup", b"0", None, True),  # it has not reported yet
        ("headgroup", b"0", json.dumps({"time": 1}), True),
    ],
)
def test_an_autoscaler_is_known_by_its_mark_or_by_its_report(monkeypatch, group, second, status, expected):
    labels = {} if group is None else {"ray.io/node-group": group}
    store = {"__autoscaling_status": status, ray._raylet.GCS_AUTOSCALER_V2_ENABLED_KEY: second}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Labels": {}}, {"Labels": labels}])
    monkeypatch.setattr(pipeline.cluster, "_in_heads_store", lambda key, namespace=None: store[key])
    assert grows() == expected


# ------------------------------------------------------------------------------------------------------ its start


@pytest.fixture
def embedded(monkeypatch, tmp_path) -> list[dict]:
    """Ray is not started; the options that it would be started with."""
    started: list[dict] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(pipeline.run, "session_folder", lambda: str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the integration tests' cluster may be up
    monkeypatch.setattr(ray, "init", lambda address, **options: started.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return started


def test_a_ray_that_does_not_start_is_one_line_that_names_its_logs(embedded, monkeypatch, tmp_path):
    def too_late(address: str, **options) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen ...")  # it has no class

    monkeypatch.setattr(ray, "init", too_late)
    with pytest.raises(ClusterError, match=f"could not be started.*timed out during startup.*{tmp_path}") as refused:
        connect()
    assert "\n" not in str(refused.value)


def test_without_shared_memory_objects_lie_in_rays_folder(embedded, monkeypatch, tmp_path):
    connect()
    monkeypatch.setattr(pipeline.run, "_SHARED_MEMORY", tmp_path / "none")
    connect()
    assert [options.get("_plasma_directory") for options in embedded] == [None, str(tmp_path)]


def test_an_address_that_has_answered_is_not_asked_again(monkeypatch):
    asked = []

    def answer(address: str, host: str, port: int, failures: list[str]) -> None:
        asked.append(address)
        failures.clear()

    monkeypatch.setattr(pipeline.cluster, "_ask", answer)
    monkeypatch.setenv("RAY_ADDRESS", "once.example:6379")
    check_address()
    check_address()
    monkeypatch.setenv("RAY_ADDRESS", "other.example:6379")
    check_address()
    assert asked == ["once.example:6379", "other.example:6379"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_folder_on_a_full_disk_is_none_for_ray(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/d")
    temporary = pipeline.cluster.TemporaryFile

    def of_full_disk(dir: Path, **options):
        return open("/dev/full", "wb", 0) if dir == Path("/tmp/d/ray") else temporary(dir=dir, **options)

    monkeypatch.setattr(pipeline.cluster, "TemporaryFile", of_full_disk)
    assert session_folder().startswith("/tmp/ray")
