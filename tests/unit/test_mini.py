"""The embedded models as they are shipped."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from ditflow import backbones
from ditflow.mini import WEIGHTS
from ditflow.mini.build import FRAMES, HEIGHT, WIDTH, build_pipeline
from ditflow.mini.measure import detect_sprite
from ditflow.mini.training.kinds import KINDS
from ditflow.mini.world import render, sample_scene
from ditflow.settings import MethodSettings

SHIPPED = ("rotary", "additive")
MODELS = tuple(f"mini-{kind}" for kind in SHIPPED)


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> backbones.Backbone:
    return backbones.load(request.param, device="cpu")


def test_all_weights_together_are_at_most_12_megabytes_of_safetensors_in_16_bits():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md"}
    for file in WEIGHTS.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_shipped_folder_has_the_architecture_that_the_code_builds(kind):
    pipeline = build_pipeline(rotary=kind == "rotary")
    for part in ("transformer", "vae", "scheduler"):
        (file,) = (WEIGHTS / f"mini-{kind}" / part).glob("*config.json")
        shipped, built = json.loads(file.read_text()), dict(getattr(pipeline, part).config)
        trained = {"scaling_factor"}
        assert {key: value for key, value in shipped.items() if key[0] != "_" and key not in trained} == {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in built.items()
            if key[0] != "_" and key not in trained
        }


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_shipped_folder_carries_the_defaults_of_the_training_script(kind):
    assert json.loads((WEIGHTS / f"mini-{kind}" / "ditflow.json").read_text()) == KINDS[kind].defaults


@pytest.mark.parametrize(("name", "of_25"), [("mini-rotary", (7, 13)), ("mini-additive", (6, 6))])
def test_a_lasting_bank_may_be_learned_in_any_number_of_steps(name, of_25):
    defaults = backbones.identify(name).defaults
    lasting = MethodSettings(optimize="coordinates", preset="lasting").resolve(defaults)
    assert (lasting.count_guided_steps(25), lasting.count_injected_steps(25)) == of_25
    for steps in range(3, 51):
        assert 1 <= lasting.count_guided_steps(steps) <= lasting.count_injected_steps(steps) <= steps


def test_the_size_is_the_training_clips(model):
    assert model.layout.trained_size == (FRAMES, HEIGHT, WIDTH)


def test_the_autoencoder_keeps_what_a_clip_shows(model):
    for seed in range(3):
        clip = render(sample_scene(seed, "eval", sprites=1))
        made = model.decode_latents(model.encode_video(clip.frames), FRAMES)
        error = np.square(made.astype(float) - clip.frames).mean()
        assert 10 * np.log10(255**2 / error) > 22
        seen, look = detect_sprite(made), clip.scene.sprites[0].appearance
        named = (seen.colour, seen.shape, seen.background)
        assert named == (look.colour, look.shape, clip.scene.background.name)
