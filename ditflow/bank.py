"""Motion banks: learned position embeddings, kept for reuse with other prompts (paper, section 3.4)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from ditflow.artifact import (
    MOST_TOKENS,
    ArtifactError,
    is_grid,
    read_artifact,
    read_artifact_header,
    write_artifact,
)
from ditflow.backbones.base import Geometry
from ditflow.compact import StepValues
from ditflow.motion import MotionStatistics, motion_statistics
from ditflow.settings import MethodSettings
from ditflow.stretch import stretched, stretched_moves
from ditflow.types import LearnedPosition, TokenGrid
from ditflow.video import is_selection

_KIND, _FORMAT = "motion bank", 4
_LIBRARIES = ("ditflow", "torch", "diffusers")


def _libraries() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


class BankMismatchError(ValueError):
    """A motion bank was learned for another model, grid or schedule."""


@dataclass(frozen=True)
class BankHeader:
    """Everything that a bank's positions depend on, and where they come from.

    model_revision: hash of the model folder, scheduler included. injected_steps: first steps in which reuse injects the
    reference's keys and values; None: those that have positions. error: what `MotionBank.compacted` was allowed, or 0.
    motion: statistics of the reference's motion, of a loss that has a displacement. tags: words of the user's own.
    """

    model: str
    model_revision: str
    grid: tuple[int, int, int]
    steps: int
    timesteps: tuple[int, ...]
    method: dict[str, Any]
    injected_steps: int | None = None
    prompt: str = ""
    losses: tuple[tuple[float, ...], ...] = ()
    error: float = 0.0
    motion: MotionStatistics | None = None
    tags: tuple[str, ...] = ()
    libraries: dict[str, str] = field(default_factory=_libraries)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MotionBank:
    """What was learned of the position embedding in every guided step, part by part (`LearnedPosition`).

    latents: the reference's latents [1, F, C, h, w], with which reuse can inject keys and values, or None.
    flow: the reference's hard displacement from every latent frame to the next, int8 [F-1, P, 2] as (dx, dy) in patches
    (16 KB for CogVideoX-5B at 24 frames), of which `header.motion` is made; for pictures. None of losses without one.
    """

    header: BankHeader
    parts: Mapping[str, StepValues]
    latents: Tensor | None = None
    flow: Tensor | None = None

    @classmethod
    def of(
        cls,
        header: BankHeader,
        changes: Sequence[LearnedPosition],
        latents: Tensor | None = None,
        flow: Tensor | None = None,
    ) -> MotionBank:
        """Make a bank of what every guided step has learned, first step first; every value is kept."""
        parts = {part: StepValues(torch.stack([change[part] for change in changes]).cpu()) for part in changes[0]}
        motion = None if flow is None else motion_statistics(flow)
        return cls(replace(header, motion=motion), parts, latents, flow)

    @property
    def guided_steps(self) -> int:
        """Guided steps that it has positions for."""
        return len(self.header.timesteps)

    @property
    def optimize(self) -> Literal["position", "coordinates"]:
        """What was optimised, `position` or `coordinates`."""
        return "coordinates" if self.parts.keys() <= {"query", "key", "token"} else "position"

    def as_learned(self, method: MethodSettings) -> MethodSettings:
        """Return the method with what it leaves open of this bank's use: how many steps are guided, and injected."""
        guided_steps = self.guided_steps if method.guided_steps is None else method.guided_steps
        injected_steps = method.injected_steps
        if injected_steps is None:  # a header that does not say is of a bank that was injected while it was guided
            injected_steps = guided_steps if self.header.injected_steps is None else self.header.injected_steps
        return replace(method, guided_steps=guided_steps, injected_steps=injected_steps)

    def change(self, step: int) -> LearnedPosition:
        """Return what a guided step has learned, in fp32."""
        return {part: values.at(step) for part, values in self.parts.items()}

    def compacted(self, error: float) -> MotionBank:
        """Return the bank with changes stored in as few bytes as a relative error of `error` of each part allows.

        The reference's latents are kept in 16 bits. An error of 0 changes nothing.
        """
        if not error:
            return self
        parts = {part: values.compacted(error) for part, values in self.parts.items()}
        latents = self.latents if self.latents is None else self.latents.half()
        return replace(self, header=replace(self.header, error=error), parts=parts, latents=latents)

    def resized(self, geometry: Geometry, size: tuple[int, int, int]) -> MotionBank:
        """Return the bank for videos of a size (frames, height, width) of the same model: its motion, stretched.

        For its own size it is the bank itself. For another the moves of coordinates are interpolated and grow as the
        grid does, and so are the reference's latents; the flow is left out. Raises BankMismatchError for free
        positions, which have a meaning on their own grid alone, and SettingsError for a size that the model cannot do.
        """
        if self.header.provenance.get("size") == list(size):
            return self
        if self.optimize != "coordinates":
            raise BankMismatchError(
                f"this motion bank has free positions of a {TokenGrid(*self.header.grid)} grid, which cannot be "
                "stretched to another: learn it with optimize: coordinates, or leave the size to the bank"
            )
        latent_shape = geometry.latent_shape(*size)
        grid = astuple(geometry.grid(latent_shape))
        parts = {
            part: StepValues(stretched_moves(values.every_step(), self.header.grid, grid))
            for part, values in self.parts.items()
        }
        latents = self.latents
        if latents is not None:
            sides = (latent_shape[1], *latent_shape[3:])
            latents = stretched(latents[0].float().transpose(0, 1), sides).transpose(0, 1)[None]
        header = replace(self.header, grid=grid, motion=None, provenance={**self.header.provenance, "size": list(size)})
        return replace(self, header=header, parts=parts, latents=latents, flow=None)

    def check_fits(self, revision: str, grid: TokenGrid, timesteps: Sequence[int], guided_steps: int) -> None:
        """Raise BankMismatchError unless this bank was learned for this model, grid and schedule."""
        if guided_steps > self.guided_steps:
            raise BankMismatchError(
                f"this motion bank has positions for {self.guided_steps} guided steps, the generation asks for "
                f"{guided_steps}: set method.guided_steps: {self.guided_steps}, or build a bank with more"
            )
        own, first = self.header, list(timesteps[: self.guided_steps])
        for what, its, wanted in (
            ("model revision", own.model_revision, revision),
            ("token grid", str(TokenGrid(*own.grid)), str(grid)),
            ("number of denoising steps", own.steps, len(timesteps)),
            ("first timesteps", list(own.timesteps), first),
        ):
            if its != wanted:
                raise BankMismatchError(
                    f"this motion bank's {what} is {its}, the generation's is {wanted}. Positions that were learned, "
                    f"here with {own.model}, serve only their own setting: change the setting, or build a bank for it."
                )

    def to_bytes(self) -> bytes:
        """Serialise as safetensors."""
        tensors = {f"{part}.{form}": t for part, values in self.parts.items() for form, t in values.tensors.items()}
        if self.latents is not None:
            tensors["latents"] = self.latents
        if self.flow is not None:
            tensors["flow"] = self.flow
        return write_artifact(_KIND, _FORMAT, asdict(self.header), tensors)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "motion bank") -> MotionBank:
        """Read what `to_bytes` wrote; ArtifactError for anything else."""
        values, tensors = read_artifact(_KIND, _FORMAT, data, name)
        header, latents, flow = _header(values, name), tensors.pop("latents", None), tensors.pop("flow", None)
        _check_latents(latents, header, name)
        _check_flow(flow, header, name)
        forms: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, form = _part_and_form(key, name)
            forms.setdefault(part, {})[form] = tensor
        parts = {part: _step_values(part, tensors, header, name) for part, tensors in forms.items()}
        if parts.keys() not in _PARTS:
            known, came = " or ".join(", ".join(sorted(names)) for names in _PARTS), ", ".join(parts) or "nothing"
            raise ArtifactError(f"{name} has positions of {came}, expected {known}: it is damaged")
        return cls(header, parts, latents, flow)

    @classmethod
    def read_header(cls, data: bytes, name: str = "motion bank", size: int | None = None) -> BankHeader:
        """Read the header of a serialised bank, and no more; ArtifactError for anything else.

        data: the file, or its first `ditflow.artifact.header_end` bytes at least; size: then the bytes that it has.
        """
        return _header(read_artifact_header(_KIND, _FORMAT, data, len(data) if size is None else size, name), name)


