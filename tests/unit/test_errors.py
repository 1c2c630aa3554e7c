"""Errors with a code: what every class of them keeps to."""

import importlib
import pickle
import pkgutil
import re
from collections.abc import Iterator

import pytest

from ditflow.errors import DitflowError
from ditflow.media.video import OversizedVideoError

for package in ("ditflow", "pipeline", "jobs"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)


def subclasses(base: type[DitflowError]) -> Iterator[type[DitflowError]]:
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)


CLASSES = {cls.__qualname__: cls for cls in subclasses(DitflowError) if not cls.__module__.startswith("test")}


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_an_error_keeps_its_message_code_and_key_between_processes(cls):
    error = cls.__new__(cls, "3 came, expected 4")  # whatever its constructor takes
    error.code, error.key = "a-code", "method.blocks"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        other = pickle.loads(pickle.dumps(error, protocol))
        assert type(other) is cls
        assert (str(other), other.args, other.code, other.key) == (str(error), error.args, error.code, error.key)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_class_has_a_code_of_its_own_and_a_built_in_base(cls):
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", vars(cls)["default_code"])
    assert [other for other in CLASSES.values() if other.default_code == cls.default_code] == [cls]
    assert any(base.__module__ == "builtins" and base not in (Exception, BaseException, object) for base in cls.__mro__)


def test_the_code_of_the_raise_goes_before_that_of_the_class():
    assert (OversizedVideoError("x").code, OversizedVideoError("x").key) == ("video-too-large", None)
    assert OversizedVideoError("x", code="other", key="references.max_pixels").code == "other"
    assert OversizedVideoError("x", key="references.max_pixels").key == "references.max_pixels"
