"""Every choice a user has about the algorithm, with its paper default, checked where it is made.

A field that is None takes the model's own default: see `ModelDefaults` and `MethodSettings.resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from ditflow.losses import MOTION_LOSSES

METHODS = ("none", "injection", *sorted(MOTION_LOSSES))
"""Plain backbone, KV injection alone, and one method per motion loss."""
VARIABLES = ("latent", "position", "coordinates")
"""What can be optimised."""
_VARIABLES: Mapping[str, Mapping[str, Any]] = {"coordinates": {"learning_rate": (0.05, 0.025)}}
_LASTING: Mapping[str, Mapping[str, Any]] = {
    "position": {"iterations": 10, "learning_rate": (0.008, 0.004), "drafts": 8},
    "coordinates": {"iterations": 10, "learning_rate": (0.15, 0.075), "optimizer": "adam-mini", "drafts": 8},
}
"""Where a model does not say otherwise."""
_TRIAL_SHARE = 0.4
"""Share of the guided steps after which a candidate's loss predicts how well its video will follow."""
_OMIT_DEFAULT = {"omit_default": True}
"""Metadata of a field that was added later: `settings_dict` omits its default, so that older row ids stay valid."""


class SettingsError(ValueError):
    """A setting has a value that it cannot have; `key` names it."""

    def __init__(self, key: str, came: object, expected: str):
        super().__init__(f"{key}: {came!r} is not valid: expected {expected}")
        self.key = key


def _require(ok: bool, key: str, came: object, expected: str) -> None:
    if not ok:
        raise SettingsError(key, came, expected)


def _count(key: str, asked: int | float, steps: int) -> int:
    """Return how many of `steps` are asked for, as a count or as a fraction of them."""
    count = round(asked * steps) if isinstance(asked, float) and asked < 1 else int(asked)
    expected = f"between 1 and sampling.steps ({steps}), or a fraction of them below 1"
    _require(1 <= count <= steps and count >= asked * (asked >= 1), key, asked, expected)
    return count


@dataclass(frozen=True)
class ModelDefaults:
    """What works best on one model; a model folder may carry its own in `ditflow.json`.

    losses: what serves single motion losses better, by their names: some of the other fields.
    variables: the same for what is optimised beside latents; learning rates of coordinates are in patches.
    lasting: the same for what is optimised with the preset `lasting`.
    """

    blocks: tuple[int, ...]
    temperature: float = 2.0
    guided_steps: int | float = 10
    injected_steps: int | float | None = None
    iterations: int = 5
    learning_rate: tuple[float, float] = (0.002, 0.001)
    optimizer: Literal["adam", "adam-mini"] = "adam"
    drafts: int = 1
    steps: int = 50
    guidance_scale: float = 7.0
    dynamic_guidance_scale: bool = False
    losses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lasting: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        valid = {f.name for f in fields(self)} & {f.name for f in fields(MethodSettings)}
        for section, names in (("losses", METHODS), ("variables", VARIABLES), ("lasting", VARIABLES)):
            for name, own in getattr(self, section).items():
                _require(name in names, section, name, f"one of {', '.join(names)}")
                _require(own.keys() <= valid, f"{section}.{name}", list(own), f"some of {', '.join(sorted(valid))}")

    def of(self, method: MethodSettings) -> ModelDefaults:
        """Return what works best with a method: for its loss, what it optimises, and its preset."""
        sections = [self.losses.get(method.name), _VARIABLES.get(method.optimize), self.variables.get(method.optimize)]
        if method.preset == "lasting":
            sections += [_LASTING.get(method.optimize), self.lasting.get(method.optimize)]
        return replace(self, **{key: value for section in sections for key, value in (section or {}).items()})


