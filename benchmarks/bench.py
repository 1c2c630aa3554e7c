"""What the design buys, as ratios: `python -m benchmarks.bench` (or `make bench`).

Every comparison runs its sides in turn (A B A B ...) in this one process, checks first that they agree, and reports
the minimum, median and maximum of the ratio within a round. Nothing is asserted about time: a row that misses what is
expected of it says so, and the exit status stays 0. Figures, machine and command go to benchmarks/results/bench.json.
On a machine that others use at the same time, `--shared` counts CPU seconds of one thread instead of wall seconds.

Axis letters: F frames, P patches of a frame, S = F*P tokens, H heads, d head size, D = H*d.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, mse_loss, pad
from torch.profiler import ProfilerActivity, profile
from transformers import T5Config, T5EncoderModel

from ditflow.backbones.cogvideox import CogVideoX
from ditflow.backbones.contract import NoiseLevel
from ditflow.losses.amf import AttentionMotionFlowLoss
from ditflow.motion.amf import hard_displacement, soft_displacement
from ditflow.motion.reference import MotionReference, reference_from_latents
from ditflow.sampling.guidance import Generation, Guidance
from ditflow.sampling.positions import PositionVariable
from ditflow.settings import ExecutionSettings, MethodSettings
from ditflow.types import QueriesKeys, TokenGrid

RESULTS = Path(__file__).parent / "results"
TEMPERATURE = 2.0
LEVEL = NoiseLevel(None, 900, 0.9)
Run = Callable[[], Any]
Clock = Callable[[], float]
Displacement = Callable[[QueriesKeys, TokenGrid, float], Tensor]
FlowError = Callable[[QueriesKeys, TokenGrid, Tensor], Tensor]

AMF_GRID, AMF_HEADS, HEAD_DIM = TokenGrid(6, 15, 22), 16, 64
STEP_LAYERS, STEP_TEXT_TOKENS = 8, 64


@dataclass(frozen=True)
class Row:
    """One ratio: how many times more the first side takes than the second."""

    name: str
    min: float
    median: float
    max: float
    expected: float | None = None
    sides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """PASS, or short by how much, of what was expected."""
        if self.expected is None:
            return ""
        return f"PASS (>= {self.expected:g})" if self.median >= self.expected else f"SHORT of {self.expected:g}"


# ---------------------------------------------------------------------- how things are measured


def interleave(
    sides: Mapping[str, Run], rounds: int, device: torch.device | str = "cpu", clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every side in every round; the sides take turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            synchronize(device)
            started = clock()
            run()
            synchronize(device)
            seconds[name].append(clock() - started)
    return {name: counted[1:] for name, counted in seconds.items()}


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Run, device: torch.device | str = "cpu") -> int:
    """Largest number of bytes that were live at once during `run`, above those live before it.

    CUDA: the caching allocator's own peak. CPU: torch's profiler notes every allocation and every release of the CPU
    allocator, in operators, inside them and in the backward pass; the peak is the largest running sum of these. What
    was live before (inputs, weights) counts as zero. A matrix library's private packing buffers are not seen, on
    either side of a comparison.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)


def time_row(name: str, seconds: Mapping[str, Sequence[float]], slow: str, fast: str, expected: float | None) -> Row:
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    sides = {f"{side} seconds": [round(s, 4) for s in seconds[side]] for side in (slow, fast)}
    return Row(name, min(ratios), statistics.median(ratios), max(ratios), expected, sides)


def memory_row(name: str, peaks: Mapping[str, int], large: str, small: str, expected: float | None) -> Row:
    """Peak bytes are the same in every run, so that one run of each side is enough."""
    ratio = peaks[large] / peaks[small]
    return Row(name, ratio, ratio, ratio, expected, {f"{side} peak bytes": peaks[side] for side in (large, small)})


# ---------------------------------------------------------------------- 1. attention motion flow


