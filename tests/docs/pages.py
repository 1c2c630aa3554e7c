"""Pages of documentation: their blocks of code, links, messages and tables.

A block that cannot be run in a test says so on the line above it, unseen by readers: `<!-- not run: Kubernetes -->`,
with one of REASONS. A block whose first line is the name of a file, as in `# my-job.yaml`, is that file: blocks behind
it find it.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
REASONS = {
    "Kubernetes": "speaks to a cluster that has KubeRay",
    "Ray cluster": "speaks to a Ray cluster elsewhere",
    "CogVideoX": "needs a GPU, and weights that are not here",
    "weights": "needs weights that are not here",
    "S3": "needs a bucket",
    "installs": "installs packages, or runs all tests",
    "hours": "takes hours",
}
RUN_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Pages whose blocks are run."""
READ_PAGES = [ROOT / "infra/README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs/decisions").glob("*.md"))]
"""Pages of which links and commands are looked up, and nothing is run."""

_MARK = re.compile(r"<!-- not run: (.*) -->")
_FILE = re.compile(r"# (\S+\.(?:yaml|py|csv))")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=.*")


@dataclass(frozen=True)
class Command:
    """One command line. variables: what is set before it, as in `DITFLOW_PLUGINS=my-folder ditflow ...`."""

    text: str
    words: tuple[str, ...]
    variables: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.words[0].rsplit("/", 1)[-1] == "ditflow"


@dataclass(frozen=True)
class Block:
    """A fenced block of code. line: of its first line, counted from 1; not_run: the reason that its mark gives."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that this block is."""
        first = _FILE.fullmatch(self.text.partition("\n")[0])
        return first and first[1]

    @cached_property
    def commands(self) -> list[Command]:
        """The command lines of a bash block."""
        assert self.language == "bash"
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [command for line in lines if (command := command_of(line)) is not None]


def command_of(line: str) -> Command | None:
    words = shlex.split(line, comments=True)
    before = 0
    while before < len(words) and _VARIABLE.fullmatch(words[before]):
        before += 1
    return Command(line, tuple(words[before:]), tuple(words[:before])) if words[before:] else None


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page: Path) -> list[Block]:
    found, mark = [], None
    for token in tokens(page):
        if token.type == "fence":
            assert token.map is not None
            found.append(Block(page, token.map[0] + 2, token.info, token.content, mark))
        comment = _MARK.fullmatch(token.content.strip()) if token.type == "html_block" else None
        mark = comment and comment[1]
    return found


def _inline(page: Path) -> Iterator[tuple[int, Token]]:
    """Every piece of running text with its line, its children taken apart."""
    for token in tokens(page):
        for child in token.children or ():
            assert token.map is not None
            yield token.map[0] + 1, child


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    found = (child.attrGet("href") or child.attrGet("src") for _, child in _inline(page))
    return [str(target) for target in found if target]


def code(page: Path) -> list[tuple[str, str]]:
    """Words `in code` within running text, each with where it stands."""
    return [
        (f"{page.relative_to(ROOT)}:{line}", child.content)
        for line, child in _inline(page)
        if child.type == "code_inline"
    ]


def anchors(page: Path) -> set[str]:
    """What links can point to within a page: its headings, written as GitHub does."""
    headings = [after.content for token, after in pairwise(tokens(page)) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, cell by cell as they are written, without the table's own head."""
    found: list[list[str]] = []
    below, in_body = False, False
    for token, after in pairwise(tokens(page)):
        if token.type == "heading_open" and not found:
            below = after.content == heading
        in_body = (in_body or token.type == "tbody_open") and token.type != "tbody_close"
        if below and token.type == "tbody_close":
            return found
        if below and in_body and token.type == "tr_open":
            found.append([])
        if below and in_body and token.type == "td_open":
            found[-1].append(after.content)
    raise AssertionError(f"{page.name} has no table below {heading!r}")


@cache
def literals() -> list[str]:
    """Every text of the software's source; where a value is put into it, it is cut."""
    found: set[str] = set()
    for folder in ("ditflow", "pipeline", "jobs"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            found |= {text for node in ast.walk(tree) for text in _texts(node)}
    return [" ".join(text.split()) for text in found]


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    if isinstance(node, ast.JoinedStr):
        # One after the other, with a character between them that no message has.
        yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
