"""The command: see the package."""

import argparse
import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import benchmarks.fuzz
from benchmarks.fuzz.search import fuzz
from benchmarks.fuzz.targets import TARGETS

_ABOUT = str(benchmarks.fuzz.__doc__).split("\n\n")[0]


def main() -> None:
    """Search for the time given, and say what came."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=_ABOUT)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="which readers; all, if none is named")
    parser.add_argument("--seconds", type=float, default=600, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/fuzz"), help="where an offending input is saved")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a mutated spec may allow downloads
    _silence()
    findings = 0
    for name in asked.targets or TARGETS:
        report = fuzz(name, asked.seconds, asked.seed, asked.folder)
        print(json.dumps(asdict(report)), flush=True)
        findings += report.finding is not None
    sys.exit(findings)


def _silence() -> None:
    """Nobody needs to hear what libraries have to say of files that are meant to be broken."""
    import av
    import diffusers
    import transformers

    av.logging.set_level(av.logging.PANIC)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("ditflow").propagate = False  # the search listens
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
