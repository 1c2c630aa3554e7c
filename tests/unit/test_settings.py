"""Settings: what is refused, what the learning rates are, and what a method needs."""

import json
import math
from dataclasses import fields, replace

import jaxtyping
import numpy as np
import pytest

from ditflow.errors import SettingsError
from ditflow.settings import (
    METHODS,
    ExecutionSettings,
    MethodSettings,
    ModelDefaults,
    MotionSettings,
    ResolvedSampling,
    SamplingSettings,
    settings_dict,
)

DEFAULTS = ModelDefaults(
    blocks=(3, 4),
    temperature=1.5,
    guided_steps=7,
    iterations=2,
    learning_rate=(0.03, 0.02),
    steps=30,
    guidance_scale=5.0,
    dynamic_guidance_scale=True,
)
PAPER = MethodSettings().resolve(ModelDefaults(blocks=(20,)))
REFUSED = [
    (MethodSettings, "name", "warp", "one of none, injection, "),
    (MethodSettings, "optimize", "weights", "latent, position or coordinates"),
    (MethodSettings, "preset", "newest", "paper, official or lasting"),
    (MethodSettings, "blocks", (), "one or more different block numbers"),
    (MethodSettings, "blocks", (4, 4), "one or more different block numbers"),
    (MethodSettings, "blocks", (2, -1), "counted from 0"),
    (MethodSettings, "temperature", 0.0, "a positive number"),
    (MethodSettings, "temperature", -2.0, "a positive number"),
    (MethodSettings, "temperature", math.nan, "a positive number"),
    (MethodSettings, "guided_steps", 0, "a count of steps (paper: 10) or a fraction of them below 1"),
    (MethodSettings, "guided_steps", -0.2, "a count of steps (paper: 10) or a fraction of them below 1"),
    (MethodSettings, "iterations", 0, "at least 1"),
    (MethodSettings, "learning_rate", (0.002,), "two positive rates"),
    (MethodSettings, "learning_rate", (0.003, 0.002, 0.001), "two positive rates"),
    (MethodSettings, "learning_rate", (0.002, 0.0), "two positive rates"),
    (MethodSettings, "noise_candidates", 0, "at least 1"),
    (SamplingSettings, "steps", 0, "between 1 and 1000"),
    (SamplingSettings, "steps", 1001, "between 1 and 1000"),
    (SamplingSettings, "guidance_scale", 0.5, "at least 1 (1: off)"),
    (SamplingSettings, "guidance_scale", math.nan, "at least 1 (1: off)"),
    (ExecutionSettings, "checkpointing", "sometimes", "auto, on or off"),
    (ExecutionSettings, "cfg", "parallel", "auto, batched or serial"),
    (ExecutionSettings, "vae_tiling", "always", "auto, on or off"),
]


@pytest.fixture
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type checks of the tests, which would refuse a wrong value before the settings can."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("_as_users_run_it")
@pytest.mark.parametrize(("settings", "key", "value", "expected"), REFUSED)
def test_a_wrong_value_is_refused_with_its_key_and_what_is_valid(settings, key, value, expected):
    with pytest.raises(SettingsError) as refused:
        settings(**{key: value})
    assert refused.value.key == key
    assert str(refused.value).startswith(f"{key}: {value!r} is not valid: expected ")
    assert expected in str(refused.value)


def test_a_wrong_name_is_answered_with_every_method():
    with pytest.raises(SettingsError, match=", ".join(METHODS)):
        MethodSettings("warp")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_named(name):
    assert MethodSettings(name).name == name


def test_the_paper_falls_from_0_002_to_0_001_and_reaches_both():
    rates = PAPER.learning_rates(10)
    assert rates[0] == 0.002
    assert rates[-1] == 0.001
    np.testing.assert_allclose(rates, np.linspace(0.002, 0.001, 10), rtol=1e-12)


def test_the_official_table_stops_one_short_of_the_last_rate():
    rates = replace(PAPER, preset="official").learning_rates(10)
    np.testing.assert_allclose(rates, np.linspace(0.002, 0.001, 11)[:10], rtol=1e-12)
    np.testing.assert_allclose(rates[-1], 0.0011, rtol=1e-12)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_one_guided_step_takes_the_first_rate(preset):
    assert replace(PAPER, preset=preset).learning_rates(1) == [0.002]


@pytest.mark.parametrize(
    ("guided_steps", "steps", "count"),
    [(10, 50, 10), (50, 50, 50), (1, 1, 1), (0.2, 50, 10), (0.5, 5, 2), (0.99, 4, 4), (0.01, 100, 1), (10.0, 50, 10)],
)
def test_guided_steps_are_a_count_or_a_fraction_of_the_steps(guided_steps, steps, count):
    assert replace(PAPER, guided_steps=guided_steps).count_guided_steps(steps) == count


