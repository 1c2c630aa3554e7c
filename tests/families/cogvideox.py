"""CogVideoX as backbones for tests: 5B's layout, 2B's and 1.5's, tiny, with random weights."""

from typing import Any

from torch import Tensor

from ditflow.backbones.cogvideox import CogVideoX
from ditflow.mini.build import build_pipeline

KINDS = ("rotary", "additive", "temporal-patch")


def build(kind: str = "rotary", **options: Any) -> CogVideoX:
    """Return one of three kinds: rotary (5B), additive (2B), temporal-patch (1.5)."""
    temporal_patch = 2 if kind == "temporal-patch" else None
    pipeline = build_pipeline(rotary=kind != "additive", layers=3, temporal_patch=temporal_patch)
    return CogVideoX(pipeline, name=f"tiny-{kind}", revision=f"revision-{kind}", **options)


def by_diffusers(backbone: CogVideoX, noise: Tensor, prompt: str, steps: int, guidance_scale: float) -> Tensor:
    """Final latents of diffusers' own pipeline."""
    return backbone.pipeline(
        prompt=prompt,
        negative_prompt="",
        num_frames=4 * (noise.shape[1] - 1) + 1,
        height=4 * noise.shape[3],
        width=4 * noise.shape[4],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=backbone.text_tokens,
        latents=noise,
        output_type="latent",
    ).frames
