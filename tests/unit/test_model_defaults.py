"""A model folder's `ditflow.json` is no part of the model's revision, and needs not be: only the driver reads it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from ditflow import backbones
from ditflow.media.video import write_video
from ditflow.mini import mini_folder
from ditflow.settings import settings_dict
from ditflow.transfer import learn_bank, transfer_motion
from jobs.spec import load_spec
from pipeline.plan import make_plan

SIZE = (9, 32, 32)
OTHERS = {
    "blocks": [1],
    "temperature": 5.0,
    "guided_steps": 1,
    "injected_steps": 1,
    "iterations": 1,
    "learning_rate": [0.5, 0.5],
    "optimizer": "adam",
    "drafts": 3,
    "steps": 3,
    "guidance_scale": 2.0,
    "dynamic_guidance_scale": True,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The same model twice, with its own defaults and with others for everything."""
    root = tmp_path_factory.mktemp("models")
    own, other = (Path(shutil.copytree(mini_folder("mini"), root / name)) for name in ("own", "other"))
    (other / "ditflow.json").write_text(json.dumps(OTHERS))
    return own, other


def job(folder: Path, model: Path, **changes):
    """A job that leaves every setting to the model."""
    write_video(folder / "moves.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    spec = {
        "kind": "synthesize",
        "name": "open",
        "model": {"path": str(model)},
        "references": {"uri": str(folder / "moves.mp4"), "frames": 9, "height": 32, "width": 32},
        "prompts": ["a ball"],
        "output": {"uri": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump({**spec, **changes}))
    return load_spec(folder / "job.yaml")


@pytest.mark.parametrize("kind", ["synthesize", "build-bank", "extract"])
def test_a_planned_job_leaves_nothing_to_the_models_defaults(tmp_path, folders, kind):
    ready = [job(tmp_path, folder, kind=kind) for folder in folders]
    assert len({spec.model.revision for spec in ready}) == 1
    for spec in ready:
        assert None not in settings_dict(spec.job.method).values()
        assert None not in settings_dict(spec.job.sampling).values()
    own, other = (make_plan(spec.job, spec.model.revision).todo[0] for spec in ready)
    assert own.row_id != other.row_id
    assert own.motion_id != other.motion_id, "the guidance block is another"


def test_workers_with_other_defaults_make_the_same_video_and_bank(tmp_path, folders, moving_video):
    few = {"optimize": "coordinates", "guided_steps": 1, "iterations": 1}
    planned = job(tmp_path, folders[0], method=few, sampling={"steps": 3}).job
    method, sampling = planned.method, planned.sampling
    workers = [backbones.load(str(folder)) for folder in folders]
    videos = [
        transfer_motion(worker, "a ball", reference=moving_video, method=method, sampling=sampling).video
        for worker in workers
    ]
    assert np.array_equal(*videos)
    motion = transfer_motion(
        workers[0], "a ball", reference=moving_video, method=method, sampling=sampling
    ).motion_reference
    banks = [
        learn_bank(worker, "a ball", reference=motion, size=SIZE, method=method, sampling=sampling).bank
        for worker in workers
    ]
    assert banks[0].parts.keys() == banks[1].parts.keys()
    assert banks[0].header.method == banks[1].header.method


@pytest.mark.parametrize("says", [True, False])
def test_a_bank_alone_says_how_it_is_reused_where_the_job_leaves_it_open(tmp_path, folders, moving_video, says):
    settings = {"method": {"optimize": "coordinates", "guided_steps": 2, "iterations": 1}, "sampling": {"steps": 3}}
    learning = job(tmp_path, folders[0], **settings).job
    workers = [backbones.load(str(folder)) for folder in folders]
    bank = transfer_motion(
        workers[0], "a ball", reference=moving_video, method=learning.method, sampling=learning.sampling
    ).bank
    assert bank is not None
    if not says:
        bank = replace(bank, header=replace(bank.header, injected_steps=None))
    reusing = job(tmp_path, folders[0], kind="reuse", banks={"uri": "bank.safetensors"}, sampling={"steps": 3}).job
    assert (reusing.method.guided_steps, reusing.method.injected_steps) == (None, None)
    videos = [
        transfer_motion(
            worker, "a ball", reference=bank, size=SIZE, method=reusing.method, sampling=reusing.sampling
        ).video
        for worker in workers
    ]
    assert np.array_equal(*videos)
