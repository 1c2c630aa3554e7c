"""Blocks of code run as they are written, page by page, in a clone in which the quickstart has run.

All jobs of all pages share one Ray, and all commands of our own run in this process: starting either takes longer than
what they do. A command with variables before it, and any other program, is run by bash.
"""

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from docs.pages import ROOT, RUN_PAGES, Block, Command, blocks, command_of
from jobs.cli import app

LEFT_OUT = {".git", ".venv", ".venv-swift", "outputs"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Iterator[Path]:
    """A folder that looks like a clone, with a `ditflow` on the path, after `make quickstart`."""
    folder = tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if entry.name not in LEFT_OUT:
            (folder / entry.name).symlink_to(entry)
    programs = tmp_path_factory.mktemp("bin")
    command = programs / "ditflow"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m jobs "$@"\n')
    command.chmod(0o755)
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(folder)]))
        for name in ("RAY_ADDRESS", "DITFLOW_PLUGINS"):
            patch.delenv(name, raising=False)
        patch.syspath_prepend(folder)
        ray.shutdown()  # one of another folder would look for outputs there
        os.chdir(folder)
        try:
            for line in recipe("quickstart"):
                run(line)
            yield folder
        finally:
            os.chdir(before)
            ray.shutdown()


def recipe(target: str) -> list[Command]:
    """The commands of our own in a recipe of the Makefile."""
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lines is not None
    words = [line.strip().replace("$(BIN)/", "") for line in lines[1].splitlines()]
    return [command for word in words if word.startswith("ditflow") and (command := command_of(word))]


def run(command: Command) -> None:
    """Run one command line; AssertionError unless it ends well."""
    if command.is_ours and not command.variables:
        status: Any = app(list(command.words[1:]), standalone_mode=False)
        assert not status, f"{command.text.strip()}: exit status {status}"
        return
    done = subprocess.run(["bash", "-euc", command.text], capture_output=True, text=True)
    assert done.returncode == 0, f"{command.text.strip()}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    if block.file is not None:
        Path(block.file).parent.mkdir(parents=True, exist_ok=True)
        Path(block.file).write_text(block.text)
    elif block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), namespace)
    elif block.language == "bash":
        for command in block.commands:
            run(command)


@pytest.mark.parametrize("page", RUN_PAGES, ids=[str(page.relative_to(ROOT)) for page in RUN_PAGES])
def test_every_block_of_a_page_runs_as_it_is_written(page, clone):
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run is None:
            try:
                run_block(block, namespace)
            except BaseException as error:
                lines = "".join(traceback.format_exception_only(error))
                raise AssertionError(f"{block}: mend it, or mark what cannot run here\n{lines}") from error


def test_a_block_that_does_not_run_is_seen(clone):
    wrong = {
        "python": "import no_such_module",
        "bash": "ditflow manifest show outputs/nowhere",
    }
    for language, text in wrong.items():
        with pytest.raises((ImportError, AssertionError)):
            run_block(Block(ROOT / "README.md", 1, language, text, None), {})