@dataclass(frozen=True)
class MethodSettings:
    """How motion is transferred (METHODS: AMF, guided sampling).

    name: `none`, `injection` or a motion loss (`ditflow`, `smm`, `moft`, `motionclone`).
    optimize: what the optimiser changes: the `latent` z_t, the values of the `position` embedding, or the `coordinates`
        (t, y, x) of the tokens, of which the embedding is made.
    preset: `paper`, or `official` for the released code's departures from it: a learning-rate table that stops one
        short, and SMM's other anchors and cosines; or `lasting`, this project's own way to learn positions that serve
        other prompts and seeds: `measured` is `prediction`, `loss_entries` are `all`, `averaged`, with 8 `drafts`
        or as many as serve the model.
    blocks: transformer blocks whose attention guides; losses are averaged over them.
    temperature: tau, multiplies the logits of the softmax.
    guided_steps: first denoising steps that are guided, as a count, or as a fraction (a float below 1).
    iterations: optimiser iterations in each guided step.
    learning_rate: Adam's rate in the first and in the last guided step, linear between.
    injection: also put the reference's keys and values into block 0 during the guided steps.
    injected_steps: or during so many of the first steps, a count or a fraction (None: the guided ones; of a bank: as
        many as it was made for).
    loss_entries: `ditflow` compares the displacement vectors that are not zero in the reference (`nonzero`, the
        paper's), or all of them (`all`), so that what rests in the reference is asked to rest.
    loss_threshold: with `nonzero`, vectors of this length in patches or less are left out.
    reference_flow: `ditflow` takes the reference's best match (`hard`), or the softmax's expectation (`soft`).
    other_frames: `motionclone` leaves out a place's attention to its own frame.
    measured: where the new video's motion is measured: in the `pass` that is optimised, as the paper does, or in the
        clean video that this pass predicts, looked at as the reference was, without what is optimised (`prediction`).
        The first can be satisfied by an embedding that moves attention alone; the second only by a video that moves.
    optimizer: `adam`, the paper's, or for `coordinates` also `adam-mini`: a token moves by what its gradient is against
        the others', instead of all by about the rate.
    averaged: end a guided step with the mean of what the last half of its iterations came to, instead of the last one.
    drafts: how many generations a bank is learned over at once, each from noise of its own, in turns; at least one for
        each prompt.
    stay: weight of the mean squared move of `coordinates`, in patches, beside the loss.
    smooth: weight of the mean squared difference between the moves of neighbours.
    zero_shot: learn the positions with the prompt `learn_with`, and then generate with them without optimising.
    more_prompts: what the other drafts show, in turns.
    noise_candidates: initial noises that are tried, each by the first two fifths of the guided steps; the one with the
        smallest motion loss is used (the paper: 1, the seed's own). Not for banks.
    """

    name: str = "ditflow"
    optimize: Literal["latent", "position", "coordinates"] = "latent"
    preset: Literal["paper", "official", "lasting"] = "paper"
    blocks: tuple[int, ...] | None = None
    temperature: float | None = None
    guided_steps: int | float | None = None
    iterations: int | None = None
    learning_rate: tuple[float, float] | None = None
    injection: bool = True
    injected_steps: int | float | None = None
    loss_entries: Literal["nonzero", "all"] | None = None
    loss_threshold: float = 0.0
    reference_flow: Literal["hard", "soft"] = "hard"
    other_frames: bool = False
    measured: Literal["pass", "prediction"] | None = None
    optimizer: Literal["adam", "adam-mini"] | None = None
    averaged: bool | None = None
    drafts: int | None = None
    stay: float = 0.0
    smooth: float = 0.0
    zero_shot: bool = False
    learn_with: str = ""
    more_prompts: tuple[str, ...] = ()
    noise_candidates: int = field(default=1, metadata=_OMIT_DEFAULT)

    def __post_init__(self) -> None:
        _require(self.name in METHODS, "name", self.name, f"one of {', '.join(METHODS)}")
        _require(self.optimize in VARIABLES, "optimize", self.optimize, "latent, position or coordinates")
        presets = ("paper", "official", "lasting")
        _require(self.preset in presets, "preset", self.preset, "paper, official or lasting")
        _require(self.measured in (None, "pass", "prediction"), "measured", self.measured, "pass or prediction")
        entries = (None, "nonzero", "all")
        _require(self.loss_entries in entries, "loss_entries", self.loss_entries, "nonzero or all")
        threshold = self.loss_threshold
        _require(0 <= threshold < math.inf, "loss_threshold", threshold, "a number of patches, 0 or more (paper: 0)")
        _require(self.reference_flow in ("hard", "soft"), "reference_flow", self.reference_flow, "hard or soft")
        if self.blocks is not None:
            ok = len(set(self.blocks)) == len(self.blocks) > 0 and min(self.blocks) >= 0
            _require(ok, "blocks", self.blocks, "one or more different block numbers, counted from 0")
        if self.temperature is not None:
            _require(0 < self.temperature < math.inf, "temperature", self.temperature, "a positive number (paper: 2)")
        for name in ("guided_steps", "injected_steps"):
            asked = getattr(self, name)
            expected = "a count of steps (paper: 10) or a fraction of them below 1"
            _require(asked is None or asked > 0, name, asked, expected)
        if self.iterations is not None:
            _require(self.iterations >= 1, "iterations", self.iterations, "at least 1 (paper: 5)")
        if self.learning_rate is not None:
            ok = len(self.learning_rate) == 2 and all(0 < rate < math.inf for rate in self.learning_rate)
            expected = "two positive rates, first and last guided step (paper: [0.002, 0.001])"
            _require(ok, "learning_rate", self.learning_rate, expected)
        ok = self.noise_candidates == 1 or (self.noise_candidates > 1 and self.loss is not None and not self.zero_shot)
        expected = "at least 1, and 1 without a motion loss or with zero_shot"
        _require(ok, "noise_candidates", self.noise_candidates, expected)
        if self.drafts is not None:
            ok = self.drafts == 1 or (self.drafts > 1 and self.learns_positions)
            _require(ok, "drafts", self.drafts, "at least 1, and 1 unless positions are learned")
            prompts = 1 + len(self.more_prompts)
            _require(self.drafts >= prompts, "drafts", self.drafts, f"at least one for each of the {prompts} prompts")
        ok = self.optimizer in (None, "adam") or (self.optimizer == "adam-mini" and self.optimize == "coordinates")
        _require(ok, "optimizer", self.optimizer, "adam, or for optimize: coordinates also adam-mini")
        for name in ("stay", "smooth"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a weight, 0 or more")
        ok = not self.zero_shot or self.learns_positions
        _require(ok, "zero_shot", self.zero_shot, "false, unless a motion loss optimises the position or coordinates")

    @property
    def loss(self) -> str | None:
        """The motion loss's registry name, or None when nothing is optimised."""
        return self.name if self.name in MOTION_LOSSES else None

    @property
    def learns_positions(self) -> bool:
        """Whether a position embedding is learned, which can be kept and used again."""
        return self.loss is not None and self.optimize != "latent"

    @property
    def injects(self) -> bool:
        """Whether the reference's keys and values are injected into block 0."""
        return self.name == "injection" or (self.loss is not None and self.injection)

    @property
    def needs_reference(self) -> bool:
        """Whether anything of the reference video enters the generation."""
        return self.injects or self.loss is not None

    def resolve(self, defaults: ModelDefaults) -> MethodSettings:
        """Fill every None with the preset's value, or the model's."""
        defaults = defaults.of(self)
        names = {f.name for f in fields(ModelDefaults)} & {f.name for f in fields(self)}
        values = {name: getattr(defaults, name) for name in names}
        lasting = self.preset == "lasting"
        values["loss_entries"] = "all" if lasting else "nonzero"
        values["measured"] = "prediction" if lasting else "pass"
        values["averaged"] = lasting
        if defaults.injected_steps is None:
            values["injected_steps"] = defaults.guided_steps if self.guided_steps is None else self.guided_steps
        values["drafts"] = max(defaults.drafts, 1 + len(self.more_prompts)) if self.learns_positions else 1
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def count_guided_steps(self, steps: int) -> int:
        """Guided steps of a run of `steps`, for resolved settings; SettingsError beyond the step count."""
        assert self.guided_steps is not None, "resolve() first"
        return _count("guided_steps", self.guided_steps, steps)

    def count_trial_steps(self, steps: int) -> int:
        """Guided steps by which noise candidates are compared, for resolved settings."""
        return math.ceil(_TRIAL_SHARE * self.count_guided_steps(steps))

    def count_injected_steps(self, steps: int) -> int:
        """Steps of a run of `steps` that injection lasts, for resolved settings; SettingsError beyond the step count.

        They are counted without a look at `injection`, which says whether there is any.
        """
        assert self.injected_steps is not None, "resolve() first"
        return _count("injected_steps", self.injected_steps, steps)

    def learning_rates(self, guided_steps: int) -> list[float]:
        """Adam's rate for every guided step: linear, both ends reached (`official`: the last is not)."""
        assert self.learning_rate is not None, "resolve() first"
        first, last = self.learning_rate
        intervals = guided_steps if self.preset == "official" else max(guided_steps - 1, 1)
        return [first + (last - first) * step / intervals for step in range(guided_steps)]


@dataclass(frozen=True)
class SamplingSettings:
    """How the video is sampled.

    steps: denoising steps (None: the model's, 50 for CogVideoX).
    guidance_scale: classifier-free guidance (None: the model's, 7); 1 switches it off.
    dynamic_guidance_scale: diffusers' cosine schedule for CogVideoX-5B (None: the model's).
    """

    steps: int | None = None
    guidance_scale: float | None = None
    dynamic_guidance_scale: bool | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.steps is not None:
            _require(1 <= self.steps <= 1000, "steps", self.steps, "between 1 and 1000")
        if self.guidance_scale is not None:
            _require(self.guidance_scale >= 1, "guidance_scale", self.guidance_scale, "at least 1 (1: off)")

    def resolve(self, defaults: ModelDefaults) -> SamplingSettings:
        """Fill every None with the model's default."""
        names = ("steps", "guidance_scale", "dynamic_guidance_scale")
        return replace(self, **{n: getattr(defaults, n) for n in names if getattr(self, n) is None})


@dataclass(frozen=True)
class ExecutionSettings:
    """How the work is done on the device; `auto` decides by free memory, and the decision is recorded.

    checkpointing: recompute activations in the optimiser's backward pass.
    cfg: both classifier-free guidance branches in one `batched` pass, or `serial`.
    vae_tiling: encode and decode in overlapping tiles (changes pixels slightly at the seams).
    attention_backend: a name of diffusers' attention dispatcher (`native`, `_native_cudnn`, `flash`, ...).
    """

    checkpointing: Literal["auto", "on", "off"] = "auto"
    cfg: Literal["auto", "batched", "serial"] = "auto"
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    attention_backend: str = "native"

    def __post_init__(self) -> None:
        switch = ("auto", "on", "off")
        _require(self.checkpointing in switch, "checkpointing", self.checkpointing, "auto, on or off")
        _require(self.cfg in ("auto", "batched", "serial"), "cfg", self.cfg, "auto, batched or serial")
        _require(self.vae_tiling in switch, "vae_tiling", self.vae_tiling, "auto, on or off")


def settings_dict(settings: Any) -> dict[str, Any]:
    """Settings as a plain dict with lists for tuples: the same as their JSON."""
    omitted = {
        f.name for f in fields(settings) if f.metadata.get("omit_default") and getattr(settings, f.name) == f.default
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items() if k not in omitted}
