"""Artifact files: safetensors with one JSON header, whose kind, format and hashes are checked on reading.

The header holds the SHA-256 of the tensors' bytes and one of the header itself: safetensors alone would load changed
tensors without an error.
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

from ditflow.errors import DitflowError
from ditflow.types import NonFiniteError, check_finite

_HEADER = "ditflow"
_HEADER_HASH, _TENSORS_HASH = "sha256_header", "sha256_tensors"
_UNSET = "0" * 64
"""Placeholder of the header's own hash while it is computed."""
MAX_TOKENS = 1_000_000
"""Tokens of a video: 57 times those of CogVideoX at 49 frames of 480x720; attention over more takes weeks."""
MAX_HEADER_BYTES = 8 * 1024**2
"""Real headers have some kilobytes; one of 100 megabytes, which safetensors allows, takes gigabytes to parse."""


class ArtifactError(DitflowError, ValueError):
    """A file is not an artifact of the expected kind and format, or is damaged."""

    default_code = "artifact-damaged"


def write_artifact(kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Serialise tensors with a header and the hashes of both; the same input gives the same bytes.

    Raises NonFiniteError for values that are NaN or infinite.
    """
    for name, tensor in tensors.items():
        check_finite(f"{name} of the {kind}", tensor)
    hashes = {_HEADER_HASH: _UNSET, _TENSORS_HASH: _UNSET}
    text = json.dumps({"kind": kind, "format": version, **hashes, **header}, sort_keys=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return update_hashes(save(contiguous, metadata={_HEADER: text}))


def read_artifact(kind: str, version: int, data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors; ArtifactError for another kind or format, or changed bytes. name: for messages."""
    _check_header_length(data, name)
    try:
        tensors = load(data)
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise _not_safetensors(name, f" ({error})") from error
    header = _checked_header(kind, version, data, name)
    _check_hash(data, _TENSORS_HASH, sha256(memoryview(data)[header_end(data) :]).hexdigest(), name)
    try:
        for key, tensor in tensors.items():
            check_finite(key, tensor)
    except NonFiniteError as error:
        raise ArtifactError(
            f"{name} has values that no video can be made of: {error}. Make the file again", code="artifact-not-finite"
        ) from None
    return header, tensors


def read_artifact_header(kind: str, version: int, start: bytes, size: int, name: str) -> dict[str, Any]:
    """Read the header from the first bytes of a file of `size` bytes, with the checks of `read_artifact`.

    start: at least `header_end(start)` bytes. The values of the tensors are not checked.
    """
    _check_header_length(start, name)
    if not 8 < header_end(start) <= len(start) or start[8:9] != b"{":
        raise _not_safetensors(name)
    header = _checked_header(kind, version, start, name)
    ends = re.findall(rb'"data_offsets": ?\[\d+, ?(\d+)\]', start[8 : header_end(start)])
    expected = header_end(start) + max(map(int, ends), default=0)
    if size != expected:
        raise ArtifactError(
            f"{name} has {size} bytes, expected {expected} by its header: it is damaged or cut off. Copy it again, or "
            "make it again."
        )
    return header


def is_grid(value: Any) -> bool:
    """Return whether a header's value is a token grid: three counts, and at most `MAX_TOKENS` tokens."""
    is_counts = isinstance(value, list) and all(type(count) is int and count > 0 for count in value)
    return is_counts and len(value) == 3 and math.prod(value) <= MAX_TOKENS


def header_end(start: bytes) -> int:
    """Return the size of a file's header in bytes, its 8-byte length field included, which is all that is read."""
    return 8 + int.from_bytes(start[:8], "little")


def update_hashes(data: bytes) -> bytes:
    """Return a file of `write_artifact` with the hashes of its current tensors and header."""
    header, tensors = data[: header_end(data)], memoryview(data)[header_end(data) :]
    header = _with_hash(_with_hash(header, _TENSORS_HASH, sha256(tensors).hexdigest()), _HEADER_HASH, _UNSET)
    return b"".join([_with_hash(header, _HEADER_HASH, sha256(header).hexdigest()), tensors])


def _not_safetensors(name: str, reason: str = "") -> ArtifactError:
    why = "It is damaged, cut off, or of another format; pickles are never read. Copy it again, or check the path."
    return ArtifactError(f"{name} is not a safetensors file{reason}. {why}", code="artifact-not-safetensors")


def _check_header_length(data: bytes, name: str) -> None:
    length = header_end(data) - 8
    if MAX_HEADER_BYTES < length <= len(data):
        raise ArtifactError(
            f"{name} has a header of {length} bytes, expected at most {MAX_HEADER_BYTES}: ditflow did not write it",
            code="artifact-header-too-large",
        )


def _checked_header(kind: str, version: int, data: bytes, name: str) -> dict[str, Any]:
    """Return our header without the keys that are checked here: kind, format and hashes."""
    text = data[: header_end(data)]
    header = _our_header(text[8:], name)
    if header.get("kind") != kind:
        came = f"a {header['kind']!s:.100}" if "kind" in header else "a safetensors file of other origin"
        raise ArtifactError(f"{name} is not a {kind}: it is {came}. Check the path.", code="artifact-wrong-kind")
    _check_format(kind, version, header.get("format"), name)
    _check_hash(text, _HEADER_HASH, sha256(_with_hash(text, _HEADER_HASH, _UNSET)).hexdigest(), name)
    return {key: value for key, value in header.items() if key not in ("kind", "format", _HEADER_HASH, _TENSORS_HASH)}


def _check_format(kind: str, version: int, written: Any, name: str) -> None:
    if not isinstance(written, int):
        raise ArtifactError(f"{name} has the {kind} format {written!r:.100}, expected a number: it is damaged")
    if written != version:
        newer = written > version
        advice = "upgrade ditflow" if newer else "make it again, or use the release that wrote it"
        raise ArtifactError(
            f"{name} has {kind} format {written}; this version reads format {version}: {advice}",
            code="artifact-newer-format" if newer else "artifact-older-format",
        )


def _check_hash(data: bytes, key: str, computed: str, name: str) -> None:
    """Raise ArtifactError unless the header records the hash that was computed of itself, or of the tensors."""
    recorded = _hash_pattern(key).findall(data[: header_end(data)])
    if recorded != [computed.encode()]:
        part = "header" if key == _HEADER_HASH else "tensors"
        came = recorded[0].decode() if len(recorded) == 1 else f"{len(recorded)} hashes"
        raise ArtifactError(
            f"{name} is damaged: the SHA-256 of its {part} is {computed}, its header records {came}. The file was "
            "changed after it was written: copy it again from an intact source, or make it again."
        )


def _with_hash(header: bytes, key: str, value: str) -> bytes:
    return _hash_pattern(key).sub(lambda match: match[0].replace(match[1], value.encode()), header)


def _hash_pattern(key: str) -> re.Pattern[bytes]:
    # Our JSON is a string within that of safetensors, which escapes its quotes; those of a prompt are escaped twice.
    return re.compile(rb'\\"' + key.encode() + rb'\\": \\"([0-9a-f]{64})\\"')


def _our_header(text: bytes, name: str) -> dict[str, Any]:
    """Return our header within that of a safetensors file; empty in a file of other origin."""
    try:
        metadata = json.loads(text).get("__metadata__") or {}
        header = json.loads(metadata.get(_HEADER, "{}"))
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{name} has a header that is not JSON ({error}): it is damaged") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{name} has the header {header!r:.100}, expected a JSON object: it is damaged")
    return header
