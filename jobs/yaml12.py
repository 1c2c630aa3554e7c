"""YAML by the core schema of YAML 1.2, on PyYAML, which knows that of 1.1 alone.

By 1.1, `no` and `off` are false, 010 is 8, 1:30 is 90, 1_000 is 1000, and 2024-01-01 is a date; by 1.2, 010 is 10 and
the others are texts. What 1.2 takes for a number and 1.1 for another one or for a text, such as 010 and 1e5, is read as
a text here, which the type of its key turns into 1.2's number: a prompt that PyYAML wrote as `1e5` stays this text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_AGREED_INT = r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+"
_AGREED_FLOAT = r"([-+]?[0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"


# libyaml's parser where PyYAML was built with it: a hundred thousand prompts take a second, not half a minute.
class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # the name is PyYAML's; filled below
    bool_values = {"true": True, "false": False}  # noqa: RUF012


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes YAML that 1.1 and 1.2 read alike: a text that either would take for something else gets quotes."""


def dump(values: Any) -> str:
    """Return values as a YAML text, with the keys in their order."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def differs_in_1_1(node: yaml.ScalarNode) -> bool:
    """Whether 1.1 and 1.2 read a scalar as different values, of which its writer means one."""
    number = re.fullmatch(f"{_INT}|{_FLOAT}", node.value) and node.tag == f"{_TAG}str"
    return not node.style and bool(number or node.tag != _OLD.resolve(yaml.ScalarNode, node.value, (True, False)))


_OLD = yaml.resolver.Resolver()


def _int(loader: Any, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if not re.fullmatch(_INT, text):
        raise ValueError("expected digits, such as 10, 0x1f or 0o17")
    return int(text, 0 if text[:2] in ("0x", "0o") else 10)


def _float(loader: Any, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    if not re.fullmatch(_FLOAT, text):
        raise ValueError("expected a number, such as 1.5, 1e-3 or .inf")
    return float(re.sub(r"\.(?=[inIN])", "", text))


Loader.add_constructor(f"{_TAG}int", _int)
Loader.add_constructor(f"{_TAG}float", _float)
for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _AGREED_INT, list("-+0123456789")),
    ("float", _AGREED_FLOAT, list("-+.0123456789")),
):
    Loader.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"(?:{_pattern})$"), _first)
Dumper.add_implicit_resolver(f"{_TAG}int", re.compile(f"(?:{_INT})$"), list("-+0123456789"))
Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"(?:{_FLOAT})$"), list("-+.0123456789"))
