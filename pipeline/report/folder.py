"""The folder of a report: files named by their content, what is there already, and data that a page can take in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pipeline.store import Store, redact

FOLDER = "report"
INDEX = f"{FOLDER}/index.html"
_PARTS = ("data", "page", "references", "motions")
"""The folders within it: whatever lies there is the report's own."""


class ReportFolder:
    """Writes what is not there yet, and at the end removes what the page does not name any more."""

    def __init__(self, store: Store):
        self.store = store
        self._there = set(store.list(FOLDER))
        self._named: set[str] = set()
        self._written = 0

    def add(self, part: str, stem: str, ending: str, data: bytes) -> str:
        """Keep a file under a name that has its content's hash; return its path relative to the page."""
        name = f"{part}/{stem}-{hashlib.sha256(data).hexdigest()[:16]}.{ending}"
        if not self.has(name):
            self.put(name, data)
        return name

    def has(self, name: str) -> bool:
        """Tell whether a file that is named by what it is made of is there; it is kept."""
        self._named.add(f"{FOLDER}/{name}")
        return f"{FOLDER}/{name}" in self._there

    def put(self, name: str, data: bytes) -> None:
        """Write a file."""
        self.store.put(f"{FOLDER}/{name}", data)
        self._written += 1

    def publish(self, html: bytes) -> None:
        """Write the page itself, unless it is the one that is there."""
        if INDEX not in self._there or self.store.read(INDEX) != html:
            self.put(INDEX.removeprefix(f"{FOLDER}/"), html)

    def tidy(self) -> tuple[int, int, int]:
        """Remove what an earlier page named and this one does not; return how many were written, kept and removed."""
        own = {key for key in self._there if key.split("/")[1] in _PARTS and not self.store.is_linked(key)}
        for key in own - self._named:
            self.store.delete(key)
        return self._written, len(own & self._named), len(own - self._named)


def script(function: str, *values: Any) -> bytes:
    """Return a script that hands values to the page.

    It is ASCII, and has no character that could end a script or open a tag, wherever it is put.
    """
    texts = [json.dumps(plain(value), separators=(",", ":"), allow_nan=False) for value in values]
    code = f"ditflowReport.{function}({','.join(texts)});\n"
    return code.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").encode("ascii")


def plain(value: Any) -> Any:
    """Return a value as a page may have it: texts without credentials, numbers short, null for those that are none."""
    if isinstance(value, str):
        return _shown(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_shown(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


@lru_cache(maxsize=100_000)
def _shown(text: str) -> str:
    # The same prompts and settings come again in most rows.
    return redact(text)
