"""Configuration files of model folders, checked before anything is built from them.

Model folders travel between people. What stands in them decides how much memory is asked for and which classes are
built, so every value that is used is checked first, and an error names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 2**20
"""A configuration has some kilobytes."""
Check = tuple[str, Callable[[Any], bool]]
"""What is expected of a value, in words, and whether a value is that."""


class ModelConfigError(ValueError):
    """A file of a model folder is missing, damaged, or not of a model that can be run."""


def read_config(file: Path, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return a file's JSON object, in which the values of `checks` are as expected; a missing value counts as None.

    Raises ModelConfigError that names the file and, if there is one, the key.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise ModelConfigError(f"{file}: {error.strerror}. Is the model folder complete?") from error
    if len(text) > MOST_BYTES:
        raise ModelConfigError(f"{file}: it is longer than {MOST_BYTES} bytes, which no configuration is")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{file}: it is no JSON ({error}). Copy the model folder again") from None
    if not isinstance(values, dict):
        raise ModelConfigError(f"{file}: expected a JSON object, came {values!r:.100}. Copy the model folder again")
    for key, (expected, fits) in checks.items():
        if not fits(values.get(key)):
            came = f"{values[key]!r:.100}" if key in values else "nothing"
            raise ModelConfigError(f"{file}: {key}: {came} is not valid: expected {expected}")
    return values


def is_count(value: Any, most: int) -> bool:
    """Whether a value of JSON is a whole number from 1 to `most`; 4.0 is one, True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= most and value == int(value)


def count(most: int) -> Check:
    """Expect a whole number from 1 to `most`."""
    return f"a whole number from 1 to {most}", lambda value: is_count(value, most)


def count_or_nothing(most: int) -> Check:
    """Expect a whole number from 1 to `most`, or null, or no such key."""
    return f"a whole number from 1 to {most}, or null", lambda value: value is None or is_count(value, most)


FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
TEXT: Check = ("a text", lambda value: isinstance(value, str))
