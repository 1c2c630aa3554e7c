"""How motion banks are best learned: `python -m benchmarks.bank_recipes`.

Part `zero-shot` measures the default way over many held-out references: a bank is learned of each, and reused with two
prompts and noise that it has not seen. Beside it, with the same prompts and noise: plain generation, and guidance that
optimises the positions for every video (the paper's). Part `recipes` learns the banks in other ways, of fewer
references. Part `compaction` keeps less and less of the same banks, and part `sizes of videos` stretches them to videos
of other sizes. Means come with 95 % bootstrap intervals over references, and paired differences. Part `sizes` counts
bytes at the shapes of CogVideoX. Figures go to benchmarks/results/bank-recipes.json, each way with its command and
commit; models, parts and ways that are not measured again keep theirs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.bench import RESULTS, command, commit, machine, write_json
from benchmarks.mini import MODELS, Bench, Scores, load, score_generation, shot_of, start_workers, summary
from ditflow import transfer_motion
from ditflow.backbones.contract import Backbone
from ditflow.banks.bank import BankHeader, MotionBank
from ditflow.metrics.statistics import paired_difference
from ditflow.mini.world import Scene, WorldClip, prompt_of, render, sample_pair, swap_appearance
from ditflow.motion.reference import MotionReference, extract_motion
from ditflow.sampling.positions import PositionVariable
from ditflow.settings import MethodSettings, settings_dict
from ditflow.transfer import learn_bank
from ditflow.types import TokenGrid
from pipeline.job import Output

FIRST_SEED, OTHER_LOOKS, LEARNED_LOOKS = 5000, 50_000, 60_000
PROMPTS = 2
DEFAULT = MethodSettings(optimize="coordinates", preset="lasting")
GUIDED = MethodSettings(optimize="position")
REUSED = MethodSettings(optimize="position")
"""Of a bank: its reference is injected, and nothing optimised."""
IN_THE_PASS = MethodSettings(optimize="coordinates", learning_rate=(0.15, 0.075))
RECIPES = {
    "position, as the paper": GUIDED,
    "position, lasting": MethodSettings(optimize="position", preset="lasting"),
    "coordinates, as the paper's positions": IN_THE_PASS,
    "coordinates, lasting, Adam": replace(DEFAULT, optimizer="adam"),
    "coordinates, lasting, moving entries only": replace(DEFAULT, loss={"entries": "nonzero"}),
    "coordinates, lasting": DEFAULT,
}
ONE_PROMPT = "coordinates, lasting, one prompt"
BRIEF = "coordinates, lasting, injected in the guided steps only"
OPTIMISED = "coordinates, guided for every video"
MOVED = "coordinates, moved along the flow, not learned"
STARTED = "coordinates, lasting, learned from where the flow moves them"
OTHER_SIZES = ((17, 80, 80), (17, 64, 96), (25, 64, 64))
BANK_ERROR = Output("").bank_error
ERRORS = (0.01, 0.03, 0.1, 0.3, 0.6)
FIGURES = ("track_cosine", "position_error", "motion_fidelity", "colour", "shape", "background")
WORDS = ("colour", "shape", "background")
Ways = Mapping[str, Callable[[], Scores]]
"""What scores a reference in every way, by name; a bank is learned when the first of its ways is scored."""


# ---- one reference


def zero_shot_ways(backbone: Backbone, clip: WorldClip, seed: int) -> Ways:
    """The default way, beside what is done without a bank."""
    bank = partial(learned, backbone, clip, DEFAULT, seed)
    return {**ways_without(backbone, clip, seed), "coordinates, lasting": lambda: reused(backbone, clip, seed, bank())}


def recipe_ways(backbone: Backbone, clip: WorldClip, seed: int) -> Ways:
    """Every recipe, a bank that nobody learned, and guidance by coordinates; with what the banks come to."""
    learn = cache(partial(learned, backbone, clip, seed=seed))
    banks: dict[str, Callable[[], MotionBank]] = {name: partial(learn, method) for name, method in RECIPES.items()}

    def brief() -> MotionBank:
        bank = learn(DEFAULT)
        return replace(bank, header=replace(bank.header, injected_steps=None))

    @cache
    def moved() -> MotionBank:
        return moved_along_the_flow(backbone, extract_motion(backbone, clip.frames, DEFAULT))

    def started() -> MotionBank:
        with mock.patch.object(PositionVariable, "zero", return_value=moved().offsets(0)):
            return learned(backbone, clip, DEFAULT, seed)

    banks |= {BRIEF: brief, ONE_PROMPT: partial(learn, DEFAULT, prompts=1), STARTED: started}

    def with_size(make_bank: Callable[[], MotionBank]) -> Scores:
        bank = make_bank()
        return reused(backbone, clip, seed, bank) | {
            "loss_final": bank.header.losses[-1][-1],
            "times smaller": times_smaller(backbone, bank.compressed(BANK_ERROR)),
        }

    return {
        **ways_without(backbone, clip, seed),
        **{name: partial(with_size, make_bank) for name, make_bank in banks.items()},
        MOVED: lambda: reused(backbone, clip, seed, moved()),
        OPTIMISED: partial(mean_scores, backbone, clip, seed, clip, IN_THE_PASS),
    }


def compaction_ways(backbone: Backbone, clip: WorldClip, seed: int) -> Ways:
    """A bank of which more and more is left out, with its size against fp32 positions."""
    learn = cache(partial(learned, backbone, clip, seed=seed))

    def compacted(name: str, error: float) -> Scores:
        kept = learn(RECIPES[name]).compressed(error)
        return reused(backbone, clip, seed, kept) | {"times smaller": times_smaller(backbone, kept)}

    return {
        f"{name}, error {error:g}": partial(compacted, name, error)
        for name in ("coordinates, lasting", "position, lasting")
        for error in (0.0, *ERRORS)
    }


def other_size_ways(backbone: Backbone, clip: WorldClip, seed: int) -> Ways:
    """A bank in videos of other sizes than it was learned at, beside what is done without it."""
    learn = cache(partial(learned, backbone, clip, DEFAULT, seed))
    learned_at = clip.frames.shape[:3]

    def resized(shown: WorldClip) -> Scores:
        return reused(backbone, shown, seed, learn().resized(backbone.layout, shown.frames.shape[:3]))

    ways: dict[str, Callable[[], Scores]] = {}
    for size in (learned_at, *OTHER_SIZES):
        shown = render(clip.scene, *size)
        ways |= {f"{name}, {_sides(size)}": way for name, way in ways_without(backbone, shown, seed).items()}
        ways[f"a bank of {_sides(learned_at)}, {_sides(size)}"] = partial(resized, shown)
    return ways


def _sides(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def ways_without(backbone: Backbone, clip: WorldClip, seed: int) -> dict[str, Callable[[], Scores]]:
    """Plain generation, and guidance for every video."""
    return {
        "plain": partial(mean_scores, backbone, clip, seed, None, MethodSettings(name="none")),
        "guided for every video": partial(mean_scores, backbone, clip, seed, clip, GUIDED),
    }


def reused(backbone: Backbone, clip: WorldClip, seed: int, bank: MotionBank) -> Scores:
    """Score the reuse of a bank."""
    return mean_scores(backbone, clip, seed, bank, REUSED)


def learned(
    backbone: Backbone, clip: WorldClip, method: MethodSettings, seed: int, prompts: int | None = None
) -> MotionBank:
    """Learn a bank with so many prompts, or as many as the method has drafts; none of them is measured."""
    prompts = prompts or method.resolve(backbone.defaults).drafts
    prompt, *others = itertools.islice(learning_prompts(clip.scene, seed), prompts)
    method = replace(method, more_prompts=tuple(others))
    reference, size = extract_motion(backbone, clip.frames, method), clip.frames.shape[:3]
    bank = learn_bank(backbone, prompt, reference=reference, size=size, method=method, seed=seed + LEARNED_LOOKS).bank
    assert bank is not None
    return bank


def learning_prompts(scene: Scene, seed: int) -> Iterator[str]:
    """Yield different prompts, with the looks of other clips, which no target of the seed has."""
    told = {prompt_of(target) for target in targets_of(scene, seed)}
    for number in itertools.count():
        look = sample_pair(seed + LEARNED_LOOKS + 1000 * number, "eval", sprites=1)[1]
        prompt = prompt_of(swap_appearance(scene, look))
        if prompt not in told:
            told.add(prompt)
            yield prompt


def moved_along_the_flow(backbone: Backbone, motion: MotionReference) -> MotionBank:
    """A bank that nobody learned: every token is moved to its mean place over all frames, as the flow tells."""
    grid = motion.grid
    places = motion.displacement.float().mean(dim=1).flatten(0, 1)
    moves = torch.cat([torch.zeros(grid.tokens, 1), places.flip(-1)], dim=1)
    method = DEFAULT.resolve(backbone.defaults)
    guided, steps = method.count_guided_steps(backbone.defaults.steps), backbone.defaults.steps
    header = BankHeader(
        model=backbone.name,
        model_revision=backbone.revision,
        grid=(grid.frames, grid.height, grid.width),
        steps=steps,
        timesteps=tuple(level.timestep for level in backbone.schedule(steps, grid).levels[:guided]),
        positions=backbone.positions(grid).name,
        optimize="coordinates",
        method=settings_dict(method),
    )
    parts = backbone.positions(grid).zero("coordinates")
    return MotionBank.from_steps(header, [dict.fromkeys(parts, moves)] * guided, motion.latents)


def mean_scores(
    backbone: Backbone, clip: WorldClip, seed: int, source: WorldClip | MotionBank | None, method: MethodSettings
) -> Scores:
    """Generate the reference's motion with each of the prompts, from noise of its own; return the means."""
    reference = source.frames if isinstance(source, WorldClip) else source
    scores = []
    for number, target in enumerate(targets_of(clip.scene, seed)):
        made = transfer_motion(
            backbone,
            prompt_of(target),
            reference=reference,
            size=clip.frames.shape[:3],
            method=method,
            seed=PROMPTS * seed + number,
        )
        scores.append(score_generation(made, clip, target))
    figures = [figure for figure in (*FIGURES, "loss_final") if figure in scores[0]]
    return {figure: sum(score[figure] for score in scores) / len(scores) for figure in figures}