_PARTS = ({"query_cos", "query_sin", "key_cos", "key_sin"}, {"additive"}, {"query", "key"}, {"token"})
"""Of free positions, rotary and additive, and of coordinates, rotary and additive."""


def _part_and_form(key: str, name: str) -> tuple[str, str]:
    """Return which part of a position a tensor belongs to, and what of it."""
    match = re.fullmatch(r"(\w+)\.(whole|left|right)", key, re.ASCII)
    if match is None:
        raise ArtifactError(
            f"{name} has a tensor {key!r:.100}, expected latents, flow, or PART.whole, PART.left, PART.right: it is "
            "damaged"
        )
    return match[1], match[2]


def _step_values(part: str, tensors: dict[str, Tensor], header: BankHeader, name: str) -> StepValues:
    """Return a part's values; ArtifactError unless they have a row for every token in every guided step.

    Factors of a few kilobytes can stand for terabytes: nothing is multiplied before their shapes are known to be those
    of the header's grid, and of as many channels as a position has.
    """
    axes = {"whole": 3, "left": 2, "right": 3}
    complete = tensors.keys() in ({"whole"}, {"left", "right"})
    if complete and all(t.ndim == axes[form] and t.is_floating_point() for form, t in tensors.items()):
        values = StepValues(**tensors)
        expected = (len(header.timesteps), TokenGrid(*header.grid).tokens)
        ranks = {t.shape[-1] for t in tensors.values()}
        fits = values.shape[:2] == expected and (values.whole is not None or len(ranks) == 1)
        if fits and _has_channels_of(part, values) and all(t.numel() for t in tensors.values()):
            return values
    came = ", ".join(f"{form} {t.dtype} {list(t.shape)}" for form, t in tensors.items())
    raise ArtifactError(
        f"{name} has for {part} the tensors {came}: expected numbers for {len(header.timesteps)} steps of a "
        f"{TokenGrid(*header.grid)} grid, {_AXES} of a token's move or at most {_MOST_VALUES} of a free position in a "
        "step. It is damaged"
    )


