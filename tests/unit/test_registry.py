"""Losses, metrics and backbones are found by being there."""

import os
import subprocess
import sys

import pytest

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


def test_knowing_a_job_does_not_load_transformers():
    assert python("import sys, pipeline.job; print('transformers' in sys.modules)") == "False"
