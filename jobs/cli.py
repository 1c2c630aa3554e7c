"""The command line. Messages for people go to stderr, with --json machine-readable lines to stdout.

Exit status: 0 all rows ok; 3 the job finished but some rows failed; 2 the request is wrong; 1 anything else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.streams import ending_with_output, is_of_output, outlived, prepare, set_aside_no_width
from jobs.table import Screen, stdout_screen
from jobs.waiting import tell_of_waits

if TYPE_CHECKING:
    from ditflow.backbones.contract import TextLimit
    from ditflow.settings import MotionSettings
    from jobs.spec import ReadySpec
    from pipeline.job import Job
    from pipeline.lease import Holder
    from pipeline.manifest import Manifest
    from pipeline.measurements import Task
    from pipeline.plan import Plan

SOME_FAILED, WRONG_REQUEST, OTHER_ERROR = 3, 2, 1

app = typer.Typer(
    name="ditflow",
    help="Make new videos that move like reference videos: DiTFlow motion transfer, one clip or many thousand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
manifest_app = typer.Typer(help="Show and check a job's manifest.", no_args_is_help=True)
bank_app = typer.Typer(help="List, show, check and copy motion banks.", no_args_is_help=True)
mini_app = typer.Typer(help="The synthetic world of the embedded model.", no_args_is_help=True)
app.add_typer(manifest_app, name="manifest")
app.add_typer(bank_app, name="bank")
app.add_typer(mini_app, name="mini")

set_aside_no_width()
screen = Screen(stderr=True, soft_wrap=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print machine-readable lines on stdout.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Change a key of the spec: model.path=mini")]
ModelOption = Annotated[str, typer.Option(help="mini, mini-additive, a diffusers folder, or a hub id.")]
FramesOption = Annotated[int | None, typer.Option(help="Frames (default: the model's training size, or the bank's).")]
HeightOption = Annotated[int | None, typer.Option(help="Height in pixels.")]
StartOption = Annotated[int, typer.Option(help="First frame used.")]
StrideOption = Annotated[int, typer.Option(help="Every how many frames one is used.")]
MotionOption = Annotated[str, typer.Option(help="Where the motion comes from: attention or optical_flow.")]
MaskOption = Annotated[
    Path | None, typer.Option(help="Mask of the reference (picture or video): only what it shows guides.")
]
MaskObjectOption = Annotated[int | None, typer.Option(help="Object in the mask (default: all that is not 0).")]
WidthOption = Annotated[int | None, typer.Option(help="Width in pixels.")]
WhereOption = Annotated[
    str | None, typer.Option(help="Condition in SQL on the catalogue's columns: mean_displacement > 1.")
]
StorageOption = Annotated[str, typer.Option("--storage", help="fsspec options as JSON, such as an endpoint_url.")]


def main() -> None:
    """Run the command line; every expected error becomes one message and an exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _terminate)
    prepare()
    _end_in_time()
    tell_of_waits(screen.print)
    with ending_with_output():
        app()


_SECONDS_TO_STOP = 8.0
_STOPPED_WAITING = "stopped without waiting for what is still being read or written.\n"


def _end_in_time() -> None:
    """End this process soon after SIGINT, SIGTERM or SIGHUP: Python waits for all threads, whatever they wait for.

    The signal comes through a pipe, since handlers do not run while the main thread is in native code.
    """
    arrived, announced = os.pipe()
    os.set_blocking(announced, False)
    signal.set_wakeup_fd(announced, warn_on_full_buffer=False)

    def watch() -> None:
        number = None
        while number not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            number = os.read(arrived, 1)[0]
        time.sleep(_SECONDS_TO_STOP)
        os.write(2, _STOPPED_WAITING.encode())
        os._exit(128 + number)

    threading.Thread(target=watch, name="end in time", daemon=True).start()


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM or SIGHUP: the same as Ctrl-C."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