_AXES = 3
"""Of a token's move: t, y and x."""
_MOST_VALUES = 2**28
"""Of all tokens in one step of a free position: 1 GiB in fp32, eight times those of CogVideoX at its largest."""


def _has_channels_of(part: str, values: StepValues) -> bool:
    """Whether a part has three channels, of coordinates, or few enough, of a free position."""
    _, tokens, channels = values.shape
    return channels == _AXES if part in ("query", "key", "token") else tokens * channels <= _MOST_VALUES


def _check_latents(latents: Tensor | None, header: BankHeader, name: str) -> None:
    """Raise ArtifactError unless the latents are of one clip, and of about the header's grid."""
    if latents is None:
        return
    if latents.ndim != 5:
        raise ArtifactError(f"{name} has latents of shape {list(latents.shape)}, expected 5 axes: it is damaged")
    clips, frames, _, height, width = latents.shape
    sides = zip((frames, height, width), header.grid, strict=True)
    fits = clips == 1 and all(side <= _MOST_PER_TOKEN * tokens for side, tokens in sides)
    if not (fits and latents.numel() and latents.is_floating_point()):
        raise ArtifactError(
            f"{name} has the latents {latents.dtype} {list(latents.shape)}, expected numbers of one clip for a "
            f"{TokenGrid(*header.grid)} grid: it is damaged"
        )


_MOST_PER_TOKEN = 8
"""Latents along one side of a patch."""


def _check_flow(flow: Tensor | None, header: BankHeader, name: str) -> None:
    """Raise ArtifactError unless the flow is one of the header's grid, and has the statistics that the header tells."""
    if flow is not None:
        grid = TokenGrid(*header.grid)
        expected = [grid.frames - 1, grid.patches, 2]
        if flow.dtype not in (torch.int8, torch.int16) or [*flow.shape] != expected or not flow.numel():
            raise ArtifactError(
                f"{name} has the flow {flow.dtype} {list(flow.shape)}, expected int8 {expected} for a {grid} grid: it "
                "is damaged"
            )
    found = None if flow is None else motion_statistics(flow)
    if not (found == header.motion or (found and header.motion and found.close_to(header.motion))):
        raise ArtifactError(f"{name} has motion {header.motion} in its header, its flow has {found}: it is damaged")


