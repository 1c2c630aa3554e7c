"""Facts about the cluster that a job runs on: its address, its folder, and how many actors find room."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import pipeline.cluster
from pipeline.cluster import ClusterError, Need, actors_with_room, check_address, session_folder
from pipeline.job import Pool

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
