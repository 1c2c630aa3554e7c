"""Configuration files of model folders, validated before a model is built from them.

Model folders come from other people, and their values determine which classes are built and how much memory is
allocated: every value that is used is checked first, and an error names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ditflow.errors import DitflowError

MAX_CONFIG_BYTES = 2**20
"""Real configurations have some kilobytes."""
Check = tuple[str, Callable[[Any], bool]]
"""The description of a valid value, and its predicate."""


class ModelConfigError(DitflowError, ValueError):
    """A file of a model folder is missing, damaged or of an unsupported model; the code says which."""

    default_code = "model-config-invalid"


def read_config(file: Path, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return a file's JSON object after `checks` of its values by key; a missing value is checked as None.

    Raises ModelConfigError with the file and, if there is one, the key.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelConfigError(
            f"{file}: {error.strerror}. Is the model folder complete?", code="model-file-missing"
        ) from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ModelConfigError(
            f"{file}: it has more than {MAX_CONFIG_BYTES} bytes: no configuration. Copy the model folder again"
        )
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{file}: it is not JSON ({error}). Copy the model folder again") from None
    if not isinstance(values, dict):
        raise ModelConfigError(f"{file}: expected a JSON object, came {values!r:.100}. Copy the model folder again")
    for key, (expected, is_valid) in checks.items():
        if not is_valid(values.get(key)):
            came = f"{values[key]!r:.100}" if key in values else "nothing"
            raise ModelConfigError(f"{file}: {key}: {came} is not valid: expected {expected}")
    return values


def is_count(value: Any, maximum: int) -> bool:
    """Return whether a JSON value is an integer from 1 to `maximum`; 4.0 is one, True is not."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 1 <= value <= maximum and value == int(value)


def count(maximum: int) -> Check:
    """Require an integer from 1 to `maximum`."""
    return f"a whole number from 1 to {maximum}", lambda value: is_count(value, maximum)


def optional_count(maximum: int) -> Check:
    """Require an integer from 1 to `maximum`, null, or a missing key."""
    return f"a whole number from 1 to {maximum}, or null", lambda value: value is None or is_count(value, maximum)


FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
STRING: Check = ("a string", lambda value: isinstance(value, str))
