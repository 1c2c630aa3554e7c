"""Losses, metrics and backbones are found by being there."""

import os
import re
import subprocess
import sys

import pytest

from ditflow.registry import PluginError, modules_of, named_classes

METRIC = """
class Frames:
    name = "frame_count"
    needs = ()
    settings = ()
"""
BACKBONE = 'PIPELINES = ("SomebodysPipeline",)'


def python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    ("package", "text", "found"),
    [
        ("metrics", METRIC, "from ditflow.metrics import METRICS; print('frame_count' in METRICS)"),
        (
            "backbones",
            BACKBONE,
            "import ditflow.backbones, importlib.util as u; print(u.find_spec('ditflow.backbones.own') is not None)",
        ),
    ],
)
def test_a_file_in_a_plugin_folder_counts_as_one_of_the_package(tmp_path, package, text, found):
    (tmp_path / package).mkdir()
    (tmp_path / package / "own.py").write_text(text)
    elsewhere = tmp_path / "nothing-here"
    assert python(found, DITFLOW_PLUGINS=f"{elsewhere}{os.pathsep}{tmp_path}") == "True"
    assert python(found, DITFLOW_PLUGINS="") == "False"


# ---------------------------------------------------------------------- installed packages

LOSS = """
class Own:
    name = "own"
    captures = "features"
"""


def install(folder, group, target="somebodys_module", name="own"):
    """Lay an installed distribution that declares one entry point into a folder."""
    info = folder / "somebodys_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")


@pytest.mark.parametrize(
    ("group", "text", "found"),
    [
        ("ditflow.losses", LOSS, lambda: "own" in named_classes("ditflow.losses", marker="captures")),
        ("ditflow.metrics", METRIC, lambda: "frame_count" in named_classes("ditflow.metrics", marker="needs")),
        (
            "ditflow.backbones",
            BACKBONE,
            lambda: any("SomebodysPipeline" in getattr(m, "PIPELINES", ()) for m in modules_of("ditflow.backbones")),
        ),
    ],
)
def test_an_installed_package_adds_what_its_entry_point_names(tmp_path, monkeypatch, group, text, found):
    (tmp_path / "somebodys_module.py").write_text(text)
    install(tmp_path, group)
    assert not found()
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("somebodys_module", None)
    assert found()


@pytest.mark.parametrize(
    ("text", "target", "says"),
    [
        (
            "import absent_dependency",
            "somebodys_module",
            "cannot be imported: ModuleNotFoundError: .*absent_dependency",
        ),
        ("1 / 0", "somebodys_module", "cannot be imported: ZeroDivisionError"),
        ("", "absent_module", "cannot be imported: ModuleNotFoundError: .*absent_module"),
        (
            "VALUE = 1",
            "somebodys_module:VALUE",
            'names a int, expected a module. Declare it as `own = "somebodys_module"`',
        ),
    ],
    ids=["dependency", "error", "module", "no-module"],
)
def test_a_broken_entry_point_is_named_with_its_package_and_its_group(tmp_path, monkeypatch, text, target, says):
    (tmp_path / "somebodys_module.py").write_text(text)
    install(tmp_path, "ditflow.metrics", target)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("somebodys_module", None)
    with pytest.raises(PluginError) as caught:
        list(modules_of("ditflow.metrics"))
    assert caught.value.code == "plugin-broken"
    where = r"^somebodys-package: the entry point 'own' in the group ditflow\.metrics \(" + re.escape(target) + r"\) "
    assert re.search(where + says, str(caught.value))


def test_a_name_that_is_taken_is_an_error_that_names_both_modules(tmp_path, monkeypatch):
    (tmp_path / "a_second_warp_error.py").write_text("class W:\n    name = 'warp_error'\n    needs = ()\n")
    install(tmp_path, "ditflow.metrics", "a_second_warp_error")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PluginError, match=r"a_second_warp_error and ditflow\.metrics\.\w+ both .* name 'warp_error'"
    ) as caught:
        named_classes("ditflow.metrics", marker="needs")
    assert caught.value.code == "plugin-name-taken"


def test_knowing_a_job_does_not_load_transformers():
    assert python("import sys, pipeline.job; print('transformers' in sys.modules)") == "False"
