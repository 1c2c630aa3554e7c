"""Replaceable parts and their settings, as a job spec names them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from ditflow.errors import SettingsError
from ditflow.parts import build, canonical, choose, extraction_settings, setting
from ditflow.settings import MethodSettings, ModelDefaults, MotionSettings


@dataclass(frozen=True)
class Blur:
    """A part of these tests."""

    radius: float = setting(1.0, extraction=True)
    kind: Literal["box", "gauss"] = "box"
    passes: int = 1
    sides: tuple[str, ...] = ()
    seed: int | None = None
    temperature: float = setting(2.0, shared=True, extraction=lambda part: part.kind == "gauss")

    name: ClassVar[str] = "blur"

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise SettingsError("radius", self.radius, "above 0")


PARTS = {"blur": Blur}


@pytest.mark.parametrize(
    ("chosen", "part"),
    [
        ("blur", Blur()),
        ({"blur": {}}, Blur()),
        ({"blur": None}, Blur()),
        ({"blur": {"radius": 2, "sides": ["left"]}}, Blur(2.0, sides=("left",))),
        ({"blur": 3}, Blur(3.0)),
    ],
)
def test_a_part_is_chosen_by_its_name_alone_with_settings_or_with_one_value(chosen, part):
    made = choose(PARTS, chosen, "filters.0")
    assert made == part
    assert isinstance(made.radius, float)
    assert choose(PARTS, canonical(made), "filters.0") == made


@pytest.mark.parametrize(
    ("chosen", "key", "code"),
    [
        ("sharpen", "filters.0", "invalid-setting"),
        (3, "filters.0", "invalid-setting"),
        ({"blur": {}, "sharpen": {}}, "filters.0", "invalid-setting"),
        ({"blur": {"radios": 1.0}}, "filters.0.blur.radios", "unknown-setting"),
        ({"blur": {"temperature": 1.0}}, "filters.0.blur.temperature", "unknown-setting"),
        ({"blur": {"radius": "wide"}}, "filters.0.blur.radius", "invalid-setting"),
        ({"blur": {"radius": True}}, "filters.0.blur.radius", "invalid-setting"),
        ({"blur": {"radius": -1.0}}, "filters.0.blur.radius", "invalid-setting"),
        ({"blur": {"kind": "median"}}, "filters.0.blur.kind", "invalid-setting"),
        ({"blur": {"passes": 1.5}}, "filters.0.blur.passes", "invalid-setting"),
        ({"blur": {"sides": [1]}}, "filters.0.blur.sides", "invalid-setting"),
        ({"blur": {"seed": "one"}}, "filters.0.blur.seed", "invalid-setting"),
    ],
)
def test_a_mistake_is_named_by_its_key(chosen, key, code):
    with pytest.raises(SettingsError) as refused:
        choose(PARTS, chosen, "filters.0")
    assert (refused.value.key, refused.value.code) == (key, code)


def test_shared_settings_come_from_the_method():
    method = MethodSettings(temperature=3.0).resolve(ModelDefaults(blocks=(1,)))
    assert build(Blur, {}, "blur", shared=method).temperature == 3.0
    assert build(Blur, {}, "blur").temperature == 2.0


def test_only_marked_settings_change_the_extraction_and_some_only_with_others():
    assert extraction_settings(Blur(3.0, passes=2)) == {"radius": 3.0}
    assert extraction_settings(Blur(kind="gauss", temperature=4.0)) == {"radius": 1.0, "temperature": 4.0}


def test_motion_settings_are_written_out_and_read_again():
    motion = MotionSettings({"optical_flow": {"enlarged": 1}}, ("mask", {"mask": {"object": 2}})).resolve()
    assert motion.source["optical_flow"]["enlarged"] == 1.0
    assert motion.filters == ({"mask": {"object": None, "outside": 0.0}}, {"mask": {"object": 2, "outside": 0.0}})
    assert motion.resolve() == motion
    assert motion.needs_mask
    assert not MotionSettings("optical_flow").needs_mask


@pytest.mark.parametrize(
    ("motion", "key"),
    [
        (lambda: MotionSettings("sonar"), "source"),
        (lambda: MotionSettings(filters=("mask", "fog")), "filters.1"),
        (lambda: MethodSettings("smm", motion=MotionSettings("optical_flow")), "motion.source"),
        (lambda: MethodSettings(loss={"threshold": float("inf")}), "loss.threshold"),
        (lambda: MethodSettings(loss={"entries": "moving"}), "loss.entries"),
        (lambda: MethodSettings("none", loss={"entries": "all"}), "loss"),
    ],
)
def test_what_a_method_cannot_do_is_named_by_its_key(motion, key):
    with pytest.raises(SettingsError) as refused:
        motion()
    assert refused.value.key == key
