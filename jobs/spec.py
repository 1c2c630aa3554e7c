"""The job spec: the only reader of YAML.

The keys are the fields of `pipeline.job.Job` and of the settings in it. Every mistake is reported with its key, its
line, what came and what is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ditflow import backbones
from ditflow.backbones import ModelIdentity, ModelNotFoundError
from ditflow.errors import SettingsError
from ditflow.layout import LatentLayout
from ditflow.settings import MethodSettings, ModelDefaults, count_steps
from jobs.yaml12 import Loader, differs_in_1_1, dump
from pipeline.cache import local_model
from pipeline.job import KINDS, Job
from pipeline.store import Store, StoreError, StoreOptionsError, check_address, public_uri, redact
from pipeline.waits import waiting

PRESETS = Path(__file__).parent

Section = TypeVar("Section")


class SpecError(ValueError):
    """A job spec that cannot be run; one line for each mistake."""


@dataclass(frozen=True)
class ReadySpec:
    """A job that is ready to be planned, the model it will run on, and the resolved spec as YAML."""

    job: Job
    model: ModelIdentity
    yaml: str


@dataclass(frozen=True)
class CheckedSpec:
    """A job whose model is somewhere else: its defaults are not filled in. `values` are those of the YAML."""

    job: Job
    values: dict[str, Any]
    lines: _Lines

    def mistake(self, keys: Iterable[str], message: str) -> str:
        """One line of a SpecError: file, line, key, message."""
        return self.lines.at(keys, message)


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> ReadySpec:
    """Read, check and resolve a job spec. `overrides` are texts like `model.path=mini`.

    Raises SpecError with every mistake that was found.
    """
    spec = check_spec(path, overrides)
    return _resolve(spec.job, spec.lines)


def check_spec(path: str | Path, overrides: Iterable[str] = ()) -> CheckedSpec:
    """Read and check a job spec, but for what only its model can tell: that one may lie on another machine.

    Raises SpecError with every mistake that was found.
    """
    presets = ", ".join(sorted(preset.name for preset in PRESETS.glob("*.yaml")))
    document = _document(_read(Path(path), f"Presets in {PRESETS}: {presets}"), str(path))
    values = _mapping(document, str(path), Job)
    lines = _Lines(document, str(path))
    for override in overrides:
        _override(values, override)
    job = _validate(values, lines, Job, lambda values: _without_auto(_with_own_methods(_with_recipe(values))))
    return CheckedSpec(job, values, lines)


def read_section(path: str | Path, section: type[Section], hint: str) -> Section:
    """Read a YAML file whose keys are the fields of a dataclass, and check it as a job spec is checked.

    Raises SpecError with every mistake that was found, and with `hint` for a file that cannot be read.
    """
    document = _document(_read(Path(path), hint), str(path))
    return _validate(_mapping(document, str(path), section), _Lines(document, str(path)), section)


def read_saved(text: str, name: str) -> Job:
    """Return the job that a resolved spec, saved beside outputs, tells of. Its model and output are not looked at.

    Raises SpecError for a text that is no job of this release.
    """
    document = _document(text, name)
    return _validate(_mapping(document, name, Job), _Lines(document, name), Job)


def check_output(job: Job) -> None:
    """Raise SpecError unless the job's output can be written to."""
    try:
        Store(job.output.uri, job.storage_options).check_writable()
    except StoreError as error:
        raise SpecError(f"output.uri: {error}") from error


def _read(path: Path, hint: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise SpecError(
                f"{path}: it has more than the {_MOST_BYTES} bytes that are accepted: put prompts into a table"
            )
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}. {hint}") from error


# --------------------------------------------------------------------------------------------------------- YAML

_MOST_BYTES = 64 * 1024**2
_DEEPEST = 50
_MOST_VALUES = 1_000_000
_NO_VALUE = (ValueError, LookupError, AttributeError, TypeError, OverflowError)
"""What PyYAML's constructors raise for a value that is none of what its tag says, such as !!timestamp 2024-13-45."""


@dataclass(frozen=True)
class _Document:
    """A YAML text as a tree of nodes, which know their lines, and as values."""

    root: Any
    values: Any


def _document(text: str, name: str) -> _Document:
    """Read a YAML text. Raises SpecError for one that is none, and for a few lines that would grow into gigabytes."""
    try:
        _check_depth(text, name)
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None:
            return _Document(None, None)
        _measure(root, name, {})
        return _Document(root, _constructed(loader, root, name))
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        quotes = re.search("alias|anchor|alphabetic|tag|cannot start any token", reason)
        hint = ". Put a text that begins with * & ! % or @ into quotes; indent by blanks, not tabs" if quotes else ""
        raise SpecError(f"{name}{line}: it is no YAML: {reason}{hint}") from error


