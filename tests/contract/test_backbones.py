"""What every backbone promises, and what loading a model says when it cannot: runs for both embedded models."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ditflow import backbones
from ditflow.backbones import ModelNotFoundError
from ditflow.backbones.base import Backbone, Solver
from ditflow.settings import ModelDefaults
from ditflow.types import TokenGrid

MODELS = ("mini-rotary", "mini-additive")
FRAMES, HEIGHT, WIDTH = 9, 32, 48


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


@pytest.fixture(scope="session")
def video() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def noise(model: Backbone) -> torch.Tensor:
    return torch.randn(model.latent_shape(FRAMES, HEIGHT, WIDTH))


# ---------------------------------------------------------------------- the protocol


def test_a_loaded_model_is_a_backbone_under_the_name_it_was_asked_by(model, request):
    assert isinstance(model, Backbone)
    assert model.name == request.node.callspec.params["model"]
    assert model.device == torch.device("cpu")
    assert isinstance(model.defaults, ModelDefaults)


def test_latents_fill_a_grid_and_pixels_come_back_in_their_size(model, video):
    latents = model.encode_video(video)
    assert latents.shape == model.latent_shape(FRAMES, HEIGHT, WIDTH)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()
    grid = model.grid(latents)
    assert grid.frames * grid.height * grid.width == grid.tokens > 0
    assert grid.width / grid.height == WIDTH / HEIGHT
    decoded = model.decode_latents(latents, FRAMES)
    assert decoded.shape == video.shape
    assert decoded.dtype == np.uint8


def test_the_default_position_has_one_row_for_every_token(model):
    position = model.default_position(model.grid(noise(model)))
    assert position
    for value in position.values():
        assert value.shape[0] == model.grid(noise(model)).tokens
        assert value.dtype == torch.float32
        assert not value.requires_grad


def test_the_default_position_is_a_fresh_copy(model):
    """An optimiser works on it in place."""
    grid = model.grid(noise(model))
    first = model.default_position(grid)
    kept = {part: value.clone() for part, value in first.items()}
    for value in first.values():
        value.zero_()
    second = model.default_position(grid)
    assert all(torch.equal(second[part], kept[part]) for part in kept)


def test_a_prediction_for_each_prompt_has_the_latents_shape(model):
    latents, embeds = noise(model), [model.encode_prompt(prompt) for prompt in ("a red ball", "")]
    predictions = model.predict(latents, 500, embeds, model.default_position(model.grid(latents)))
    assert len(predictions) == 2
    for prediction in predictions:
        assert prediction.shape == latents.shape
        assert prediction.dtype == torch.float32
        assert not prediction.requires_grad
    assert not torch.equal(*predictions)


def test_a_capture_hands_out_the_video_tokens_of_the_asked_blocks(model):
    latents = noise(model).requires_grad_()
    grid = model.grid(latents)
    captured = model.capture(latents, 0, model.encode_prompt(""), (2, 0), model.default_position(grid))
    assert set(captured) == {0, 2}
    for capture in captured.values():
        assert capture.query.shape == capture.key.shape
        assert capture.query.shape[0] == grid.tokens
        assert capture.query.shape[1] % capture.heads == 0
        (gradient,) = torch.autograd.grad(capture.query.square().sum() + capture.key.sum(), latents, retain_graph=True)
        assert gradient.any()


def test_features_are_captured_with_their_gradient(model):
    latents = noise(model).requires_grad_()
    grid = model.grid(latents)
    position = model.default_position(grid)
    captured = model.capture(latents, 0, model.encode_prompt(""), (1, 0), position, captures="features")
    assert set(captured) == {0, 1}
    for capture in captured.values():
        assert capture.tokens.shape[0] == grid.tokens
        (gradient,) = torch.autograd.grad(capture.tokens.square().sum(), latents, retain_graph=True)
        assert gradient.any()


def test_the_default_blocks_exist(model):
    latents = noise(model)
    blocks = model.defaults.blocks
    captured = model.capture(latents, 0, model.encode_prompt(""), blocks, model.default_position(model.grid(latents)))
    assert set(captured) == set(blocks)


def test_first_keys_and_values_are_those_of_the_video_tokens(model):
    latents = noise(model)
    keys_values = model.first_keys_values(latents, 500, model.encode_prompt(""))
    assert keys_values.key.shape == keys_values.value.shape
    assert keys_values.key.shape[:2] == (1, model.grid(latents).tokens)
    assert not keys_values.key.requires_grad
    assert not torch.equal(keys_values.key, keys_values.value)


def test_a_solver_steps_from_noise_to_clean_latents(model):
    """With the true v of a clean video as prediction, the last step lands on the video."""
    solver = model.solver(4)
    assert isinstance(solver, Solver)
    assert len(solver.timesteps) == 4
    assert (solver.timesteps.diff() < 0).all()
    clean, first_noise = torch.randn(2, *model.latent_shape(FRAMES, HEIGHT, WIDTH))
    signal = model.pipeline.scheduler.alphas_cumprod
    latents, generator = solver.add_noise(clean, first_noise, int(solver.timesteps[0])), torch.Generator()
    for step, timestep in enumerate(solver.timesteps):
        alpha, sigma = signal[timestep].sqrt(), (1 - signal[timestep]).sqrt()
        predicted_noise = (latents - alpha * clean) / sigma
        latents = solver.step(alpha * predicted_noise - sigma * clean, step, latents, generator)
    torch.testing.assert_close(latents, clean, rtol=1e-3, atol=1e-3)


def test_a_new_solver_remembers_nothing_of_another_run(model):
    start, prediction = noise(model), noise(model)

    def run() -> torch.Tensor:
        solver, latents, generator = model.solver(3), start, torch.Generator().manual_seed(0)
        for step in range(3):
            latents = solver.step(prediction, step, latents, generator)
        return latents

    assert torch.equal(run(), run())


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
    with pytest.raises(ModelNotFoundError, match=f"model '{path}' is neither a folder here.*mini-rotary.*download"):
        backbones.load(path)


def test_a_folder_that_is_no_model_is_named_with_what_it_lacks(tmp_path):
    with pytest.raises(ModelNotFoundError, match=rf"{tmp_path} is no diffusers model folder.*no model_index.json"):
        backbones.load(str(tmp_path))


def test_a_pipeline_that_no_backbone_runs_is_named_with_those_that_run(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ModelNotFoundError, match=r"holds a StableDiffusionPipeline.*valid: .*CogVideoXPipeline"):
        backbones.load(str(tmp_path))


@pytest.mark.usefixtures("cache")
def test_an_unknown_precision_is_refused_with_those_that_are_valid():
    with pytest.raises(ValueError, match="dtype: 'int8' is not valid: expected auto, float32, bfloat16, float16"):
        backbones.load("mini", dtype="int8")


def test_a_grid_of_half_a_patch_is_refused_with_the_nearest_size(model):
    with pytest.raises(ValueError, match="height: 36 .*nearest is 32"):
        model.latent_shape(FRAMES, 36, WIDTH)
    assert model.grid(noise(model)) == TokenGrid(3, 4, 6)
