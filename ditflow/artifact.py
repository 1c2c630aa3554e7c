"""Our files of tensors: safetensors with one JSON header, whose kind and format are checked on reading."""

from __future__ import annotations

import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_HEADER = "ditflow"


class ArtifactError(ValueError):
    """A file is not what it should be."""


def write_artifact(kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Serialise tensors with a header; the same input gives the same bytes."""
    text = json.dumps({"kind": kind, "format": version, **header}, sort_keys=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return save(contiguous, metadata={_HEADER: text})


def read_artifact(kind: str, version: int, data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors; ArtifactError if `data` is no `kind` of this or an older format."""
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ArtifactError(
            f"{name} is not a safetensors file ({error}). It is damaged, cut off, or of another format; pickles are "
            "never read."
        ) from error
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get(_HEADER, "{}"))
    if header.get("kind") != kind:
        raise ArtifactError(f"{name} is no {kind}: it is {header.get('kind', 'a safetensors file of other origin')}")
    if header["format"] > version:
        raise ArtifactError(
            f"{name} has {kind} format {header['format']}; this version reads up to {version}: upgrade ditflow"
        )
    return header, tensors
