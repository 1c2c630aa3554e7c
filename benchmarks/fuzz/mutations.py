"""Changes of a sound file: of its bytes, and of what they mean in JSON, YAML, safetensors and Parquet."""

from __future__ import annotations

import io
import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ditflow.artifact import update_hashes
from jobs.yaml12 import Dumper, Loader
from pipeline.manifest import parquet_bytes
from pipeline.record import VERSION_KEY

Mutation = Callable[[bytes, random.Random], bytes]

# ------------------------------------------------------------------------------------------------------- bytes

_INTERESTING = (0, 1, 2, 7, 8, 127, 128, 255, 256, 4096, 65535, 1 << 20, 1 << 24, 1 << 26, 2**31 - 1, 2**31, 2**32 - 1)


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(data: bytes, rng: random.Random) -> bytes:
    place, count = _piece(data, rng, 16)
    return data[:place] + rng.randbytes(count) + data[place + count :]


def set_number(data: bytes, rng: random.Random) -> bytes:
    """A count, size or offset of another magnitude, in either byte order."""
    packed = struct.pack(rng.choice("<>") + "I", rng.choice(_INTERESTING))[: rng.choice((1, 2, 4))]
    place = rng.randrange(len(data) + 1)
    return data[:place] + packed + data[place + len(packed) :]


def set_number_of_box(data: bytes, rng: random.Random) -> bytes:
    """The same, close behind a name of four letters: the fields of an mp4 or avi."""
    names = [match.end() for match in re.finditer(rb"[A-Za-z]{3}[A-Za-z0-9]", data)]
    if not names:
        return data
    place = rng.choice(names) + 4 * rng.randrange(-2, 8)
    packed = struct.pack(rng.choice("<>") + "I", rng.choice(_INTERESTING))
    return data[: max(0, place)] + packed + data[max(0, place) + 4 :]


def cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    place, count = _piece(data, rng, 4096)
    return data[:place] + data[place + count :]


def double(data: bytes, rng: random.Random) -> bytes:
    place, count = _piece(data, rng, 4096)
    return data[: place + count] + data[place : place + count] * rng.choice((1, 2, 100)) + data[place + count :]


def _piece(data: bytes, rng: random.Random, most: int) -> tuple[int, int]:
    place = rng.randrange(len(data) + 1)
    return place, rng.randint(0, min(most, len(data) - place))


BYTES: tuple[Mutation, ...] = (flip_bits, set_bytes, set_number, cut_off, cut_out, double)


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one input and the end of another."""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


# ------------------------------------------------------------------------------------------------------ values

_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", " ",
    10**400, "auto", "none", "\0", "a" * 10_000, "../../x", "s3://", "file://", "{}", "é🐆\u202e", "\ud800",
    "2024-13-45", [], [[]], {}, {"": ""}, [None], [1, "a", None], {"uri": []}, {"a": {"b": {"c": []}}},
    list(range(1000)),
)  # fmt: skip


def mutated_value(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """Return a value with one part, somewhere within it, replaced, renamed, doubled or dropped."""
    if isinstance(value, dict) and value and rng.random() < 0.9 - depth / 20:
        key = rng.choice([*value])
        return _mutated_mapping(dict(value), key, rng, depth)
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        part = mutated_value(value[place], rng, depth + 1)
        return value[:place] + [part] * rng.choice((0, 1, 1, 1, 2, 50)) + value[place + 1 :]
    return rng.choice(_ODD)


def _mutated_mapping(value: dict[Any, Any], key: Any, rng: random.Random, depth: int) -> dict[Any, Any]:
    kind = rng.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1:
        value[rng.choice(("", "x", 5, None, True, str(key) + "s", str(key)[1:]))] = value.pop(key)
    elif kind == 2:
        value[key] = value[rng.choice([*value])]
    else:
        value[key] = mutated_value(value[key], rng, depth + 1)
    return value


# -------------------------------------------------------------------------------------------------------- JSON

_DEPTHS = (50, 300, 900, 3_000, 10_000)


def json_structure(data: bytes, rng: random.Random) -> bytes:
    """Other values in a JSON text, or one that is nested deeply, or has more digits than a number can."""
    try:
        value = json.loads(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            value = mutated_value(value, rng)
        return json_text(value, rng).encode()
    except (ValueError, TypeError, RecursionError):
        return flip_bits(data, rng)


def json_text(value: Any, rng: random.Random) -> str:
    """Return a value as JSON; one of its texts, or all of it, may become what no library would write."""
    depth = rng.choice(_DEPTHS)
    odd = ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth, "9" * 5_000, "1e999", "-", "")
    text = json.dumps(value)
    texts = [match.span() for match in re.finditer(r'"[^"\\]*"(?!:)|\d+', text)]
    if rng.random() < 0.8 or not texts:
        return text
    start, end = rng.choice([*texts, (0, len(text))])
    return text[:start] + rng.choice(odd) + text[end:]


def lines_structure(data: bytes, rng: random.Random) -> bytes:
    """Another JSON in one of several lines, each a name, a space, and JSON."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    name, _, text = lines[place].partition(b" ")
    lines[place] = name + b" " + json_structure(text, rng)
    return b"\n".join(lines)


