"""Facts about the jobs that are shipped: each loads, and the paper's comparison plans what the paper compares."""

import csv
import json
from collections import Counter
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path

import pytest

from jobs.spec import PRESETS, load_spec
from pipeline.plan import make_plan

PAPER_TABLE = PRESETS / "paper-table.yaml"
METHODS = [
    *("none", "injection", "motionclone", "moft", "smm"),
    *("ditflow-latent", "ditflow-position", "ditflow-zero-shot"),
]
CLASSES = ["caption", "subject", "scene"]
DAVIS_2016 = [
    "bear", "blackswan", "bmx-bumps", "bmx-trees", "boat", "breakdance", "breakdance-flare", "bus", "camel",
    "car-roundabout", "car-shadow", "car-turn", "cows", "dance-jump", "dance-twirl", "dog", "dog-agility",
    "drift-chicane", "drift-straight", "drift-turn", "elephant", "flamingo", "goat", "hike", "hockey",
    "horsejump-high", "horsejump-low", "kite-surf", "kite-walk", "libby", "lucia", "mallard-fly", "mallard-water",
    "motocross-bumps", "motocross-jump", "motorbike", "paragliding", "paragliding-launch", "parkour", "rhino",
    "rollerblade", "scooter-black", "scooter-gray", "soapbox", "soccerball", "stroller", "surf", "swing", "tennis",
    "train",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cached_models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITFLOW_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


# A model that is not at hand is replaced; the sizes of all presets fit the embedded one.
@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda preset: preset.stem)
def test_every_preset_loads_and_its_resolved_spec_is_the_same_job(preset, tmp_path):
    spec = load_spec(preset, ["model.path=mini"])
    assert spec.job.name == preset.stem
    resolved = tmp_path / "job.yaml"
    resolved.write_text(spec.yaml, encoding="utf-8")
    assert load_spec(resolved).job == spec.job


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """The rows of the paper's table."""
    with PAPER_TABLE.with_suffix(".csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_paper_table_has_a_prompt_of_each_class_for_each_clip_of_davis(rows):
    assert [(row["reference"], row["category"]) for row in rows] == [
        (f"{name}.mp4", category) for name, category in product(DAVIS_2016, CLASSES)
    ]
    assert {(row["start"], row["stop"], row["step"]) for row in rows} == {("0", "24", "1")}


def test_the_prompts_of_the_paper_table_are_sentences_of_8_to_25_words_and_no_two_are_the_same(rows):
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == 150
    for prompt in prompts:
        assert 8 <= len(prompt.split()) <= 25, prompt
        assert prompt[0].isupper() and prompt[-1] == "." and prompt == prompt.strip(), prompt


def test_zero_shot_methods_learn_with_another_prompt_of_the_same_clip(rows):
    for _, of_clip in groupby(rows, itemgetter("reference")):
        caption, subject, scene = of_clip
        assert caption["learn_with"] == subject["prompt"]
        assert subject["learn_with"] == scene["learn_with"] == caption["prompt"]


@pytest.fixture
def clips(tmp_path) -> Path:
    """A file for each clip: planning reads their bytes and decodes nothing."""
    folder = tmp_path / "references"
    folder.mkdir()
    for name in DAVIS_2016:
        (folder / f"{name}.mp4").write_bytes(name.encode())
    return folder


def test_the_paper_table_plans_every_method_for_every_prompt_from_the_root_of_the_repository(
    clips, tmp_path, monkeypatch
):
    monkeypatch.chdir(PRESETS.parent)
    places = [f"references.uri={clips}", f"output.uri={tmp_path / 'out'}"]
    spec = load_spec(PAPER_TABLE, ["model.path=mini", *places])
    plan = make_plan(spec.job, spec.model.revision)
    assert (len(plan.todo), plan.duplicates) == (1200, 0)
    assert Counter((row.variant, row.category) for row in plan.todo) == dict.fromkeys(product(METHODS, CLASSES), 50)
    assert all(row.reference is not None and row.reference.sha256 is not None for row in plan.todo)
    # Extracted once for each clip and what is taken from it: nothing for the plain model, DiTFlow's for three methods.
    assert len({row.motion_id for row in plan.todo} - {None}) == 50 * 5


def released(folder: Path, layers: int, rotary: bool) -> Path:
    """What is read of a released CogVideoX before its weights are: three small files."""
    transformer = {"num_layers": layers, "use_rotary_positional_embeddings": rotary, "in_channels": 16, "patch_size": 2}
    transformer |= {"sample_frames": 49, "sample_height": 60, "sample_width": 90}
    vae = {"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}
    for part, values in {"transformer": transformer, "vae": vae}.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(values))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    return folder


@pytest.mark.parametrize(("layers", "rotary", "block"), [(42, True, 20), (30, False, 15)], ids=["5B", "2B"])
def test_the_paper_table_has_the_papers_settings_on_both_sizes_of_the_model(tmp_path, layers, rotary, block):
    job = load_spec(PAPER_TABLE, [f"model.path={released(tmp_path / 'model', layers, rotary)}"]).job
    assert list(job.variants) == METHODS
    for variant in job.variants.values():
        method = variant.method
        assert (method.preset, method.blocks, method.temperature) == ("paper", (block,), 2.0)
        assert (method.guided_steps, method.iterations, method.learning_rate) == (10, 5, (0.002, 0.001))
    assert (job.sampling.steps, job.sampling.guidance_scale) == (50, 7.0)
    assert (job.sampling.dynamic_guidance_scale, job.references.size) == (rotary, (24, 480, 720))
