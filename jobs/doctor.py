"""What works on this machine."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from pipeline.store import redact

Finding = dict[str, Any]
"""`what` was examined, what was `found`, and whether it is `ok`."""


def examine(model: str, output: str | None) -> Iterator[Finding]:
    """Examine this machine, one finding at a time; an examination that fails says why."""
    examinations: dict[str, Callable[[], str]] = {
        "software": _software,
        "device": _device,
        "video codecs": _video,
        "disk": _disk,
        f"model {model}": lambda: _model(model),
    }
    if output is not None:
        examinations[f"output {output}"] = lambda: _output(output)
    for what, examination in examinations.items():
        try:
            yield {"what": redact(what), "found": examination(), "ok": True}
        except Exception as error:
            yield {"what": redact(what), "found": redact(f"{type(error).__name__}: {error}"), "ok": False}


def _software() -> str:
    names = ("ditflow", "torch", "diffusers", "ray", "pyarrow", "av")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device; {torch.get_num_threads()} CPU threads (enough for mini, not for CogVideoX)"
    names = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{device.name} with {device.total_memory / 2**30:.0f} GiB" for device in names)


def _video() -> str:
    import numpy as np

    from ditflow.media.video import encode_video, probe_video

    frames = np.zeros((5, 64, 64, 3), np.uint8)
    found = probe_video(encode_video(frames, fps=8.0)).frames
    if found != len(frames):
        raise RuntimeError(f"wrote {len(frames)} frames of H.264 and read {found}")
    return "H.264 can be written and read"


def _disk() -> str:
    return f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here"


def _model(path: str) -> str:
    from ditflow import backbones

    identity = backbones.identify(path)
    size = "x".join(map(str, identity.layout.trained_size))
    return f"revision {identity.revision}, {identity.layout.blocks} blocks, made for {size}"


def _output(uri: str) -> str:
    from pipeline.store import Store

    Store(uri).check_writable()
    return "can be written to"
