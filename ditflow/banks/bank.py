"""Motion banks: learned position offsets, stored for reuse with other prompts (paper, section 3.4)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ditflow.artifact import (
    MAX_TOKENS,
    ArtifactError,
    is_grid,
    read_artifact,
    read_artifact_header,
    write_artifact,
)
from ditflow.banks.compression import StepOffsets
from ditflow.banks.resizing import resize_field, resize_moves
from ditflow.errors import DitflowError
from ditflow.layout import LatentLayout
from ditflow.media.video import is_selection
from ditflow.motion import MotionStatistics, motion_statistics
from ditflow.settings import MethodSettings
from ditflow.types import LearnedPosition, PositionKind, TokenGrid

_KIND, _FORMAT = "motion bank", 5
_LIBRARIES = ("ditflow", "torch", "diffusers")


def _libraries() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


class BankMismatchError(DitflowError, ValueError):
    """A motion bank was learned for another model, token grid or schedule; the code says which."""

    default_code = "bank-mismatch"


@dataclass(frozen=True)
class BankHeader:
    """Everything that a bank's offsets depend on, and their provenance.

    model_revision: hash of the model folder, scheduler included. positions: name of the model's `PositionScheme`.
    optimize: what was learned of it. injected_steps: first steps in which reuse injects the reference's keys and
    values; None: the guided steps. error: relative error of the compression, 0 without. motion: statistics of the
    reference's motion, None for losses without a displacement. tags: free words of the user.
    """

    model: str
    model_revision: str
    grid: tuple[int, int, int]
    steps: int
    timesteps: tuple[int | float, ...]
    positions: str
    optimize: PositionKind
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
    """Learned position offsets of every guided step, by part of the position embedding (`LearnedPosition`).

    latents: the reference's latents [1, F, C, h, w], from which reuse injects keys and values, or None.
    flow: the reference's hard displacement from every latent frame to the next, int8 [F-1, P, 2] as (dx, dy) in patches
    (16 KB for CogVideoX-5B at 24 frames), for statistics and pictures; None for losses without a displacement.
    """

    header: BankHeader
    parts: Mapping[str, StepOffsets]
    latents: Tensor | None = None
    flow: Tensor | None = None

    @classmethod
    def from_steps(
        cls,
        header: BankHeader,
        offsets: Sequence[LearnedPosition],
        latents: Tensor | None = None,
        flow: Tensor | None = None,
    ) -> MotionBank:
        """Build a bank from the learned offsets of every guided step, in order and uncompressed."""
        parts = {part: StepOffsets(torch.stack([step[part] for step in offsets]).cpu()) for part in offsets[0]}
        motion = None if flow is None else motion_statistics(flow)
        return cls(replace(header, motion=motion), parts, latents, flow)

    @property
    def guided_steps(self) -> int:
        """Number of guided steps that the bank has offsets for."""
        return len(self.header.timesteps)

    def with_bank_steps(self, method: MethodSettings) -> MethodSettings:
        """Return the method with its unset numbers of guided and injected steps taken from this bank."""
        guided_steps = self.guided_steps if method.guided_steps is None else method.guided_steps
        injected_steps = method.injected_steps
        if injected_steps is None:  # None in a header: injected in the guided steps
            injected_steps = guided_steps if self.header.injected_steps is None else self.header.injected_steps
        return replace(method, guided_steps=guided_steps, injected_steps=injected_steps)

    def offsets(self, step: int) -> LearnedPosition:
        """Return the learned offsets of a guided step, in fp32."""
        return {part: values.at(step) for part, values in self.parts.items()}

    def compressed(self, error: float) -> MotionBank:
        """Return the bank with each part compressed to a relative error of at most `error`; 0 changes nothing.

        The reference's latents are stored in 16 bits.
        """
        if not error:
            return self
        parts = {part: values.compressed(error) for part, values in self.parts.items()}
        latents = None if self.latents is None else self.latents.half()
        return replace(self, header=replace(self.header, error=error), parts=parts, latents=latents)

    def resized(self, layout: LatentLayout, size: tuple[int, int, int]) -> MotionBank:
        """Return the bank resampled for videos of another size (frames, height, width) of the same model.

        Coordinate offsets are interpolated and scaled with the token grid, the reference's latents are interpolated,
        and the flow is dropped. For the bank's own size the bank itself is returned. Raises BankMismatchError for free
        positions, which are defined on their own grid only, and SettingsError for a size that the model cannot do.
        """
        if self.header.provenance.get("size") == list(size):
            return self
        if self.header.optimize != "coordinates":
            raise BankMismatchError(
                f"this motion bank has free positions of a {TokenGrid(*self.header.grid)} grid, which cannot be "
                "resized: learn it with optimize: coordinates, or leave the size to the bank",
                code="bank-not-resizable",
                key="banks.size",
            )
        latent_shape = layout.latent_shape(*size)
        grid = astuple(layout.grid(latent_shape))
        parts = {
            part: StepOffsets(resize_moves(values.all_steps(), self.header.grid, grid))
            for part, values in self.parts.items()
        }
        latents = self.latents
        if latents is not None:
            sides = (latent_shape[1], *latent_shape[3:])
            latents = resize_field(latents[0].float().transpose(0, 1), sides).transpose(0, 1)[None]
        header = replace(self.header, grid=grid, motion=None, provenance={**self.header.provenance, "size": list(size)})
        return replace(self, header=header, parts=parts, latents=latents, flow=None)

    def check_fits(
        self,
        revision: str,
        positions: str,
        grid: TokenGrid,
        timesteps: Sequence[int | float],
        guided_steps: int,
    ) -> None:
        """Raise BankMismatchError unless this bank was learned for this model, token grid and schedule.

        revision, positions: of the model; the latter is the name of its `PositionScheme`.
        """
        if guided_steps > self.guided_steps:
            raise BankMismatchError(
                f"this motion bank has positions for {self.guided_steps} guided steps, the generation asks for "
                f"{guided_steps}: set method.guided_steps: {self.guided_steps}, or build a bank with more",
                code="bank-guided-steps",
                key="method.guided_steps",
            )
        own, first = self.header, list(timesteps[: self.guided_steps])
        for what, code, key, its, wanted in (
            ("model revision", "bank-model-revision", "model.path", own.model_revision, revision),
            ("position embedding", "bank-positions", "model.path", own.positions, positions),
            ("token grid", "bank-token-grid", None, str(TokenGrid(*own.grid)), str(grid)),
            ("number of denoising steps", "bank-steps", "sampling.steps", own.steps, len(timesteps)),
            ("first timesteps", "bank-timesteps", None, list(own.timesteps), first),
        ):
            if its != wanted:
                raise BankMismatchError(
                    f"this motion bank's {what} is {its}, the generation's is {wanted}. Learned positions, here of "
                    f"{own.model}, are valid only for their own setting: change the setting, or build a bank for it.",
                    code=code,
                    key=key,
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
        """Read a bank written by `to_bytes`; ArtifactError for anything else."""
        values, tensors = read_artifact(_KIND, _FORMAT, data, name)
        header, latents, flow = _header(values, name), tensors.pop("latents", None), tensors.pop("flow", None)
        _check_latents(latents, header, name)
        _check_flow(flow, header, name)
        forms: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, form = _part_and_form(key, name)
            forms.setdefault(part, {})[form] = tensor
        parts = {part: _step_offsets(part, tensors, header, name) for part, tensors in forms.items()}
        if not parts:
            raise ArtifactError(f"{name} has no offsets: it is damaged")
        return cls(header, parts, latents, flow)

    @classmethod
    def read_header(cls, data: bytes, name: str = "motion bank", size: int | None = None) -> BankHeader:
        """Read only the header of a serialised bank; ArtifactError for anything else.

        data: the file, or at least its first `ditflow.artifact.header_end` bytes; size: then the file's size in bytes.
        """
        return _header(read_artifact_header(_KIND, _FORMAT, data, len(data) if size is None else size, name), name)


def _part_and_form(key: str, name: str) -> tuple[str, str]:
    """Return the part of the position embedding that a tensor belongs to, and its form: whole, left or right."""
    match = re.fullmatch(r"(\w+)\.(whole|left|right)", key, re.ASCII)
    if match is None:
        raise ArtifactError(
            f"{name} has a tensor {key!r:.100}, expected latents, flow, or PART.whole, PART.left, PART.right: it is "
            "damaged"
        )
    return match[1], match[2]


def _step_offsets(part: str, tensors: dict[str, Tensor], header: BankHeader, name: str) -> StepOffsets:
    """Return a part's offsets; ArtifactError unless their shape fits the header's token grid and guided steps.

    Factors of a few kilobytes can expand to terabytes: shapes are checked before anything is multiplied.
    """
    axes = {"whole": 3, "left": 2, "right": 3}
    complete = tensors.keys() in ({"whole"}, {"left", "right"})
    if complete and all(t.ndim == axes[form] and t.is_floating_point() for form, t in tensors.items()):
        values = StepOffsets(**tensors)
        expected = (len(header.timesteps), TokenGrid(*header.grid).tokens)
        ranks = {t.shape[-1] for t in tensors.values()}
        fits = values.shape[:2] == expected and (values.whole is not None or len(ranks) == 1)
        if fits and _has_valid_channels(header.optimize, values) and all(t.numel() for t in tensors.values()):
            return values
    came = ", ".join(f"{form} {t.dtype} {list(t.shape)}" for form, t in tensors.items())
    raise ArtifactError(
        f"{name} has for {part} the tensors {came}: expected floats for {len(header.timesteps)} steps of a "
        f"{TokenGrid(*header.grid)} grid, {_AXES} for each coordinate offset or at most {_MAX_VALUES} for a free "
        "position in a step. It is damaged"
    )


_AXES = 3
"""Axes of a coordinate offset: t, y and x."""
_MAX_VALUES = 2**28
"""Values of a free position in one step: 1 GiB in fp32, eight times the largest of CogVideoX."""


def _has_valid_channels(optimize: PositionKind, values: StepOffsets) -> bool:
    """Return whether coordinates have three channels, and a free position at most `_MAX_VALUES` values."""
    _, tokens, channels = values.shape
    return channels == _AXES if optimize == "coordinates" else tokens * channels <= _MAX_VALUES


def _check_latents(latents: Tensor | None, header: BankHeader, name: str) -> None:
    """Raise ArtifactError unless the latents are of one clip and roughly of the size of the header's token grid."""
    if latents is None:
        return
    if latents.ndim != 5:
        raise ArtifactError(f"{name} has latents of shape {list(latents.shape)}, expected 5 axes: it is damaged")
    clips, frames, _, height, width = latents.shape
    sides = zip((frames, height, width), header.grid, strict=True)
    fits = clips == 1 and all(side <= _MAX_LATENTS_PER_TOKEN * tokens for side, tokens in sides)
    if not (fits and latents.numel() and latents.is_floating_point()):
        raise ArtifactError(
            f"{name} has the latents {latents.dtype} {list(latents.shape)}, expected floats of one clip for a "
            f"{TokenGrid(*header.grid)} grid: it is damaged"
        )


