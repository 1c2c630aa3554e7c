"""Guided sampling at the size of CogVideoX-5B on one GPU, with random weights: `python -m benchmarks.gpu_5b`.

Speed and memory do not depend on what the weights are, so no download is needed. The machine needs torch, diffusers,
transformers, safetensors, einops, jaxtyping and numpy, and nothing else. `--smoke` runs all of it, shrunk, on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn

from benchmarks.bench import (
    HEAD_DIM,
    LEVEL,
    RESULTS,
    FlowError,
    GuidedIteration,
    Run,
    activations_row,
    command,
    error_and_gradients,
    interleave,
    machine,
    moving_texture,
    our_error,
    peak_bytes,
    plain_displacement,
    plain_error,
    random_backbone,
    random_pipeline,
    write_json,
)
from ditflow.motion.amf import hard_displacement
from ditflow.types import QueriesKeys, TokenGrid

BACKENDS = ("native", "_native_cudnn", "flash")
GUIDED_STEPS, ITERATIONS, STEPS = 10, 5, 50
# Tensors of H x S x S that the plain form holds at its peak, forward and backward (`benchmarks.bench` measures it).
PLAIN_TENSORS = 2.1


@dataclass(frozen=True)
class Shape:
    """The size of a model and of a clip."""

    layers: int
    heads: int
    block: int
    rotary: bool
    grid: TokenGrid
    text_tokens: int = 226
    text_dim: int = 4096
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def released(cls, kind: str, frames: int, layers: int | None) -> Shape:
        """CogVideoX-2B or -5B at 480x720; with fewer layers the guidance block keeps its relative depth."""
        full, heads, block, rotary = {"5b": (42, 48, 20, True), "2b": (30, 30, 15, False)}[kind]
        layers = layers or full
        dtype = torch.bfloat16 if rotary else torch.float16
        return cls(layers, heads, block * layers // full, rotary, TokenGrid(-(-frames // 4), 30, 45), dtype=dtype)

    @classmethod
    def smoke(cls, kind: str) -> Shape:
        return cls(4, 2, 2, kind == "5b", TokenGrid(3, 4, 6), text_tokens=10, text_dim=32, dtype=torch.float32)

    def pipeline(self, device: torch.device) -> CogVideoXPipeline:
        return random_pipeline(
            layers=self.layers,
            heads=self.heads,
            grid=self.grid,
            rotary=self.rotary,
            text_tokens=self.text_tokens,
            text_dim=self.text_dim,
            dtype=self.dtype,
            device=device,
        )


Measured = dict[str, Any]


class Bench:
    """All measurements of one shape on one device; a run that cannot be had is recorded with its reason."""

    def __init__(self, shape: Shape, device: torch.device, rounds: int):
        self.shape, self.device, self.rounds = shape, device, rounds
        self.pipeline = shape.pipeline(device)
        self.backends = [name for name in BACKENDS if self._usable(name)]

    def measure(self, name: str, run: Run) -> Measured:
        """Median, least and largest seconds, and peak bytes above what was live before; or why there are none."""
        gc.collect()
        torch.cuda.empty_cache()
        try:
            seconds = interleave({name: run}, self.rounds, self.device)[name]
            peak = peak_bytes(run, self.device)
        except torch.OutOfMemoryError as error:
            measured: Measured = {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
        else:
            spread = {"seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
            measured = {**spread, "peak GB": peak / 1e9}
        self.show(name, measured)
        return measured

    @staticmethod
    def show(name: str, measured: Measured) -> None:
        if "skipped" in measured:
            print(f"{name:44} {measured['skipped']}", flush=True)
        else:
            print(f"{name:44}{measured['seconds']:10.4f} s{measured['peak GB']:10.3f} GB", flush=True)

    def iterations(self) -> dict[str, Measured]:
        """One iteration of latent optimisation at the guidance block, by attention backend and checkpointing."""
        found = {}
        for backend in self.backends:
            for checkpointing in ("off", "on"):
                name = f"iteration, {backend}, checkpointing {checkpointing}"
                found[name] = self.measure(name, self._iteration(backend, checkpointing).ours)
        return found

    def whole_iteration(self) -> Measured:
        """Measure the same iteration by the whole transformer with trainable weights and diffusers' own attention."""
        try:
            return self.measure("iteration, whole transformer", self._iteration("native", "off").whole)
        finally:
            self.pipeline.transformer.zero_grad(set_to_none=True)
            self.pipeline.transformer.requires_grad_(False)

    def predictions(self) -> dict[str, Measured]:
        """One denoising prediction for both branches of classifier-free guidance."""
        found = {}
        for backend in self.backends:
            for cfg in ("batched", "serial"):
                name = f"prediction, {backend}, CFG {cfg}"
                found[name] = self.measure(name, self._prediction(backend, cfg))
        return found

    def flow(self) -> dict[str, Measured]:
        """AMF forward and backward from the model's precision: ours, ours with TF32 products, and the plain form."""
        capture = moving_texture(self.shape.grid, self.shape.heads, HEAD_DIM)
        capture = self._capture(capture, self.shape.dtype)
        target = hard_displacement(capture, self.shape.grid)

        def run(error: FlowError, inputs: QueriesKeys) -> Run:
            return lambda: error_and_gradients(error, inputs, self.shape.grid, target)

        found = {"AMF, ours": self.measure("AMF, ours", run(our_error, capture))}
        if self.device.type == "cuda":
            found["AMF, ours, TF32"] = self.measure("AMF, ours, TF32", _with_tf32(run(our_error, capture)))
        for dtype in dict.fromkeys((self.shape.dtype, torch.float32)):
            name = f"AMF, plain, {str(dtype).removeprefix('torch.')}"
            found[name] = self._skip_plain(name, dtype) or self.measure(
                name, run(plain_error(plain_displacement), self._capture(capture, dtype))
            )
        return found

    def kept_by_a_block(self, peak_gigabytes: float) -> float:
        """Activations that a block keeps for the backward pass, in tensors of all tokens x D."""
        iteration = self._iteration("native", "off")
        return activations_row(iteration, round(peak_gigabytes * 1e9)).median

    def _backbone(self, **execution: str) -> Any:
        return random_backbone(self.pipeline, **execution)

    def _iteration(self, backend: str, checkpointing: str) -> GuidedIteration:
        backbone = self._backbone(attention_backend=backend, checkpointing=checkpointing)
        return GuidedIteration.of(backbone, self.shape.grid, self.shape.block)

    def _prediction(self, backend: str, cfg: str) -> Run:
        backbone = self._backbone(attention_backend=backend, cfg=cfg)
        inputs = GuidedIteration.of(backbone, self.shape.grid, self.shape.block)
        embeds = [inputs.embeds, torch.zeros_like(inputs.embeds)]
        return lambda: backbone.predict(inputs.latents, LEVEL, embeds)

    def _usable(self, backend: str) -> bool:
        """Whether this machine can run an attention backend, by running it forward and backward on a few tokens."""
        size = (1, 64, self.shape.heads, HEAD_DIM)
        query, key, value = (
            torch.randn(size, device=self.device, dtype=self.shape.dtype, requires_grad=True) for _ in range(3)
        )
        try:
            dispatch_attention_fn(query, key, value, backend=backend).sum().backward()
        except Exception as error:  # whatever a missing or unfit kernel raises
            print(f"attention backend {backend}: not available here ({type(error).__name__}: {_first_line(error)})")
            return False
        return True

    def _capture(self, capture: QueriesKeys, dtype: torch.dtype) -> QueriesKeys:
        return QueriesKeys(capture.query.to(self.device, dtype), capture.key.to(self.device, dtype), capture.heads)

    def _skip_plain(self, name: str, dtype: torch.dtype) -> Measured | None:
        if self.device.type != "cuda":
            return None
        needed = PLAIN_TENSORS * self.shape.heads * self.shape.grid.tokens**2 * dtype.itemsize
        free, _ = torch.cuda.mem_get_info(self.device)
        if needed <= free:
            return None
        skipped = {"skipped": f"does not fit: needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"}
        self.show(name, skipped)
        return skipped


