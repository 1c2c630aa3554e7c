"""What the documentation says is looked up: links, commands, options, keys, messages, columns and figures."""

import dataclasses
import importlib.util
import json
import re
import types
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from docs.pages import (
    READ_PAGES,
    REASONS,
    ROOT,
    RUN_PAGES,
    Block,
    Command,
    anchors,
    blocks,
    code,
    command_of,
    links,
    literals,
    rows,
)
from jobs.cli import app
from jobs.spec import check_spec
from jobs.yaml12 import Loader, dump
from pipeline.job import Job
from pipeline.record import COLUMNS

PAGES = [*RUN_PAGES, *READ_PAGES]
BLOCKS = [block for page in PAGES for block in blocks(page)]
OF_BASH = [block for block in BLOCKS if block.language == "bash"]
OF_YAML = [block for block in BLOCKS if block.language == "yaml"]
MOST_MARKED = 8
MOST_PICTURE_BYTES = 300_000
TROUBLES = ROOT / "docs/troubleshooting.md"


def ids(items: list[Any]) -> list[str]:
    return [str(item.relative_to(ROOT) if isinstance(item, Path) else item) for item in items]


# ------------------------------------------------------------------------------------------------- links, pictures


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_link_leads_somewhere(page):
    for link in links(page):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{link}: there is no {target}"
            assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_every_page_is_in_the_index():
    index = ROOT / "docs/README.md"
    named = [*links(index), *(text for _, text in code(index))]
    listed = {(index.parent / name).resolve() for name in named}
    assert {page for page in RUN_PAGES if page.parent.name == "docs"} - {index} <= listed


def test_every_picture_is_small_and_shown_by_a_page():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    pictures = set((ROOT / "docs/pictures").iterdir())
    assert pictures <= shown
    assert {picture for picture in pictures if picture.stat().st_size > MOST_PICTURE_BYTES} == set()


# ---------------------------------------------------------------------------------------------- commands and options


def parse(words: tuple[str, ...]) -> None:
    """Parse a command line with the real command line, as far as its start; raises what a user would be told."""
    command: Any = typer.main.get_command(app)
    name, *rest = words
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"{' '.join(words)}: {name} has {', '.join(command.commands)}"
        command, name, rest = command.commands[rest[0]], rest[0], rest[1:]
    command.make_context(name, list(rest))


def check(command: Command) -> None:
    """Look up what a command line names: of our own everything, of others the files and modules of this project."""
    words = command.words
    if command.is_ours:
        parse(words)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[1:2] == ("-m",) and words[2].startswith(("benchmarks.", "ditflow.")):
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] in ("ray", "docker"):
        assert all((ROOT / word).exists() for word in words if word.startswith("infra/"))


@pytest.mark.parametrize("block", OF_BASH, ids=ids(OF_BASH))
def test_every_command_and_option_exists(block: Block):
    for command in block.commands:
        check(command)


@pytest.mark.parametrize(
    "wrong",
    ["ditflow transfr a.mp4 b", "ditflow run job.yaml --retri failed", "ditflow manifest", "ditflow plan"],
)
def test_a_command_that_does_not_exist_is_seen(wrong):
    command = command_of(wrong)
    assert command is not None
    with pytest.raises((AssertionError, Exception)):
        check(command)


@pytest.mark.parametrize("page", RUN_PAGES, ids=ids(RUN_PAGES))
def test_commands_and_options_within_texts_exist(page):
    command: Any = typer.main.get_command(app)
    options = {option for one in _commands(command) for p in one.params for option in (*p.opts, *p.secondary_opts)}
    for where, text in code(page):
        if text.startswith("--"):
            assert text.split()[0].split("=")[0] in options, f"{where}: {text}"
        if text.startswith("ditflow "):
            named = text.split()[1:]
            one = command
            while hasattr(one, "commands") and named:
                assert named[0] in one.commands, f"{where}: {text}"
                one = one.commands[named.pop(0)]
            its = {option for p in one.params for option in (*p.opts, *p.secondary_opts)}
            assert {word for word in named if word.startswith("-") and word != "-"} <= its, f"{where}: {text}"


def _commands(command: Any) -> list[Any]:
    return [command, *(inner for one in getattr(command, "commands", {}).values() for inner in _commands(one))]


# --------------------------------------------------------------------------------------------------------- job specs


def keys_of(section: type, before: str = "") -> set[str]:
    """Every key of a section, with those of the sections in it: method.name."""
    found = set()
    for name, hint in typing.get_type_hints(section).items():
        if name in {field.name for field in dataclasses.fields(section)}:
            found |= {before + name}
            for inner in _sections_in(hint):
                found |= keys_of(inner, f"{before}{name}.")
    return found


def _sections_in(hint: Any) -> list[type]:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [part for part in parts if dataclasses.is_dataclass(part) and isinstance(part, type)]


