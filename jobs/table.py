"""What people are shown in a terminal: lines and tables, without what would command it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

FILE_WIDTH = 200
"""Characters of a table that goes to a file or a pipe."""


class Screen(Console):
    """A terminal, or a file in its place, that prints texts of any origin as they are: a line each, never as markup."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `Console` does, each text by itself in one line, without control characters."""
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)


def print_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table on stdout, a line each."""
    table = Table(box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        # The first column is an id, which people copy.
        table.add_column(column, no_wrap=True, overflow="ellipsis", min_width=24 if number == 0 else len(column))
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    stdout_screen().print(table)


def stdout_screen() -> Screen:
    """Standard output, as wide as its terminal, or wide enough for a table in a file."""
    return Screen(width=None if sys.stdout.isatty() else FILE_WIDTH)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return printable("; ".join(map(str, value)))
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))


def printable(text: str) -> str:
    """Return a text of unknown origin in one line, without characters that would command the terminal."""
    return _COMMANDS.sub("\ufffd", re.sub(r"[\t\n\r]", " ", text))


_COMMANDS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of writing."""
