"""Our files of tensors: safetensors with one JSON header, whose kind and format are checked on reading."""

from __future__ import annotations

import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_HEADER = "ditflow"
MOST_HEADER_BYTES = 8 * 1024**2
"""A real header has some kilobytes; one of 100 megabytes, which safetensors allows, takes gigabytes to understand."""


class ArtifactError(ValueError):
    """A file is not what it should be."""


def write_artifact(kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Serialise tensors with a header; the same input gives the same bytes."""
    text = json.dumps({"kind": kind, "format": version, **header}, sort_keys=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return save(contiguous, metadata={_HEADER: text})


def read_artifact(kind: str, version: int, data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors; ArtifactError if `data` is no `kind` of this or an older format."""
    length = int.from_bytes(data[:8], "little")
    if MOST_HEADER_BYTES < length <= len(data):
        raise ArtifactError(f"{name} has a header of {length} bytes, expected at most {MOST_HEADER_BYTES}: not ours")
    try:
        tensors = load(data)
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{name} is not a safetensors file ({error}). It is damaged, cut off, or of another format; pickles are "
            "never read."
        ) from error
    header = _our_header(data[8 : 8 + length], name)
    if header.get("kind") != kind:
        came = header.get("kind", "a safetensors file of other origin")
        raise ArtifactError(f"{name} is no {kind}: it is {came!s:.100}")
    written = header.get("format")
    if not isinstance(written, int):
        raise ArtifactError(f"{name} has the {kind} format {written!r:.100}, expected a number: it is damaged")
    if written > version:
        raise ArtifactError(f"{name} has {kind} format {written}; this version reads up to {version}: upgrade ditflow")
    return header, tensors


def _our_header(text: bytes, name: str) -> dict[str, Any]:
    """Return our header in that of a safetensors file; empty in one of other origin."""
    try:
        metadata = json.loads(text).get("__metadata__") or {}
        header = json.loads(metadata.get(_HEADER, "{}"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} has a header that is no JSON ({error}): it is damaged") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{name} has a header that is no JSON object but {header!r:.100}: it is damaged")
    return header