def targets_of(scene: Scene, seed: int) -> list[Scene]:
    """The reference's motion in looks of other clips."""
    return [
        swap_appearance(scene, sample_pair(seed + number * OTHER_LOOKS, "eval", sprites=1)[1])
        for number in range(PROMPTS)
    ]


def times_smaller(backbone: Backbone, bank: MotionBank) -> float:
    """Return how often a bank's positions fit into what the released code keeps."""
    return fp32_bytes(backbone, bank) / sum(values.nbytes for values in bank.parts.values())


def fp32_bytes(backbone: Backbone, bank: MotionBank) -> int:
    """Bytes of the position embedding of every guided step in fp32, which is what the released code keeps."""
    position = backbone.positions(TokenGrid(*bank.header.grid)).zero("position")
    return bank.guided_steps * sum(4 * value.numel() for value in position.values())


# ---- shapes of the released models

SHAPES = {"24 frames": 6, "49 frames": 13}
PATCHES, GUIDED_STEPS = 30 * 45, 10
TARGET = 20
"""Times smaller than fp32; which rank a bank needs for an error depends on what it learned."""


def sizes() -> list[dict[str, Any]]:
    """Bytes of a bank's positions at 480x720, ten guided steps, counted on tensors of the real shapes."""
    rows = []
    for length, model in itertools.product(SHAPES, ("5B", "2B")):
        tokens = SHAPES[length] * PATCHES
        channels, parts, movable = (64, 4, 2) if model == "5B" else (1920, 1, 1)
        fp32 = GUIDED_STEPS * parts * torch.empty(tokens, channels, device="meta").nbytes
        half = GUIDED_STEPS * movable * torch.empty(tokens, 3, dtype=torch.float16, device="meta").nbytes
        rank = fp32 // TARGET // (parts * (tokens + GUIDED_STEPS * channels) * 2)
        rows.append(
            {
                "model": model,
                "length": length,
                "fp32 positions": fp32,
                "coordinates, 16 bits": half,
                "coordinates, times smaller": round(fp32 / half, 1),
                "position, 16 bits": fp32 // 2,
                f"position, highest rank that is {TARGET} times smaller": rank,
                "position, full rank": min(tokens, GUIDED_STEPS * channels),
            }
        )
    return rows


