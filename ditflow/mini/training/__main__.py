"""The command `python -m ditflow.mini.training`."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ditflow.mini.training.autoencoder import train_autoencoder
from ditflow.mini.training.kinds import KINDS
from ditflow.mini.training.loop import say
from ditflow.mini.training.recipe import RECIPES, Run
from ditflow.mini.training.transformer import train_transformer


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the requested stages one after the other, until they are done or out of time."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(
        out=options.out,
        device=torch.device(options.device),
        dtype=getattr(torch, options.precision),
        seed=options.seed,
        clips=options.clips,
        steps=options.steps,
        deadline=time.monotonic() + 60 * options.minutes,
    )
    for stage in RECIPES if options.stage == "all" else (options.stage,):
        done = train_transformer(stage, run) if stage in KINDS else train_autoencoder(stage, run)
        if not done:
            say(f"out of time in stage {stage}: run the same command again to continue")
            return
        say(f"stage {stage} is done")


def _parser() -> argparse.ArgumentParser:
    description = "Train the embedded models on the synthetic world."
    parser = argparse.ArgumentParser(prog="python -m ditflow.mini.training", description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, latents, pictures and models")
    parser.add_argument("--stage", choices=(*RECIPES, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; run again to continue")
    parser.add_argument("--steps", type=int, help="of every stage that runs; may be changed before the decay begins")
    parser.add_argument("--clips", type=int, default=Run.clips, help="encoded for the transformers")
    parser.add_argument("--seed", type=int, default=Run.seed)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    return parser


if __name__ == "__main__":
    main()
