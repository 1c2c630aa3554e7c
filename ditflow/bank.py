"""Motion banks: learned position embeddings, kept for reuse with other prompts (paper, section 3.4)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ditflow.artifact import ArtifactError, read_artifact, write_artifact
from ditflow.types import LearnedPosition, TokenGrid

_KIND, _FORMAT = "motion bank", 1


class BankMismatchError(ValueError):
    """A motion bank was learned for another model, grid or schedule."""


@dataclass(frozen=True)
class BankHeader:
    """Everything that a bank's embeddings depend on, and where they come from."""

    model: str
    model_revision: str
    grid: tuple[int, int, int]
    steps: int
    timesteps: tuple[int, ...]
    method: dict[str, Any]
    prompt: str = ""
    losses: tuple[tuple[float, ...], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MotionBank:
    """What was learned of the position embedding in every guided step, first step first (`LearnedPosition`).

    latents: the reference's latents [1, F, C, h, w], with which reuse can inject keys and values, or None.
    """

    header: BankHeader
    changes: tuple[LearnedPosition, ...]
    latents: Tensor | None = None

    def check_fits(self, revision: str, grid: TokenGrid, steps: int, guided_steps: int) -> None:
        """Raise BankMismatchError unless this bank was learned for this model, grid and number of steps."""
        if guided_steps > len(self.changes):
            raise BankMismatchError(
                f"this motion bank has positions for {len(self.changes)} guided steps, the generation asks for "
                f"{guided_steps}: set method.guided_steps: {len(self.changes)}, or build a bank with more"
            )
        bank_grid = TokenGrid(*self.header.grid)
        for what, own, wanted in (
            ("model revision", f"{self.header.model_revision} ({self.header.model})", revision),
            ("token grid", str(bank_grid), str(grid)),
            ("number of denoising steps", str(self.header.steps), str(steps)),
        ):
            if own.split(" ")[0] != wanted:
                raise BankMismatchError(
                    f"this motion bank's {what} is {own}, the generation's is {wanted}. Learned positions serve only "
                    "the setting they were learned in: change the setting, or build a bank for it."
                )

    def to_bytes(self) -> bytes:
        """Serialise as safetensors."""
        tensors = {f"step.{s}.{part}": t for s, change in enumerate(self.changes) for part, t in change.items()}
        if self.latents is not None:
            tensors["latents"] = self.latents
        return write_artifact(_KIND, _FORMAT, asdict(self.header), tensors)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "motion bank") -> MotionBank:
        """Read what `to_bytes` wrote; ArtifactError for anything else."""
        values, tensors = read_artifact(_KIND, _FORMAT, data, name)
        header = _header(values, name)
        changes: list[LearnedPosition] = [{} for _ in header.timesteps]
        for key, tensor in tensors.items():
            if key != "latents":
                step, part = _step_and_part(key, len(changes), name)
                changes[step][part] = tensor
        return cls(header, tuple(changes), tensors.get("latents"))

    @classmethod
    def read_header(cls, data: bytes, name: str = "motion bank") -> BankHeader:
        """Read the header of a serialised bank, checked like the whole."""
        return cls.from_bytes(data, name).header


def _step_and_part(key: str, steps: int, name: str) -> tuple[int, str]:
    """Return the guided step and the part of a position embedding that a tensor's name tells."""
    match = re.fullmatch(r"step\.(\d{1,4})\.(\w+)", key, re.ASCII)
    if match is None or int(match[1]) >= steps:
        raise ArtifactError(
            f"{name} has a tensor {key!r:.100}, expected latents or step.S.PART with S below {steps}: it is damaged"
        )
    return int(match[1]), match[2]


def _header(values: dict[str, Any], name: str) -> BankHeader:
    fields = {key: value for key, value in values.items() if key not in ("kind", "format")}
    for key, (expected, fits) in _FITS.items():
        if key in fields and not fits(fields[key]):
            raise ArtifactError(
                f"{name} has a motion bank header with {key} {fields[key]!r:.100}: expected {expected}. It is damaged"
            )
    try:
        # JSON has no tuples.
        tuples = {key: tuple(fields[key]) for key in ("grid", "timesteps")}
        losses = tuple(tuple(step) for step in fields["losses"])
        return BankHeader(**{**fields, **tuples, "losses": losses})
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"{name} has an incomplete or unknown motion bank header: {error}") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and value > 0


def _is_list(value: Any, of: Callable[[Any], bool], most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(of, value))


def _is_size(value: Any) -> bool:
    return _is_list(value, _is_count, 3) and len(value) == 3


def _is_provenance(value: Any) -> bool:
    """Empty in a bank that no job made."""
    if not isinstance(value, dict):
        return False
    return _is_size(value.get("size", [1, 1, 1])) and (value.get("fps") is None or _is_number(value["fps"]))


_MOST_STEPS = 1000
"""Of a schedule, and so of a bank: see `SamplingSettings`."""
_MOST_LOSSES = 1_000_000
_FITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a text", _is_text),
    "model_revision": ("a text", _is_text),
    "grid": ("three counts", _is_size),
    "steps": (f"a count up to {_MOST_STEPS}", lambda value: _is_count(value) and value <= _MOST_STEPS),
    "timesteps": (f"up to {_MOST_STEPS} numbers", lambda value: _is_list(value, _is_number, _MOST_STEPS)),
    "method": ("a mapping", lambda value: isinstance(value, dict)),
    "prompt": ("a text", _is_text),
    "losses": (
        "a list of numbers for every step",
        lambda value: _is_list(value, lambda step: _is_list(step, _is_number, _MOST_LOSSES) and step, _MOST_STEPS),
    ),
    "provenance": ("a mapping with the size of the video, three counts", _is_provenance),
}