_MAX_LATENTS_PER_TOKEN = 8
"""Latent pixels along one side of a patch."""


def _check_flow(flow: Tensor | None, header: BankHeader, name: str) -> None:
    """Raise ArtifactError unless the flow fits the header's token grid and motion statistics."""
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
    for key, (expected, is_valid) in _HEADER_CHECKS.items():
        if key in values and not is_valid(values[key]):
            raise ArtifactError(
                f"{name} has a motion bank header with {key} {values[key]!r:.100}: expected {expected}. It is damaged"
            )
    size = values.get("provenance", {}).get("size")
    if size and any(
        side > _MAX_PIXELS_PER_TOKEN * tokens for side, tokens in zip(size, values.get("grid", size), strict=True)
    ):
        raise ArtifactError(
            f"{name} has a video of the size {size} on a grid of {values['grid']}: expected at most "
            f"{_MAX_PIXELS_PER_TOKEN} frames, rows and columns per token. It is damaged"
        )
    try:
        # JSON has lists, the header tuples.
        tuples = {key: tuple(values[key]) for key in ("grid", "timesteps", "tags")}
        losses = tuple(tuple(step) for step in values["losses"])
        motion = values["motion"] and MotionStatistics(**values["motion"])
        return BankHeader(**{**values, **tuples, "losses": losses, "motion": motion})
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"{name} has an incomplete or unknown motion bank header: {error}") from error


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and 0 < value < 2**31