def _with_tf32(run: Run) -> Run:
    def inside() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            run()
        finally:
            torch.set_float32_matmul_precision(before)

    return inside


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:100]


def derived(iterations: dict[str, Measured], predictions: dict[str, Measured], flow: dict[str, Measured]) -> Measured:
    """What follows from the measurements: AMF's share of an iteration, its ratios, and the time of one clip."""
    iteration, prediction = _fastest(iterations), _fastest(predictions)
    ours = flow["AMF, ours"]
    found: Measured = {"AMF / iteration": ours["seconds"] / iteration["seconds"]}
    found |= _ratios({name: other for name, other in flow.items() if other is not ours}, ours, "ours")
    optimising, denoising = GUIDED_STEPS * ITERATIONS * iteration["seconds"], STEPS * prediction["seconds"]
    found[f"seconds of a clip: {GUIDED_STEPS} x {ITERATIONS} iterations"] = optimising
    found[f"seconds of a clip: {STEPS} predictions"] = denoising
    found["guided / unguided clip"] = (optimising + denoising) / denoising
    return found


def _ratios(others: dict[str, Measured], base: Measured, base_name: str) -> Measured:
    """Time and peak memory over those of `base`, for all that could be measured."""
    return {
        f"{name} / {base_name}: {what}": other[key] / base[key]
        for name, other in others.items()
        for what, key in (("time", "seconds"), ("peak memory", "peak GB"))
        if key in other and key in base
    }


