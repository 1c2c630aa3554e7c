"""A reference video's motion, taken once and used for any number of new videos."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from ditflow.artifact import ArtifactError, is_grid, read_artifact, write_artifact
from ditflow.backbones.base import Backbone
from ditflow.losses import MOTION_LOSSES, MotionLoss, Payload
from ditflow.motion import consecutive
from ditflow.settings import MethodSettings
from ditflow.types import TokenGrid, check_finite

_KIND, _FORMAT = "motion reference", 2


@dataclass(frozen=True)
class MotionReference:
    """What is kept of a reference video.

    payloads: the motion signal of every guidance block, as its loss defines it (`ditflow`: displacement int8
        [F, F, P, 2] in patches). Empty when only injection is wanted.
    latents: the scaled mean latents [1, F, C, h, w], when keys and values will be injected.
    fps: the reference video's frames per second, if known.
    notes: how the reference video was read, where that is not as usual; see `ditflow.video.Clip`.
    """

    grid: TokenGrid
    model_revision: str
    loss: str | None
    payloads: Mapping[int, Payload]
    latents: Tensor | None
    fps: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def displacement(self) -> Num[Tensor, "frames frames patches 2"]:
        """The attention motion flow of the first guidance block, in patches; fractional for a soft reference."""
        return next(iter(self.payloads.values()))["displacement"]

    @property
    def flow(self) -> Int[Tensor, "pairs patches 2"] | None:
        """The hard displacement from every latent frame to the next; None of losses that have none."""
        displacement = next(iter(self.payloads.values()), {}).get("displacement")
        if displacement is None or displacement.is_floating_point() or len(displacement) < 2:
            return None
        return consecutive(displacement)

    def to_bytes(self) -> bytes:
        """Serialise as safetensors."""
        header = {
            "grid": [self.grid.frames, self.grid.height, self.grid.width],
            "model_revision": self.model_revision,
            "loss": self.loss,
            "blocks": list(self.payloads),
            "fps": self.fps,
            **({"notes": list(self.notes)} if self.notes else {}),
        }
        tensors = {f"block.{b}.{part}": t for b, payload in self.payloads.items() for part, t in payload.items()}
        if self.latents is not None:
            tensors["latents"] = self.latents
        return write_artifact(_KIND, _FORMAT, header, tensors)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "motion reference") -> MotionReference:
        """Read what `to_bytes` wrote; ArtifactError for anything else."""
        header, tensors = read_artifact(_KIND, _FORMAT, data, name)
        _check_header(header, name)
        payloads: dict[int, Payload] = {block: {} for block in header["blocks"]}
        for key, tensor in tensors.items():
            match = re.fullmatch(r"block\.(\d+)\.(\w+)", key, re.ASCII)
            if match and int(match[1]) in payloads:
                payloads[int(match[1])][match[2]] = tensor
            elif key != "latents" or tensor.ndim != 5:
                raise ArtifactError(f"{name} has a tensor {key!r:.100} {list(tensor.shape)} of no block: it is damaged")
        grid = TokenGrid(*header["grid"])
        for payload in payloads.values():
            _check_shapes(payload, grid, header.get("loss"), name)
        latents, notes = tensors.get("latents"), tuple(header.get("notes") or ())
        return cls(grid, header["model_revision"], header.get("loss"), payloads, latents, header.get("fps"), notes)

    def check_fits(self, backbone: Backbone, grid: TokenGrid, method: MethodSettings) -> None:
        """Raise ArtifactError unless this reference serves this model, grid and method."""
        for what, own, wanted in (
            ("model revision", self.model_revision, backbone.revision),
            ("token grid", self.grid, grid),
            ("loss", self.loss, method.loss or self.loss),
        ):
            if own != wanted:
                raise ArtifactError(f"motion reference: its {what} is {own}, needed is {wanted}: extract it again")
        blocks = method.blocks or () if method.loss is not None else ()
        if missing := [block for block in blocks if block not in self.payloads]:
            raise ArtifactError(
                f"motion reference: it has the motion of blocks {list(self.payloads)}, needed are also {missing}: "
                "extract it again"
            )


def _check_header(header: dict[str, Any], name: str) -> None:
    """Raise ArtifactError unless a header has what `to_bytes` writes."""
    loss, blocks, fps, notes = (header.get(key) for key in ("loss", "blocks", "fps", "notes"))
    notes = [] if notes is None else notes
    fits = {
        "grid": is_grid(header.get("grid")),
        "model_revision": isinstance(header.get("model_revision"), str),
        "loss": loss is None or isinstance(loss, str),
        "blocks": isinstance(blocks, list) and all(type(block) is int and block >= 0 for block in blocks),
        "fps": fps is None or (isinstance(fps, int | float) and 0 < fps < math.inf),
        "notes": isinstance(notes, list) and all(isinstance(note, str) for note in notes),
    }
    if wrong := [key for key, is_right in fits.items() if not is_right]:
        raise ArtifactError(f"{name} has a header with {wrong[0]} {header.get(wrong[0])!r:.100}: it is damaged")


def _check_shapes(payload: Payload, grid: TokenGrid, loss: str | None, name: str) -> None:
    """Raise ArtifactError unless a block's tensors have the axes that the loss says."""
    wanted: Mapping[str, str] | None = getattr(MOTION_LOSSES.get(loss or ""), "payload_axes", None)
    if wanted is None:
        return
    sides = {"F": grid.frames, "P": grid.patches}
    for part, tensor in payload.items():
        axes = wanted.get(part, "").split()
        sides |= {axis: int(axis) for axis in axes if axis.isdigit()}
        fits = tensor.ndim == len(axes) and tensor.numel() > 0
        if not fits or any(sides.setdefault(axis, side) != side for axis, side in zip(axes, tensor.shape, strict=True)):
            raise ArtifactError(
                f"{name} has for {part:.100} a tensor {list(tensor.shape)}, expected {wanted.get(part)} of a {grid} "
                f"grid, as the loss {loss} has it: it is damaged"
            )
    if payload.keys() != wanted.keys():
        raise ArtifactError(f"{name} has {', '.join(payload) or 'nothing'} of a block, expected {', '.join(wanted)}")