def _check_depth(text: str, name: str) -> None:
    """Refuse deep nesting before the tree is built, which is done by recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise SpecError(_too_deep(name, event.start_mark.line + 1))


def _too_deep(name: str, line: int) -> str:
    return f"{name}:{line}: it is nested more than {_DEEPEST} deep, which no job spec is"


def _measure(node: Any, name: str, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return how many values a node stands for, and how deep they are nested, with what its aliases repeat."""
    line = node.start_mark.line + 1
    if id(node) in known:
        measured = known[id(node)]
        if measured is None:
            raise SpecError(f"{name}:{line}: it holds itself, by an alias")
        return measured
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, name)
    parts = [_measure(part, name, known) for part in _parts(node)]
    values, depth = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
    if depth > _DEEPEST:
        raise SpecError(_too_deep(name, line))
    if values > _MOST_VALUES:
        raise SpecError(
            f"{name}:{line}: it stands for {values} values, aliases counted as often as they repeat; expected at most "
            f"{_MOST_VALUES}. Put so many prompts into a table: {{uri: prompts.parquet}}."
        )
    known[id(node)] = (values, depth)
    return values, depth


def _check_keys(node: Any, name: str) -> None:
    """Refuse a key that stands twice in a mapping, of which the last one would win, and YAML 1.1's merging."""
    first: dict[str, int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        line = key.start_mark.line + 1
        if key.value == "<<" and not key.style:
            raise SpecError(
                f"{name}:{line}: YAML 1.2 has no merge key <<. Write the keys out, or repeat a whole section by an "
                "alias."
            )
        if key.value in first:
            raise SpecError(
                f"{name}:{line}: the key {key.value!r:.100} stands twice, first in line {first[key.value]}. Remove one."
            )
        first[key.value] = line


def _parts(node: Any) -> Iterator[Any]:
    """The nodes directly within a node, keys and values alike."""
    if isinstance(node, yaml.MappingNode):
        yield from chain.from_iterable(node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _constructed(loader: Any, root: Any, name: str) -> Any:
    """Return the values of a tree of nodes; SpecError, with its line, for a scalar that is none of what it says."""
    for node in _scalars(root):
        try:
            node.value.encode()
            loader.construct_object(node)
        except _NO_VALUE as error:
            raise SpecError(
                f"{name}:{node.start_mark.line + 1}: {node.value!r:.100} is no valid {node.tag.rsplit(':', 1)[-1]} "
                f"({error}). Put a text into quotes."
            ) from error
    try:
        return loader.construct_document(root)
    except _NO_VALUE as error:
        raise SpecError(f"{name}: it is no YAML that can be understood: {error}") from error


def _scalars(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    for part in _parts(node):
        yield from _scalars(part)


def _mapping(document: _Document, name: str, section: type) -> dict[str, Any]:
    if not isinstance(document.values, dict):
        raise SpecError(f"{name}: expected a mapping with the keys {', '.join(_keys_of(section))}")
    for key, node in document.root.value:
        if _is_untyped(section, key.value):
            _check_plain(node, name, key.value)
    return document.values


def _is_untyped(section: type, key: str) -> bool:
    """Whether the values below a key of a section are handed on as they are read: nothing says what each should be."""
    return bool(get_type_hints(section).get(key) == dict[str, Any])


def _check_plain(root: Any, name: str, key: str) -> None:
    """Refuse what YAML 1.1 reads as another value, such as `no`, where no type says which one is meant."""
    for node in _scalars(root):
        if differs_in_1_1(node):
            raise SpecError(
                f"{name}:{node.start_mark.line + 1}: {key}: {node.value!r:.100} is one value in YAML 1.1 and another "
                "in 1.2. Put a text into quotes; write true or false, and numbers in decimal digits."
            )


class _Lines:
    """Where each key of a YAML text stands."""

    def __init__(self, document: _Document, name: str):
        self._name = name
        self._lines: dict[tuple[str, ...], int] = {}
        self._walk(document.root, ())

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
    document = _document(text, f"--set {override}")
    if _is_untyped(Job, key.partition(".")[0]):
        _check_plain(document.root, f"--set {override}", key)
    values[last] = document.values


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


def _validate(
    values: dict[str, Any],
    lines: _Lines,
    section: type[Section],
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Section:
    """Return values as the dataclass whose fields are their keys; `prepare` brings short forms into full ones."""
    unknown = list(islice(_unknown_keys(values, section, ()), _MOST_MISTAKES))
    mistakes = [lines.at(keys, message) for keys, message in unknown]
    if len(mistakes) == _MOST_MISTAKES:
        raise _refusal(mistakes)
    for keys, _ in unknown:
        _drop(values, keys)
    try:
        checked = TypeAdapter(section).validate_python(prepare(values))
    except ValidationError as error:
        # A key that is missing where another is misspelt is most likely that one.
        misspelt = {keys[:-1] for keys, _ in unknown}
        errors = [e for e in error.errors() if e["type"] != "missing" or e["loc"][:-1] not in misspelt]
        mistakes += _explain_all(errors, lines)
        if not mistakes:
            raise
        raise _refusal(mistakes) from error
    if mistakes:
        raise _refusal(mistakes)
    return checked


_MOST_MISTAKES = 100


def _refusal(mistakes: Sequence[str]) -> SpecError:
    """All mistakes, a line each; of a very long list that is wrong throughout, the first ones."""
    more = len(mistakes) - _MOST_MISTAKES
    return SpecError("\n".join([*mistakes[:_MOST_MISTAKES], *([f"... and {more} more"] if more > 0 else [])]))


def _drop(values: Any, keys: tuple[str, ...]) -> None:
    """Remove a key. It may be gone already: by an alias, one section can stand in two places."""
    *parents, last = keys
    for parent in parents:
        values = next((inner for key, inner in values.items() if str(key) == parent), {})
    for key in [key for key in values if str(key) == last]:
        del values[key]


_RECIPES = {"build-bank": {"optimize": "coordinates", "preset": "lasting"}, "reuse": {"optimize": "coordinates"}}
"""What `method` is in jobs of these kinds where it says nothing else: what serves a motion bank best."""


def _with_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """A job of banks takes from its kind what `method` leaves out."""
    kind, method = values.get("kind"), values.get("method", {})
    recipe = _RECIPES.get(kind, {}) if isinstance(kind, str) else {}
    return {**values, "method": {**recipe, **method}} if recipe and isinstance(method, dict) else values


def _with_own_methods(values: dict[str, Any]) -> dict[str, Any]:
    """Each of `methods` takes from `method` what it leaves out, but not the settings of another motion loss."""
    shared, methods = values.get("method") or {}, values.get("methods")
    if not isinstance(shared, dict) or not isinstance(methods, dict):
        return values
    name = shared.get("name", MethodSettings.name)
    other = {key: value for key, value in shared.items() if key != "loss"}
    return {
        **values,
        "methods": {
            variant: {**(shared if own.get("name", name) == name else other), **own} if isinstance(own, dict) else own
            for variant, own in methods.items()
        },
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
        return (*keys, *cause.key.split(".")), str(cause).removeprefix(f"{cause.key}: ")
    if error["type"] == "missing":
        return keys, "it is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = _EXPECTED.get(error["type"], message)
    return keys, f"{_SHORTENED.repr(error['input'])} is not valid: expected {expected}"


class _Shortened(reprlib.Repr):
    """Short forms of values. Secrets are taken out first: half of a signature looks like any other word."""

    maxstring = maxother = 200

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redact(x), level)


_SHORTENED = _Shortened()


def _either(messages: list[str]) -> str:
    first, *others = dict.fromkeys(messages)
    return " or ".join([first, *(other.split(": expected ", 1)[-1] for other in others)])


_EXPECTED = {
    "tuple_type": "a list",
    "dataclass_type": "a section {key: value, ...}",
    "string_type": "a text: put it into quotes",
}
"""pydantic's names of Python types, as YAML calls them."""


_UNION_MEMBER = re.compile(r"(Table|str|int|float|bool|(tuple|literal)\[.*)$")
"""Names that pydantic puts into an error's location for the members of a union."""


# --------------------------------------------------------------------------------------------- the model's part


def _resolve(job: Job, lines: _Lines) -> ReadySpec:
    """Fill in the model's defaults and check what only the model can tell."""
    try:
        with waiting(lambda: f"the model {job.model.path} to be found and hashed"):
            found = backbones.identify(local_model(job), download=job.model.download)
        model = replace(found, path=job.model.path)
    except (ModelNotFoundError, StoreError, OSError, ValueError) as error:  # the last two: names that no file can have
        raise SpecError(lines.at(["model", "path"], f"{error}"[:1000])) from error
    defaults = model.defaults
    resolved = replace(
        job,
        motion=job.motion.resolve(),
        method=_resolved(job.method, job, defaults),
        methods={name: _resolved(method, job, defaults) for name, method in job.methods.items()},
        sampling=job.sampling.resolve(defaults),
    )
    mistakes = [*_misfits(resolved, model, lines), *_bad_addresses(job, lines)]
    if mistakes:
        raise SpecError("\n".join(mistakes))
    return ReadySpec(resolved, model, to_yaml(resolved))


def _resolved(method: MethodSettings, job: Job, defaults: ModelDefaults) -> MethodSettings:
    """Fill in the job's motion and the model's defaults.

    How many steps of `reuse` are guided and injected, each bank says if it can.
    """
    resolved = method.resolve(defaults) if method.motion else replace(method, motion=job.motion).resolve(defaults)
    if job.kind != "reuse":
        return resolved
    own = {"guided_steps": method.guided_steps, "injected_steps": method.injected_steps}
    return MethodSettings(**{**vars(resolved), **own})


def _misfits(job: Job, model: ModelIdentity, lines: _Lines) -> Iterator[str]:
    """What a job asks that its model, or its kind, cannot do."""
    layout, steps = model.layout, job.sampling.steps
    assert steps is not None
    checks: list[tuple[tuple[str, ...], Callable[[], Any]]] = [
        (("references",), lambda: job.kind in ("reuse", "evaluate") or layout.latent_shape(*job.references.size)),
        (("banks", "size"), lambda: job.banks.size is None or layout.latent_shape(*job.banks.size)),
    ]
    for name, variant in job.variants.items():
        where = ("methods", name) if job.methods else ("method",)
        checks += [(where, partial(check, variant.method)) for check in _method_checks(job.kind, layout, steps)]
    for keys, check in checks:
        try:
            check()
        except SettingsError as error:
            yield lines.at([*keys, *filter(None, [error.key])], str(error).removeprefix(f"{error.key}: "))
        except ArithmeticError as error:
            yield lines.at(keys, f"it holds a number that cannot be counted with ({error}), such as infinity")


def _method_checks(kind: str, layout: LatentLayout, steps: int) -> list[Callable[[MethodSettings], Any]]:
    """What each of a job's methods has to stand; each raises SettingsError."""
    return [
        partial(_check_counts, steps=steps),
        lambda method: layout.check_blocks(method.blocks or ()),
        partial(_check_kind, kind),
    ]


def _check_counts(method: MethodSettings, steps: int) -> None:
    """Raise SettingsError for more guided or injected steps than there are; what a bank decides is not known yet."""
    if method.needs_reference and method.guided_steps is not None:
        count_steps("guided_steps", method.guided_steps, steps)
    if method.injected_steps not in (None, method.guided_steps):
        count_steps("injected_steps", method.injected_steps, steps)


def _bad_addresses(job: Job, lines: _Lines) -> Iterator[str]:
    """The first of the output that is no place, addresses that are not opened, and options that are not taken."""
    for keys, uri in job.addresses:
        try:
            check_address(uri, job.storage_options)
            if keys[0] == "output":
                Store(uri)
        except StoreOptionsError as error:
            yield lines.at(error.key.split("."), str(error).removeprefix(f"{error.key}: "))
            return
        except StoreError as error:
            yield lines.at(keys, str(error))
            return


def _check_kind(kind: str, method: MethodSettings) -> None:
    """Raise SettingsError for a method that makes no sense in this kind of job."""
    if kind in ("build-bank", "reuse") and not method.learns_positions:
        came = f"{method.name}, optimize: {method.optimize}"
        raise SettingsError(
            "", came, f"a method with a motion loss and optimize: position or coordinates for kind {kind}"
        )
    if kind != "synthesize" and method.noise_candidates > 1:
        raise SettingsError("noise_candidates", method.noise_candidates, f"1 for kind {kind}, which guides no video")
    if kind == "extract" and not method.has_loss:
        raise SettingsError("name", method.name, "a method with a motion loss for kind extract")


def to_yaml(job: Job) -> str:
    """Return the job as YAML that `load_spec` reads again, without the signatures of URLs."""
    assert job.kind in KINDS
    return dump(_plain(dataclasses.asdict(job)))


def _plain(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, key) for inner in value]
    return public_uri(value) if key in _ADDRESSES and isinstance(value, str) else value


_ADDRESSES = ("uri", "masks", "path", "clip", "tracker_weights")