def _fastest(measured: dict[str, Measured]) -> Measured:
    done = [entry for entry in measured.values() if "skipped" not in entry]
    return min(done, key=lambda entry: entry["seconds"], default={"seconds": float("nan")})


def run(shape: Shape, device: torch.device, rounds: int) -> Measured:
    bench = Bench(shape, device, rounds)
    weights = sum(p.numel() * p.element_size() for p in bench.pipeline.transformer.parameters()) / 1e9
    print(f"{shape}\nweights {weights:.2f} GB; attention backends {', '.join(bench.backends)}\n")
    iterations, predictions, flow = bench.iterations(), bench.predictions(), bench.flow()
    found = derived(iterations, predictions, flow)
    uncheckpointed = iterations["iteration, native, checkpointing off"]
    if "skipped" not in uncheckpointed:
        found["kept by a block / one tensor of tokens x D"] = bench.kept_by_a_block(uncheckpointed["peak GB"])
    whole = {"iteration, whole transformer": bench.whole_iteration()}
    found |= _ratios(whole, uncheckpointed, "ours")
    print("\n" + "\n".join(f"{name:60}{value:10.3f}" for name, value in found.items()))
    return {"weights GB": weights, "measured": iterations | predictions | flow | whole, "derived": found}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("5b", "2b"), default="5b")
    parser.add_argument("--frames", type=int, choices=(24, 49), default=24)
    parser.add_argument("--layers", type=int, help="fewer layers than the released model has")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each measurement, behind one warm-up")
    parser.add_argument("--smoke", action="store_true", help="all of it on a tiny shape, on a CPU too")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: benchmarks/results/gpu-KIND-FRAMES.json; --smoke: none)"
    )
    options = parser.parse_args(arguments)
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("there is no CUDA device here: pass --smoke to run a shrunk model on the CPU")
    return options


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape.smoke(options.kind) if options.smoke else Shape.released(options.kind, options.frames, options.layers)
    found = run(shape, device, options.rounds)
    content = {
        "command": command(),
        "measured at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "shape": str(shape),
        **found,
    }
    default = None if options.smoke else RESULTS / f"gpu-{options.kind}-{options.frames}.json"
    if path := options.out or default:
        write_json(path, content)


if __name__ == "__main__":
    main()
