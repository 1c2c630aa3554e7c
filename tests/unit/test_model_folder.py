"""A stranger's model folder: what does not fit is refused by file and key, before anything large is allocated."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from ditflow import backbones
from ditflow.backbones import ModelNotFoundError
from ditflow.backbones.config import ModelConfigError
from ditflow.mini import mini_folder

DOCUMENTED = (ModelConfigError, ModelNotFoundError)


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(mini_folder("mini"), tmp_path / "model"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


WRONG = {
    "own defaults that are a list": ("ditflow.json", "[1]", "expected a JSON object"),
    "own defaults nested without end": ("ditflow.json", "[" * 100_000, "it is not JSON"),
    "own defaults that are no JSON": ("ditflow.json", '{"blocks"', "it is not JSON"),
    "own defaults of megabytes": ("ditflow.json", " " * 2**21, "more than .* bytes"),
    "an unknown default": ("ditflow.json", '{"colour": 1}', "colour is not valid"),
    "blocks of text": ("ditflow.json", '{"blocks": ["a"]}', "blocks|not supported|Type-check"),
    "a temperature of text": ("ditflow.json", '{"temperature": "hot"}', "not supported|Type-check"),
    "a section that is a list": ("ditflow.json", '{"losses": [1]}', "losses: .*an object of objects"),
    "a section of another loss": ("ditflow.json", '{"losses": {"none such": {}}}', "losses: 'none such'"),
    "a section with a wrong rate": (
        "ditflow.json", '{"losses": {"smm": {"learning_rate": [-1, 1]}}}', "learning_rate"
    ),
    "an empty index": ("model_index.json", "", "it is not JSON"),
    "an index without a class": ("model_index.json", "{}", "_class_name: nothing is not valid: expected a string"),
    "an index with a class that is a list": ("model_index.json", '{"_class_name": []}', "_class_name: .*a string"),
    "code of other origin": (
        "model_index.json",
        '{"_class_name": "CogVideoXPipeline", "vae": ["os", "system"]}',
        "vae: .*No other code is run",
    ),
    "no layers": ("transformer/config.json", "{}", "num_layers: nothing is not valid"),
    "a transformer that is a text": ("transformer/config.json", '"a"', "expected a JSON object"),
    "no picture": ("vae/config.json", '{"block_out_channels": []}', "block_out_channels: .*1 to 8 whole numbers"),
    "bytes that are no text": ("vae/config.json", "\udcff", "it is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_configuration_is_refused_by_its_file(folder, name, text, said):
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    for use in (backbones.identify, backbones.load):
        with pytest.raises(DOCUMENTED, match=f"(?s){folder / name}.*: .*(?:{said})"):
            use(str(folder))


@pytest.mark.parametrize("layers", [10**9, 10**400, 0, -1, 2.5, True, "6", None, [6]])
def test_a_number_of_layers_that_no_model_has_is_refused(folder, layers):
    change(folder / "transformer" / "config.json", num_layers=layers)
    with pytest.raises(ModelConfigError, match="config.json: num_layers: .*expected a whole number from 1 to 1000"):
        backbones.load(str(folder))


def test_a_transformer_that_its_weights_cannot_fill_is_refused_before_it_is_built(folder):
    change(folder / "transformer" / "config.json", num_layers=1000, num_attention_heads=1000)
    with pytest.raises(ModelConfigError, match=r"1000 layers of width 32000 need more than the \d+ bytes") as caught:
        backbones.load(str(folder))
    assert caught.value.code == "model-weights-incomplete"


def test_a_part_that_is_missing_is_named(folder):
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ModelConfigError, match=r"vae/config.json: No such file or directory") as caught:
        backbones.identify(str(folder))
    assert caught.value.code == "model-file-missing"


@pytest.mark.parametrize("text", ['"someone/model"', "-1"])
def test_a_scheduler_that_names_a_model_of_the_hub_is_refused(folder, text):
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(ModelConfigError, match="scheduler_config.json: expected a JSON object"):
        backbones.load(str(folder))


@pytest.mark.parametrize("words", [10**400, 10**9, -1, "many"])
@pytest.mark.parametrize("use", [backbones.load, backbones.read_text_limit])
def test_a_tokenizer_with_a_giant_number_of_words_of_its_own_is_refused_before_it_is_filled(folder, use, words):
    change(folder / "tokenizer" / "tokenizer_config.json", extra_ids=words)
    with pytest.raises(ModelConfigError, match="tokenizer_config.json: extra_ids: .*expected a whole number from 0"):
        use(str(folder))


def test_a_file_that_only_libraries_read_is_refused_with_the_folder(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(
        folder / "transformer" / "other.safetensors"
    )
    with pytest.raises(ModelConfigError, match=f"{folder}: the model cannot be built: OSError") as caught:
        backbones.load(str(folder))
    assert (caught.value.code, caught.value.key) == ("model-build-failed", "model.path")


def test_weights_of_another_shape_are_refused_with_the_folder(folder):
    change(folder / "transformer" / "config.json", in_channels=8)
    with pytest.raises(ModelConfigError, match=f"{folder}: the model cannot be built") as caught:
        backbones.load(str(folder))
    assert caught.value.code == "model-build-failed"


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_configuration_loads_or_is_refused(folder, seed):
    """One value of one file becomes another; what can be loaded also makes a grid."""
    rng = random.Random(seed)
    file = rng.choice([*sorted(folder.rglob("*config.json")), folder / "model_index.json", folder / "ditflow.json"])
    values = json.loads(file.read_text())
    key = rng.choice(sorted(values))
    values[key] = rng.choice([None, -1, 0, 1, 3, 2**31, 1e9, float("nan"), "", "x", [], [[]], {}, True, ["a", "b"]])
    file.write_text(json.dumps(values))
    try:
        with torch.no_grad():
            backbone = backbones.load(str(folder))
    except DOCUMENTED as error:
        message = str(error)
    else:
        backbone.layout.grid(torch.empty(backbone.layout.latent_shape(*backbone.layout.trained_size)).shape)
        return
    assert str(folder) in message
