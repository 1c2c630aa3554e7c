"""The embedded models: what each is made of, and the settings that its folder carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ditflow.mini.build import build_pipeline, build_wan_pipeline
from ditflow.mini.training.cogvideox import CogVideoXDenoiser
from ditflow.mini.training.denoiser import Denoiser
from ditflow.mini.training.wan import WanDenoiser


@dataclass(frozen=True)
class Kind:
    """An embedded model.

    build: makes its diffusers pipeline with random weights, from a seed. denoiser: how its family is trained.
    defaults: `ditflow.json` of its folder. autoencoder: the stage that trains its VAE.
    """

    build: Callable[..., Any]
    denoiser: type[Denoiser]
    defaults: Mapping[str, Any]
    autoencoder: str = "vae"

    @property
    def latents(self) -> str:
        """The folder of clips that its VAE encoded."""
        return self.autoencoder.replace("vae", "latents")


KINDS = {
    "rotary": Kind(
        partial(build_pipeline, rotary=True),
        CogVideoXDenoiser,
        {
            "blocks": [3, 4],
            "learning_rate": [0.08, 0.04],
            "variables": {"position": {"learning_rate": [0.002, 0.001]}},
            "lasting": {"coordinates": {"guided_steps": 0.28, "injected_steps": 0.52, "iterations": 20, "drafts": 16}},
            "steps": 25,
            "guidance_scale": 5.0,
            "losses": {
                "motionclone": {"blocks": [2], "learning_rate": [0.16, 0.08]},
                "moft": {"blocks": [2], "learning_rate": [0.04, 0.02]},
                "smm": {"blocks": [2], "learning_rate": [0.16, 0.08]},
            },
        },
    ),
    "additive": Kind(
        partial(build_pipeline, rotary=False),
        CogVideoXDenoiser,
        {
            "blocks": [3],
            "learning_rate": [0.02, 0.01],
            "variables": {"position": {"learning_rate": [0.01, 0.005]}},
            "lasting": {
                "coordinates": {
                    "guided_steps": 0.24,
                    "iterations": 20,
                    "learning_rate": [0.25, 0.125],
                    "optimizer": "adam",
                    "drafts": 16,
                }
            },
            "steps": 25,
            "guidance_scale": 5.0,
            "losses": {
                "motionclone": {"blocks": [3, 4], "learning_rate": [0.02, 0.01]},
                "moft": {"blocks": [2], "learning_rate": [0.01, 0.005]},
                "smm": {"blocks": [2], "learning_rate": [0.01, 0.005]},
            },
        },
    ),
    "wan": Kind(
        build_wan_pipeline,
        WanDenoiser,
        {"blocks": [3], "steps": 25, "guidance_scale": 5.0},
        autoencoder="vae-wan",
    ),
}
"""By name. The defaults are what `python -m benchmarks.mini_sweep` found best, for lasting banks see
docs/bank-recipes.md; those of `wan` have not been swept."""

AUTOENCODERS: dict[str, Callable[..., Any]] = {
    "vae": partial(build_pipeline, rotary=True),
    "vae-wan": build_wan_pipeline,
}
"""By stage: makes a pipeline with the VAE that the stage trains, from a seed."""
