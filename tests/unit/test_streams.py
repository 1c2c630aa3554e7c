"""What is written for people never ends the work, whatever the terminal, the pipe and the disk are like."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.manifest import Manifest
from pipeline.store import Store

ACCENTED = "a yéllow stär over 東京"
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
"""A terminal that has no letters but those of ASCII."""
WORK = """
import sys
from jobs.streams import outlived, prepare

prepare()
with outlived():
    print("begun", flush=True)
    sys.stdin.readline()
    for number in range(3):
        print("a line", flush=True)
        print("a message", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("done")
"""


def begin(result: Path, **streams) -> subprocess.Popen:
    """A process that prints, waits for a line, prints more, and leaves its work in a file."""
    return subprocess.Popen([sys.executable, "-c", WORK, str(result)], stdin=subprocess.PIPE, text=True, **streams)


def commands(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "jobs", *arguments], capture_output=True, text=True, **options)


def test_work_goes_on_without_a_reader_and_says_so(tmp_path):
    work = begin(tmp_path / "result", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert work.stdout.readline() == "begun\n"
    work.stdout.close()
    _, messages = work.communicate("go on\n")
    said = "standard output cannot be written to (Broken pipe): going on without it\n"
    assert messages == said + 3 * "a message\n"
    assert (work.returncode, (tmp_path / "result").read_text()) == (0, "done")


def test_work_goes_on_when_nobody_reads_its_messages_either(tmp_path):
    work = begin(tmp_path / "result", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert work.stdout.readline() == "begun\n"
    work.stdout.close()
    work.stdin.write("go on\n")
    work.stdin.close()
    assert (work.wait(), (tmp_path / "result").read_text()) == (0, "done")


def test_work_goes_on_after_its_terminal_is_closed(tmp_path):
    controller, terminal = pty.openpty()
    work = begin(tmp_path / "result", stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert os.read(controller, 5) == b"begun"
    os.close(controller)
    work.communicate("go on\n")
    assert (work.returncode, (tmp_path / "result").read_text()) == (0, "done")


def test_work_waits_for_a_slow_reader_of_a_pipe_that_does_not_block(tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.write(writing, b"x" * 65_536)  # it is full
    work = begin(tmp_path / "result", stdout=writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read(65_536 + 6).endswith(b"begun\n")
        work.communicate("go on\n")
        assert pipe.read() == 3 * b"a line\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_work_goes_on_when_the_disk_of_its_output_is_full(tmp_path):
    with open("/dev/full", "w") as full:
        work = begin(tmp_path / "result", stdout=full, stderr=subprocess.PIPE)
    _, messages = work.communicate("go on\n")
    assert messages.startswith("standard output cannot be written to (No space left on device)")
    assert (work.returncode, (tmp_path / "result").read_text()) == (0, "done")


def test_streams_that_were_closed_leave_their_numbers_to_no_other_file(tmp_path):
    command = f"{sys.executable} -c '{WORK}' {tmp_path / 'result'} <&- >&- 2>&-".replace("sys.stdin.readline()", "None")
    subprocess.run(["sh", "-c", command], check=True)
    assert (tmp_path / "result").read_text() == "done"


@pytest.mark.parametrize("show", [("manifest", "show"), ("manifest", "show", "--json"), ("status",)])
def test_any_text_can_be_shown_on_a_terminal_of_ascii(local_store, show):
    error = {"error_kind": "permanent", "error_class": "VideoError", "error_message": ACCENTED}
    local_store.put("job.yaml", b"")
    Manifest(local_store).commit({"row_id": "one", "status": "failed", "prompt": ACCENTED, **error})
    shown = commands(*show[:2], local_store.uri, *show[2:], env=ASCII)
    assert (shown.returncode, "Traceback" in shown.stderr) == (0, False), shown.stderr
    assert "a y\\" in shown.stdout + shown.stderr


def test_a_name_that_is_no_text_can_be_shown_on_any_terminal(tmp_path):
    shown = commands("plan", os.fsdecode(os.fsencode(tmp_path) + b"/\xff.yaml"))
    assert shown.returncode == 2
    assert "\\udcff.yaml: cannot be read" in shown.stderr


def test_tables_and_manifests_are_utf_8_on_every_terminal(tmp_path):
    work = f"""
from pathlib import Path
from types import SimpleNamespace
from jobs.display import write_comparison
write_comparison(SimpleNamespace(to_csv=lambda: {ACCENTED!a}, to_latex=None), Path({str(tmp_path / "table.csv")!r}))
"""
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", work], env=ASCII, check=True)
    assert (tmp_path / "table.csv").read_bytes().decode() == ACCENTED
    Store(str(tmp_path)).put(
        "job.yaml",
        f"""
kind: synthesize
name: night
model: {{path: s3://bucket/model}}
references: {{uri: s3://bucket/refs}}
prompts: [{ACCENTED}]
output: {{uri: s3://bucket/out}}
""".encode(),
    )
    command = [sys.executable, "-m", "jobs", "submit", str(tmp_path / "job.yaml"), "--to", "kuberay", "--dry-run"]
    printed = subprocess.run(command, env=ASCII, capture_output=True)
    assert printed.returncode == 0, printed.stderr
    assert ACCENTED in printed.stdout.decode()


SHOWS = """
import sys
from jobs.streams import ending_with_output, prepare

prepare()
with ending_with_output():
    print("begun", flush=True)
    sys.stdin.readline()
    print("a line" * 100_000)
print("not reached", file=sys.stderr)
"""


def show(**streams) -> subprocess.Popen:
    """A command whose output is all that it is for."""
    command = [sys.executable, "-c", SHOWS]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **streams)


def test_a_command_that_only_shows_ends_without_a_word_when_nobody_reads(tmp_path):
    shown = show(stdout=subprocess.PIPE)
    assert shown.stdout.readline() == "begun\n"
    shown.stdout.close()
    _, messages = shown.communicate("go on\n")
    assert (shown.returncode, messages) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_command_that_only_shows_says_that_the_disk_is_full():
    with open("/dev/full", "w") as full:
        _, messages = (shown := show(stdout=full)).communicate("go on\n")
    assert (shown.returncode, messages) == (
        1,
        "error: standard output cannot be written to: No space left on device\n",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_messages_that_cannot_be_written_end_no_command():
    code = "import sys; from jobs.streams import prepare; prepare(); print('x', file=sys.stderr); print('done')"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


@pytest.mark.parametrize("columns", ["0", "00", " "])
def test_a_width_of_nothing_hides_no_message(columns):
    code = "from jobs.cli import screen; screen.print('a message')"
    environment = {**os.environ, "COLUMNS": columns}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert shown.stderr == "a message\n"