# ---- what is told


def print_rows(rows: Mapping[str, Any]) -> None:
    """Print a line for every way, with its difference in motion fidelity to what it is held against."""
    for name, row in rows.items():
        held_against = (at_the_size_of(name)[0], whole_of(name), name)  # itself, if neither was asked for
        baseline = next(other for other in held_against if other in rows)
        cells = " ".join(
            f"{f} {row[f]['mean']:.3f} [{row[f]['low']:.3f}, {row[f]['high']:.3f}]"
            for f in ("track_cosine", "motion_fidelity", *WORDS)
        )
        gain = paired_difference(row["motion_fidelity"]["values"], rows[baseline]["motion_fidelity"]["values"])
        print(f"{name:46} {cells}  fidelity against {baseline}: {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")


def differences(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paired differences of every way to guidance for every video and to plain generation, at the same size
    of the videos, and of a bank of which something is left out to the same bank as it was learned."""
    return {
        name: {
            f"{figure} less {baseline}": vars(
                paired_difference(row[figure]["values"], rows[baseline][figure]["values"])
            )
            for figure in FIGURES
            for baseline in (*at_the_size_of(name), whole_of(name))
            if baseline in rows and baseline != name
        }
        for name, row in rows.items()
    }


def at_the_size_of(name: str) -> tuple[str, str]:
    """Return guidance for every video and plain generation, at the size of the videos if a name tells one."""
    size = "".join(re.findall(r", \d+x\d+x\d+$", name))
    return f"guided for every video{size}", f"plain{size}"


def whole_of(name: str) -> str:
    """Return the name of the bank that nothing is left out of."""
    return f"{name.partition(', error ')[0]}, error 0"


def differences_by_shot(rows: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the paired differences of motion fidelity to guidance for every video, by what the camera does."""
    shots = [shot_of(sample_pair(seed, "eval", sprites=1)[0]) for seed in seeds]

    def fidelities(name: str, shot: str) -> list[float]:
        return list(itertools.compress(rows[name]["motion_fidelity"]["values"], [other == shot for other in shots]))

    baseline = "guided for every video"
    return {
        name: {
            shot: vars(paired_difference(fidelities(name, shot), fidelities(baseline, shot)))
            for shot in sorted(set(shots))
        }
        for name in rows
        if baseline in rows and name != baseline
    }


PARTS = {
    "zero-shot": zero_shot_ways,
    "recipes": recipe_ways,
    "compaction": compaction_ways,
    "sizes of videos": other_size_ways,
}


def part_scores(model: str, part: str, wanted: str, seed: int) -> dict[str, Scores]:
    """Score the ways of a part that are wanted, on the held-out reference of a seed."""
    backbone, clip = load(model), render(sample_pair(seed, "eval", sprites=1)[0])
    return {name: way() for name, way in PARTS[part](backbone, clip, seed).items() if re.search(wanted, name)}


def main() -> None:
    """Measure what is asked for and write it among the rest."""
    asked = _parser().parse_args()
    results: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    results["sizes"] = {"command": command(), "commit": commit(), "rows": sizes()}
    write_json(asked.out, results)
    with start_workers(asked.workers) as pool:
        for model, part in itertools.product(asked.models, asked.parts):
            seeds = range(FIRST_SEED + asked.skip, FIRST_SEED + asked.skip + asked.clips)
            score = partial(part_scores, model, part, asked.ways)
            measured = summary(Bench(asked.clips, pool).scores(score, seeds, f"{model}: {part}"))
            about = {
                "command": command(),
                "commit": commit(),
                "machine": machine(),
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            before = results.setdefault(model, {}).get(part, {})
            kept = before["rows"] if before.get("seeds") == list(seeds) else {}
            rows = kept | {name: {**row, **about} for name, row in measured.items()}
            results[model][part] = {
                "seeds": list(seeds),
                "rows": rows,
                "differences": differences(rows),
                "motion fidelity by shot": differences_by_shot(rows, seeds),
            }
            write_json(asked.out, results)
            print_rows(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bank_recipes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=64, help="held-out references")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many references first")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ways", default="", help="a regular expression: of a part, measure the ways that it finds")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "bank-recipes.json")
    return parser


if __name__ == "__main__":
    main()
