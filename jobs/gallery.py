"""`ditflow report`: the gallery of a job, and what a person is told while it is written."""

from __future__ import annotations

from dataclasses import replace

from jobs.spec import SpecError, read_saved
from jobs.table import Screen
from pipeline.cpus import limit_threads, usable_cpus
from pipeline.job import Job, Output
from pipeline.report import Report, write_report
from pipeline.store import Store, StoreMissingError
from pipeline.waits import waiting

SPEC_KEY = "job.yaml"


def write_gallery(store: Store, references: bool, screen: Screen) -> Report:
    """Write or update the gallery of the job in a store; reference videos are read with that job's own limits."""
    limit_threads(usable_cpus())
    job = replace(_saved_job(store, screen), output=Output(store.uri), storage_options=store.storage_options)
    step = "reading the manifest"
    with screen.status(step) as status, waiting(lambda: f"the report: {step}"):

        def on_step(told: str) -> None:
            nonlocal step
            step = told
            status.update(told)

        report = write_report(job, references, on_step)
    for note in sorted(set(report.without_reference.values())):
        screen.print(note)
    screen.print(f"{report.uri}: {report.rows} rows, {report.written} files written, {report.kept} kept")
    return report


def _saved_job(store: Store, screen: Screen) -> Job:
    """Return the job as it was run, or, said aloud, one with the usual limits."""
    try:
        return read_saved(store.read(SPEC_KEY).decode(), store.uri_of(SPEC_KEY))
    except (StoreMissingError, SpecError, UnicodeDecodeError) as error:
        screen.print(f"references are read with the usual limits, since the job's own are unknown: {error}")
        return Job("evaluate", "report", Output(store.uri))
