"""A process that holds a model: loading it, its threads, its memory, and what the manifest says of them."""

from __future__ import annotations

import json
import platform
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version

import torch

from ditflow import backbones
from pipeline.cache import local_model
from pipeline.job import Job
from pipeline.stages.attempt import Rung

_VERSIONS = ("ditflow", "torch", "diffusers", "transformers", "ray", "av", "numpy")


class ModelChangedError(RuntimeError):
    """A worker found another model than the one that the job was planned with."""


class Worker:
    """The model of one actor, and the facts of the machine that the manifest records."""

    def __init__(self, job: Job, model_revision: str):
        if job.resources.threads is not None:
            torch.set_num_threads(job.resources.threads)
        model = job.model
        self.backbone = backbones.load(
            local_model(job),
            name=model.path,
            dtype=model.dtype,
            device=model.device,
            execution=model.execution,
            download=model.download,
        )
        if self.backbone.revision != model_revision:
            raise ModelChangedError(
                f"{model.path} has revision {self.backbone.revision} on {socket.gethostname()}, and the job was "
                f"planned with {model_revision}: the machines hold different models. Give all the same folder."
            )

    @property
    def lighter(self) -> Rung | None:
        """The way of working that needs the least memory, or None if that is the usual one."""
        usual = self.backbone.execution
        lightest = replace(usual, checkpointing="on", cfg="serial", vae_tiling="on")

        @contextmanager
        def entered() -> Iterator[None]:
            self.backbone.set_execution(lightest)
            try:
                yield
            finally:
                self.backbone.set_execution(usual)

        return None if usual == lightest else entered

    def reset_peak_memory(self) -> None:
        """Begin a new peak; on a CPU the peak is the process's, from its start."""
        if self.backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.backbone.device)

    def prompt_facts(self, prompt: str) -> dict[str, object]:
        """Return the manifest's columns on the length of a prompt."""
        limit = self.backbone.text_limit
        (tokens,) = limit.count([prompt])
        return {"prompt_tokens": tokens, "prompt_cut": tokens > limit.tokens}

    def facts(self) -> dict[str, object]:
        """Return the manifest's columns on device, memory and software."""
        device = self.backbone.device
        cuda = device.type == "cuda"
        execution = {**asdict(self.backbone.execution), "threads": torch.get_num_threads()}
        return {
            "device": torch.cuda.get_device_name(device) if cuda else (platform.processor() or platform.machine()),
            "node": socket.gethostname(),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else _peak_resident_bytes(),
            "versions_json": json.dumps({name: version(name) for name in _VERSIONS}),
            "execution_json": json.dumps(execution),
        }


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