@contextmanager
def expected_errors() -> Iterator[None]:
    """Turn errors that a user can cause into a message and an exit status, and nothing else."""
    files = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
    try:
        yield
    except KeyboardInterrupt as stop:
        screen.print("stopped. Run the same command again to go on where it stopped.")
        number = stop.number if isinstance(stop, Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from stop
    except files as error:
        _fail(_told_of_file(error), WRONG_REQUEST)
    except Exception as error:
        if isinstance(error, typer.Exit) or is_of_output(error):
            raise
        status = _status_of(error)
        if status is None:  # a mistake of ours or of a library, which may quote what it was given
            from pipeline.store import redact

            sys.stderr.write(redact(traceback.format_exc()))
            raise typer.Exit(OTHER_ERROR) from None
        _fail(str(error), status)


def _told_of_file(error: OSError) -> str:
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder is gone: it was removed or replaced. Change to one that is there (cd)"
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)


def _status_of(error: Exception) -> int | None:
    """Return the exit status for an error that a user can cause; None for any other."""
    # Imported when it comes to that: they take seconds, which a quick command does not have.
    from pipeline.store import StoreError, StoreMissingError

    if isinstance(error, (ValueError, StoreMissingError)):
        return WRONG_REQUEST
    from jobs.shipping import LaunchError
    from pipeline.cluster import ClusterError
    from pipeline.faults import JobStoppedError
    from pipeline.lease import LeaseHeldError, LeaseLostError
    from pipeline.manifest import ManifestError

    others = (StoreError, ManifestError, JobStoppedError, LeaseHeldError, LeaseLostError, LaunchError, ClusterError)
    return OTHER_ERROR if isinstance(error, others) else None


def _fail(message: str, status: int) -> None:
    from pipeline.store import redact

    for line in redact(message).splitlines():
        screen.print(f"error: {line}", style="red")
    raise typer.Exit(status)


def _emit(**values: Any) -> None:
    print(json.dumps(values, default=str), flush=True)


# ------------------------------------------------------------------------------------------------------ one clip