@pytest.mark.parametrize(
    ("guided_steps", "steps"), [(51, 50), (10, 4), (0.001, 50), (1.5, 50)], ids=["one-more", "more", "none", "mixed"]
)
def test_guided_steps_beyond_or_between_the_steps_are_refused_with_both_keys(guided_steps, steps):
    with pytest.raises(SettingsError, match=rf"guided_steps: {guided_steps} .* 1 and sampling.steps \({steps}\)"):
        replace(PAPER, guided_steps=guided_steps).count_guided_steps(steps)


def test_a_model_may_have_a_learning_rate_of_its_own_for_positions():
    variables = {"position": {"learning_rate": (0.3, 0.1)}}
    own = replace(DEFAULTS, learning_rate=(0.02, 0.01), variables=variables)
    for optimize, rate in (("latent", (0.02, 0.01)), ("position", (0.3, 0.1))):
        assert MethodSettings(optimize=optimize).resolve(own).learning_rate == rate
        assert MethodSettings(optimize=optimize, learning_rate=(1.0, 0.5)).resolve(own).learning_rate == (1.0, 0.5)
    assert MethodSettings(optimize="position").resolve(DEFAULTS).learning_rate == DEFAULTS.learning_rate


def test_a_model_may_serve_single_losses_better():
    own = replace(DEFAULTS, losses={"smm": {"blocks": (5,), "learning_rate": (0.2, 0.1)}})
    assert MethodSettings("smm").resolve(own).blocks == (5,)
    assert MethodSettings("smm").resolve(own).learning_rate == (0.2, 0.1)
    assert MethodSettings("smm").resolve(own).temperature == DEFAULTS.temperature
    assert MethodSettings("smm", blocks=(1,)).resolve(own).blocks == (1,)
    assert MethodSettings("moft").resolve(own) == MethodSettings("moft").resolve(DEFAULTS)


def test_the_lasting_preset_measures_what_is_predicted_over_several_drafts():
    lasting = MethodSettings(optimize="coordinates", preset="lasting")
    own = replace(DEFAULTS, lasting={"coordinates": {"iterations": 7, "learning_rate": (0.4, 0.3)}})
    resolved = lasting.resolve(own)
    assert (resolved.measured, resolved.averaged, resolved.drafts, resolved.iterations) == ("prediction", True, 8, 7)
    assert (resolved.loss["entries"], resolved.learning_rate) == ("all", (0.4, 0.3))
    assert replace(lasting, drafts=2, measured="pass").resolve(own).drafts == 2
    assert replace(lasting, drafts=2, measured="pass").resolve(own).measured == "pass"
    paper = replace(lasting, preset="paper").resolve(own)
    assert (paper.measured, paper.drafts, paper.iterations) == ("pass", 1, own.iterations)
    assert paper.loss["entries"] == "nonzero"
    for learns_nothing in ({"optimize": "latent"}, {"name": "none"}):
        assert replace(lasting, **learns_nothing).resolve(own).drafts == 1


def test_injection_lasts_as_long_as_guidance_unless_something_says_otherwise():
    own = replace(DEFAULTS, lasting={"coordinates": {"guided_steps": 0.3, "injected_steps": 0.5}})
    cases = {
        6: MethodSettings(guided_steps=6),
        9: MethodSettings(guided_steps=6, injected_steps=9),
        15: MethodSettings(optimize="coordinates", preset="lasting"),
        21: MethodSettings(injected_steps=0.7),
    }
    for expected, method in cases.items():
        assert method.resolve(own).count_injected_steps(30) == expected
    assert MethodSettings().resolve(own).injected_steps == own.guided_steps
    with pytest.raises(SettingsError, match="injected_steps: 31 .* between 1 and sampling.steps .30."):
        MethodSettings(injected_steps=31).resolve(own).count_injected_steps(30)
    with pytest.raises(SettingsError, match="injected_steps: 0 "):
        MethodSettings(injected_steps=0)


def test_only_coordinates_are_learned_with_adam_mini():
    lasting = MethodSettings(optimize="coordinates", preset="lasting")
    assert lasting.resolve(DEFAULTS).optimizer == "adam-mini"
    assert replace(lasting, preset="paper").resolve(DEFAULTS).optimizer == "adam"
    assert replace(lasting, optimize="position").resolve(DEFAULTS).optimizer == "adam"
    for optimize in ("latent", "position"):
        with pytest.raises(SettingsError, match="optimizer: 'adam-mini' .* for optimize: coordinates"):
            MethodSettings(optimize=optimize, optimizer="adam-mini")