# -------------------------------------------------------------------------------------------------------- YAML


def yaml_structure(data: bytes, rng: random.Random) -> bytes:
    try:
        values = yaml.load(data, Loader)
    except Exception:
        return flip_bits(data, rng)
    for _ in range(rng.choice((1, 1, 2, 5))):
        values = mutated_value(values, rng)
    try:
        text = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=rng.random() < 0.5)
        return text.encode(errors="replace")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape; and JSON is YAML
        return json.dumps(values, default=str, skipkeys=True).encode()
    except (yaml.YAMLError, RecursionError):
        return data


_TOKENS = (
    b": ", b"- ", b"\n", b"  ", b"\t", b"#", b"&a ", b"*a", b"<<: *a\n", b"!!python/name:os.system ", b"!!binary ",
    b"!!timestamp ", b"!!set ", b"!!int ", b"!!float ", b"!!bool ", b"!!null ", b"!x ", b"? ", b"| ", b"> ", b"~",
    b"%YAML 9.9\n", b"---\n", b"...\n", b"[", b"]", b"{", b"}", b",", b"'", b'"', b'"\\ud800"', b'"\\0"', b"0x",
    b"1e999", b".inf", b".nan", b"2024-13-45", b"1:99:99", b"9" * 5000, b"[" * 60, b"\xff", b"\xef\xbb\xbf",
    b"\x00", b"\xc2\x85", b"\xe2\x80\xa8",
)  # fmt: skip


def yaml_tokens(data: bytes, rng: random.Random) -> bytes:
    """Signs of YAML where they may not be."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(data) + 1)
        data = data[:place] + rng.choice(_TOKENS) + data[place + rng.choice((0, 0, 1)) :]
    return data


# ------------------------------------------------------------------------------------------------- safetensors


def artifact_structure(data: bytes, rng: random.Random) -> bytes:
    """Another header of safetensors, or another one of ours within it, of the right length and mostly with its hash."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        if rng.random() < 0.7:
            ours = mutated_value(json.loads(header["__metadata__"]["ditflow"]), rng)
            header["__metadata__"]["ditflow"] = rng.choice((json_text(ours, rng), repr(ours)))
        else:
            header = mutated_value(header, rng)
        text = json.dumps(header).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return flip_bits(data, rng)
    return _mostly_rehashed(len(text).to_bytes(8, "little") + text + data[8 + length :], rng)


def _mostly_rehashed(data: bytes, rng: random.Random) -> bytes:
    """With the hashes of what it is now: nothing gets past a wrong one."""
    return update_hashes(data) if rng.random() < 0.8 else data


def artifact_values(data: bytes, rng: random.Random) -> bytes:
    """Bits of the tensors, or of anything else, with the hashes that they have then."""
    return _mostly_rehashed(flip_bits(data, rng), rng)


_TYPES = (b"F64", b"F32", b"F16", b"BF16", b"I64", b"BOOL", b"F8_E4M3", b"F8_E8M0", b"F4", b"C64", b"U64", b"X")


def artifact_types(data: bytes, rng: random.Random) -> bytes:
    """A tensor of another type, its length as it was."""
    mutated = data.replace(b'"F32"', (b'"' + rng.choice(_TYPES) + b'"').ljust(5), rng.randint(1, 9))
    return _mostly_rehashed(mutated, rng)


