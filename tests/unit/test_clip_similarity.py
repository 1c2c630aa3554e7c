"""CLIP similarities, by a tiny real CLIP with random weights in the layout of the released folders."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor

from ditflow.metrics import clip_similarity
from ditflow.metrics.base import MetricSettings
from ditflow.metrics.clip_similarity import (
    ClipModel,
    _image_processor,
    frame_consistency,
    prompt_similarity,
    read_text_limit,
)
from ditflow.metrics.errors import MetricInputError
from jobs.cli import _to_measure
from pipeline.job import Job, Output
from pipeline.manifest import Manifest
from pipeline.store import Store

SIDE, POSITIONS = 32, 8
MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
LETTERS = "abcdefghijklm"
START, END = 2 * len(LETTERS) + 1, 2 * len(LETTERS) + 2
VOCABULARY = {letter: i for i, letter in enumerate(LETTERS)}
VOCABULARY |= {f"{letter}</w>": len(LETTERS) + i for i, letter in enumerate(LETTERS)}
VOCABULARY |= {"ca": 2 * len(LETTERS), "<|startoftext|>": START, "<|endoftext|>": END}
PROMPT, IDS = "Cab fig", [START, VOCABULARY["ca"], VOCABULARY["b</w>"], *map(VOCABULARY.get, ["f", "i", "g</w>"]), END]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the files of openai/clip-vit-base-patch32, but safetensors."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": END + 1, "max_position_embeddings": POSITIONS, "bos_token_id": START, "eos_token_id": END}
    vision = {"image_size": SIDE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=layers | text, vision_config=layers | vision, projection_dim=12))
    for weight in model.parameters():
        if weight.dim() > 1:  # the default ones are so small that all embeddings are nearly alike
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps(VOCABULARY))
    (path / "merges.txt").write_text("#version: 0.2\nc a\n")
    switches = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}
    values = {"size": SIDE, "crop_size": SIDE, "image_mean": MEAN, "image_std": STD}
    kind = {"feature_extractor_type": "CLIPFeatureExtractor"}
    (path / "preprocessor_config.json").write_text(json.dumps(switches | values | kind))
    return path


@pytest.fixture(scope="module")
def model(folder) -> ClipModel:
    return ClipModel(folder)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def noise(frames, height=SIDE, width=SIDE, seed=0):
    """Coarse random blocks of colour, which differ in their embeddings more than fine noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def pixels_of(frames) -> torch.Tensor:
    """The smaller side resized to 32, the middle cut out, levels normalised: as CLIP was trained."""
    height, width = frames.shape[1:3]
    size = (SIDE * width // min(height, width), SIDE * height // min(height, width))
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    resized = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames]
    cut = np.stack(resized)[:, top : top + SIDE, left : left + SIDE]
    return torch.tensor(((cut / 255 - MEAN) / STD).transpose(0, 3, 1, 2), dtype=torch.float32)


def cosines(folder, frames, ids=IDS) -> np.ndarray:
    """Of each frame with the prompt, by the whole model, which answers them times its temperature."""
    clip = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        logits = clip(input_ids=torch.tensor([ids]), pixel_values=pixels_of(frames)).logits_per_image[:, 0]
    return (logits / clip.logit_scale.exp()).detach().numpy()


# --- the similarities


@pytest.mark.parametrize("size", [(SIDE, SIDE), (48, 64), (64, 48), (20, 30), (3, 40)])
def test_prompt_similarity_is_the_mean_cosine_of_the_whole_model(model, folder, size):
    frames = noise(5, *size)
    expected = cosines(folder, frames)
    assert np.ptp(expected) > 0.02
    assert prompt_similarity(model, frames, PROMPT) == pytest.approx(expected.mean(), abs=1e-5)
    assert prompt_similarity(model, frames[:1], PROMPT) == pytest.approx(expected[0], abs=1e-5)


def test_prompt_similarity_does_not_depend_on_the_order_of_frames(model):
    frames = noise(5)
    assert prompt_similarity(model, frames[[3, 0, 4, 1, 2]], PROMPT) == pytest.approx(
        prompt_similarity(model, frames, PROMPT), abs=1e-6
    )


def test_other_prompts_have_other_similarities(model):
    frames = noise(2)
    values = [prompt_similarity(model, frames, prompt) for prompt in (PROMPT, "cab", "a b", "")]
    assert np.diff(sorted(values)).min() > 1e-3