KEYS = keys_of(Job)
SECTIONS = {key.partition(".")[0] for key in KEYS}
NAMES = {key.rpartition(".")[2] for key in KEYS} | {"bank_error", "least_common"}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_keys_of_the_job_spec_within_texts_exist(page):
    for where, text in code(page):
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", text) and text.partition(".")[0] in SECTIONS:
            assert text in KEYS, f"{where}: {text}"
        key = re.fullmatch(r"([a-z_.]+): [^\s].*", text)
        if key and page in RUN_PAGES:
            assert key[1] in KEYS | NAMES, f"{where}: {text}"


def completed(text: str) -> dict[str, Any]:
    """A block of YAML as a whole job: what it leaves out is that of the quickstart's job of its kind."""
    values = yaml.load(text, Loader)
    presets = {"build-bank": "quickstart-bank", "reuse": "quickstart-reuse"}
    preset = ROOT / f"jobs/{presets.get(values.get('kind'), 'quickstart')}.yaml"
    return {**yaml.load(preset.read_text(), Loader), **values}


@pytest.mark.parametrize("block", OF_YAML, ids=ids(OF_YAML))
def test_every_block_of_yaml_is_a_valid_job_spec(block, tmp_path):
    spec = tmp_path / "job.yaml"
    spec.write_text(dump(completed(block.text)))
    check_spec(spec)


# ---------------------------------------------------------------------------------- messages, columns and figures


def fragments(message: str) -> list[str]:
    """What of a quoted message is the same every time: between the places where `…` stands for a value."""
    return [text for part in message.split("…") if (text := " ".join(part.split()))]


def is_said(fragment: str) -> bool:
    return any(fragment in literal for literal in literals())


MESSAGES = [block for block in blocks(TROUBLES) if block.language == "text"] if TROUBLES.exists() else []


@pytest.mark.parametrize("block", MESSAGES, ids=ids(MESSAGES))
def test_every_quoted_message_is_one_of_the_software(block):
    parts = fragments(block.text)
    assert max(map(len, parts)) >= 20, "so little of it is the same every time that anything would fit"
    assert [part for part in parts if not is_said(part)] == []


def test_a_message_that_the_software_does_not_have_is_seen():
    (part, *_) = [part for block in MESSAGES for part in fragments(block.text) if len(part) > 30]
    assert is_said(part)
    assert not is_said(part.replace(" ", " verily ", 1))


def test_the_table_of_columns_is_that_of_the_manifest():
    """When a column is added: paste what this prints."""
    expected = [[f"`{c.name}`", str(c.type), c.unit, c.meaning] for c in COLUMNS]
    found = rows(ROOT / "docs/manifest.md", "Columns")
    assert found == expected, "\n".join(f"| {' | '.join(row)} |" for row in expected)


def interval(entries: list[dict[str, Any]], variant: str, figure: str) -> str:
    (entry,) = [e for e in entries if (e["variant"], e["figure"], e["category"]) == (variant, figure, None)]
    return "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**entry["interval"])


@pytest.mark.parametrize(
    ("page", "heading", "results", "named"),
    [
        ("docs/settings.md", "What each choice does", "mini-ablation", {}),
        (
            "README.md",
            "How they compare",
            "mini-table",
            {
                "plain model": "none",
                "KV injection": "injection",
                "SMM": "smm",
                "MOFT": "moft",
                "MotionClone": "motionclone",
                "DiTFlow, latents": "ditflow-latent",
                "DiTFlow, latents, best of four noises": "ditflow-4-noises",
                "DiTFlow, positions": "ditflow-position",
                "DiTFlow, zero-shot": "ditflow-zero-shot",
            },
        ),
    ],
    ids=["ablation", "comparison"],
)
def test_figures_of_a_table_are_those_of_the_results(page, heading, results, named):
    models = json.loads((ROOT / f"benchmarks/results/{results}.json").read_text())["models"]
    figures = [(model, figure) for model in ("mini", "mini-additive") for figure in ("track_cosine", "motion_fidelity")]
    for first, *cells in rows(ROOT / page, heading):
        variant = named.get(first, first.strip("`"))
        assert cells[-4:] == [interval(models[m]["entries"], variant, figure) for m, figure in figures]


# ------------------------------------------------------------------------------------------------- what is not run


def test_marks_give_known_reasons_and_stand_above_commands():
    marked = [block for block in BLOCKS if block.not_run is not None]
    assert {block.not_run for block in marked} <= REASONS.keys()
    assert {block.language for block in marked} <= {"bash", "python"}


def test_most_blocks_are_run():
    """Whoever marks one more has to say so here."""
    runnable = [b for page in RUN_PAGES for b in blocks(page) if b.language in ("bash", "python")]
    marked = [block for block in runnable if block.not_run is not None]
    assert len(marked) <= MOST_MARKED, ids(marked)
    assert len(marked) < len(runnable) / 2, Counter(block.not_run for block in marked)


def test_languages_are_those_that_are_looked_after():
    """Text is quoted, and nothing else goes by unseen."""
    assert {block.language for page in RUN_PAGES for block in blocks(page)} <= {"bash", "python", "yaml", "text"}
