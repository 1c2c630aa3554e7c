"""Replaceable parts of the method: motion losses, motion sources and motion filters.

A part is a frozen dataclass whose fields are its settings. It is chosen in a job spec by its name, alone or with
settings: `optical_flow`, or `{optical_flow: {frame: middle}}`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ditflow.errors import SettingsError


def setting(default: Any, *, extraction: bool | Callable[[Any], bool] = False, shared: bool = False) -> Any:
    """Declare a setting of a part.

    extraction: whether the setting changes what is extracted from a reference, or a function of the part that says so.
    Motion is extracted again when such a setting changes. shared: the value is the method's setting of the same name.
    """
    return field(default=default, metadata={"extraction": extraction, "shared": shared})


def settings_of(part: type) -> dict[str, Any]:
    """Return the settings of a part that its section in a job spec may have, with their defaults."""
    return {f.name: f.default for f in fields(part) if not f.metadata.get("shared")}


def build(part: type, values: Mapping[str, Any], key: str, shared: Any = None) -> Any:
    """Make a part from its settings. `shared` has those that belong to the method.

    Raises SettingsError, under `key`, for a setting that the part does not have or a value of another type.
    """
    own, hints = settings_of(part), get_type_hints(part)
    for name, value in values.items():
        if name not in own:
            valid = ", ".join(own) or "no settings"
            raise SettingsError(f"{key}.{name}", value, f"one of the keys {valid}", code="unknown-setting")
        if not _fits(value, hints[name]):
            raise SettingsError(f"{key}.{name}", value, _in_words(hints[name]))
    missing = [name for name, default in own.items() if default is MISSING and name not in values]
    if missing:
        raise SettingsError(f"{key}.{missing[0]}", None, _in_words(hints[missing[0]]), code="missing-setting")
    common = {f.name: getattr(shared, f.name, None) for f in fields(part) if f.metadata.get("shared")}
    common = {name: value for name, value in common.items() if value is not None}
    try:
        return part(**{name: _typed(value, hints[name]) for name, value in values.items()}, **common)
    except SettingsError as error:
        raise error.below(key) from None


def choose(parts: Mapping[str, Any], chosen: Any, key: str) -> Any:
    """Make the part that a job spec chooses: a name, or a mapping from one name to its settings.

    A single value in place of the settings sets the first one: `{camera: remove}`.
    Raises SettingsError for anything else.
    """
    name: Any = chosen
    values: Any = {}
    if isinstance(chosen, Mapping) and len(chosen) == 1:
        ((name, values),) = chosen.items()
    if not isinstance(name, str) or name not in parts:
        valid = ", ".join(sorted(parts))
        raise SettingsError(key, chosen, f"one of {valid}, or one of them with settings: {{name: {{...}}}}")
    if values is not None and not isinstance(values, Mapping):
        values = {next(iter(settings_of(parts[name])), "value"): values}
    return build(parts[name], values or {}, f"{key}.{name}")


def canonical(part: Any) -> dict[str, dict[str, Any]]:
    """Return a part as a job spec chooses it, every setting written out as JSON."""
    return {part.name: own_settings(part)}


def own_settings(part: Any) -> dict[str, Any]:
    """Return the settings of a part as JSON values."""
    return {name: _plain(getattr(part, name)) for name in settings_of(type(part))}


def extraction_settings(part: Any) -> dict[str, Any]:
    """Return the settings of a part that change what is extracted from a reference, as JSON values."""
    found = {}
    for f in fields(part):
        changes = f.metadata.get("extraction", False)
        if changes(part) if callable(changes) else changes:
            found[f.name] = _plain(getattr(part, f.name))
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _typed(value: Any, hint: Any) -> Any:
    """Return a JSON value as the type of its field: whole numbers for floats, lists for tuples."""
    if float in _options(hint) and isinstance(value, int) and not isinstance(value, bool) and int not in _options(hint):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        if get_origin(option) is Literal:
            fits = value in get_args(option)
        elif get_origin(option) is tuple:
            inner = get_args(option)[0]
            fits = isinstance(value, list | tuple) and all(_fits(item, inner) for item in value)
        elif option is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif option is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, option)
        if fits:
            return True
    return False


def _in_words(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", type(None): "null"}
    words = [
        " or ".join(map(str, get_args(option))) if get_origin(option) is Literal else names.get(option, "a list")
        for option in _options(hint)
    ]
    return " or ".join(words)
