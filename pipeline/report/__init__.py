"""The gallery: a folder `report/` in a job's output that a browser shows from a disk or from object storage.

    manifest + metrics ──> rows in files of some hundreds ──┐
    reference videos ────> the frames that were used ───────┼──> index.html, written last
    amf/ ────────────────> arrows ──────────────────────────┘

Every file but index.html is named by its content, so an update writes what is new, and a page that is open while it is
written stays whole. Data are scripts that call a function, because browsers let a page from a disk read nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from pipeline.job import Job
from pipeline.manifest import Manifest
from pipeline.report.clips import ReferenceClips
from pipeline.report.folder import FOLDER, INDEX, ReportFolder, plain, script
from pipeline.report.motions import write_motions
from pipeline.report.rows import ROWS_PER_FILE, Rows
from pipeline.report.summary import newest_figures, summarise

SCRIPTS = ("data.js", "view.js", "charts.js", "arrows.js", "player.js", "card.js", "main.js")
"""The page's scripts, in the order in which they build on each other."""


class ReportError(ValueError):
    """There is nothing to report."""


@dataclass(frozen=True)
class Report:
    """What was written: where the page is, how many rows it shows, files written now and kept from before.

    without_reference: references of which the page has no video, and why.
    """

    uri: str
    rows: int
    written: int
    kept: int
    removed: int
    without_reference: dict[str, str]


def write_report(job: Job, references: bool, on_step: Callable[[str], None] = lambda told: None) -> Report:
    """Write, or bring up to date, the gallery of what is in the job's output.

    job: where the output is, and the limits and the patience with which references are read. references: False reads no
    reference videos; the page then has those that an earlier report has read. on_step: is told what is being done.

    Raises ReportError for a job without a finished row, ManifestError and StoreError.
    """
    store = job.store()
    rows = Rows.of(Manifest(store).read())
    if not rows.table.num_rows:
        raise ReportError(f"{store.uri}: no row has ended yet, so there is nothing to show. Run the job first.")
    folder = ReportFolder(store)
    on_step(f"{rows.table.num_rows} rows")
    clips = ReferenceClips(folder, job, on_step)
    notes = clips.write(rows.references(), references)
    motions = write_motions(folder, rows.motions())
    figures = newest_figures(store)
    names = [folder.add("data", "rows", "js", script("page", n, page)) for n, page in enumerate(rows.pages())]
    index = plain(
        {
            **rows.index(figures),
            "summary": summarise(rows.table, rows.names, figures),
            "pages": names,
            "rowsPerPage": ROWS_PER_FILE,
            "references": notes,
            "motions": motions,
        }
    )
    _write_page(folder, index, folder.add("data", "index", "js", script("index", index)))
    return Report(store.uri_of(INDEX), rows.table.num_rows, *folder.tidy(), {i: n for i, n in notes.items() if n})


def _write_page(folder: ReportFolder, index: dict[str, Any], data: str) -> None:
    """Write the page, which names all else."""
    style = folder.add("page", "report", "css", _page_file("report.css"))
    scripts = [folder.add("page", name.removesuffix(".js"), "js", _page_file(name)) for name in SCRIPTS]
    html = _template().render(index=index, style=style, scripts=[*scripts, data])
    folder.publish(html.encode())


@cache
def _page_file(name: str) -> bytes:
    return (files("pipeline.report") / "page" / name).read_bytes()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_page_file("index.html").decode())


__all__ = ["FOLDER", "Report", "ReportError", "write_report"]
