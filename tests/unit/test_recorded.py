"""Two recorded runs of the authors' released code, number by number. See tests/recorded/README.md."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ditflow import backbones
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import Transferred, transfer_latents

RECORDED = Path(__file__).parents[1] / "recorded"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(RECORDED / "runs.safetensors")


def run(recorded: dict[str, Tensor], optimize: str) -> Transferred:
    generator = torch.Generator("cpu").manual_seed(1)
    torch.randn(recorded["initial"].shape, generator=generator)  # the recorded run drew its initial noise first
    return transfer_latents(
        backbones.load(str(RECORDED / "model"), dtype="float32", device="cpu"),
        reference_latents=recorded["reference"],
        initial_latents=recorded["initial"],
        prompt_embeds=recorded["prompt"][1:],
        negative_prompt_embeds=recorded["prompt"][:1],
        source_embeds=recorded["source"],
        method=MethodSettings(
            optimize=optimize,
            preset="official",
            blocks=(2,),
            temperature=2.0,
            guided_steps=3,
            iterations=5,
            learning_rate=(0.002, 0.001),
        ),
        sampling=SamplingSettings(steps=10, guidance_scale=7.0, dynamic_guidance_scale=False),
        generator=generator,
    )


@pytest.mark.parametrize("optimize", ["latent", "position"])
def test_motion_losses_and_latents_are_those_of_the_released_code(recorded, optimize):
    result = run(recorded, optimize)
    assert torch.equal(result.motion_reference.displacement, recorded["displacement"])
    losses = [loss for step in result.losses for loss in step]
    assert losses == pytest.approx(recorded[f"{optimize}.losses"].tolist(), rel=TOLERANCE)
    final = recorded[f"{optimize}.final"]
    assert (result.latents - final).norm() <= TOLERANCE * final.norm()
