"""A newcomer's path, timed: clone, the README's quickstart, a look at the result: `python -m benchmarks.newcomer`.

Clones the repository that this file lies in (what is committed, no more) into an empty folder, and runs there what
stands in its README below "Quickstart", command by command. It installs all packages, some 2.5 GB, and takes both
cores. Figures go to benchmarks/results/newcomer.json; a step that fails ends the path, and its output is shown.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bench import RESULTS, machine, write_json

REPOSITORY = Path(__file__).parents[1]
PAGE = "outputs/quickstart/synthesize/report/index.html"
OURS = ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS", "DITFLOW_PLUGINS", "MAKEFLAGS", "MAKELEVEL")
"""Variables of whoever runs this that a newcomer does not have."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def commands_of(readme: str) -> list[str]:
    """The command lines of the first block of bash below the heading "Quickstart", without their comments."""
    block = re.search(r"^## Quickstart$.*?^```bash$\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if block is None:
        raise ValueError('README.md has no block of bash below "## Quickstart": the path cannot be followed')
    return [shlex.join(words) for line in block[1].splitlines() if (words := shlex.split(line, comments=True))]


def step(command: str, folder: Path) -> dict[str, Any]:
    """Run a command line in a folder; return it with its seconds. Raises RuntimeError, with its output, if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    started = time.perf_counter()
    done = subprocess.run(["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True)
    seconds = round(time.perf_counter() - started, 1)
    print(f"{seconds:8.1f} s  {command}", flush=True)
    if done.returncode:
        raise RuntimeError(f"{command}: exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return {"command": command, "seconds": seconds, "output": done.stdout}


def look(folder: Path) -> dict[str, Any]:
    """Open the page in a browser without a window; return what it says of its rows, or why nobody looked."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return {
            "command": "open the page",
            "seconds": None,
            "says": f"not looked at: none of {', '.join(BROWSERS)} here",
        }
    options = "--headless --no-sandbox --disable-gpu --virtual-time-budget=10000 --dump-dom"
    made = step(f"{browser} {options} {(folder / PAGE).as_uri()}", folder)
    found = re.search(r'id="found"[^>]*>([^<]+)<', made["output"])
    if found is None:
        raise RuntimeError(f"{PAGE} shows no rows")
    return {"command": "open the page", "seconds": made["seconds"], "says": found[1].strip()}


def walk(folder: Path) -> list[dict[str, Any]]:
    """Take every step of the path, in an empty folder."""
    cloned = step(f"git clone --quiet {shlex.quote(str(REPOSITORY))} ditflow", folder)
    steps = [{**cloned, "command": "git clone REPOSITORY ditflow"}]  # where it lies is no concern of the figures
    clone = folder / "ditflow"
    steps += [step(command, clone) for command in commands_of((clone / "README.md").read_text())]
    return [*({key: value for key, value in one.items() if key != "output"} for one in steps), look(clone)]


def figures(steps: Sequence[dict[str, Any]], revision: str) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.newcomer",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision,
        "machine": machine(),
        "steps": steps,
        "seconds from clone to result": round(sum(one["seconds"] or 0 for one in steps), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the path from a clone to a result.")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which stays (default: one that goes)")
    parser.add_argument("--out", type=Path, default=RESULTS / "newcomer.json")
    asked = parser.parse_args()
    if asked.keep is not None and asked.keep.exists() and any(asked.keep.iterdir()):
        parser.error(f"--keep: {asked.keep} is not empty: a newcomer begins with nothing")
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = figures(walk(folder), revision)
        except RuntimeError as error:
            sys.exit(f"the path ended: {error}")
    print(f"{found['seconds from clone to result']:8.1f} s  in all")
    write_json(asked.out, found)


if __name__ == "__main__":
    main()
