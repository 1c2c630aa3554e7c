"""Conditions on a table, in SQL: `mean_displacement > 1 AND list_contains(tags, 'walk')`.

DuckDB computes them. A condition may come from a stranger's job spec, so it can do nothing but look at the columns, and
not for long: it is parsed first, and refused unless it is one expression of comparisons and of FUNCTIONS, whose work
grows no faster than what they are given. The database that computes it has no access to files, the network or Python's
variables, nor to the switches that would give it any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa

FUNCTIONS = (
    "list_contains", "list_has", "list_has_all", "list_has_any", "len", "length", "lower", "upper", "contains",
    "starts_with", "ends_with", "regexp_matches", "abs", "round", "floor", "ceil", "trunc", "sqrt", "least", "greatest",
    "radians", "degrees", "sin", "cos", "isnan", "year", "month", "day", "now",
    "to_days", "to_hours", "to_months", "date_part",
)  # fmt: skip
"""What a condition may call. Others could do anything: `len(range(10000000000))` takes all the memory there is."""

_SIGNS = frozenset({"+", "-", "*", "/", "//", "%", "||", "&&", "@>", "<@", "~~", "!~~", "~~*", "!~~*", "list_value"})
"""Operators that DuckDB parses to functions: of numbers, texts and lists, LIKE and ILIKE, and a list's own brackets."""
_CLASSES = frozenset({"COLUMN_REF", "CONSTANT", "COMPARISON", "CONJUNCTION", "OPERATOR", "BETWEEN", "CASE", "CAST"})
_LONGEST = 4_000
"""Characters of a condition; unclosed brackets take the parser a time that grows with their square."""
_LOCKED: dict[str, Any] = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "python_enable_replacements": "false",
    "lock_configuration": "true",
}


class ConditionError(ValueError):
    """A condition, or an order, that cannot be applied to the table."""


def rows_where(table: Any, condition: str, key: str) -> Any:
    """Return the rows of a pyarrow table for which an SQL expression is true, in their order.

    key: what the user calls the condition. Raises ConditionError for what is no such expression, and for unknown
    columns, with the valid ones.
    """
    numbered = table.append_column("row number", pa.array(range(table.num_rows), pa.int64()))
    with duckdb.connect(":memory:", config=_LOCKED) as database:
        try:
            _check_expression(database, condition)
            database.register("rows", numbered)
            ((_, its_type, *_),) = database.execute(f"DESCRIBE SELECT (\n{condition}\n) FROM rows").fetchall()
            if its_type != "BOOLEAN":
                raise ValueError(f"it is of the type {its_type}, expected one that is true or false")
            chosen = database.execute(f'SELECT "row number" FROM rows WHERE (\n{condition}\n)').fetchall()
        except (duckdb.Error, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise ConditionError(
                f"{key}: {condition!r:.300} is not valid: {reason:.600}. Expected one SQL expression over the columns "
                f"{', '.join(table.column_names)}"
            ) from error
    return table.take(pa.array(sorted(number for (number,) in chosen), pa.int64()))


def _check_expression(database: duckdb.DuckDBPyConnection, condition: str) -> None:
    """Raise ValueError unless a text is one expression, and all that is in it is known to be harmless."""
    if len(condition) > _LONGEST:
        raise ValueError(f"it has {len(condition)} characters, expected at most {_LONGEST}")
    parsed, plain = (_parsed(database, f"SELECT\n{text}\n") for text in (condition, "true"))
    if "error_message" in parsed:
        raise ValueError(parsed["error_message"])
    query, simplest = _query(parsed), _query(plain)
    expressions = query.pop("select_list", [])
    simplest.pop("select_list")
    if len(parsed["statements"]) != 1 or query != simplest or len(expressions) != 1 or expressions[0]["alias"]:
        raise ValueError("it is more than one expression")
    for node in _nodes(expressions):
        _check_node(node)


def _check_node(node: dict[str, Any]) -> None:
    """Raise ValueError for a part of an expression that a condition may not have."""
    kind, function = node.get("class"), str(node.get("function_name", "")).lower()
    if kind == "FUNCTION":
        if function not in FUNCTIONS and function not in _SIGNS:
            raise ValueError(f"it calls {function:.100}, expected signs and the functions {', '.join(FUNCTIONS)}")
    elif kind is not None and kind not in _CLASSES and not (kind == "TYPE" and not node["children"]):
        what = {"SUBQUERY": "a query of its own", "STAR": "'*'", "TYPE": "a type made of others"}.get(
            kind, f"a {kind.lower()}"
        )
        raise ValueError(f"it has {what}, which a condition may not")


def _parsed(database: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    ((tree,),) = database.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchall()
    return json.loads(tree, object_hook=_without_places)


def _without_places(node: dict[str, Any]) -> dict[str, Any]:
    """A part of a parse tree without where it stands in the text."""
    return {key: value for key, value in node.items() if not key.startswith("query_location")}


def _query(parsed: dict[str, Any]) -> dict[str, Any]:
    return dict(parsed["statements"][0]["node"])


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping within a parse tree."""
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(part)


def rows_sorted(table: Any, column: str, key: str) -> Any:
    """Return the rows in the order of a column, or of `-column` in the reverse one; rows without a value come last."""
    name, reverse = column.removeprefix("-"), column.startswith("-")
    sortable = [field.name for field in table.schema if not pa.types.is_list(field.type)]
    if name not in sortable:
        valid = ", ".join(sortable)
        raise ConditionError(
            f"{key}: {column!r} is not valid: expected one of {valid}, with a '-' for the reverse order"
        )
    values = table[name].to_pylist()
    present = [row for row, value in enumerate(values) if value is not None]
    present.sort(key=lambda row: values[row], reverse=reverse)
    return table.take(pa.array([*present, *(row for row, value in enumerate(values) if value is None)], pa.int64()))
