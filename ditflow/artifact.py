"""Our files of tensors: safetensors with one JSON header, whose kind and format are checked on reading.

The header holds the SHA-256 of the tensors' bytes and one of the header itself, so that no changed byte goes unseen;
safetensors alone would read changed tensors.
"""

from __future__ import annotations

import json
import math
import re
from hashlib import sha256
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ditflow.types import NonFiniteError, check_finite

_HEADER = "ditflow"
_OF_HEADER, _OF_TENSORS = "sha256_header", "sha256_tensors"
_UNSET = "0" * 64
"""Stands for the header's own hash while it is computed."""
MOST_TOKENS = 1_000_000
"""Of a video: 57 times those of CogVideoX at 49 frames of 480x720; attention over more takes weeks."""
MOST_HEADER_BYTES = 8 * 1024**2
"""A real header has some kilobytes; one of 100 megabytes, which safetensors allows, takes gigabytes to understand."""


class ArtifactError(ValueError):
    """A file is not what it should be."""


def write_artifact(kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Serialise tensors with a header and the hashes of both; the same input gives the same bytes.

    Raises NonFiniteError for values that are NaN or infinite.
    """
    for name, tensor in tensors.items():
        check_finite(f"{name} of the {kind}", tensor)
    hashes = {_OF_HEADER: _UNSET, _OF_TENSORS: _UNSET}
    text = json.dumps({"kind": kind, "format": version, **hashes, **header}, sort_keys=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return sealed(save(contiguous, metadata={_HEADER: text}))


def read_artifact(kind: str, version: int, data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors; ArtifactError if `data` is no `kind` of this format, or not as it was written."""
    try:
        _check_length(data, name)
        tensors = load(data)
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(_no_safetensors(name, f" ({error})")) from error
    header = _checked_header(kind, version, data, name)
    _check_hash(data, _OF_TENSORS, sha256(memoryview(data)[header_end(data) :]).hexdigest(), name)
    try:
        for key, tensor in tensors.items():
            check_finite(key, tensor)
    except NonFiniteError as error:
        raise ArtifactError(f"{name} has values that no video can be made of: {error}. Make the file again") from None
    return header, tensors


def read_artifact_header(kind: str, version: int, start: bytes, size: int, name: str) -> dict[str, Any]:
    """Read the header from the beginning of a file of `size` bytes, checked as by `read_artifact`.

    `start` has at least `header_end(start)` bytes. What the tensors hold is not looked at.
    """
    _check_length(start, name)
    if not 8 < header_end(start) <= len(start) or start[8:9] != b"{":
        raise ArtifactError(_no_safetensors(name))
    header = _checked_header(kind, version, start, name)
    ends = re.findall(rb'"data_offsets": ?\[\d+, ?(\d+)\]', start[8 : header_end(start)])
    expected = header_end(start) + max(map(int, ends), default=0)
    if size != expected:
        raise ArtifactError(f"{name} has {size} bytes, its header speaks of {expected}: it is damaged or cut off")
    return header


def is_grid(value: Any) -> bool:
    """Return whether a value of a header is a grid of tokens: three counts, of no more than can be computed."""
    is_counts = isinstance(value, list) and all(type(count) is int and count > 0 for count in value)
    return is_counts and len(value) == 3 and math.prod(value) <= MOST_TOKENS


def header_end(start: bytes) -> int:
    """Return how many bytes at the beginning of a file are its header, as its first 8 bytes say."""
    return 8 + int.from_bytes(start[:8], "little")


def sealed(data: bytes) -> bytes:
    """Return a file of `write_artifact` with the hashes that its tensors and its header have now."""
    header, tensors = data[: header_end(data)], memoryview(data)[header_end(data) :]
    header = _with_hash(_with_hash(header, _OF_TENSORS, sha256(tensors).hexdigest()), _OF_HEADER, _UNSET)
    return b"".join([_with_hash(header, _OF_HEADER, sha256(header).hexdigest()), tensors])


def _no_safetensors(name: str, reason: str = "") -> str:
    why = "It is damaged, cut off, or of another format; pickles are never read."
    return f"{name} is not a safetensors file{reason}. {why}"


def _check_length(data: bytes, name: str) -> None:
    length = header_end(data) - 8
    if MOST_HEADER_BYTES < length <= len(data):
        raise ArtifactError(f"{name} has a header of {length} bytes, expected at most {MOST_HEADER_BYTES}: not ours")


def _checked_header(kind: str, version: int, data: bytes, name: str) -> dict[str, Any]:
    """Return our header, without what is checked here: kind, format, and the hash of the header."""
    text = data[: header_end(data)]
    header = _our_header(text[8:], name)
    if header.get("kind") != kind:
        came = header.get("kind", "a safetensors file of other origin")
        raise ArtifactError(f"{name} is no {kind}: it is {came!s:.100}")
    written = header.get("format")
    if not isinstance(written, int):
        raise ArtifactError(f"{name} has the {kind} format {written!r:.100}, expected a number: it is damaged")
    if written != version:
        advice = "upgrade ditflow" if written > version else "make it again, or use the release that wrote it"
        raise ArtifactError(f"{name} has {kind} format {written}; this version reads format {version}: {advice}")
    _check_hash(text, _OF_HEADER, sha256(_with_hash(text, _OF_HEADER, _UNSET)).hexdigest(), name)
    return {key: value for key, value in header.items() if key not in ("kind", "format", _OF_HEADER, _OF_TENSORS)}


def _check_hash(data: bytes, key: str, found: str, name: str) -> None:
    """Raise ArtifactError unless the header says of itself, or of the tensors, what was found."""
    said = _hash_place(key).findall(data[: header_end(data)])
    if said != [found.encode()]:
        what = "header" if key == _OF_HEADER else "tensors"
        came = said[0].decode() if len(said) == 1 else f"{len(said)} hashes"
        raise ArtifactError(
            f"{name} is damaged: the SHA-256 of its {what} is {found}, and it says {came}. Something changed it after "
            "it was written: copy it again from where it is whole, or make it again."
        )


def _with_hash(header: bytes, key: str, value: str) -> bytes:
    return _hash_place(key).sub(lambda place: place[0].replace(place[1], value.encode()), header)


def _hash_place(key: str) -> re.Pattern[bytes]:
    # Our JSON is a text within that of safetensors, which escapes its quotes; those of a prompt are escaped twice.
    return re.compile(rb'\\"' + key.encode() + rb'\\": \\"([0-9a-f]{64})\\"')


def _our_header(text: bytes, name: str) -> dict[str, Any]:
    """Return our header in that of a safetensors file; empty in one of other origin."""
    try:
        metadata = json.loads(text).get("__metadata__") or {}
        header = json.loads(metadata.get(_HEADER, "{}"))
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{name} has a header that is no JSON ({error}): it is damaged") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{name} has a header that is no JSON object but {header!r:.100}: it is damaged")
    return header
