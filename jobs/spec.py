"""The job spec: the only reader of YAML.

The keys are the fields of `pipeline.job.Job` and of the settings in it. Every mistake is reported with its key, its
line, what came and what is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ditflow import backbones
from ditflow.backbones import ModelIdentity, ModelNotFoundError
from ditflow.backbones.base import Geometry
from ditflow.settings import MethodSettings, SettingsError
from pipeline.job import KINDS, Job
from pipeline.store import Store, StoreError

PRESETS = Path(__file__).parent


class SpecError(ValueError):
    """A job spec that cannot be run; one line for each mistake."""


@dataclass(frozen=True)
class ReadySpec:
    """A job that is ready to be planned, the model it will run on, and the resolved spec as YAML."""

    job: Job
    model: ModelIdentity
    yaml: str


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> ReadySpec:
    """Read, check and resolve a job spec. `overrides` are texts like `model.path=mini`.

    Raises SpecError with every mistake that was found.
    """
    text = _read(Path(path))
    values = _parse(text, str(path))
    lines = _Lines(text, str(path))
    for override in overrides:
        _override(values, override)
    return _resolve(_validate(values, lines), lines)


def check_output(job: Job) -> None:
    """Raise SpecError unless the job's output can be written to."""
    try:
        Store(job.output.uri, job.storage_options).check_writable()
    except StoreError as error:
        raise SpecError(f"output.uri: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        presets = ", ".join(sorted(preset.name for preset in PRESETS.glob("*.yaml")))
        raise SpecError(f"{path}: cannot be read: {error}. Presets in {PRESETS}: {presets}") from error


def _parse(text: str, name: str) -> dict[str, Any]:
    values = _from_yaml(text, name)
    if not isinstance(values, dict):
        raise SpecError(f"{name}: expected a mapping with the keys {', '.join(_keys_of(Job))}")
    return values


def _from_yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SpecError(f"{name}{line}: it is no YAML: {reason}") from error


class _Lines:
    """Where each key of a YAML text stands."""

    def __init__(self, text: str, name: str):
        self._name = name
        self._lines: dict[tuple[str, ...], int] = {}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            self._walk(root, ())

    def _walk(self, node: Any, keys: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                path = (*keys, str(key.value))
                self._lines[path] = key.start_mark.line + 1
                self._walk(value, path)

    def at(self, keys: Iterable[str], message: str) -> str:
        """One line of an error: file, line (of the nearest key that has one), key, message."""
        path = tuple(keys)
        line = next((self._lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._lines), None)
        where = f"{self._name}:{line}" if line else self._name
        return f"{where}: {'.'.join(path)}: {message}"


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise SpecError(f"--set {override}: expected KEY=VALUE, such as model.path=mini")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise SpecError(f"--set {override}: {parent} is no section but {inner!r}")
        values = inner
    values[last] = _from_yaml(text, f"--set {override}")


# ------------------------------------------------------------------------------------------------ keys and types


def _keys_of(section: type) -> list[str]:
    return [f.name for f in fields(section)]


def _unknown_keys(values: Any, section: type, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key that its section does not have, with the nearest that it has."""
    if not isinstance(values, Mapping):
        return
    hints, valid = get_type_hints(section), _keys_of(section)
    for key, value in values.items():
        path = (*keys, str(key))
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            yield path, f"there is no such key; {hint}Valid here: {', '.join(valid)}"
            continue
        inner = _section_in(hints[key])
        if inner is not None:
            yield from _unknown_keys(value, inner, path)
        named = _named_sections_in(hints[key])
        if named is not None and isinstance(value, Mapping):
            for name, section_values in value.items():
                yield from _unknown_keys(section_values, named, (*path, str(name)))


def _section_in(hint: Any) -> type | None:
    """Return the dataclass of a type, also inside a union."""
    options = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if is_dataclass(option) and isinstance(option, type)), None)


def _named_sections_in(hint: Any) -> type | None:
    """Return the dataclass of a mapping from names to sections."""
    return _section_in(get_args(hint)[1]) if get_origin(hint) is dict else None


def _validate(values: dict[str, Any], lines: _Lines) -> Job:
    unknown = list(_unknown_keys(values, Job, ()))
    mistakes = [lines.at(keys, message) for keys, message in unknown]
    for keys, _ in unknown:
        _drop(values, keys)
    try:
        job = _ADAPTER.validate_python(_without_auto(_with_own_methods(values)))
    except ValidationError as error:
        # A key that is missing where another is misspelt is most likely that one.
        misspelt = {keys[:-1] for keys, _ in unknown}
        errors = [e for e in error.errors() if e["type"] != "missing" or e["loc"][:-1] not in misspelt]
        mistakes += _explain_all(errors, lines)
        if not mistakes:
            raise
        raise SpecError("\n".join(mistakes)) from error
    if mistakes:
        raise SpecError("\n".join(mistakes))
    return job


def _drop(values: Any, keys: tuple[str, ...]) -> None:
    *parents, last = keys
    for parent in parents:
        values = values[parent]
    for key in [key for key in values if str(key) == last]:
        del values[key]


_ADAPTER: TypeAdapter[Job] = TypeAdapter(Job)


def _with_own_methods(values: dict[str, Any]) -> dict[str, Any]:
    """Each of `methods` takes from `method` what it leaves out."""
    shared, methods = values.get("method") or {}, values.get("methods")
    if not isinstance(shared, dict) or not isinstance(methods, dict):
        return values
    return {
        **values,
        "methods": {name: {**shared, **own} if isinstance(own, dict) else own for name, own in methods.items()},
    }


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """`auto` in method, methods and sampling means the model's own default, which is None in the settings."""
    sections: dict[str, Any] = {name: _settled(values[name]) for name in ("method", "sampling") if name in values}
    methods = values.get("methods")
    if isinstance(methods, dict):
        sections["methods"] = {name: _settled(own) for name, own in methods.items()}
    return {**values, **sections}


def _settled(section: Any) -> Any:
    if not isinstance(section, dict):
        return section
    return {key: None if value == "auto" else value for key, value in section.items()}


def _explain_all(errors: Iterable[Mapping[str, Any]], lines: _Lines) -> list[str]:
    """Turn pydantic's errors into one line for each wrong value.

    A value that fits no member of a union has an error for each: those count that came furthest into the value.
    """
    values: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for error in errors:
        parts = [str(part) for part in error["loc"]]
        member = next((n for n, part in enumerate(parts) if _UNION_MEMBER.match(part)), len(parts))
        values.setdefault(tuple(parts[:member]), []).append(error)
    explained = []
    for found in values.values():
        furthest = max(len(error["loc"]) for error in found)
        lines_of_value: dict[tuple[str, ...], list[str]] = {}
        for error in found:
            if len(error["loc"]) == furthest:
                keys, message = _explain(error)
                lines_of_value.setdefault(keys, []).append(message)
        explained += [lines.at(keys, _either(messages)) for keys, messages in lines_of_value.items()]
    return explained


def _explain(error: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return the keys of one of pydantic's errors, and what it says."""
    keys = tuple(str(part) for part in error["loc"] if not _UNION_MEMBER.match(str(part)))
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        return (*keys, cause.key), str(cause).removeprefix(f"{cause.key}: ")
    if error["type"] == "missing":
        return keys, "it is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = _EXPECTED.get(error["type"], message)
    return keys, f"{error['input']!r} is not valid: expected {expected}"


def _either(messages: list[str]) -> str:
    first, *others = dict.fromkeys(messages)
    return " or ".join([first, *(other.split(": expected ", 1)[-1] for other in others)])


_EXPECTED = {"tuple_type": "a list", "dataclass_type": "a section {key: value, ...}"}
"""pydantic's names of Python types, as YAML calls them."""


_UNION_MEMBER = re.compile(r"(Table|str|int|float|bool|(tuple|literal)\[.*)$")
"""Names that pydantic puts into an error's location for the members of a union."""


# --------------------------------------------------------------------------------------------- the model's part


def _resolve(job: Job, lines: _Lines) -> ReadySpec:
    """Fill in the model's defaults and check what only the model can tell."""
    try:
        model = backbones.identify(job.model.path, download=job.model.download)
    except ModelNotFoundError as error:
        raise SpecError(lines.at(["model", "path"], str(error))) from error
    defaults = model.geometry.defaults
    resolved = replace(
        job,
        method=job.method.resolve(defaults),
        methods={name: method.resolve(defaults) for name, method in job.methods.items()},
        sampling=job.sampling.resolve(defaults),
    )
    mistakes = [*_misfits(resolved, model, lines), *_credentials(job, lines)]
    if mistakes:
        raise SpecError("\n".join(mistakes))
    return ReadySpec(resolved, model, to_yaml(resolved))


def _misfits(job: Job, model: ModelIdentity, lines: _Lines) -> Iterator[str]:
    """What a job asks that its model, or its kind, cannot do."""
    geometry, steps = model.geometry, job.sampling.steps
    assert steps is not None
    checks: list[tuple[tuple[str, ...], Callable[[], Any]]] = [
        (("references",), lambda: job.kind in ("reuse", "evaluate") or geometry.latent_shape(*job.references.size))
    ]
    for name, variant in job.variants.items():
        where = ("methods", name) if job.methods else ("method",)
        checks += [(where, partial(check, variant.method)) for check in _method_checks(job.kind, geometry, steps)]
    for keys, check in checks:
        try:
            check()
        except SettingsError as error:
            yield lines.at([*keys, *filter(None, [error.key])], str(error).removeprefix(f"{error.key}: "))


def _method_checks(kind: str, geometry: Geometry, steps: int) -> list[Callable[[MethodSettings], Any]]:
    """What each of a job's methods has to stand; each raises SettingsError."""
    return [
        lambda method: method.needs_reference and method.count_guided_steps(steps),
        lambda method: geometry.check_blocks(method.blocks or ()),
        partial(_check_kind, kind),
    ]


def _credentials(job: Job, lines: _Lines) -> Iterator[str]:
    """Credentials among the storage options, which would reach the resolved copy."""
    try:
        Store(job.output.uri, job.storage_options)
    except StoreError as error:
        yield lines.at(["storage_options"], str(error))


def _check_kind(kind: str, method: MethodSettings) -> None:
    """Raise SettingsError for a method that makes no sense in this kind of job."""
    learns = method.loss is not None and method.optimize == "position"
    if kind in ("build-bank", "reuse") and not learns:
        came = f"{method.name}, optimize: {method.optimize}"
        raise SettingsError("", came, f"a method with a motion loss and optimize: position for kind {kind}")
    if kind == "extract" and method.loss is None:
        raise SettingsError("name", method.name, "a method with a motion loss for kind extract")


def to_yaml(job: Job) -> str:
    """Return the job as YAML that `load_spec` reads again."""
    assert job.kind in KINDS
    return yaml.safe_dump(_plain(dataclasses.asdict(job)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
