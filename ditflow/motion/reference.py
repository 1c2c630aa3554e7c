"""A reference video's motion, taken once and used for any number of new videos."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor

from ditflow.artifact import ArtifactError, is_grid, read_artifact, write_artifact
from ditflow.backbones.contract import CLEAN, Backbone, Condition, Schedule
from ditflow.losses import MOTION_LOSSES, DisplacementLoss, MotionLoss, Payload
from ditflow.motion import MotionTarget, consecutive
from ditflow.motion.filters import ClipContext, MotionFilter
from ditflow.settings import MethodSettings, MotionSettings, ResolvedMethod, settings_dict
from ditflow.types import MotionFilterError, TokenGrid, check_finite

_KIND, _FORMAT = "motion reference", 2


@dataclass(frozen=True)
class MotionReference:
    """What is kept of a reference video.

    payloads: the motion signal of every guidance block, as its loss defines it (`ditflow`: displacement int8
        [F, F, P, 2] in patches). Empty when only injection is wanted.
    latents: the scaled mean latents [1, F, C, h, w], when keys and values will be injected.
    fps: the reference video's frames per second, if known.
    notes: how the reference video was read, where that is not as usual; see `ditflow.media.video.Clip`.
    motion: the source and the filters that the payloads come from.
    """

    grid: TokenGrid
    model_revision: str
    loss: str | None
    payloads: Mapping[int, Payload]
    latents: Tensor | None
    fps: float | None = None
    notes: tuple[str, ...] = ()
    motion: MotionSettings = field(default_factory=MotionSettings)

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
            **({"motion": settings_dict(self.motion)} if self.motion.resolve() != MotionSettings().resolve() else {}),
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
        latents, notes, motion = tensors.get("latents"), tuple(header.get("notes") or ()), _motion_of(header, name)
        return cls(
            grid, header["model_revision"], header.get("loss"), payloads, latents, header.get("fps"), notes, motion
        )

    def check_fits(self, backbone: Backbone, grid: TokenGrid, method: ResolvedMethod) -> None:
        """Raise ArtifactError unless this reference serves this model, grid and method."""
        for what, code, own, wanted in (
            ("model revision", "motion-model-revision", self.model_revision, backbone.revision),
            ("token grid", "motion-token-grid", self.grid, grid),
            ("loss", "motion-loss", self.loss, method.name if method.has_loss else self.loss),
        ):
            if own != wanted:
                raise ArtifactError(
                    f"motion reference: its {what} is {own}, needed is {wanted}: extract it again", code=code
                )
        blocks = method.blocks if method.has_loss else ()
        if missing := [block for block in blocks if block not in self.payloads]:
            raise ArtifactError(
                f"motion reference: it has the motion of blocks {list(self.payloads)}, needed are also {missing}: "
                "extract it again",
                code="motion-blocks",
                key="method.blocks",
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


def _motion_of(header: dict[str, Any], name: str) -> MotionSettings:
    motion = header.get("motion") or {}
    try:
        return MotionSettings(motion.get("source", "attention"), tuple(motion.get("filters", ())))
    except (AttributeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{name} has a header with motion {motion!r:.100}: it is damaged ({error})") from error


def _check_shapes(payload: Payload, grid: TokenGrid, loss: str | None, name: str) -> None:
    """Raise ArtifactError unless a block's tensors have the axes that the loss says."""
    wanted: Mapping[str, str] | None = getattr(MOTION_LOSSES.get(loss or ""), "payload_axes", None)
    if wanted is None:
        return
    optional: Mapping[str, str] = getattr(MOTION_LOSSES[loss or ""], "optional_axes", {})
    wanted = {**wanted, **{part: axes for part, axes in optional.items() if part in payload}}
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
    source: Condition,
    method: ResolvedMethod,
    clip: ClipContext | None = None,
) -> MotionReference:
    """Take the motion signal from reference latents (paper, section 3.2).

    They are clean, unless the loss asks for a noised reference: then the noise is always the same.
    source: condition of the empty prompt. clip: what the filters need to know. Raises NonFiniteError if the latents or
    their motion are not finite.
    """
    grid = backbone.layout.grid(latents.shape)
    check_finite("the reference's latents", latents)
    payloads: dict[int, Payload] = {}
    if method.has_loss:
        loss = method.make_loss()
        with torch.no_grad():
            captured = capture_clean(backbone, backbone.schedule(1, grid), latents, source, loss, method.blocks)
            payloads = {block: _payload_of(loss, captured[block], grid, method, clip) for block in method.blocks}
    return _reference_of(backbone, grid, payloads, latents, method)