def test_a_prompt_counts_up_to_the_last_position(model, folder):
    """Eight positions: the start, six letters, the end."""
    frames, whole = noise(2), "a b c d e f"
    ids = [START, *(VOCABULARY[f"{letter}</w>"] for letter in "abcdef"), END]
    assert len(ids) == POSITIONS
    similarity = prompt_similarity(model, frames, whole)
    assert similarity == pytest.approx(cosines(folder, frames, ids).mean(), abs=1e-5)
    assert prompt_similarity(model, frames, whole + " g h i j") == similarity
    assert abs(prompt_similarity(model, frames, "a b c d e g") - similarity) > 1e-3


def test_embeddings_have_length_one_and_a_picture_is_like_itself(model):
    embeddings = model.embed_frames(noise(3))
    assert torch.linalg.norm(embeddings, dim=-1).numpy() == pytest.approx(np.ones(3), abs=1e-12)
    assert float(torch.linalg.norm(model.embed_prompt(PROMPT))) == pytest.approx(1, abs=1e-12)
    assert frame_consistency(model, noise(1).repeat(4, axis=0)) == pytest.approx(1, abs=1e-6)


def test_frame_consistency_is_the_mean_cosine_of_neighbours(model, folder):
    frames = noise(4, 48, 64)
    clip = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        embedded = clip(input_ids=torch.tensor([IDS]), pixel_values=pixels_of(frames)).image_embeds.numpy()
    expected = (embedded @ embedded.T)[[0, 1, 2], [1, 2, 3]]
    assert np.ptp(expected) > 0.05
    assert frame_consistency(model, frames) == pytest.approx(expected.mean(), abs=1e-5)


def test_frame_consistency_depends_on_the_order_of_frames(model):
    """One change in three steps, or three."""
    two = noise(2)
    change = 1 - frame_consistency(model, two)
    assert frame_consistency(model, two[[0, 0, 1, 1]]) == pytest.approx(1 - change / 3, abs=1e-6)
    assert frame_consistency(model, two[[0, 1, 0, 1]]) == pytest.approx(1 - change, abs=1e-6)


def test_frames_go_through_the_encoder_in_batches(model, folder, monkeypatch):
    monkeypatch.setattr(clip_similarity, "BATCH", 2)
    sizes, frames = [], noise(5)
    hook = model._model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    similarity = prompt_similarity(model, frames, PROMPT)
    hook.remove()
    assert sizes == [2, 2, 1]
    assert similarity == pytest.approx(cosines(folder, frames).mean(), abs=1e-5)


# --- folders


def test_folders_in_other_layouts_give_the_same(model, folder, tmp_path):
    """Weights in shards, a tokenizer.json, and what the processor as a whole writes."""
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="10KB")
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), _image_processor().from_pretrained(folder)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)  # transformers 4 writes it, too
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "model.safetensors").exists()
    frames = noise(2, 48, 64)
    expected = prompt_similarity(model, frames, PROMPT)
    assert prompt_similarity(ClipModel(str(tmp_path), "cpu"), frames, PROMPT) == pytest.approx(expected, abs=1e-6)


def test_the_end_token_of_older_releases_gives_the_same(model, copy):
    """They say 2, and mean the largest id."""
    change_config(copy, text_config={"eos_token_id": 2})
    expected = prompt_similarity(model, noise(2), PROMPT)
    assert prompt_similarity(ClipModel(copy), noise(2), PROMPT) == pytest.approx(expected, abs=1e-6)


def change_config(folder, text_config=None, **values):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text_config or {}
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent is not a folder.*never downloaded"):
        ClipModel(tmp_path / "absent")
    with pytest.raises(MetricInputError) as caught:
        ClipModel("openai/clip-vit-base-patch32")
    assert (caught.value.code, caught.value.key) == ("clip-folder-missing", "metrics.clip")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], r"not a CLIP folder: it lacks config\.json\. Pass"),
        (["model.safetensors"], r"it lacks model\.safetensors or model\.safetensors\.index\.json\. Pass"),
        (["vocab.json"], r"it lacks tokenizer\.json or vocab\.json and merges\.txt\. Pass"),
        (["merges.txt"], r"it lacks tokenizer\.json or vocab\.json and merges\.txt\. Pass"),
        (["preprocessor_config.json"], r"it lacks preprocessor_config\.json or processor_config\.json\. Pass"),
        (
            ["config.json", "merges.txt"],
            r"it lacks config\.json; tokenizer\.json or vocab\.json and merges\.txt\. Pass",
        ),
    ],
)
def test_a_folder_without_a_part_is_refused(copy, files, message):
    for file in files:
        (copy / file).unlink()
    with pytest.raises(MetricInputError, match=message) as caught:
        ClipModel(copy)
    assert caught.value.code == "clip-folder-incomplete"