def moving_texture(grid: TokenGrid, heads: int, head_dim: int, smoothness: int = 4, share: float = 0.3) -> QueriesKeys:
    """Queries and keys with the statistics of real ones: unit variance, and correlated in space and over time.

    A random texture, averaged `smoothness` times over 3x3 patches, drifts by (2, 1) patches a frame; it makes up
    `share` of the variance of queries and of keys, and independent noise the rest.
    """
    generator = torch.Generator().manual_seed(0)
    inner = heads * head_dim
    texture = torch.randn(1, inner, grid.height, grid.width, generator=generator)
    for _ in range(smoothness):
        texture = avg_pool2d(pad(texture, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    texture = texture[0] / texture.std()
    drifted = torch.cat([texture.roll((f, 2 * f), dims=(1, 2)).flatten(1).T for f in range(grid.frames)])

    def noisy() -> Tensor:
        return share**0.5 * drifted + (1 - share) ** 0.5 * torch.randn(grid.tokens, inner, generator=generator)

    return QueriesKeys(noisy(), noisy(), heads)


def plain_displacement(capture: QueriesKeys, grid: TokenGrid, temperature: float) -> Float[Tensor, "f f p 2"]:
    """Soft displacement as its definition reads: logits of every head, mean over heads, softmax per key frame."""
    query, key = _by_head(capture)
    logits = (query @ key.transpose(1, 2) / math.sqrt(query.shape[2])).mean(dim=0)
    return _expectation(temperature * logits, grid)


def plain_displacement_scaled_late(
    capture: QueriesKeys, grid: TokenGrid, temperature: float
) -> Float[Tensor, "f f p 2"]:
    """The plain form by a careful hand: scaled behind the mean over heads, which saves a pass over H x S x S."""
    query, key = _by_head(capture)
    logits = (query @ key.transpose(1, 2)).mean(dim=0)
    return _expectation(logits * (temperature / math.sqrt(query.shape[2])), grid)


def _by_head(capture: QueriesKeys) -> tuple[Tensor, Tensor]:
    """From [S, D] to [H, S, d]."""
    query, key = (part.unflatten(1, (capture.heads, -1)).transpose(0, 1) for part in (capture.query, capture.key))
    return query, key


def _expectation(logits: Float[Tensor, "tokens tokens"], grid: TokenGrid) -> Float[Tensor, "f f p 2"]:
    coordinates = grid.coordinates(logits.device).to(logits.dtype)
    weights = logits.unflatten(1, (grid.frames, grid.patches)).softmax(dim=-1)
    matches = (weights @ coordinates).unflatten(0, (grid.frames, grid.patches))
    return matches.transpose(1, 2) - coordinates


def plain_error(form: Displacement) -> FlowError:
    """Mean squared error of a plain form's displacement."""

    def error(capture: QueriesKeys, grid: TokenGrid, target: Tensor) -> Tensor:
        soft = form(capture, grid, TEMPERATURE)
        return mse_loss(soft, target.to(soft.dtype))

    return error


def our_error(capture: QueriesKeys, grid: TokenGrid, target: Tensor) -> Tensor:
    """Mean squared error as guided sampling computes it."""
    return AttentionMotionFlowLoss("all", temperature=TEMPERATURE)(capture, {"displacement": target}, grid)


def error_and_gradients(error: FlowError, capture: QueriesKeys, grid: TokenGrid, target: Tensor) -> list[Tensor]:
    """Mean squared error of the soft displacement, and its gradients in queries and keys."""
    query, key = (part.detach().requires_grad_() for part in (capture.query, capture.key))
    loss = error(QueriesKeys(query, key, capture.heads), grid, target)
    return [loss.detach(), *torch.autograd.grad(loss, (query, key))]


def bench_amf(rounds: int, clock: Clock) -> list[Row]:
    capture = moving_texture(AMF_GRID, AMF_HEADS, HEAD_DIM)
    target = hard_displacement(capture, AMF_GRID)
    errors = {
        "plain": plain_error(plain_displacement),
        "plain scaled late": plain_error(plain_displacement_scaled_late),
        "ours": our_error,
    }
    sides = {
        name: lambda error=error: error_and_gradients(error, capture, AMF_GRID, target)
        for name, error in errors.items()
    }
    for name in ("plain", "plain scaled late"):
        for ours, theirs in zip(sides["ours"](), sides[name](), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    peaks = {name: peak_bytes(run) for name, run in sides.items()}
    seconds = interleave(sides, rounds, clock=clock)
    return [
        time_row("AMF + backward, time: plain / ours", seconds, "plain", "ours", 2.5),
        time_row("  plain scaled late / ours", seconds, "plain scaled late", "ours", None),
        memory_row("AMF + backward, peak memory: plain / ours", peaks, "plain", "ours", 10),
        memory_row("  plain scaled late / ours", peaks, "plain scaled late", "ours", None),
    ]


# ---------------------------------------------------------------------- 2. one iteration of a guided step


def random_pipeline(
    *,
    layers: int,
    heads: int,
    grid: TokenGrid,
    rotary: bool = True,
    text_tokens: int = 226,
    text_dim: int = 4096,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CogVideoXPipeline:
    """Build a CogVideoX with random weights, directly on its device; VAE and text encoder are there for the form."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = CogVideoXTransformer3DModel(
                num_attention_heads=heads,
                attention_head_dim=HEAD_DIM,
                num_layers=layers,
                text_embed_dim=text_dim,
                max_text_seq_length=text_tokens,
                sample_width=2 * grid.width,
                sample_height=2 * grid.height,
                sample_frames=4 * (grid.frames - 1) + 1,
                use_rotary_positional_embeddings=rotary,
            )
    finally:
        torch.set_default_dtype(default)
    return CogVideoXPipeline(
        tokenizer=None,
        text_encoder=T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        vae=AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        transformer=transformer,
        scheduler=CogVideoXDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
    )


def random_backbone(pipeline: CogVideoXPipeline, **execution: Any) -> CogVideoX:
    settings = ExecutionSettings(**({"checkpointing": "off", "cfg": "batched", "vae_tiling": "off"} | execution))
    return CogVideoX(pipeline, name="random", revision="random", execution=settings)


@dataclass(frozen=True)
class GuidedIteration:
    """One iteration of latent optimisation: forward pass, motion loss, backward pass, update."""

    backbone: CogVideoX
    block: int
    reference: MotionReference
    guidance: Guidance
    latents: Tensor
    embeds: Tensor

    @classmethod
    def of(cls, backbone: CogVideoX, grid: TokenGrid, block: int) -> GuidedIteration:
        config = backbone.transformer.config
        generator = torch.Generator().manual_seed(1)
        shape = (1, grid.frames, config.in_channels, 2 * grid.height, 2 * grid.width)
        latents, reference = (torch.randn(shape, generator=generator).to(backbone.device) for _ in range(2))
        embeds = torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator)
        embeds = embeds.to(backbone.device, backbone.dtype)
        method = MethodSettings(blocks=(block,), iterations=1, injection=False).resolve(backbone.defaults)
        motion = reference_from_latents(backbone, reference, embeds, method)
        variable = PositionVariable(backbone.positions(grid), "position", grid)
        guidance = Guidance(backbone, method, guided_steps=10, injected_steps=0, variable=variable, reference=motion)
        return cls(backbone, block, motion, guidance, latents, embeds)

    def ours(self) -> tuple[float, Tensor]:
        """Return loss and updated latents, by the code that guided sampling runs."""
        generation = Generation(
            self.latents, [self.embeds], self.backbone.schedule(50, self.reference.grid), torch.Generator()
        )
        guided = self.guidance.guide(0, LEVEL, [generation], [self.latents], None)
        return guided.losses[0], guided.latents[0]

    def whole(self) -> tuple[float, Tensor]:
        """Return the same by the whole transformer, with diffusers' own attention and trainable weights."""
        transformer = self.backbone.transformer.requires_grad_(True)
        latents = self.latents.clone().requires_grad_()
        optimiser = torch.optim.Adam([latents], lr=self.guidance.method.learning_rates(10)[0])
        scheme = self.backbone.positions(self.reference.grid)
        position = scheme.apply(scheme.zero("position"), "position")
        rotary = (position["query_cos"], position["query_sin"]) if scheme.name == "rotary" else None
        with _hooked_queries_keys(transformer, self.block) as captured:
            transformer(
                hidden_states=latents.to(self.backbone.dtype),
                encoder_hidden_states=self.embeds,
                timestep=torch.full((1,), LEVEL.timestep, device=latents.device),
                image_rotary_emb=rotary,
            )
        query, key = (captured[n][0, :, -self.reference.grid.tokens :].transpose(0, 1).flatten(1) for n in "qk")
        capture = QueriesKeys(query, key, heads=captured["q"].shape[1])
        loss = AttentionMotionFlowLoss(temperature=TEMPERATURE)(
            capture, self.reference.payloads[self.block], self.reference.grid
        )
        loss.backward()
        optimiser.step()
        transformer.zero_grad(set_to_none=True)
        transformer.requires_grad_(False)
        return loss.item(), latents.detach()


@contextmanager
def _hooked_queries_keys(transformer: CogVideoXTransformer3DModel, block: int) -> Any:
    """Queries `q` and keys `k` [B, H, L, d] of a block; diffusers' attention rotates what it is handed in place."""
    captured: dict[str, Tensor] = {}
    attention = transformer.transformer_blocks[block].attn1
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: captured.update({name: output}))
        for name, module in (("q", attention.norm_q), ("k", attention.norm_k))
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def bench_step(heads: int, grid: TokenGrid, expected: float | None, rounds: int, clock: Clock) -> list[Row]:
    """Compare at half depth. The more tokens there are to D, the more attention outweighs the weights' gradients."""
    pipeline = random_pipeline(layers=STEP_LAYERS, heads=heads, grid=grid, text_tokens=STEP_TEXT_TOKENS, text_dim=512)
    block = STEP_LAYERS // 2
    iteration = GuidedIteration.of(random_backbone(pipeline), grid, block)
    checkpointed = GuidedIteration.of(random_backbone(pipeline, checkpointing="on"), grid, block)
    sides = {"whole": iteration.whole, "ours": iteration.ours, "ours checkpointed": checkpointed.ours}
    for name in ("whole", "ours checkpointed"):
        (loss, latents), (same_loss, same_latents) = iteration.ours(), sides[name]()
        torch.testing.assert_close(loss, same_loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(latents, same_latents, rtol=0, atol=1e-4)
    peaks = {name: peak_bytes(run) for name, run in sides.items()}
    seconds = interleave(sides, rounds, clock=clock)
    shape = f"S/D {(grid.tokens + STEP_TEXT_TOKENS) / (heads * HEAD_DIM):.1f}"
    return [
        time_row(f"guided iteration, {shape}, time: whole / ours", seconds, "whole", "ours", expected),
        memory_row("  peak memory: whole / ours", peaks, "whole", "ours", None),
        time_row("  time: ours checkpointed / ours", seconds, "ours checkpointed", "ours", None),
        memory_row("  peak memory: ours / ours checkpointed", peaks, "ours", "ours checkpointed", None),
        activations_row(iteration, peaks["ours"]),
    ]


def activations_row(iteration: GuidedIteration, peak: int) -> Row:
    """What a block keeps for its backward pass, in tensors of all tokens x D: the slope of the peak over depth."""
    backbone, grid, depth = iteration.backbone, iteration.reference.grid, iteration.block
    shallow = depth // 2
    shallow_peak = peak_bytes(GuidedIteration.of(backbone, grid, shallow).ours, backbone.device)
    config = backbone.transformer.config
    tokens = grid.tokens + config.max_text_seq_length
    tensor = tokens * config.num_attention_heads * config.attention_head_dim * backbone.dtype.itemsize
    kept = (peak - shallow_peak) / (depth - shallow) / tensor
    return Row("  kept by a block / one tensor of tokens x D", kept, kept, kept)


# ---------------------------------------------------------------------- 3. numerics


def bench_numerics() -> dict[str, Any]:
    """Relative errors against fp64, and how many entries of the reference's flow a bf16 product changes.

    max: largest error over the largest value; mean: mean error over the mean value (of magnitudes).
    """
    capture, sharp = (moving_texture(AMF_GRID, AMF_HEADS, HEAD_DIM, smoothness) for smoothness in (4, 1))
    rounded = _to(capture, torch.bfloat16)
    target = hard_displacement(_to(capture, torch.float64), AMF_GRID)
    exact, exact_of_rounded = (_plain_numbers(_to(c, torch.float64), target) for c in (capture, rounded))
    ours_fp32, ours_bf16 = (_our_numbers(c, target) for c in (capture, rounded))
    plain_bf16 = _plain_numbers(rounded, target)
    return {
        "relative errors": {
            "ours, fp32": _errors(ours_fp32, exact),
            "ours, bf16 inputs, against fp64 of the same inputs": _errors(ours_bf16, exact_of_rounded),
            "ours, bf16 inputs, against fp64 of the unrounded inputs": _errors(ours_bf16, exact),
            "plain, bf16 throughout, against fp64 of the same inputs": _errors(plain_bf16, exact_of_rounded),
        },
        "hard displacement entries that flip": {
            "logits fp32 instead of fp64": _flips(hard_displacement(capture, AMF_GRID), target),
            "logits bf16 instead of fp32, smooth texture": _flips_of_bf16(rounded),
            "logits bf16 instead of fp32, sharp texture": _flips_of_bf16(_to(sharp, torch.bfloat16)),
        },
    }


def _to(capture: QueriesKeys, dtype: torch.dtype) -> QueriesKeys:
    return QueriesKeys(capture.query.to(dtype), capture.key.to(dtype), capture.heads)


def _plain_numbers(capture: QueriesKeys, target: Tensor) -> dict[str, Tensor]:
    _, query, key = error_and_gradients(plain_error(plain_displacement), capture, AMF_GRID, target)
    displacement = plain_displacement(capture, AMF_GRID, TEMPERATURE)
    return {"displacement": displacement, "query gradient": query, "key gradient": key}


def _our_numbers(capture: QueriesKeys, target: Tensor) -> dict[str, Tensor]:
    _, query, key = error_and_gradients(our_error, capture, AMF_GRID, target)
    displacement = soft_displacement(capture, AMF_GRID, TEMPERATURE)
    return {"displacement": displacement, "query gradient": query, "key gradient": key}


def _errors(came: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    def relative(name: str) -> dict[str, float]:
        error, size = (came[name].double() - exact[name]).abs(), exact[name].abs()
        return {"max": (error.max() / size.max()).item(), "mean": (error.mean() / size.mean()).item()}

    return {name: relative(name) for name in exact}


def _flips(came: Tensor, expected: Tensor) -> float:
    """Share of (frame pair, patch) entries whose match is another patch."""
    return (came != expected).any(dim=-1).double().mean().item()


def _flips_of_bf16(capture: QueriesKeys) -> float:
    """Share that flips when the product of the same bf16 inputs is rounded to bf16."""
    return _flips(_hard_displacement_bf16(capture, AMF_GRID), hard_displacement(capture, AMF_GRID))


def _hard_displacement_bf16(capture: QueriesKeys, grid: TokenGrid) -> Tensor:
    """Hard displacement with the logits of one bf16 product."""
    logits = (capture.query @ capture.key.T).unflatten(1, (grid.frames, grid.patches))
    coordinates = grid.coordinates()
    matches = coordinates[logits.argmax(dim=-1)].unflatten(0, (grid.frames, grid.patches))
    return (matches.transpose(1, 2) - coordinates).to(torch.int8)


# ---------------------------------------------------------------------- report


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load average": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def command() -> str:
    """The command that is running: of the program, not of this module, which others import."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name if spec else __name__} {shlex.join(sys.argv[1:])}".strip()


def print_rows(rows: Sequence[Row]) -> None:
    print(f"{'ratio':50}{'median':>9}{'min':>9}{'max':>9}   expected")
    for row in rows:
        print(f"{row.name:50}{row.median:9.2f}{row.min:9.2f}{row.max:9.2f}   {row.verdict}")


def print_numerics(numerics: Mapping[str, Any]) -> None:
    print(f"\n{'AMF numerics: error relative to fp64':76}{'max':>9}{'mean':>9}")
    for name, parts in numerics["relative errors"].items():
        for part, error in parts.items():
            print(f"{name if part == 'displacement' else '':58}{part:18}{error['max']:9.1e}{error['mean']:9.1e}")
    print("\nhard displacement: share of the entries that flip")
    for name, share in numerics["hard displacement entries that flip"].items():
        print(f"{name:76}{share:9.2%}")


def commit() -> str:
    """Commit that the benchmark runs on, with `-dirty` if anything but results has been changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the first comparison (the second: half)")
    parser.add_argument("--shared", action="store_true", help="one thread, CPU seconds: for a machine with other load")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench.json")
    options = parser.parse_args()
    clock: Clock = time.process_time if options.shared else time.perf_counter
    if options.shared:
        torch.set_num_threads(1)
    before = machine()
    print(", ".join(f"{name}: {value}" for name, value in before.items()), "\n")
    rows = bench_amf(options.rounds, clock)
    rows += bench_step(12, TokenGrid(2, 15, 22), 1.7, -(-options.rounds // 2), clock)
    rows += bench_step(8, TokenGrid(4, 15, 22), None, -(-options.rounds // 2), clock)
    print_rows(rows)
    numerics = bench_numerics()
    print_numerics(numerics)
    content = {
        "command": command(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "clock": "CPU seconds of one thread" if options.shared else "wall seconds",
        "machine": before,
        "load average afterwards": machine()["load average"],
        "ratios": [asdict(row) | {"verdict": row.verdict} for row in rows],
        "numerics": numerics,
    }
    write_json(options.out, content)


if __name__ == "__main__":
    main()
