"""Settings of the algorithm, with the paper's defaults.

A field that is None takes the model's default: see `ModelDefaults` and `MethodSettings.resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from ditflow.errors import SettingsError
from ditflow.losses import MOTION_LOSSES, MotionLoss
from ditflow.motion.filters import FILTERS
from ditflow.motion.sources import SOURCES
from ditflow.parts import build, canonical, choose, settings_of

METHODS = ("none", "injection", *sorted(MOTION_LOSSES))
"""No guidance, KV injection alone, and one method per motion loss."""
VARIABLES = ("latent", "position", "coordinates")
"""What can be optimised."""
_VARIABLES: Mapping[str, Mapping[str, Any]] = {"coordinates": {"learning_rate": (0.05, 0.025)}}
_LASTING: Mapping[str, Mapping[str, Any]] = {
    "position": {"iterations": 10, "learning_rate": (0.008, 0.004), "drafts": 8},
    "coordinates": {"iterations": 10, "learning_rate": (0.15, 0.075), "optimizer": "adam-mini", "drafts": 8},
}
"""Where a model does not say otherwise."""
_TRIAL_SHARE = 0.4
"""Fraction of the guided steps after which noise candidates are compared by their motion loss."""


def _require(ok: bool, key: str, came: object, expected: str) -> None:
    if not ok:
        raise SettingsError(key, came, expected)


def count_steps(key: str, asked: int | float, steps: int) -> int:
    """Return how many of `steps` are asked for, as a count or as a fraction of them."""
    count = round(asked * steps) if isinstance(asked, float) and asked < 1 else int(asked)
    expected = f"between 1 and sampling.steps ({steps}), or a fraction of them below 1"
    _require(1 <= count <= steps and count >= asked * (asked >= 1), key, asked, expected)
    return count


@dataclass(frozen=True)
class ModelDefaults:
    """Default settings of one model; a model folder may bring its own in `ditflow.json`.

    losses: overrides of the other fields, by motion loss. variables: the same by the optimised variable; learning rates
    of coordinates are in patches. lasting: the same by the optimised variable, for the preset `lasting`.
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
        """Return the defaults with the overrides for a method's loss, optimised variable and preset."""
        sections = [self.losses.get(method.name), _VARIABLES.get(method.optimize), self.variables.get(method.optimize)]
        if method.preset == "lasting":
            sections += [_LASTING.get(method.optimize), self.lasting.get(method.optimize)]
        return replace(self, **{key: value for section in sections for key, value in (section or {}).items()})