def reference_from_latents(
    backbone: Backbone,
    latents: Float[Tensor, "1 frames channels height width"],
    source_embeds: Tensor,
    method: MethodSettings,
) -> MotionReference:
    """Take the motion signal from reference latents (paper, section 3.2).

    They are clean and at timestep 0, unless the loss asks for a noised reference: then the noise is always the same.
    source_embeds are the empty prompt's text embeddings; `method` is resolved. Raises NonFiniteError if the latents or
    their motion are not finite.
    """
    grid = backbone.grid(latents)
    check_finite("the reference's latents", latents)
    payloads: dict[int, Payload] = {}
    if method.loss is not None:
        assert method.blocks is not None, "resolve() first"
        loss = MOTION_LOSSES[method.loss].from_settings(method)
        with torch.no_grad():
            captured = look(backbone, latents, source_embeds, loss, method.blocks)
            payloads = {block: loss.reference(captured[block], grid) for block in method.blocks}
        for block, payload in payloads.items():
            check_finite(f"the reference's motion in block {block}", *payload.values())
    kept = latents.float().cpu() if method.injects else None
    return MotionReference(grid, backbone.revision, method.loss, payloads, kept)


def look(
    backbone: Backbone, latents: Tensor, source_embeds: Tensor, loss: MotionLoss, blocks: Sequence[int]
) -> Mapping[int, Any]:
    """Return what a loss sees of a finished video in these blocks, differentiable in its clean latents."""
    noised, timestep = _noised(backbone, latents, loss.reference_noise)
    position = backbone.default_position(backbone.grid(latents))
    return backbone.capture(noised, timestep, source_embeds, blocks, position, captures=loss.captures)


def _noised(backbone: Backbone, latents: Tensor, share: float) -> tuple[Tensor, int]:
    """Noise latents to a share of the training timesteps; return them with the timestep."""
    if share == 0:
        return latents, 0
    solver = backbone.solver(1)
    timestep = round(share * solver.training_timesteps)
    noise = torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(0))
    return solver.add_noise(latents, noise.to(latents), timestep), timestep


def extract_motion(backbone: Backbone, video: np.ndarray, method: MethodSettings) -> MotionReference:
    """Take the motion signal from a uint8 RGB video [T, H, W, 3]."""
    resolved = method.resolve(backbone.defaults)
    latents = backbone.encode_video(video)
    return reference_from_latents(backbone, latents, backbone.encode_prompt(""), resolved)
