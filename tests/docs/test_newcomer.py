"""The newcomer's path follows the README: what it does with it, without installing anything."""

import subprocess

import pytest

from benchmarks import newcomer
from docs.pages import ROOT


def test_the_path_is_the_quickstart_of_the_readme_and_nothing_else():
    install, *then = newcomer.commands_of((ROOT / "README.md").read_text())
    assert install == "make quickstart"
    assert then == [".venv/bin/ditflow report outputs/quickstart/synthesize"]
    assert newcomer.PAGE in (ROOT / "README.md").read_text()


def test_a_readme_without_a_quickstart_is_no_path():
    with pytest.raises(ValueError, match="no block of bash"):
        newcomer.commands_of("# ditflow\n\n## Two commands\n\n```bash\nmake quickstart\n```\n")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository whose quickstart takes no time, in place of this one."""
    page = newcomer.PAGE
    (tmp_path / "Makefile").write_text(
        f"quickstart:\n\tmkdir -p {page.rpartition('/')[0]}\n\techo '<p id=\"found\">2 rows</p>' > {page}\n"
    )
    (tmp_path / "README.md").write_text("## Quickstart\n\n```bash\nmake quickstart   # a comment\n```\n")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@example.com commit -qm a"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    (tmp_path / "README.md").write_text("what is not committed is not cloned")
    monkeypatch.setattr(newcomer, "REPOSITORY", tmp_path)
    return tmp_path


def test_every_step_is_timed_in_a_clone(project, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(newcomer, "BROWSERS", ("no-browser-has-this-name",))
    steps = newcomer.walk(tmp_path_factory.mktemp("empty"))
    commands = [step["command"] for step in steps]
    assert commands == ["git clone REPOSITORY ditflow", "make quickstart", "open the page"]
    assert all(step["seconds"] >= 0 for step in steps[:2])
    assert (steps[2]["seconds"], steps[2]["says"][:14]) == (None, "not looked at:")


def test_a_step_that_fails_ends_the_path_with_its_output(project, tmp_path):
    with pytest.raises(RuntimeError, match=r"make tset: exit status 2\n.*\n.*No rule to make target"):
        newcomer.step("make tset", tmp_path)