def _header(values: dict[str, Any], name: str) -> BankHeader:
    for key, (expected, fits) in _FITS.items():
        if key in values and not fits(values[key]):
            raise ArtifactError(
                f"{name} has a motion bank header with {key} {values[key]!r:.100}: expected {expected}. It is damaged"
            )
    size = values.get("provenance", {}).get("size")
    if size and any(side > _MOST_PIXELS * tokens for side, tokens in zip(size, values.get("grid", size), strict=True)):
        raise ArtifactError(
            f"{name} has a video of the size {size} on a grid of {values['grid']}: expected at most "
            f"{_MOST_PIXELS} frames, rows and columns to a token. It is damaged"
        )
    try:
        # JSON has no tuples.
        tuples = {key: tuple(values[key]) for key in ("grid", "timesteps", "tags")}
        losses = tuple(tuple(step) for step in values["losses"])
        motion = values["motion"] and MotionStatistics(**values["motion"])
        return BankHeader(**{**values, **tuples, "losses": losses, "motion": motion})
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"{name} has an incomplete or unknown motion bank header: {error}") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and 0 < value < 2**31


def _is_list(value: Any, of: Callable[[Any], bool], most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(of, value))


def _is_size(value: Any) -> bool:
    return _is_list(value, _is_count, 3) and len(value) == 3


def _is_provenance(value: Any) -> bool:
    """Empty in a bank that no job made."""
    if not isinstance(value, dict):
        return False
    checks: dict[str, Callable[[Any], bool]] = {
        "size": _is_size,
        "fps": _is_rate,
        "reference_fps": _is_rate,
        "reference_uri": _is_text,
        "reference_sha256": _is_text,
        "reference_video": is_selection,
        "reference_notes": lambda notes: isinstance(notes, list) and all(isinstance(note, str) for note in notes),
        "seed": lambda seed: _is_number(seed) and isinstance(seed, int) and -(2**63) <= seed < 2**63,
    }
    size = value.get("size", [1, 1, 1])
    return _is_size(size) and all(value.get(key) is None or fits(value[key]) for key, fits in checks.items())


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_motion(value: Any) -> bool:
    """None in a bank of a loss without a displacement."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(MotionStatistics)}:
        return False
    return all(_is_number(number) or (key == "direction" and number is None) for key, number in value.items())


_MOST_PIXELS = 128
"""Frames, rows or columns of the video to one token."""
_MOST_STEPS = 1000
"""Of a schedule, and so of a bank: see `SamplingSettings`."""
_MOST_LOSSES = 1_000_000
_MOST_TAGS = 1000
_FITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a text", _is_text),
    "model_revision": ("a text", _is_text),
    "grid": (f"three counts, of at most {MOST_TOKENS} tokens", is_grid),
    "steps": (f"a count up to {_MOST_STEPS}", lambda value: _is_count(value) and value <= _MOST_STEPS),
    "timesteps": (f"up to {_MOST_STEPS} numbers", lambda value: _is_list(value, _is_number, _MOST_STEPS)),
    "method": ("a mapping", lambda value: isinstance(value, dict)),
    "injected_steps": (
        f"a count up to {_MOST_STEPS}, or null",
        lambda value: value is None or (_is_count(value) and value <= _MOST_STEPS),
    ),
    "prompt": ("a text", _is_text),
    "error": ("a share of 1", lambda value: _is_number(value) and 0 <= value < 1),
    "libraries": (
        "versions by name",
        lambda value: isinstance(value, dict) and all(map(_is_text, [*value, *value.values()])),
    ),
    "losses": (
        "a list of numbers for every step",
        lambda value: _is_list(value, lambda step: _is_list(step, _is_number, _MOST_LOSSES) and step, _MOST_STEPS),
    ),
    "motion": ("five numbers, or null", _is_motion),
    "tags": (f"up to {_MOST_TAGS} texts", lambda value: _is_list(value, _is_text, _MOST_TAGS)),
    "provenance": (
        "a mapping with the size of the video, three counts, and where its motion comes from",
        _is_provenance,
    ),
}