def _is_list(value: Any, is_item: Callable[[Any], bool], max_length: int) -> bool:
    return isinstance(value, list) and len(value) <= max_length and all(map(is_item, value))


def _is_size(value: Any) -> bool:
    return _is_list(value, _is_count, 3) and len(value) == 3


def _is_provenance(value: Any) -> bool:
    """Return whether a value is a provenance; it is empty in a bank made outside a job."""
    if not isinstance(value, dict):
        return False
    checks: dict[str, Callable[[Any], bool]] = {
        "size": _is_size,
        "fps": _is_rate,
        "reference_fps": _is_rate,
        "reference_uri": _is_string,
        "reference_sha256": _is_string,
        "reference_video": is_selection,
        "reference_notes": lambda notes: isinstance(notes, list) and all(isinstance(note, str) for note in notes),
        "seed": lambda seed: _is_number(seed) and isinstance(seed, int) and -(2**63) <= seed < 2**63,
    }
    size = value.get("size", [1, 1, 1])
    return _is_size(size) and all(value.get(key) is None or fits(value[key]) for key, fits in checks.items())


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_motion(value: Any) -> bool:
    """Return whether a value is motion statistics; None for losses without a displacement."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(MotionStatistics)}:
        return False
    return all(_is_number(number) or (key == "direction" and number is None) for key, number in value.items())


_MAX_PIXELS_PER_TOKEN = 128
"""Frames, rows or columns of the video per token."""
_MAX_STEPS = 1000
"""As in `SamplingSettings`."""
_MAX_LOSSES = 1_000_000
_MAX_TAGS = 1000
_HEADER_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a string", _is_string),
    "model_revision": ("a string", _is_string),
    "grid": (f"three counts, of at most {MAX_TOKENS} tokens", is_grid),
    "steps": (f"a count up to {_MAX_STEPS}", lambda value: _is_count(value) and value <= _MAX_STEPS),
    "timesteps": (f"up to {_MAX_STEPS} numbers", lambda value: _is_list(value, _is_number, _MAX_STEPS)),
    "positions": ("a name", _is_string),
    "optimize": ("position or coordinates", lambda value: value in ("position", "coordinates")),
    "method": ("a mapping", lambda value: isinstance(value, dict)),
    "injected_steps": (
        f"a count up to {_MAX_STEPS}, or null",
        lambda value: value is None or (_is_count(value) and value <= _MAX_STEPS),
    ),
    "prompt": ("a string", _is_string),
    "error": ("a fraction below 1", lambda value: _is_number(value) and 0 <= value < 1),
    "libraries": (
        "versions by name",
        lambda value: isinstance(value, dict) and all(map(_is_string, [*value, *value.values()])),
    ),
    "losses": (
        "a list of numbers for every step",
        lambda value: _is_list(value, lambda step: _is_list(step, _is_number, _MAX_LOSSES) and step, _MAX_STEPS),
    ),
    "motion": ("five numbers, or null", _is_motion),
    "tags": (f"up to {_MAX_TAGS} strings", lambda value: _is_list(value, _is_string, _MAX_TAGS)),
    "provenance": (
        "a mapping with the video's size (three counts) and its reference",
        _is_provenance,
    ),
}