# ----------------------------------------------------------------------------------------------------- Parquet

_COLUMN_TYPES = (
    pa.null(), pa.bool_(), pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float16(), pa.float64(), pa.string(),
    pa.large_string(), pa.binary(), pa.date32(), pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "UTC"),
    pa.timestamp("us", "Asia/Kolkata"), pa.duration("us"), pa.decimal128(38, 5), pa.list_(pa.string()),
    pa.list_(pa.float64()), pa.struct([("a", pa.int64())]), pa.dictionary(pa.int32(), pa.string()),
)  # fmt: skip
_VERSIONS = (b"", b"x", b"0", b"-1", b"99", b"9" * 5000, b"\xff", b"1.0")


def parquet_structure(data: bytes, rng: random.Random) -> bytes:
    """A table with other columns, types, values, rows or metadata, written as ours are."""
    try:
        table = pq.read_table(io.BytesIO(data))
        for _ in range(rng.choice((1, 1, 2, 4))):
            table = _mutated_table(table, rng)
        return parquet_bytes(table, checksums=rng.random() < 0.5)
    except (pa.ArrowException, OSError, ValueError, OverflowError, TypeError):
        return flip_bits(data, rng)


def _mutated_table(table: Any, rng: random.Random) -> Any:
    kind = rng.randrange(10)
    if kind == 0:
        return table.replace_schema_metadata(rng.choice((None, {VERSION_KEY: rng.choice(_VERSIONS)})))
    if kind == 1:
        rows = rng.choice(((), (0,), (0, 0), range(len(table) - 1), 3 * (*range(len(table)),)))
        return table.take([row for row in rows if 0 <= row < len(table)])
    if not table.num_columns:
        return table
    place = rng.randrange(table.num_columns)
    name, column = table.column_names[place], table.column(place)
    if kind == 2:
        return table.remove_column(place)
    if kind == 3:
        names = list(table.column_names)
        names[place] = rng.choice(("", "x", name.upper(), rng.choice(names)))
        return table.rename_columns(names)
    if kind == 4:
        return table.set_column(place, name, table.column(rng.randrange(table.num_columns)))
    if kind == 5:
        return table.set_column(place, name, _retyped(column, rng.choice(_COLUMN_TYPES)))
    return table.set_column(place, name, _with_odd_values(column, rng))


def _retyped(column: Any, kind: Any) -> Any:
    try:
        return column.cast(kind, safe=False)
    except (pa.ArrowException, ValueError):
        return pa.nulls(len(column), kind)


def _with_odd_values(column: Any, rng: random.Random) -> Any:
    """Return a column of the same type with some values that its type allows and nobody expects."""
    kind, count = column.type, len(column)
    values: list[Any]
    if pa.types.is_temporal(kind) or pa.types.is_integer(kind):
        values = [rng.choice((None, 0, 1, -1, 2**31 - 1, -(2**31), 2**62, -(2**62), 10**15)) for _ in range(count)]
        return (
            pa.array(values, pa.int64()).cast(pa.int32() if kind.bit_width == 32 else pa.int64(), safe=False).cast(kind)
        )
    if pa.types.is_floating(kind):
        values = [rng.choice((None, 0.0, -1.0, 1e308, -1e308, float("inf"), float("nan"))) for _ in range(count)]
        return pa.array(values, pa.float64()).cast(kind, safe=False)
    if pa.types.is_list(kind):
        values = [rng.choice((None, [], [None], [float("nan")], [1e38] * 1000)) for _ in range(count)]
        return pa.array(values, kind) if pa.types.is_floating(kind.value_type) else pa.nulls(count, kind)
    texts = [None if text is None else str(text).encode(errors="replace") for text in column.to_pylist()]
    changed = [text and rng.choice((json_structure, json_structure, flip_bits))(text, rng) for text in texts]
    odd = (None, b"", b"\xff\xfe", b"a" * 100_000, b"\x1b[2J", "\u202e".encode(), b"ok", b"../../x", b"s3://", b"\0")
    values = [rng.choice(odd) if rng.random() < 0.4 else text for text in changed]
    return pa.array(values, pa.binary()).view(pa.string())