def _payload_of(
    loss: MotionLoss, capture: Any, grid: TokenGrid, method: ResolvedMethod, clip: ClipContext | None
) -> Payload:
    """The motion signal of one block, filtered."""
    filters = method.motion.make_filters()
    if not filters:
        return loss.reference(capture, grid)
    if clip is None:
        raise MotionFilterError(
            "motion filters need the reference's video: expected none with reference latents alone",
            code="no-clip",
            key="motion.filters",
        )
    unweighted = torch.ones(grid.frames, grid.frames, grid.patches)
    if isinstance(loss, DisplacementLoss):
        return loss.from_target(_filtered(MotionTarget(loss.displacement(capture, grid), unweighted), filters, clip))
    weight = _filtered(MotionTarget(None, unweighted), filters, clip).weight
    return loss.reference(capture, grid, weight.diagonal().T)


def _filtered(target: MotionTarget, filters: Sequence[MotionFilter], clip: ClipContext) -> MotionTarget:
    for change in filters:
        target = change(target, clip)
    return target


def _reference_of(
    backbone: Backbone,
    grid: TokenGrid,
    payloads: Mapping[int, Payload],
    latents: Tensor | None,
    method: ResolvedMethod,
) -> MotionReference:
    for block, payload in payloads.items():
        check_finite(f"the reference's motion in block {block}", *payload.values())
    kept = latents.float().cpu() if method.injects and latents is not None else None
    loss = method.name if method.has_loss else None
    return MotionReference(grid, backbone.revision, loss, payloads, kept, motion=method.motion)


def capture_clean(
    backbone: Backbone,
    schedule: Schedule,
    latents: Tensor,
    source: Condition,
    loss: MotionLoss,
    blocks: Sequence[int],
) -> Mapping[int, Any]:
    """Capture what a loss needs of a finished video in these blocks; differentiable in its clean latents."""
    level = CLEAN
    if loss.reference_noise:
        level = schedule.level_at(loss.reference_noise)
        noise = torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(0))
        latents = schedule.add_noise(latents, noise.to(latents), level)
    return backbone.capture(latents, level, source, blocks, what=loss.captures)


def extract_motion(
    backbone: Backbone,
    video: UInt8[np.ndarray, "time height width 3"],
    method: MethodSettings,
    mask: UInt8[np.ndarray, "time_of_mask height width"] | None = None,
) -> MotionReference:
    """Take the motion signal from an RGB video, as `method.motion` says.

    mask: number of the object that every pixel belongs to, of every frame or of the first alone; for the filters.
    """
    resolved = method.resolve(backbone.defaults)
    source = resolved.motion.make_source()
    grid = backbone.layout.grid(backbone.layout.latent_shape(*video.shape[:3]))
    clip = ClipContext(grid, backbone.layout, len(video), mask)
    if source.uses_model or not resolved.has_loss:
        latents, empty = backbone.encode_video(video), backbone.condition("")
        return reference_from_latents(backbone, latents, empty, resolved, clip)
    loss = resolved.make_loss()
    assert isinstance(loss, DisplacementLoss), "the settings are checked"
    target = _filtered(source.target(video, backbone.layout), resolved.motion.make_filters(), clip)
    payload = loss.from_target(target)
    injected = backbone.encode_video(video) if resolved.injects else None
    return _reference_of(backbone, grid, dict.fromkeys(resolved.blocks, payload), injected, resolved)
