"""Running a small real job in a test's own process."""

from pathlib import Path

import yaml

from jobs.spec import ReadySpec, load_spec
from pipeline.plan import make_plan
from pipeline.run import Tally, run_plan


def write_spec(folder: Path, **changes) -> Path:
    """A spec of the quickest real job: three steps, two of them guided."""
    spec = {
        "kind": "synthesize",
        "name": "test",
        "model": {"path": "mini"},
        "references": {"uri": str(folder / "references"), "frames": 9, "height": 32, "width": 32, "stride": 2},
        "prompts": ["a red ball moving over grass"],
        "seeds": [1],
        "method": {"name": "ditflow", "optimize": "latent", "guided_steps": 2, "iterations": 2},
        "sampling": {"steps": 3},
        "output": {"uri": str(folder / "out")},
        "faults": {"base_seconds": 0, "max_seconds": 0},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({**spec, **changes}))
    return file


def run(file: Path, *, retry: tuple[str, ...] = ()) -> tuple[ReadySpec, Tally, list[dict]]:
    """Run a spec in this process; return it, the tally and the rows in the order they ended."""
    spec, rows = load_spec(file), []
    plan = make_plan(spec.job, spec.model.revision, retry)
    tally = run_plan(spec.job, plan, spec.model.revision, spec.yaml, rows.append)
    return spec, tally, rows
