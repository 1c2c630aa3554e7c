"""Loading the embedded models: identity, defaults of a model folder, and what is said when a model cannot be loaded."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditflow import backbones
from ditflow.backbones import ModelNotFoundError
from ditflow.backbones.contract import Backbone
from ditflow.settings import ModelDefaults, SettingsError

MODELS = ("mini-rotary", "mini-additive")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Iterator[Path]:
    """A cache folder of this test run: nothing is read from or left in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("DITFLOW_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", params=MODELS)
def model(request, cache) -> Backbone:
    return backbones.load(request.param, device="cpu")


@pytest.fixture
def model_folder(tmp_path, cache) -> Path:
    """A copy of an embedded model's folder, to be changed."""
    return Path(shutil.copytree(backbones.find_model("mini-rotary"), tmp_path / "model"))


def test_a_loaded_model_is_a_backbone_under_the_name_it_was_asked_by(model, request):
    assert isinstance(model, Backbone)
    assert model.name == request.node.callspec.params["model"]
    assert model.device.type == "cpu"
    assert isinstance(model.defaults, ModelDefaults)


# ---------------------------------------------------------------------- identity


def test_a_revision_is_the_same_at_every_load_and_for_every_place(model, tmp_path):
    folder = Path(shutil.copytree(backbones.find_model(model.name), tmp_path / "elsewhere"))
    revisions = {backbones.load(path, device="cpu").revision for path in (model.name, str(folder))}
    assert revisions == {model.revision}


@pytest.mark.usefixtures("cache")
def test_the_two_embedded_models_are_different_ones_and_mini_is_the_rotary_one():
    revisions = {name: backbones.load(name, device="cpu").revision for name in ("mini", *MODELS)}
    assert revisions["mini"] == revisions["mini-rotary"] != revisions["mini-additive"]


def test_another_weight_is_another_revision(model_folder):
    before = backbones.load(str(model_folder), device="cpu").revision
    weights = model_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    later = weights.stat().st_mtime_ns + 1_000_000_000
    os.utime(weights, ns=(later, later))
    assert backbones.load(str(model_folder), device="cpu").revision != before


def test_a_model_folder_may_carry_its_own_defaults(model_folder):
    own = {
        "blocks": [0, 3],
        "temperature": 3.0,
        "guided_steps": 0.5,
        "injected_steps": 0.7,
        "iterations": 2,
        "learning_rate": [0.1, 0.05],
        "optimizer": "adam",
        "drafts": 4,
        "steps": 8,
        "guidance_scale": 2.0,
        "dynamic_guidance_scale": False,
        "losses": {"smm": {"blocks": [1]}},
        "variables": {"position": {"learning_rate": [0.2, 0.1]}},
        "lasting": {"coordinates": {"iterations": 7}},
    }
    plain = backbones.load(str(model_folder), device="cpu")
    (model_folder / "ditflow.json").write_text(json.dumps(own))
    overridden = backbones.load(str(model_folder), device="cpu")
    sections = (
        {"smm": {"blocks": (1,)}},
        {"position": {"learning_rate": (0.2, 0.1)}},
        {"coordinates": {"iterations": 7}},
    )
    assert overridden.defaults == ModelDefaults(
        (0, 3), 3.0, 0.5, 0.7, 2, (0.1, 0.05), "adam", 4, 8, 2.0, False, *sections
    )
    assert plain.defaults != overridden.defaults
    assert plain.revision == overridden.revision


def test_a_default_that_a_model_folder_leaves_out_stays_the_models(model_folder):
    (model_folder / "ditflow.json").unlink()
    plain = backbones.load(str(model_folder), device="cpu").defaults
    (model_folder / "ditflow.json").write_text(json.dumps({"temperature": 3.0}))
    overridden = backbones.load(str(model_folder), device="cpu").defaults
    assert overridden.temperature == 3.0
    assert overridden.blocks == plain.blocks
    assert overridden.dynamic_guidance_scale == plain.dynamic_guidance_scale


def test_a_default_that_does_not_exist_is_refused_with_its_file_and_key(model_folder):
    (model_folder / "ditflow.json").write_text(json.dumps({"blocks": [0], "temprature": 3.0}))
    with pytest.raises(ValueError, match=r"ditflow\.json.*temprature.*temperature"):
        backbones.load(str(model_folder), device="cpu")


# ---------------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize("path", ["/no/such/model", "nobody/no-such-model"])
def test_a_missing_model_is_named_with_what_would_help(path):
    with pytest.raises(
        ModelNotFoundError, match=f"model '{path}' is neither a folder here.*mini-rotary.*download"
    ) as caught:
        backbones.load(path)
    assert (caught.value.code, caught.value.key) == ("model-not-found", "model.path")


def test_a_folder_that_is_no_model_is_named_with_what_it_lacks(tmp_path):
    with pytest.raises(
        ModelNotFoundError, match=rf"{tmp_path} is not a diffusers model folder.*no model_index.json"
    ) as caught:
        backbones.load(str(tmp_path))
    assert caught.value.code == "model-folder-invalid"


def test_a_pipeline_that_no_backbone_runs_is_named_with_those_that_run(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(
        ModelNotFoundError, match=r"holds a StableDiffusionPipeline.*valid: .*CogVideoXPipeline"
    ) as caught:
        backbones.load(str(tmp_path))
    assert (caught.value.code, caught.value.key) == ("model-unsupported", "model.path")


@pytest.mark.usefixtures("cache")
def test_an_unknown_precision_is_refused_with_those_that_are_valid():
    with pytest.raises(SettingsError, match="auto, float32, bfloat16, float16") as caught:
        backbones.load("mini", dtype="int8")
    assert caught.value.key == "dtype"