class Marker:
    """A pickle that leaves a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_only_as_a_pickle_are_refused_unread(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    with pytest.raises(
        ValueError, match=r"only as pytorch_model\.bin, expected model\.safetensors.*save_pretrained"
    ) as caught:
        ClipModel(copy)
    assert caught.value.code == "clip-weights-pickled"
    assert not (tmp_path / "marker").exists()


def test_code_in_the_folder_is_not_run(copy, tmp_path):
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Evil: ...\n")
    change_config(copy, auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    (copy / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    settings |= {"auto_map": {"AutoImageProcessor": "evil.Evil"}}
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    assert -1 < prompt_similarity(ClipModel(copy), noise(2), PROMPT) < 1
    assert not (tmp_path / "marker").exists()


def test_another_model_is_refused(copy):
    change_config(copy, model_type="siglip")
    with pytest.raises(ValueError, match="model_type 'siglip', expected 'clip'") as caught:
        ClipModel(copy)
    assert caught.value.code == "clip-folder-wrong-model"


def test_weights_of_one_half_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("text_model.")}
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack \d+ tensors, such as text_model\..*one half of CLIP only") as caught:
        ClipModel(copy)
    assert caught.value.code == "clip-weights-incomplete"


def test_weights_cut_short_or_of_another_size_are_refused(copy):
    change_config(copy, text_config={"hidden_size": 24})
    with pytest.raises(ValueError, match=r"(?s)do not load \(.*\)\. .*damaged, or belongs to another config\.json"):
        ClipModel(copy)
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:500])
    with pytest.raises(MetricInputError) as caught:
        ClipModel(copy)
    assert caught.value.code == "clip-weights-damaged"


def test_the_tokenizer_of_another_model_is_refused(copy):
    change_config(copy, text_config={"eos_token_id": END - 3})
    with pytest.raises(ValueError, match=f"{END + 1} tokens with {END} at the end, its text encoder .* with {END - 3}"):
        ClipModel(copy)
    change_config(copy, text_config={"eos_token_id": 2})
    (copy / "vocab.json").write_text(json.dumps(VOCABULARY | {"ab": END + 1}))
    with pytest.raises(ValueError, match=f"has {END + 2} tokens .*, its text encoder {END + 1}") as caught:
        ClipModel(copy)
    assert caught.value.code == "clip-tokenizer-mismatch"


# --- frames


@pytest.mark.parametrize("of", [lambda m, f: prompt_similarity(m, f, PROMPT), frame_consistency])
@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (np.zeros((5, SIDE, SIDE, 3), np.float32), "frames-invalid"),
        (np.zeros((5, 3, SIDE, SIDE), np.uint8), "frames-invalid"),
        (np.zeros((SIDE, SIDE, 3), np.uint8), "frames-invalid"),
        (np.zeros((0, SIDE, SIDE, 3), np.uint8), "frames-too-few"),
    ],
)
def test_frames_that_cannot_be_embedded_are_refused(model, of, frames, code):
    with pytest.raises(MetricInputError) as caught:
        of(model, frames)
    assert caught.value.code == code


def test_one_frame_has_no_consistency(model):
    with pytest.raises(ValueError, match="1 frames came, expected 2 or more: one frame has no neighbour"):
        frame_consistency(model, noise(1))


def test_the_limit_of_a_folder_is_where_its_text_encoder_cuts(folder, model):
    limit, longest = read_text_limit(folder), "a b c d e f"
    assert (limit.tokens, limit.count([longest, longest + " g"])) == (POSITIONS, [POSITIONS, POSITIONS + 1])
    assert limit.too_long([longest, longest + " g"]) == {longest + " g": POSITIONS + 1}
    assert torch.equal(model.embed_prompt(longest + " g"), model.embed_prompt(longest + " h"))


def test_an_evaluation_warns_of_prompts_that_clip_cuts(folder, tmp_path, capsys):
    store = Store(str(tmp_path))
    made = {"output_uri": store.uri_of("videos/a.mp4"), "output_sha256": "0" * 64, "output_bytes": 1}
    size = {"frames": 9, "height": 32, "width": 32, "fps": 8.0}
    Manifest(store).commit(
        {"row_id": "a", "status": "ok", "kind": "synthesize", "prompt": "a b c d e f g", **made, **size}
    )
    settings = MetricSettings(names=("prompt_similarity",), clip=str(folder))
    assert len(_to_measure(Job("evaluate", "test", Output(str(tmp_path)), metrics=settings))) == 1
    assert f"warning: 1 of 1 prompts are longer than the {POSITIONS} tokens that CLIP reads" in capsys.readouterr().err