@dataclass(frozen=True)
class MotionSettings:
    """Source and filters of the motion target.

    source: a motion source of `ditflow.motion.sources`, as its name or as {name: {settings}}. Only losses that compare
        displacements accept another one than `attention` (the paper's).
    filters: motion filters of `ditflow.motion.filters` in the same form, applied in order.
    """

    source: str | dict[str, Any] = "attention"
    filters: tuple[str | dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        choose(SOURCES, self.source, "source")
        for number, chosen in enumerate(self.filters):
            choose(FILTERS, chosen, f"filters.{number}")

    def make_source(self) -> Any:
        """Return the source."""
        return choose(SOURCES, self.source, "source")

    def make_filters(self) -> list[Any]:
        """Return the filters, in order."""
        return [choose(FILTERS, chosen, "filters") for chosen in self.filters]

    @property
    def needs_mask(self) -> bool:
        """Whether any filter needs a mask of the reference."""
        return any(made.needs_mask for made in self.make_filters())

    def resolve(self) -> MotionSettings:
        """Return the same with every setting of the source and the filters written out."""
        return MotionSettings(canonical(self.make_source()), tuple(map(canonical, self.make_filters())))


@dataclass(frozen=True)
class MethodSettings:
    """Settings of the motion transfer.

    name: `none`, `injection`, or a motion loss (`ditflow`, `smm`, `moft`, `motionclone`).
    optimize: the optimised variable: the `latent` z_t, the values of the `position` embedding, or the `coordinates`
        (t, y, x) of the tokens from which the embedding is computed.
    preset: `paper`; `official`, which reproduces where the released code departs from the paper (a learning-rate
        schedule that stops one step short, SMM's anchors and cosines); or `lasting`, this project's recipe for
        positions that generalise to other prompts and seeds (`measured: prediction`, `loss: {entries: all}`,
        `averaged`, and 8 `drafts` or the model's default).
    blocks: transformer blocks whose attention guides; the loss is averaged over them.
    temperature: tau, multiplies the logits of the softmax.
    guided_steps: number of guided denoising steps, from the first one: a count, or a fraction (a float below 1).
    iterations: optimiser iterations per guided step.
    learning_rate: Adam's learning rate in the first and in the last guided step, interpolated linearly.
    injection: also inject the reference's keys and values into block 0.
    injected_steps: number of steps with injection, a count or a fraction (None: the guided steps; when a bank is
        reused: as many as it was learned with).
    loss: settings of the motion loss; see its class in `ditflow.losses`. For `ditflow`, {entries: all} compares all
        displacement vectors, not only those that are non-zero in the reference.
    motion: source and filters of the motion target (None: the job's `motion`).
    measured: where the motion of the new video is measured: in the forward `pass` that is optimised (the paper), or in
        the clean video that this pass predicts, captured like the reference with the model's own positions
        (`prediction`). The former can be minimised by positions that change the attention alone, the latter only by
        motion in the video.
    optimizer: `adam` (the paper); for `coordinates` also `adam-mini`, whose step per token is proportional to the
        token's gradient.
    averaged: end a guided step with the average of the iterates of its second half (Polyak averaging).
    drafts: number of generations, each with noise of its own, over which a bank is learned in turns; at least one per
        prompt.
    stay, smooth: regularisation weights of `coordinates`; see `PositionVariable`.
    zero_shot: learn the positions with the prompt `learn_with`, then generate with them without optimisation.
    more_prompts: prompts of the other drafts, in turns.
    noise_candidates: number of initial noises that are compared after two fifths of the guided steps; the one with the
        smallest motion loss is used (1: the seed's own, as in the paper). Not for banks.
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
    loss: dict[str, Any] = field(default_factory=dict)
    motion: MotionSettings | None = None
    measured: Literal["pass", "prediction"] | None = None
    optimizer: Literal["adam", "adam-mini"] | None = None
    averaged: bool | None = None
    drafts: int | None = None
    stay: float = 0.0
    smooth: float = 0.0
    zero_shot: bool = False
    learn_with: str = ""
    more_prompts: tuple[str, ...] = ()
    noise_candidates: int = 1

    def __post_init__(self) -> None:
        _require(self.name in METHODS, "name", self.name, f"one of {', '.join(METHODS)}")
        _require(self.optimize in VARIABLES, "optimize", self.optimize, "latent, position or coordinates")
        presets = ("paper", "official", "lasting")
        _require(self.preset in presets, "preset", self.preset, "paper, official or lasting")
        _require(self.measured in (None, "pass", "prediction"), "measured", self.measured, "pass or prediction")
        if self.has_loss:
            made = build(MOTION_LOSSES[self.name], self.loss, "loss")
            source = self.motion.make_source().name if self.motion is not None else "attention"
            expected = f"attention: the loss {self.name} compares no displacements"
            _require(source == "attention" or hasattr(made, "from_target"), "motion.source", source, expected)
        else:
            _require(not self.loss, "loss", self.loss, f"nothing for method {self.name}, which has no motion loss")
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
        ok = self.noise_candidates == 1 or (self.noise_candidates > 1 and self.has_loss and not self.zero_shot)
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
    def has_loss(self) -> bool:
        """Whether the method has a motion loss, whose name is `name`."""
        return self.name in MOTION_LOSSES

    @property
    def learns_positions(self) -> bool:
        """Whether positions are learned, which can be stored as a bank."""
        return self.has_loss and self.optimize != "latent"

    @property
    def injects(self) -> bool:
        """Whether the reference's keys and values are injected into block 0."""
        return self.name == "injection" or (self.has_loss and self.injection)

    @property
    def needs_reference(self) -> bool:
        """Whether the generation depends on the reference video."""
        return self.injects or self.has_loss

    def make_loss(self) -> MotionLoss:
        """Return the motion loss; what is left open has its default. SettingsError for a method without a loss."""
        _require(self.has_loss, "name", self.name, f"a motion loss: {', '.join(sorted(MOTION_LOSSES))}")
        made: MotionLoss = build(MOTION_LOSSES[self.name], self.loss, "loss", shared=self)
        return made

    def resolve(self, defaults: ModelDefaults) -> ResolvedMethod:
        """Return the settings with every None replaced by the preset's or the model's default."""
        defaults = defaults.of(self)
        names = {f.name for f in fields(ModelDefaults)} & {f.name for f in fields(self)}
        values = {name: getattr(defaults, name) for name in names}
        lasting = self.preset == "lasting"
        values["motion"] = MotionSettings()
        values["measured"] = "prediction" if lasting else "pass"
        values["averaged"] = lasting
        if defaults.injected_steps is None:
            values["injected_steps"] = defaults.guided_steps if self.guided_steps is None else self.guided_steps
        values["drafts"] = max(defaults.drafts, 1 + len(self.more_prompts)) if self.learns_positions else 1
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        settled = {name: values[name] if value is None else value for name, value in own.items()}
        settled["motion"] = settled["motion"].resolve()
        if self.has_loss:
            loss = MOTION_LOSSES[self.name]
            implied = getattr(loss, "presets", {}).get(self.preset, {})
            settled["loss"] = {**settings_of(loss), **implied, **self.loss}
        return ResolvedMethod(**settled)


@dataclass(frozen=True)
class ResolvedMethod(MethodSettings):
    """Method settings without None: the input of the algorithm."""

    blocks: tuple[int, ...] = ()
    temperature: float = 2.0
    guided_steps: int | float = 10
    iterations: int = 5
    learning_rate: tuple[float, float] = (0.002, 0.001)
    injected_steps: int | float = 10
    motion: MotionSettings = field(default_factory=MotionSettings)
    measured: Literal["pass", "prediction"] = "pass"
    optimizer: Literal["adam", "adam-mini"] = "adam"
    averaged: bool = False
    drafts: int = 1

    def count_guided_steps(self, steps: int) -> int:
        """Return the number of guided steps of `steps`; SettingsError if it exceeds them."""
        return count_steps("guided_steps", self.guided_steps, steps)

    def count_trial_steps(self, steps: int) -> int:
        """Return the number of guided steps after which noise candidates are compared."""
        return math.ceil(_TRIAL_SHARE * self.count_guided_steps(steps))

    def count_injected_steps(self, steps: int) -> int:
        """Return the number of steps with injection of `steps`; SettingsError if it exceeds them."""
        return count_steps("injected_steps", self.injected_steps, steps)

    def learning_rates(self, guided_steps: int) -> list[float]:
        """Return the learning rate of every guided step: linear, both ends included (`official`: without the last)."""
        first, last = self.learning_rate
        intervals = guided_steps if self.preset == "official" else max(guided_steps - 1, 1)
        return [first + (last - first) * step / intervals for step in range(guided_steps)]


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the sampler.

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

    def resolve(self, defaults: ModelDefaults) -> ResolvedSampling:
        """Return the settings with every None replaced by the model's default."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return ResolvedSampling(**{n: getattr(defaults, n) if v is None else v for n, v in own.items()})


@dataclass(frozen=True)
class ResolvedSampling(SamplingSettings):
    """Sampling settings without None."""

    steps: int = 50
    guidance_scale: float = 7.0
    dynamic_guidance_scale: bool = False


@dataclass(frozen=True)
class ExecutionSettings:
    """Execution on the device. `auto` is decided by free memory, and the decision is recorded.

    checkpointing: recompute activations in the backward pass of guidance.
    cfg: the two branches of classifier-free guidance in one `batched` pass, or `serial`.
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
    return {name: _as_json(value) for name, value in asdict(settings).items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, tuple | list) else value
