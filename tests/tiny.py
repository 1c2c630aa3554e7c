"""Tiny REAL components: two CogVideoX blocks of each kind, from diffusers' own classes."""

from ditflow.backbones.cogvideox import CogVideoX
from ditflow.backbones.contract import Backbone, NoiseLevel
from ditflow.mini.build import build_pipeline
from ditflow.types import PositionEmbedding, TokenGrid

KINDS = ("rotary", "additive")
FRAMES, SIZE = 9, 32
LEVEL = NoiseLevel(None, 500, 0.5)


def tiny_backbone(kind: str, **options) -> CogVideoX:
    """Kinds: rotary (5B), additive (2B), temporal-patch (1.5)."""
    temporal_patch = 2 if kind == "temporal-patch" else None
    pipeline = build_pipeline(rotary=kind != "additive", layers=2, temporal_patch=temporal_patch)
    return CogVideoX(pipeline, name=f"tiny-{kind}", revision=f"revision-{kind}", **options)


def own_position(backbone: Backbone, grid: TokenGrid) -> PositionEmbedding:
    """The model's own position embedding of the video tokens."""
    scheme = backbone.positions(grid)
    return scheme.apply(scheme.zero("position"), "position")