def test_every_prompt_has_a_draft():
    lasting = MethodSettings(optimize="coordinates", preset="lasting")
    assert replace(lasting, more_prompts=("a ball",)).resolve(DEFAULTS).drafts == 8
    assert replace(lasting, more_prompts=("a ball",) * 11).resolve(DEFAULTS).drafts == 12
    assert replace(lasting, preset="paper", more_prompts=("a ball",)).resolve(DEFAULTS).drafts == 2
    with pytest.raises(SettingsError, match="drafts: 2 .* at least one for each of the 3 prompts"):
        replace(lasting, drafts=2, more_prompts=("a ball", "a star"))


def test_a_model_may_need_other_steps_and_drafts_for_a_lasting_bank():
    lasting = MethodSettings(optimize="coordinates", preset="lasting")
    own = replace(DEFAULTS, lasting={"coordinates": {"guided_steps": 6, "drafts": 16}})
    assert (lasting.resolve(own).guided_steps, lasting.resolve(own).drafts) == (6, 16)
    assert replace(lasting, drafts=2).resolve(own).drafts == 2
    assert replace(lasting, preset="paper").resolve(own).guided_steps == DEFAULTS.guided_steps


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"warp": {}}, "losses: 'warp' is not valid: expected one of none, injection"),
        ({"smm": {"steps": 3}}, "losses.smm"),
    ],
)
def test_defaults_of_unknown_losses_and_of_what_a_loss_has_not_are_refused(losses, said):
    with pytest.raises(SettingsError, match=said):
        replace(DEFAULTS, losses=losses)


def test_resolve_fills_whatever_is_none_from_the_model():
    resolved = MethodSettings().resolve(DEFAULTS)
    own, of_the_paper = (
        MethodSettings(),
        {"measured": "pass", "averaged": False, "drafts": 1, "motion": MotionSettings({"attention": {}})},
    )
    own = replace(own, loss={"entries": "nonzero", "threshold": 0.0, "reference_flow": "hard"})
    of_the_paper["injected_steps"] = DEFAULTS.guided_steps
    for field in fields(MethodSettings):
        expected = getattr(own, field.name)
        expected = of_the_paper.get(field.name, getattr(DEFAULTS, field.name, None)) if expected is None else expected
        assert getattr(resolved, field.name) == expected
    assert None not in settings_dict(resolved).values()
    sampling = SamplingSettings(negative_prompt="blurred").resolve(DEFAULTS)
    assert sampling == ResolvedSampling(30, 5.0, True, "blurred")


def test_resolve_leaves_what_is_set_as_it_is():
    method = MethodSettings("ditflow", "position", "official", (0,), 3.0, 0.5, 9, (0.1, 0.2), False, 0.7)
    method = replace(method, loss=MethodSettings(preset="lasting", loss={"threshold": 0.5}).resolve(DEFAULTS).loss)
    method = replace(
        method,
        motion=MotionSettings("optical_flow", ("mask",)).resolve(),
        measured="prediction",
        averaged=True,
        optimizer="adam",
        drafts=3,
    )
    assert vars(method.resolve(DEFAULTS)) == vars(method)
    sampling = SamplingSettings(steps=8, guidance_scale=1.0, dynamic_guidance_scale=False)
    assert vars(sampling.resolve(DEFAULTS)) == vars(sampling)
    partly = MethodSettings(temperature=3.0).resolve(DEFAULTS)
    assert (partly.temperature, partly.iterations) == (3.0, 2)


@pytest.mark.parametrize(
    ("method", "has_loss", "injects", "needs_reference"),
    [
        (MethodSettings("none"), False, False, False),
        (MethodSettings("injection"), False, True, True),
        (MethodSettings("ditflow"), True, True, True),
        (MethodSettings("ditflow", injection=False), True, False, True),
    ],
    ids=["none", "injection", "ditflow", "ditflow-without-injection"],
)
def test_what_a_method_takes_from_the_reference(method, has_loss, injects, needs_reference):
    assert (method.has_loss, method.injects, method.needs_reference) == (has_loss, injects, needs_reference)


def test_a_settings_dict_is_its_own_json():
    values = settings_dict(PAPER)
    assert json.loads(json.dumps(values)) == values
    assert values["learning_rate"] == [0.002, 0.001]


@pytest.mark.parametrize("options", [{"name": "injection"}, {"optimize": "position", "zero_shot": True}])
def test_noises_are_compared_by_the_loss_of_the_video_that_is_guided(options):
    with pytest.raises(SettingsError, match="1 without a motion loss or with zero_shot"):
        MethodSettings(noise_candidates=2, **options)


@pytest.mark.parametrize(("guided", "trial"), [(1, 1), (3, 2), (10, 4), (0.2, 4)])
def test_noises_are_tried_over_two_fifths_of_the_guided_steps(guided, trial):
    assert replace(PAPER, guided_steps=guided).count_trial_steps(50) == trial