@app.command()
def transfer(
    reference: Annotated[str, typer.Argument(help="Reference video. With --bank it may be left out.")],
    prompt: Annotated[str | None, typer.Argument(help="What the new video shows.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the new video goes.")] = Path("out.mp4"),
    method: Annotated[str, typer.Option(help="none, injection, motionclone, moft, smm or ditflow.")] = "ditflow",
    optimize: Annotated[str, typer.Option(help="latent, position or coordinates.")] = "latent",
    bank: Annotated[Path | None, typer.Option(help="Reuse a motion bank: nothing is optimised.")] = None,
    save_bank: Annotated[
        Path | None, typer.Option(help="Keep the learned positions (--optimize position or coordinates).")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the loss curve into this PNG.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw reference, motion and result, one above the other, into this PNG.")
    ] = None,
    model: ModelOption = "mini",
    frames: FramesOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    start: StartOption = 0,
    stride: StrideOption = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (default: the model's).")] = None,
    guided_steps: Annotated[int | None, typer.Option(help="Guided steps (default: the model's).")] = None,
    noise_candidates: Annotated[int, typer.Option(help="Initial noises to choose from, by their motion loss.")] = 1,
    injection: Annotated[bool, typer.Option(help="Inject the reference's keys and values.")] = True,
    motion: MotionOption = "attention",
    mask: MaskOption = None,
    mask_object: MaskObjectOption = None,
    seed: int = 0,
    as_json: JsonFlag = False,
) -> None:
    """Make one video that moves like a reference. No Ray, no job spec.

    \b
    ditflow transfer bmx.mp4 "a leopard running up a snowy hill" -o leopard.mp4 --plot loss.png
    ditflow transfer bmx.mp4 "a leopard ..." --optimize position --save-bank bmx.safetensors
    ditflow transfer --bank bmx.safetensors "a tractor on a field" -o tractor.mp4
    """
    from ditflow.banks.bank import MotionBank
    from ditflow.settings import MethodSettings, SamplingSettings
    from jobs import single

    if prompt is None:
        if bank is None:
            _fail("PROMPT is missing: give REFERENCE and PROMPT; only with --bank is PROMPT enough", WRONG_REQUEST)
        prompt = reference
    with outlived(), expected_errors():
        summary = single.transfer(
            single.ReferenceClip(reference, frames, height, width, start, stride, mask)
            if bank is None
            else single.ReusedBank(MotionBank.from_bytes(bank.read_bytes(), str(bank)), frames, height, width),
            prompt,
            output,
            model=model,
            method=MethodSettings(
                name=method,
                optimize=optimize,  # type: ignore[arg-type]  # checked there
                guided_steps=guided_steps,
                noise_candidates=noise_candidates,
                injection=injection,
                motion=_motion(motion, mask, mask_object),
            ),
            sampling=SamplingSettings(steps=steps),
            seed=seed,
            screen=screen,
            save_bank=save_bank,
            plot=plot,
            picture=picture,
        )
        if as_json:
            _emit(**summary)


@app.command()
def extract(
    reference: Annotated[str, typer.Argument(help="Reference video.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the motion goes (safetensors).")],
    plot: Annotated[Path | None, typer.Option(help="Draw the motion over the frames into this PNG.")] = None,
    block: Annotated[int | None, typer.Option(help="Transformer block (default: the model's).")] = None,
    model: ModelOption = "mini",
    frames: FramesOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    start: StartOption = 0,
    stride: StrideOption = 1,
    motion: MotionOption = "attention",
    mask: MaskOption = None,
    mask_object: MaskObjectOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Extract the motion of a video, and draw it.

    \b
    ditflow extract bmx.mp4 -o bmx.safetensors --plot bmx.png
    """
    from ditflow.settings import MethodSettings
    from jobs import single

    with outlived(), expected_errors():
        summary = single.extract(
            single.ReferenceClip(reference, frames, height, width, start, stride, mask),
            output,
            model=model,
            method=MethodSettings(
                blocks=None if block is None else (block,), motion=_motion(motion, mask, mask_object)
            ),
            screen=screen,
            plot=plot,
        )
        if as_json:
            _emit(**summary)


def _motion(source: str, mask: Path | None, number: int | None) -> MotionSettings:
    from ditflow.settings import MotionSettings

    if number is not None and mask is None:
        _fail("--mask-object chooses from a mask: give --mask as well", WRONG_REQUEST)
    return MotionSettings(source, () if mask is None else ({"mask": {"object": number}},))


# ---------------------------------------------------------------------------------------------------------- jobs


@app.command()
def plan(
    job: Annotated[Path, typer.Argument(help="Job spec (YAML).")],
    set_: SetOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a job and count its rows to do, done and failed. Starts nothing.

    \b
    ditflow plan jobs/quickstart.yaml --set seeds=[1,2,3]
    """
    with expected_errors():
        from jobs.spec import check_output, load_spec

        spec = load_spec(job, set_ or ())
        if spec.job.kind == "evaluate":
            todo = len(_to_measure(spec.job))
            if as_json:
                _emit(name=spec.job.name, kind=spec.job.kind, todo=todo)
            return
        check_output(spec.job)
        planned = _plan_of(spec, retry=())
        cut = _print_plan(spec, planned)
        if as_json:
            counts = {"rows": planned.total, **planned.counts, "prompts_cut": cut}
            _emit(name=spec.job.name, kind=spec.job.kind, **counts)


@app.command()
def run(
    jobs: Annotated[list[Path], typer.Argument(help="Job specs (YAML), run one after the other.")],
    set_: SetOption = None,
    retry: Annotated[list[str] | None, typer.Option(help="Do rows again that ended as: failed, quarantined.")] = None,
    allow_failed_rows: Annotated[
        bool, typer.Option("--allow-failed-rows", help="End with 0 also then: for what would run the job again.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run a job, or go on with it: only rows without a record are done.

    Runs on this machine, or on the Ray cluster at RAY_ADDRESS.

    \b
    ditflow run jobs/quickstart.yaml
    ditflow run my-job.yaml --set model.path=mini --retry failed
    """
    with outlived(), expected_errors():
        valid = {"failed", "quarantined"}
        if not set(retry or ()) <= valid:
            raise ValueError(f"--retry: {retry} is not valid: expected {' or '.join(sorted(valid))}")
        ok = [_run_one(job, set_, tuple(retry or ()), as_json) for job in jobs]
    if not (all(ok) or allow_failed_rows):
        raise typer.Exit(SOME_FAILED)


def _run_one(path: Path, overrides: list[str] | None, retry: tuple[str, ...], as_json: bool) -> bool:
    """Run one job; return whether all its rows are ok."""
    from jobs.spec import check_output, load_spec
    from pipeline.cluster import check_address
    from pipeline.run import sole_run

    check_address()
    spec = load_spec(path, overrides or ())
    if spec.job.kind == "evaluate":
        return _evaluate_job(spec.job, as_json)
    check_output(spec.job)
    with sole_run(spec.job, _tell_of_wait):
        planned = _plan_of(spec, retry)
        _print_plan(spec, planned)
        failed = sum(planned.counts.get(ended, 0) for ended in ("failed", "quarantined"))
        if planned.todo:
            failed += _run_rows(spec, planned, as_json)
    if failed:
        screen.print(f"{failed} rows failed: ditflow manifest show {spec.job.output.uri} --status failed")
    return failed == 0


def _tell_of_wait(holder: Holder) -> None:
    screen.print(f"another run has left no word that it ended ({holder}): waiting to see whether it lives")


def _run_rows(spec: ReadySpec, planned: Plan, as_json: bool) -> int:
    """Do the rows of a plan, showing each as it ends; return how many failed."""
    from pipeline.run import run_plan

    with _shown_rows(spec.job, len(planned.todo), as_json, planned.motions) as on_row:
        tally = run_plan(spec.job, planned, spec.model.revision, spec.yaml, on_row, screen.print)
    screen.print(
        f"{spec.job.name}: this run ended {tally.ok} ok, {tally.failed} failed, {tally.quarantined} quarantined"
    )
    return tally.not_ok


@contextmanager
def _shown_rows(
    job: Job, rows: int, as_json: bool, motions: Collection[str] = ()
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a job's progress; what it lends takes each row as it ends."""
    from jobs.progress import RowProgress

    with RowProgress(job.name, rows, screen, job.store(), motions) as progress:

        def on_row(row: dict[str, Any]) -> None:
            progress.show(row)
            if as_json:
                _emit(**row)

        yield on_row


def _plan_of(spec: ReadySpec, retry: tuple[str, ...]) -> Plan:
    from pipeline.plan import make_plan

    return make_plan(spec.job, spec.model.revision, retry)


def _evaluate_job(job: Job, as_json: bool) -> bool:
    """Measure what is not measured yet; return whether all rows could be."""
    from pipeline.run import run_evaluation

    tasks = _to_measure(job)
    with _shown_rows(job, len(tasks), as_json) as on_row:
        tally = run_evaluation(job, tasks, on_row, screen.print)
    return tally.not_ok == 0


def _to_measure(job: Job) -> list[Task]:
    """Return, and say, what of a finished job is not measured yet."""
    from ditflow.metrics.clip_similarity import PromptSimilarity, read_text_limit
    from pipeline.measurements import Measurements

    tasks = Measurements(job.store()).todo(job.metrics)
    screen.print(f"{job.name}: {len(tasks)} rows of {job.output.uri} to measure: {', '.join(job.metrics.names)}")
    prompts = {task.row["prompt"] for task in tasks if PromptSimilarity.name in task.metrics and task.row["prompt"]}
    if prompts and job.metrics.clip is not None:
        with suppress(OSError, ValueError):  # what is wrong with the folder, its first row tells
            _warn_of_cut(read_text_limit(job.metrics.clip), prompts, "prompts", "CLIP", "")
    return tasks


def _print_plan(spec: ReadySpec, planned: Plan) -> int | None:
    """Say what is planned; return how many prompts are too long for the model, None if that is not known."""
    from ditflow import backbones
    from pipeline.cache import local_model

    counts = ", ".join(f"{count} {status}" for status, count in planned.counts.items())
    extra = f" ({planned.duplicates} duplicates of other rows are made once)" if planned.duplicates else ""
    screen.print(f"{spec.job.name}: {planned.total} rows of kind {spec.job.kind}: {counts}{extra}")
    screen.print(f"  output {spec.job.output.uri}, model {spec.model.path} ({spec.model.revision})")
    try:
        limit = backbones.read_text_limit(local_model(spec.job))
    except (OSError, ValueError) as error:  # what else such a folder lacks, the first row tells
        screen.print(
            f"warning: the lengths of the prompts were not checked, the model's tokenizer cannot be read: {error}"
        )
        return None
    for key, texts in planned.other_texts(spec.job).items():
        _warn_of_cut(limit, texts, f"texts of {key}", "the model", "")
    marked = " The manifest marks their rows (prompt_cut)."
    return _warn_of_cut(limit, planned.prompts, "prompts", "the model", marked)


def _warn_of_cut(limit: TextLimit, texts: Collection[str], what: str, reader: str, more: str) -> int:
    """Warn of texts that are longer than a text encoder reads; return how many are."""

    cut = limit.too_long(texts)
    if cut:
        first, tokens = next(iter(cut.items()))
        screen.print(
            f"warning: {len(cut)} of {len(texts)} {what} are longer than the {limit.tokens} tokens that {reader} "
            f"reads; what comes after these changes nothing.{more} "
            f"The first, of {tokens} tokens: {first:.100}"
        )
    return len(cut)


@app.command()
def submit(
    job: Annotated[Path | None, typer.Argument(help="Job spec (YAML). With --follow it is left out.")] = None,
    to: Annotated[str, typer.Option(help="ray (a cluster that runs) or kuberay (Kubernetes).")] = "ray",
    set_: SetOption = None,
    address: Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help="ray: http://head:8265")] = None,
    wait: Annotated[bool, typer.Option(help="ray: follow the log until the job ends.")] = True,
    follow: Annotated[str | None, typer.Option(help="ray: id of a job to follow again.")] = None,
    profile: Annotated[Path, typer.Option(help="kuberay: what the cluster is like.")] = Path(
        "infra/kuberay/profile.yaml"
    ),
    name: Annotated[str | None, typer.Option(help="kuberay: instead of the job's own name.")] = None,
    schedule: Annotated[str | None, typer.Option(help="kuberay: run at these times: '0 2 * * *'")] = None,
    cron: Annotated[str, typer.Option(help="kuberay: what makes the runs: cronjob or raycronjob.")] = "cronjob",
    queue: Annotated[str | None, typer.Option(help="kuberay: Kueue's queue.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="kuberay: print the manifests, change nothing.")] = False,
) -> None:
    """Hand a job to a cluster. To ray, its log is followed; who stops following does not stop the job.

    \b
    ditflow submit job.yaml --address http://ray-head:8265
    ditflow submit --follow raysubmit_aBcDeFgH --address http://ray-head:8265
    ditflow submit jobs/nightly-synthesis.yaml --to kuberay --schedule "0 2 * * *" --dry-run
    """
    from jobs.launch import Request, Wish, start

    with expected_errors():
        wish = Wish(name, schedule, cron, queue)
        status = start(Request(to, job, tuple(set_ or ()), address, wait, follow, profile, wish, dry_run), screen)
    if status:
        raise typer.Exit(status)


@app.command()
def status(
    output: Annotated[str, typer.Argument(help="Output folder of a job.")],
    watch: Annotated[float | None, typer.Option(help="Again after so many seconds, until the job is at rest.")] = None,
    storage: StorageOption = "{}",
    as_json: JsonFlag = False,
) -> None:
    """Show how a job goes, from its output alone: who runs it, rows, pace, losses, times, what is in flight, failures.

    \b
    ditflow status s3://bucket/runs/running-things --watch 60
    """
    with expected_errors():
        from jobs.status import show_status

        show_status(_store(output, storage), screen, as_json, watch)


@app.command()
def evaluate(
    output: Annotated[str, typer.Argument(help="Output folder of a finished job.")],
    metric: Annotated[list[str] | None, typer.Option(help="Metrics, by name (default: what needs no weights).")] = None,
    tracker: Annotated[str, typer.Option(help="dis, lucas-kanade or cotracker3.")] = "dis",
    tracker_weights: Annotated[Path | None, typer.Option(help="TorchScript file of CoTracker3.")] = None,
    variant: Annotated[str, typer.Option(help="Motion fidelity: symmetric or official.")] = "symmetric",
    clip: Annotated[Path | None, typer.Option(help="CLIP folder, for prompt_similarity and frame_consistency.")] = None,
    device: Annotated[str, typer.Option(help="Where CLIP and CoTracker run: cpu, cuda.")] = "cpu",
    baseline: Annotated[str | None, typer.Option(help="Compare with this method (default: the plain model).")] = None,
    table: Annotated[list[Path] | None, typer.Option(help="Write the table: .csv, .tex, .json or .png.")] = None,
    storage: StorageOption = "{}",
    as_json: JsonFlag = False,
) -> None:
    """Measure a finished job's videos, and compare its methods.

    \b
    ditflow evaluate outputs/quickstart/synthesize
    ditflow evaluate s3://bucket/runs/table --metric motion_fidelity --metric prompt_similarity --clip /models/clip \\
        --table table.csv --table table.png
    """
    from ditflow.metrics.base import MetricSettings
    from jobs.display import print_comparison, write_comparison
    from pipeline.comparison import compare
    from pipeline.job import Job, Output

    with outlived(), expected_errors():
        settings = MetricSettings(
            names=tuple(metric or MetricSettings.names),
            tracker=tracker,
            tracker_weights=str(tracker_weights) if tracker_weights else None,
            variant=variant,  # type: ignore[arg-type]  # checked there
            clip=str(clip) if clip else None,
            device=device,
        )
        store = _store(output, storage)
        job = Job("evaluate", "evaluate", Output(output), metrics=settings, storage_options=_options(storage))
        measured = _evaluate_job(job, as_json=False)
        comparison = compare(store, settings, baseline)
        for file in table or ():
            write_comparison(comparison, file)
        _emit(**comparison.to_dict()) if as_json else print_comparison(comparison)
    if not measured:
        raise typer.Exit(SOME_FAILED)


@app.command()
def report(
    output: Annotated[str, typer.Argument(help="Output folder of a job.")],
    references: Annotated[bool, typer.Option(help="Also show the reference videos, read from where they are.")] = True,
    storage: StorageOption = "{}",
    as_json: JsonFlag = False,
) -> None:
    """Write a gallery to look at: OUT/report/index.html, for any browser. Again, it brings it up to date.

    \b
    ditflow report outputs/quickstart/synthesize
    """
    from dataclasses import asdict

    from jobs.gallery import write_gallery

    with outlived(), expected_errors():
        written = write_gallery(_store(output, storage), references, screen)
        if as_json:
            _emit(**asdict(written))


@manifest_app.command("show")
def manifest_show(
    output: Annotated[str, typer.Argument(help="Output folder of a job.")],
    status: Annotated[str | None, typer.Option(help="Only rows with this status.")] = None,
    columns: Annotated[str | None, typer.Option(help="Columns, separated by commas, or 'all'.")] = None,
    storage: StorageOption = "{}",
    as_json: JsonFlag = False,
) -> None:
    """Show the manifest as a table; with --json, a line per row."""
    from jobs.table import print_rows
    from pipeline.manifest import Manifest
    from pipeline.record import COLUMN_NAMES, STATUSES

    shown = ["row_id", "status", "prompt", "seed", "loss_first", "loss_final", "seconds_total", "error_message"]
    if columns is not None:
        shown = list(COLUMN_NAMES) if columns == "all" else columns.split(",")
    with expected_errors():
        if status not in (None, *STATUSES):
            raise ValueError(f"--status: {status!r} is not valid: expected {', '.join(STATUSES)}")
        table = Manifest(_store(output, storage)).read(list(dict.fromkeys(["status", *shown])))
        rows = [row for row in table.to_pylist() if status in (None, row["status"])]
        for row in rows if as_json else ():
            _emit(**{name: row[name] for name in shown})
        if not as_json:
            print_rows(shown, rows)


@manifest_app.command("compact")
def manifest_compact(
    output: Annotated[str, typer.Argument(help="Output folder of a job at rest.")],
    storage: StorageOption = "{}",
    as_json: JsonFlag = False,
) -> None:
    """Merge the manifest's small files into large ones, so that it is read fast. No row is lost or doubled."""
    from pipeline.lease import Lease
    from pipeline.manifest import Manifest

    with outlived(), expected_errors():
        with Lease(_store(output, storage), on_wait=_tell_of_wait):
            merged = Manifest(_store(output, storage)).compact()
        screen.print(f"{merged} files of single rows merged")
        if as_json:
            _emit(merged=merged)


@manifest_app.command("verify")
def manifest_verify(
    output: Annotated[str, typer.Argument(help="Output folder of a job.")],
    hashes: Annotated[bool, typer.Option(help="Read every output and check its hash.")] = True,
    clean: Annotated[bool, typer.Option("--clean", help="First list what killed runs left behind.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --clean: remove it.")] = False,
    storage: StorageOption = "{}",
    as_json: JsonFlag = False,
) -> None:
    """Check every output of the manifest: there, of the right size, with the right hash, and nothing else there.

    --clean, for a job at rest, lists outputs that no record names, and unfinished files; --clean --yes removes them.
    """
    from dataclasses import asdict

    from pipeline.manifest import Manifest

    with expected_errors():
        manifest = Manifest(_store(output, storage))
        if yes and not clean:
            raise ValueError("--yes: it says that what --clean lists is removed: give --clean too")
        if clean:
            _clean(manifest, yes)
        problems = manifest.verify(check_hashes=hashes)
        damaged = any(problem.kind == "manifest_unreadable" for problem in problems)
        rows = "unknown" if damaged else len(manifest.statuses())
    show = stdout_screen()
    for problem in problems:
        told = f"{problem.kind}: {problem.row_id or ''} {problem.detail}"
        _emit(**asdict(problem)) if as_json else show.print(told, soft_wrap=True)
    screen.print(f"{rows} rows, {len(problems)} problems")
    if problems:
        raise typer.Exit(OTHER_ERROR)


def _clean(manifest: Manifest, remove: bool) -> None:
    """Say what killed runs have left in a job's folder, and remove it if that is wanted."""
    from pipeline.faults import Ledger
    from pipeline.lease import Lease

    said = "removed" if remove else "would be removed:"
    with Lease(manifest.store, on_wait=_tell_of_wait):
        left, unfinished = manifest.leftovers(), manifest.store.unfinished()
        for key in [*(problem.key for problem in left), *unfinished]:
            screen.print(f"{said} {key}")
        if remove:
            manifest.clean()
            Ledger(manifest.store).end_all(manifest.statuses())
            manifest.store.remove_unfinished()
    if not remove:
        screen.print("nothing was removed: --clean --yes does it")


@bank_app.command("list")
def bank_list(
    banks: Annotated[str, typer.Argument(help="A folder of banks, or the output of a build-bank job.")],
    where: WhereOption = None,
    sort: Annotated[str | None, typer.Option(help="Column to sort by; with a '-' before it, the other way.")] = None,
    limit: Annotated[int | None, typer.Option(help="Show so many.", min=1)] = None,
    storage: StorageOption = "{}",
    as_json: JsonFlag = False,
) -> None:
    """List motion banks, with model, motion, losses and tags; with --json, a line per bank and all columns.

    \b
    ditflow bank list s3://bucket/runs/banks --sort loss_final --limit 20
    ditflow bank list banks --where "mean_displacement > 1 AND loss_final < 0.2 AND list_contains(tags, 'walk')"
    """
    from jobs.banks import SHOWN, listed
    from jobs.table import print_rows

    with expected_errors():
        rows = listed(banks, _options(storage), where, sort, limit, screen.print)
        for row in rows if as_json else ():
            _emit(**row)
        if not as_json:
            print_rows(SHOWN, rows)


@bank_app.command("show")
def bank_show(
    bank: Annotated[str, typer.Argument(help="A bank's file (path or URI).")],
    plot: Annotated[Path | None, typer.Option(help="Draw the reference's motion flow into this PNG.")] = None,
    storage: StorageOption = "{}",
) -> None:
    """Show all that a motion bank says of itself, as JSON, and draw its motion."""
    from jobs.banks import shown

    with expected_errors():
        print(json.dumps(shown(bank, _options(storage), plot), indent=2))


@bank_app.command("verify")
def bank_verify(
    banks: Annotated[str, typer.Argument(help="A bank, a folder of banks, or the output of a build-bank job.")],
    storage: StorageOption = "{}",
    as_json: JsonFlag = False,
) -> None:
    """Read every bank whole, and check it by its hashes and its job's manifest."""
    from dataclasses import asdict

    with expected_errors():
        from pipeline.bank_files import check_banks

        count, problems = check_banks(banks, _options(storage))
    show = stdout_screen()
    for problem in problems:
        _emit(**asdict(problem)) if as_json else show.print(f"{problem.key}: {problem.detail}", soft_wrap=True)
    screen.print(f"{count} banks, {len(problems)} problems")
    if problems:
        raise typer.Exit(OTHER_ERROR)


@bank_app.command("export")
def bank_export(
    banks: Annotated[str, typer.Argument(help="A folder of banks, or the output of a build-bank job.")],
    target: Annotated[str, typer.Argument(help="Folder that the copies go to (path or URI).")],
    where: WhereOption = None,
    storage: StorageOption = "{}",
) -> None:
    """Copy motion banks to another folder, byte for byte, with a catalogue; it can be the banks.uri of a reuse job.

    \b
    ditflow bank export outputs/banks s3://bucket/walks --where "list_contains(tags, 'walk')"
    """
    with outlived(), expected_errors():
        from jobs.banks import exported

        count = exported(banks, target, _options(storage), where, screen.print)
        screen.print(f"{count} banks copied to {target}")


def _store(output: str, storage: str) -> Any:
    from pipeline.store import Store, StoreMissingError

    store = Store(output, _options(storage))
    if not (store.exists("job.yaml") or store.sizes("manifest") or store.sizes("banks")):
        raise StoreMissingError(f"there is no job in {store.uri}: no job.yaml, manifest or banks. Check its spelling.")
    return store


def _options(storage: str) -> dict[str, Any]:
    try:
        options = json.loads(storage)
    except ValueError as error:
        raise ValueError(f"--storage: {storage!r} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f'--storage: {storage!r} is not valid: expected a JSON object, such as {{"anon": true}}')
    return options


# ------------------------------------------------------------------------------------------------------ the rest


@app.command()
def doctor(
    model: ModelOption = "mini",
    output: Annotated[str | None, typer.Option(help="Also check that this output folder can be written to.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check what works here: Python, GPU, video codecs, model folder, storage."""
    from jobs.doctor import examine

    findings = list(examine(model, output))
    for finding in findings:
        if as_json:
            _emit(**finding)
        else:
            screen.print(f"{'ok  ' if finding['ok'] else 'FAIL'} {finding['what']}: {finding['found']}")
    if not all(finding["ok"] for finding in findings):
        raise typer.Exit(OTHER_ERROR)


@app.command("frames-to-clips")
def frames_to_clips(
    frames_folder: Annotated[Path, typer.Argument(help="Folder with a folder of pictures for each clip.")],
    out_folder: Annotated[Path, typer.Argument(help="Where the clips go, as mp4.")],
    fps: Annotated[float, typer.Option(help="Frames per second of the clips.")] = 24.0,
) -> None:
    """Make a video of every folder of pictures (jpg, png), named after it. Existing files are kept.

    \b
    ditflow frames-to-clips DAVIS/JPEGImages/480p outputs/paper-table/references
    """
    from jobs.clips import encode_frame_folders

    with outlived(), expected_errors():
        for clip in encode_frame_folders(frames_folder, out_folder, fps):
            screen.print(str(clip))


@mini_app.command("clips")
def mini_clips(
    folder: Annotated[Path, typer.Argument(help="Where the clips go.")],
    count: Annotated[int, typer.Option(help="How many.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = 0,
    sprites: Annotated[int | None, typer.Option(help="In every clip; left out: one or two.", min=1, max=2)] = None,
) -> None:
    """Render clips of the synthetic world, with known motion, as reference videos. Existing files are kept."""
    from jobs.clips import render_clips

    with outlived(), expected_errors():
        render_clips(folder, count, seed, sprites)


@mini_app.command("pairs")
def mini_pairs(
    folder: Annotated[Path, typer.Argument(help="Where the clips and pairs.csv go.")],
    count: Annotated[int, typer.Option(help="How many.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = 0,
) -> None:
    """Render clips of one sprite, and a table that pairs each with a prompt: what the comparison jobs run on."""
    from jobs.clips import render_pairs

    with outlived(), expected_errors():
        render_pairs(folder, count, seed)
