"""The training loop of every stage, and its checkpoints."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditflow.mini.training.optimizers import averaged, optimizers_of
from ditflow.mini.training.recipe import Recipe


class Training:
    """What a checkpoint holds: a model, its optimisers, the moving average of its weights and its step number."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.model, self.recipe, self.step = model, recipe, 0
        self.optimizers = optimizers_of(model)
        self._average = averaged(model, recipe.average_decay)

    @property
    def average(self) -> Any:
        """The model with the averaged weights."""
        return self._average.module

    def update(self, loss: Tensor) -> None:
        """Take one optimiser step and update the moving average."""
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(self.step)
            optimizer.step()
        self.step += 1
        self._average.update_parameters(self.model)

    def save(self, file: Path) -> None:
        """Write a checkpoint atomically."""
        tensors = {f"model.{name}": weight.detach() for name, weight in self.model.named_parameters()}
        tensors |= {f"average.{name}": weight.detach() for name, weight in self.average.named_parameters()}
        for which, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{which}.{index}.{name}": value for name, value in state.items()}
        tensors["step"] = torch.tensor(self.step)
        with replacing(file) as temporary:
            save_file(tensors, temporary)

    def load(self, file: Path) -> None:
        """Restore a checkpoint."""
        tensors = load_file(file)
        self.step = int(tensors["step"])
        self._average.n_averaged.fill_(self.step + 1)
        with torch.no_grad():
            for part, module in (("model", self.model), ("average", self.average)):
                for name, weight in module.named_parameters():
                    weight.copy_(tensors[f"{part}.{name}"])
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, which, index, name = key.split(".")
                states[int(which)].setdefault(int(index), {})[name] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def fit(
    training: Training,
    loss_at: Callable[[int], Tensor],
    file: Path,
    deadline: float = math.inf,
    on_sample: Callable[[Training], None] | None = None,
) -> bool:
    """Train to the recipe's last step, from the checkpoint `file` if there is one; return whether it got there.

    loss_at: the loss of a step, whose randomness depends on the step number alone. deadline: in seconds of
    `time.monotonic`. on_sample runs before the checkpoint of its step is written, so a checkpoint implies its output.
    """
    if file.is_file():
        training.load(file)
    if on_sample is not None and training.step >= training.recipe.steps:
        on_sample(training)
    recipe, losses, started = training.recipe, [], time.monotonic()
    while training.step < recipe.steps and time.monotonic() < deadline:
        loss = loss_at(training.step)
        training.update(loss)
        losses.append(loss.detach())
        last = training.step == recipe.steps
        if on_sample is not None and (training.step % recipe.sample_steps == 0 or last):
            on_sample(training)
        if training.step % recipe.checkpoint_steps == 0 or last:
            training.save(file)
            seconds = (time.monotonic() - started) / len(losses)
            left = (recipe.steps - training.step) * seconds / 60
            mean = torch.stack(losses).mean().item()
            say(f"{file.stem} {training.step}/{recipe.steps} loss {mean:.4f} {seconds:.2f} s/step {left:.0f} min left")
            losses, started = [], time.monotonic()
    return training.step >= recipe.steps


def say(message: str) -> None:
    """Print a line with the time of day."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success what was written there takes the target's place at once."""
    temporary = target.with_name(f"writing-{target.name}")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    yield temporary
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(temporary, target)


def generator_of(seed: int, step: int) -> torch.Generator:
    """Return the random generator of a step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to a dtype, unless it is float32."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
