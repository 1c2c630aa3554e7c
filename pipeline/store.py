"""Storage: one root folder for a job's outputs, absolute URIs for its inputs, on any fsspec file system.

Outputs go through `Store`, whose writes are durable, atomic and checked, and which can create an object so
that exactly one of several writers wins. Inputs go through the functions at the end (`read_uri`, `list_uris`,
...).

URIs are written as fsspec reads them: `file:///folder/a b.mp4`, `s3://bucket/a b.mp4`, without
percent-encoding; in local ones it is undone where only the decoded name exists. Credentials come from the
environment or a profile only, never from options.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import time
import unicodedata
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache, partial, wraps
from itertools import takewhile
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote, unquote_to_bytes

import fsspec
import tenacity
from fsspec.asyn import sync
from fsspec.core import split_protocol
from fsspec.exceptions import FSTimeoutError

from pipeline.protocols import OPTIONS, TOKEN_KINDS, OptionError, options_for
from pipeline.waits import waiting

LOCAL_PROTOCOLS = frozenset({"file", "local"})
S3_PROTOCOLS = frozenset({"s3", "s3a"})
TEMPORARY_PREFIX = ".tmp-"  # hidden, so that readers of a whole folder (pyarrow, DuckDB) pass over it
CHUNK_BYTES = 8 * 2**20  # of a local read or copy, or of a request for a range
PIECE_BYTES = 256 * 2**10  # of an answer that comes as it comes
MOST_BYTES = 4 * 2**30  # of an input that nothing else limits
MOST_LISTING_BYTES = 64 * 2**20  # of a web page that lists files
PART_BYTES = 32 * 2**20  # of a multipart upload, which s3fs starts at two parts
PARTS_AT_ONCE = 4
CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mp4": "video/mp4",
}
"""By a name's ending: without it, a browser downloads a page from object storage and does not show it."""
FIRST_BYTE_S = 300.0  # until an answer begins, retries of the storage's own included
GRACE_S, LEAST_BYTES_S = 60.0, 16 * 2**10
"""An answer that has begun may take so many seconds, and one more for so many bytes: a trickle is given up."""
LONGEST_PAUSE_S = 20.0  # between two tries of an operation that is waited out

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# One layer retries requests: botocore, which knows S3's error codes. s3fs's own retries would multiply with
# it (5 x 5 requests by default), so open_fs sets them to 1.
S3_CONFIG: Mapping[str, Any] = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 60,  # seconds without a byte
    "max_pool_connections": 32,
    "retries": {"mode": "standard", "total_max_attempts": 5},
}

# --------------------------------------------------------------------------------------------------- errors


class StoreError(Exception):
    """A storage operation failed; `__cause__` has the file system's own error.

    `transient` tells whether the same operation may succeed later. It is a plain attribute because
    `__cause__` is lost when an exception travels between processes.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class StoreMissingError(StoreError):
    """The object, folder or bucket does not exist."""


class StoreForbiddenError(StoreError):
    """The storage refused access, or no credentials were found."""


class StoreCredentialsError(StoreForbiddenError):
    """There are no credentials, or the storage does not take them: nothing there can be read, whatever it is."""


class StoreOversizedError(StoreError):
    """An input is larger than accepted, whatever its server says of it."""


class StoreDamagedError(StoreError):
    """An object of ours is not what was written there; the message names it."""


class StoreOptionsError(StoreError):
    """The options of a spec hold something that is refused. key: its place in the spec."""

    key = "storage_options"


class StoreUnwritableError(StoreForbiddenError):
    """The storage cannot be written to: no permission, no space, a root that is gone. No row could end there."""


_SECRET_VARIABLE = re.compile(
    r"(SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|PWD|KEY|ACCESS_KEY_ID|CONNECTION_STRING|SAS|SIGNATURE)$"
)
_NO_SECRET_VARIABLES = frozenset({"PWD", "OLDPWD"})
_SECRET_QUERY = (
    r"X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|"
    r"AWSAccessKeyId|Signature|sig"
)
_SECRET_NAME = (
    r"(?:aws[_-])?secret(?:[_-]?access)?(?:[_-]?key)?|(?:aws[_-])?access[_-]?key(?:[_-]?id)?|"
    r"(?:session|security|access|refresh|sas)?[_-]?token|api[_-]?key|client[_-]?secret|password|passwd|passphrase|"
    r"(?:account|shared[_-]?access|private|sse[_-]?customer)[_-]?key|shared[_-]?access[_-]?signature"
)
_REDACTIONS = (
    (re.compile(r"(?<=://)[^/\s'\"]+(?=@)"), "***"),
    (re.compile(r"(?i)(https?://[^\s?'\"]*\?)[^\s'\"]+"), r"\1***"),
    (re.compile(rf"(?i)([?&;](?:{_SECRET_QUERY})=)[^&\s'\"]+"), r"\1***"),
    (re.compile(r"(?is)-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)"), "***"),
    (re.compile(r"(?i)((?:authorization|cookie)['\"]?\s*[:=]\s*['\"]?)[^'\"\n]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=%-]{6,}"), r"\1***"),
    (re.compile(rf"(?i)((?:{_SECRET_NAME})['\"]?\s*[:=]\s*['\"]?)[^\s'\",;&]+"), r"\1***"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), "***"),
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|ya29\.|AIza)[\w-]{16,}"), "***"),
    (re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"), "***"),
)


def redact(text: str) -> str:
    """Return `text` with credentials replaced by `***`.

    Covered: `user:password@` in URLs, the whole query of http(s) URLs (every service signs by names of its own),
    signatures in other URLs, `secret=...`-like pairs, authorization headers and cookies, private keys, tokens that are
    known by how they begin, access key ids, and the values of this process's secret environment variables (a secret key
    alone looks like any other word, so only its value can give it away).
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name.upper()) and name not in _NO_SECRET_VARIABLES:
            text = text.replace(value, "***")
    for pattern, replacement in _REDACTIONS:
        text = pattern.sub(replacement, text)
    return text


_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_TRANSIENT_ERRNO = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
        errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EPIPE,
        errno.ESTALE, errno.ETIMEDOUT,
    }
)  # fmt: skip
# By name, because the libraries that define them are slow to import and may not be installed.
_TRANSIENT_NAMES = frozenset(
    {
        "TimeoutError", "ConnectionError", "HTTPClientError", "IncompleteRead", "IncompleteReadError",
        "ResponseParserError", "ClientPayloadError", "ClientConnectionError", "ProtocolError", "ReadError",
        "ConnectError", "TimeoutException", "Timeout",
    }
)  # fmt: skip
_CERTIFICATE_NAMES = frozenset({"SSLCertVerificationError", "ClientConnectorCertificateError", "SSLError"})
_CREDENTIAL_NAMES = frozenset(
    {
        "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
        "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError",
    }
)  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Return whether this one error (not its causes) is of the kind that goes away by itself.

    Timeouts, lost or refused connections, throttling (429, 503) and a server's own trouble (500, 502, 504).
    """
    if isinstance(error, StoreError):
        return error.transient
    status = http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    names = _class_names(error)
    if names & _CERTIFICATE_NAMES:
        return False
    return bool(names & _TRANSIENT_NAMES) or getattr(error, "errno", None) in _TRANSIENT_ERRNO


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of botocore, aiohttp, requests or s3fs carries, if any."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int):
        return status
    # s3fs turns botocore's ClientError into an OSError and keeps it as the cause.
    cause = error.__cause__
    return http_status(cause) if isinstance(error, OSError) and cause is not None else None


def _class_names(error: BaseException) -> set[str]:
    return {base.__name__ for base in type(error).__mro__}


@contextmanager
def _translating(action: str, uri: str) -> Iterator[None]:
    """Turn whatever a file system raises inside the block into a StoreError that names action and URI."""
    try:
        with waiting(lambda: f"the storage to {action} {_shown(uri)}"):
            yield
    except StoreError:
        raise
    except Exception as error:
        raise _store_error(action, uri, error) from error


def _store_error(action: str, uri: str, error: Exception) -> StoreError:
    what = f"cannot {action} {_shown(uri)}"
    reason = redact(f"{type(error).__name__}: {error}".replace(uri, public_uri(uri)))
    status = http_status(error)
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and status is None):
        return StoreMissingError(f"{what}: it does not exist ({reason}). {_where_to_look(uri)}")
    code = _error_code(error)
    if _class_names(error) & _CREDENTIAL_NAMES or code in _CREDENTIAL_CODES:
        unusable = StoreUnwritableError if action in _WRITING else StoreCredentialsError
        return unusable(
            f"{what}: no usable credentials ({reason}). Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, in the environment of every machine of the cluster."
        )
    if isinstance(error, PermissionError) or status in (401, 403):
        refusal = StoreUnwritableError if action in _WRITING else StoreForbiddenError
        return refusal(f"{what}: access was refused ({reason}). {_who_may(action, uri, code)}")
    kind = StoreUnwritableError if getattr(error, "errno", None) in _NO_ROOM else StoreError
    return kind(f"{what}: {reason}{_advice(error)}", transient=is_transient(error))


def _where_to_look(uri: str) -> str:
    if is_local(uri):
        path = local_path(uri)
        link = f"It is a symbolic link to {os.readlink(path)!r}. " if os.path.islink(path) else ""
        return f"{link}{_misspelt(uri)}Check its spelling, and that its disk is mounted on this machine."
    return (
        "Check its spelling and, on S3, that the bucket exists (buckets are never created here) and that "
        "AWS_ENDPOINT_URL names the intended server."
    )


def _misspelt(uri: str) -> str:
    """What is most likely wrong with an address that leads nowhere, as a sentence, or nothing."""
    if found := _NOT_FILLED_IN.search(uri):
        return f"It holds {found[0].lstrip('/')!r}, which is not filled in here. "
    if _WINDOWS.search(uri):
        return "It is a path of Windows, and this machine has none. "
    if is_local(uri):
        folder, name = os.path.split(local_path(uri))
        with suppress(OSError):
            if any(_is_spelt_like(other, name) for other in os.listdir(folder or "/") if other != name):
                return (
                    "There is a name that looks the same, of other Unicode characters (e with a combining accent, for "
                    "one, as macOS writes it). Rename the file, or name it by a pattern. "
                )
    return ""


def _is_spelt_like(name: str, other: str) -> bool:
    return unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other)


_NOT_FILLED_IN = re.compile(r"\$[{(]|(?:^|/)\$[A-Za-z_]\w*|\{[^/{},]*\}|\{\{|<[^<>/]+>|^%\w+%|`|^~[^/]*(?=/|$)")
"""What shells and templates fill in."""
_WINDOWS = re.compile(r"(?:^|/)(?:[A-Za-z]:[\\/]|\\\\)")


def _who_may(action: str, uri: str, code: str) -> str:
    """Return what to look at after a refusal. Credentials that read other things are not what is wrong with one."""
    if code == "InvalidObjectState":
        return "The object is archived (Glacier): restore it (aws s3api restore-object), or leave it out."
    if is_local(uri):
        return "Check the permissions of the file and of the folders above it."
    if "http" in uri.split("://", 1)[0]:
        if "?" in uri:
            return "If it was a signed URL: it has expired, or was signed for something else. Sign it anew."
        return (
            "If it was read by a signed URL: signatures are not written down, so that only the run that was given one "
            "can read it."
        )
    if action in _WRITING:
        return "On S3, check the right of these credentials to get, put, list and delete there."
    return (
        "On S3, check the right to get it (and to list a folder) in the policies of the bucket, of the object and of "
        "the key that encrypts it."
    )


def _error_code(error: Exception) -> str:
    """Return S3's own code for an error, or nothing."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code", "") if isinstance(response, Mapping) else ""


_CREDENTIAL_CODES = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
)
_WRITING = frozenset({"write", "create", "delete"})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def _advice(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ". The disk or quota is full: free space, or choose another output."
    if number == errno.EROFS:
        return ". The file system is read-only: choose another output."
    if is_transient(error):
        return ". This is usually passing: retry, or check the network and the endpoint (AWS_ENDPOINT_URL)."
    return ""


def _shown(uri: str) -> str:
    return repr(redact(public_uri(uri)))


# --------------------------------------------------------------------------------------------- file systems

_REFUSED_OPTION = re.compile(
    r"(?i)(key|secret|token|passw(or)?d|passphrase|pwd|username|auth|authorization|cookies?|credentials?|sas|"
    r"access_key_id|connection_string)$"
)
"""Ends of the names of credentials: account_key, x-api-key, SSECustomerKey."""


def open_fs(uri: str, storage_options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """Return the fsspec file system that serves `uri`, and the path of `uri` in it.

    Of `storage_options` those that the protocol has count, see `pipeline.protocols`. On S3: one layer of retries,
    timeouts, a bounded connection pool, no cached listings; the options may override each (for example `endpoint_url`,
    `requester_pays`, `config_kwargs: {read_timeout: 120}`).

    Raises StoreError for credentials in the options or the URI, for a protocol that is not opened, and
    StoreOptionsError for an option that is not taken.
    """
    options = check_address(uri, storage_options or {})
    protocol = _protocol(uri)
    with _translating("open", uri):
        if protocol in LOCAL_PROTOCOLS:
            return fsspec.filesystem("file"), local_path(uri)
        if protocol in S3_PROTOCOLS:
            return _open_s3(uri, options)
        # Not url_to_fs: it takes "::" for a chain of file systems, and has options from the address that count more.
        uri, kind = _plain_scheme(uri), fsspec.get_filesystem_class(protocol)
        told = {name: value for name, value in kind._get_kwargs_from_urls(uri).items() if name in OPTIONS[protocol]}
        if protocol in ("http", "https"):
            options["client_kwargs"] = {**_web_client(), **options.get("client_kwargs", {})}
        fs = kind(**{"use_listings_cache": False, **told, **options})
        return fs, fs._strip_protocol(uri)


@cache
def _web_client() -> Mapping[str, Any]:
    """Return what keeps look-ups and listings short, whatever a web server answers. For content see `_content`."""
    from aiohttp import ClientResponse, ClientTimeout

    class ShortText(ClientResponse):
        async def text(self, encoding: str | None = None, errors: str = "strict") -> str:
            data = await _filled(self.content, MOST_LISTING_BYTES + 1)
            if len(data) > MOST_LISTING_BYTES:
                raise ValueError(f"the page has more than {MOST_LISTING_BYTES} bytes, which no list of files has")
            return data.decode(encoding or self.charset or "utf-8", errors)

    return {"timeout": ClientTimeout(total=GRACE_S), "response_class": ShortText}


def check_address(uri: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of those options that count for an address. Raises what `open_fs` raises; nothing is opened."""
    protocol = _protocol(uri)
    if protocol.endswith(":"):
        meant = f"{protocol}//{uri.removeprefix(protocol).removeprefix('/')}"
        raise StoreError(redact(f"{uri!r} is no address: expected '//' after '{protocol}'. Write {meant}"))
    if protocol not in OPTIONS:
        raise StoreError(
            f"cannot open {_shown(uri)}: the protocol {protocol!r:.50} is not opened here, only "
            f"{', '.join(f'{name}://' for name in OPTIONS)}, and none through another ('::'). Copy the file to one of "
            "these."
        )
    _refuse_credentials(uri, options)
    try:
        return options_for(protocol, options)
    except OptionError as error:
        refusal = StoreOptionsError(redact(str(error)))
        refusal.key = error.key
        raise refusal from error


def _open_s3(uri: str, options: dict[str, Any]) -> tuple[Any, str]:
    # max_concurrency 1: with more, s3fs asks for the size before each read, two requests in place of one.
    defaults = {"use_listings_cache": False, "max_concurrency": 1}
    config = {**S3_CONFIG, **options.get("config_kwargs", {})}
    fs = fsspec.filesystem("s3", **{**defaults, **options, "config_kwargs": config})
    fs.retries = 1
    return fs, fs._strip_protocol(_plain_scheme(uri))


def _plain_scheme(uri: str) -> str:
    """Return a URI with the name of its protocol in small letters, as file systems know it."""
    return re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*(?=://)", lambda scheme: scheme[0].lower(), uri)


def _protocol(uri: str) -> str:
    """Return the protocol of an address; `s3:`, which is none, of one that lacks its slashes."""
    protocol = split_protocol(uri)[0]
    if protocol is not None:
        return protocol.lower()
    start = re.match(r"([a-z][a-z0-9]+):", uri)
    if start is None or start[1] in LOCAL_PROTOCOLS or start[1] not in OPTIONS or os.path.lexists(uri):
        return "file"
    return start[0]


def _refuse_credentials(uri: str, options: Mapping[str, Any]) -> None:
    found = sorted(_credential_keys(options))
    if found:
        raise StoreOptionsError(
            f"storage options hold the credentials {', '.join(found)} for {_shown(uri)}. They would end up "
            "in job files and logs: remove them and set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, in the environment."
        )
    if _protocol(uri) in S3_PROTOCOLS and "@" in uri.split("://", 1)[1].split("/", 1)[0]:
        raise StoreError(
            f"{_shown(uri)} holds credentials before an '@'. Write s3://bucket/folder and set AWS_PROFILE, "
            "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the environment."
        )


def _refuse_as_root(uri: str) -> None:
    """Refuse `${OUT}/run`, which would become a folder of this name, and secrets, which all outputs would name."""
    if re.search(r"://[^/\s]*:[^/\s]*@|^https?://[^?]*\?", uri):
        raise StoreError(
            f"{_shown(uri)} holds a password or a signature, which must not be written down. Signed URLs are for files "
            "that are read, by a job that is run here: a spec that goes to a cluster is kept there. Put them into a "
            "table on the storage, as pairing: {uri: s3://...}."
        )
    wrong = _no_place(uri)
    if wrong and not (uri.strip() and os.path.exists(os.path.expanduser(_LOCAL_SCHEME.sub("", uri)))):
        raise StoreError(
            f"{_shown(uri)} {wrong}. Write the place itself, a folder or s3://bucket/folder, or let the shell do it: "
            '--set "output.uri=$OUT/run".'
        )


def _no_place(uri: str) -> str:
    """What a folder would get its name from that nobody means, or nothing."""
    if not uri.strip():
        return "is empty"
    if uri != uri.strip() or re.search(r"[\x00-\x1f\x7f]", uri):
        return "begins or ends with white space, or holds control characters"
    if re.fullmatch(r"[a-z0-9]+:/*", uri, flags=re.IGNORECASE):
        return "names no bucket or folder"
    if _WINDOWS.search(uri):
        return "is a path of Windows, and would become a folder of this name"
    found = _NOT_FILLED_IN.search(uri)
    if found is None or (found[0].startswith("~") and not os.path.expanduser(found[0]).startswith("~")):
        return ""
    return f"holds {found[0].lstrip('/')!r}, which is not filled in here, and would become a folder of this name"


def _credential_keys(options: Mapping[str, Any], depth: int = 5) -> Iterator[str]:
    """Yield the names of secrets among options; what is nested deeper than any option is refused as such."""
    for name, value in options.items():
        inner = value if isinstance(value, list | tuple) else [value]
        named = _REFUSED_OPTION.search(str(name)) is not None and not isinstance(value, bool | None)
        named = named and not (name == "token" and value in TOKEN_KINDS)
        if named or any(isinstance(part, str) and redact(part) != part for part in inner):
            yield str(name)
        for part in inner:
            yield from _credential_keys(part, depth - 1) if isinstance(part, Mapping) and depth and not named else ()


# ------------------------------------------------------------------------------------------------- patience


def patiently(
    operation: Callable[[], _Result], patience_s: float, sleep: Callable[[float], None] = time.sleep
) -> _Result:
    """Return `operation()`, repeating it while its error passes by itself and `patience_s` seconds are not over.

    Waits a random time of up to 1, 2, 4, ... `LONGEST_PAUSE_S` seconds: many workers that failed together must not
    come back together. Raises the operation's own last error.
    """
    if not patience_s:
        return operation()
    reasons: list[str] = []

    def note(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        reasons[:] = [redact(f"storage that is tried again: {state.outcome.exception()}")]

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(patience_s),
        wait=tenacity.wait_random_exponential(multiplier=1, max=LONGEST_PAUSE_S),
        retry=tenacity.retry_if_exception(is_transient),
        before_sleep=note,
        sleep=sleep,
        reraise=True,
    )
    with waiting(lambda: "".join(reasons)):
        return retrying(operation)


def _patient(
    method: Callable[Concatenate[Store, _Arguments], _Result],
) -> Callable[Concatenate[Store, _Arguments], _Result]:
    """Let a method of a Store wait out errors that pass, for as long as the store's patience lasts."""

    @wraps(method)
    def waiting(store: Store, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return patiently(lambda: method(store, *args, **kwargs), store.patience_s)

    return waiting


# ---------------------------------------------------------------------------------------------------- Store


@dataclass(frozen=True)
class Stored:
    """What `Store.put` wrote: the absolute URI, the SHA-256 in hex, and the size in bytes."""

    uri: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Entry:
    """What a listing says of an object: its size, and when it was written, if the storage tells."""

    bytes: int
    written: datetime | None


class Store:
    """A root folder, local (`file://` or a plain path) or on S3 (`s3://bucket/folder`), addressed by keys.

    A key is a relative path with `/`, such as `videos/0a1b.mp4`. Objects are written whole or not at all.
    Holds the URI and the options only, so it is cheap to pickle; each process opens its own file system.
    Safe to use from several threads. Every operation waits for `patience_s` seconds for errors that pass by
    themselves, such as throttling and lost connections; beyond what botocore retries.

    needs: a key that a local root must have to be written to. A root that was moved away or unmounted is then an error,
    and is not made anew.

    Raises StoreError for credentials among the options or in the URI, and for a URI with a variable that nobody has
    filled in; nothing is opened or created here.
    """

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any] | None = None,
        patience_s: float = 0.0,
        needs: str | None = None,
    ) -> None:
        self.storage_options: dict[str, Any] = dict(storage_options or {})
        self.patience_s, self.needs = patience_s, needs
        check_address(uri, self.storage_options)
        _refuse_as_root(uri)
        self._local = _protocol(uri) in LOCAL_PROTOCOLS
        self.uri = absolute_uri(uri).rstrip("/") if not self._local else absolute_uri(uri)
        self._opened: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store, (self.uri, self.storage_options, self.patience_s, self.needs))

    def __repr__(self) -> str:
        return f"Store({_shown(self.uri)})"

    def uri_of(self, key: str) -> str:
        """Return the absolute URI of `key`. Raises StoreError for a key that leaves the root."""
        return f"{self.uri.rstrip('/')}/{_checked(key)}"

    def read(self, key: str) -> bytes:
        """Return the object's bytes. Raises StoreMissingError, StoreForbiddenError or StoreError."""
        return read_uri(self.uri_of(key), self.storage_options, self.patience_s)

    def read_record(self, key: str, make: Callable[[Any], _Result], advice: str) -> _Result:
        """Return what `make` makes of the JSON that is stored at `key`.

        Raises StoreDamagedError, with what to do about it, for a file of which nothing can be made, and what `read`
        raises.
        """
        data = self.read(key)
        try:
            return make(json.loads(data))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise StoreDamagedError(
                f"{self.uri_of(key)} ({len(data)} bytes) is damaged ({type(error).__name__}: {error!s:.200}): {advice}"
            ) from error

    @_patient
    def read_start(self, key: str, count: int) -> bytes:
        """Return the object's first bytes, `count` or as many as there are, in one request.

        For an object that is not empty: servers have no range of nothing. Raises as `read` does.
        """
        uri = self.uri_of(key)
        with _translating("read", uri):
            fs, path = self._at(key)
            _check_regular(fs, path)
            if "http" in fs.protocol:  # servers need not heed what part is asked for
                return _start_of(_content(fs, path, uri, MOST_BYTES), count)
            return fs.cat_file(path, start=0, end=count)

    @_patient
    def exists(self, key: str) -> bool:
        """Return whether `key` is an object (a folder is none)."""
        uri = self.uri_of(key)
        with _translating("look up", uri):
            fs, path = self._at(key)
            return _kind(fs, path) == "file"

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size in bytes of every object below the folder `prefix`, at any depth, sorted by key.

        A folder that does not exist has no objects. Unfinished temporary files are not listed.
        """
        return {key: entry.bytes for key, entry in self.entries(prefix).items()}

    @_patient
    def entries(self, prefix: str = "", closed: dict[str, str] | None = None) -> dict[str, Entry]:
        """Return what the storage's listing says of every object below `prefix`; see `sizes`.

        closed: takes the local folders that cannot be listed, with the reason; without it they are an error.
        """
        folder = prefix.rstrip("/")
        uri = self.uri_of(folder) if folder else self.uri
        with _translating("list", uri):
            fs, path = self._at(folder)
            found = _files_below(fs, path, closed)
        lead = f"{folder}/" if folder else ""
        return {lead + name: found[name] for name in sorted(found)}

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys of every object below the folder `prefix`, at any depth, sorted."""
        return [*self.sizes(prefix)]

    @_patient
    def put(self, key: str, data: bytes | Path) -> Stored:
        """Write `data`, or the content of a local file, at `key`; return where it is with its hash and size.

        Replaces what was there. Durable and atomic: a reader sees the old object or the new one. Afterwards the
        stored size is checked. A file is copied in pieces and never held in memory as a whole.

        Raises StoreMissingError (no such bucket), StoreUnwritableError, StoreForbiddenError or StoreError.
        """
        uri = self.uri_of(key)
        with _translating("write", uri):
            fs, path = self._at(key)
            if self._local:
                self._check_root()
                _write_local(path, data, os.replace)
            else:
                self._upload(fs, path, data)
            size = data.stat().st_size if isinstance(data, Path) else len(data)
            _check_size(uri, fs.info(path)["size"], size)
        with _pieces(data) as pieces:
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
        return Stored(uri, digest.hexdigest(), size)

    @_patient
    def create(self, key: str, data: bytes) -> bool:
        """Write `data` at `key` if nothing is there; return False when an object already existed.

        Of several writers exactly one gets True. A writer whose answer got lost on the way may get False for
        an object of its own: compare what is stored where that matters.

        Raises StoreMissingError (no such bucket), StoreForbiddenError or StoreError.
        """
        uri = self.uri_of(key)
        with _translating("create", uri):
            fs, path = self._at(key)
            try:
                self._create(fs, path, data)
            except Exception as error:
                if not _says_exists(error):
                    raise
                if _kind(fs, path) == "file":
                    return False
                raise StoreError(
                    f"cannot create {uri!r}: the storage said that it exists, but no object is there. It was "
                    "deleted at the same moment, or a folder has this name: try again.",
                    transient=True,
                ) from error
        return True

    @_patient
    def delete(self, key: str) -> None:
        """Remove the object; one that does not exist is no error. Local folders left empty go as well.

        Raises StoreError for a file that a symbolic link leads to from the root: it lies elsewhere, and is not ours.
        """
        uri = self.uri_of(key)
        if self.is_linked(key.rpartition("/")[0]):
            raise StoreError(
                f"{_shown(uri)} is not removed: a folder on the way to it is a symbolic link, and links are not "
                "followed to remove what lies elsewhere."
            )
        with _translating("delete", uri):
            fs, path = self._at(key)
            with suppress(FileNotFoundError):
                fs.rm_file(path)
        if self._local:
            self._prune(Path(path).parent)

    def is_linked(self, key: str) -> bool:
        """Return whether a file or a folder, or one that leads to it from the root, is a symbolic link."""
        if not self._local:
            return False
        parts, root = key.split("/"), self._at("")[1]
        return any(os.path.islink(os.path.join(root, *parts[:count])) for count in range(1, len(parts) + 1))

    def unfinished(self) -> Sequence[str]:
        """Return what writers that died have left: keys of temporary files, or of parts of uploads.

        In a folder that nobody writes into. Symbolic links are not followed.
        """
        with _translating("list", self.uri):
            fs, root = self._at("")
            if not self._local:
                return [upload["Key"] for upload in self._uploads(fs, root)]
            found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
        return sorted(os.path.relpath(path, root) for path in found if _is_temporary(path))

    def remove_unfinished(self) -> int:
        """Remove what `unfinished` returns, and return how many it was."""
        with _translating("clean", self.uri):
            fs, root = self._at("")
            if self._local:
                left = [Path(root, key) for key in self.unfinished()]
                for path in left:
                    path.unlink(missing_ok=True)
                    self._prune(path.parent)
                return len(left)
            uploads = self._uploads(fs, root)
            for upload in uploads:
                bucket = fs.split_path(root)[0]
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            return len(uploads)

    def _uploads(self, fs: Any, root: str) -> Sequence[Any]:
        """Return the uploads below the root that were begun and not completed."""
        bucket, folder, _ = fs.split_path(root)
        return [one for one in fs.list_multipart_uploads(bucket) if one["Key"].startswith(f"{folder}/")]

    def fingerprints(self) -> dict[str, str]:
        """Return a short text for every object that changes with its content, by key; see `fingerprint`."""
        return {key: fingerprint(self.uri_of(key), self.storage_options) for key in self.list()}

    @_patient
    def download(self, key: str, file: Path) -> None:
        """Copy the object into a local file, in pieces, and check its size.

        Raises StoreMissingError, StoreForbiddenError or StoreError.
        """
        uri = self.uri_of(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with _translating("read", uri):
            fs, path = self._at(key)
            size = fs.info(path)["size"]
            with file.open("wb") as copy:
                copy.writelines(_content(fs, path, uri, MOST_BYTES if size is None else size))
            _check_size(str(file), file.stat().st_size, size)

    def check_writable(self) -> None:
        """Write, re-create and delete a small probe object, so that a job fails before its work, not after.

        Raises StoreError that says what to do, also when the storage ignores conditional writes, on which the
        promise of one result per row rests.
        """
        key = f"probe-{uuid.uuid4().hex}"
        try:
            first, second = self.create(key, b"probe"), self.create(key, b"probe")
        except StoreError as error:
            raise type(error)(
                f"the output folder {_shown(self.uri)} cannot be written to: {error}",
                transient=error.transient,
            ) from error
        self.delete(key)
        if not first or second:
            raise StoreError(
                f"the storage of {_shown(self.uri)} ignores conditional writes (If-None-Match: *), so two "
                "workers could both commit one row. Use AWS S3, or a server that makes them atomic (MinIO, "
                "Ceph). OpenStack Swift takes them, but looks before it stores: of writers that meet, all succeed."
            )

    def _create(self, fs: Any, path: str, data: bytes) -> None:
        if self._local:
            self._check_root()
            _write_local(path, data, _link)
        else:
            self._require_s3()
            fs.pipe_file(path, data, mode="create", chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    def _upload(self, fs: Any, path: str, data: bytes | Path) -> None:
        self._require_s3()
        content_type = CONTENT_TYPES.get(path.rsplit(".", 1)[-1], "application/octet-stream")
        options = {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE, "ContentType": content_type}
        if isinstance(data, Path):
            fs.put_file(str(data), path, **options)
        else:
            fs.pipe_file(path, data, **options)

    def _require_s3(self) -> None:
        if _protocol(self.uri) not in S3_PROTOCOLS:
            raise StoreError(
                f"outputs cannot be written to {_shown(self.uri)}: only a local folder and s3:// offer "
                "atomic and conditional writes here. Other protocols can be read from."
            )

    def _check_root(self) -> None:
        """Raise StoreUnwritableError if what the root needs is not there."""
        if self.needs is not None and not os.path.exists(os.path.join(self._at("")[1], self.needs)):
            raise StoreUnwritableError(
                f"the output folder {_shown(self.uri)} is gone: {self.needs} is no more in it. It was moved or "
                "unmounted while the job ran. Bring it back, or run the job where it is now."
            )

    def _at(self, key: str) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():  # a forked process needs its own connections
            self._opened = (os.getpid(), *open_fs(self.uri, self.storage_options))
        _, fs, root = self._opened
        return fs, f"{root.rstrip('/')}/{key}" if key else root

    def _prune(self, folder: Path) -> None:
        """Remove empty folders upwards to the root: object storage has no empty folders either."""
        root = Path(self._at("")[1])
        with suppress(OSError):  # not empty, or another process was faster: both are fine
            while root in folder.parents:
                folder.rmdir()
                folder = folder.parent


def _checked(key: str) -> str:
    segments = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") or part.startswith(TEMPORARY_PREFIX) for part in segments):
        raise StoreError(
            f"the key {key!r} is not a plain relative path: it must not be empty, start or end with '/', "
            f"hold '..', or use names that start with '{TEMPORARY_PREFIX}'."
        )
    return key


def _check_size(uri: str, stored: int, expected: int) -> None:
    if stored != expected:
        raise StoreError(
            f"{_shown(uri)} has {stored} bytes after {expected} were written. The upload was cut short, or "
            "another program writes to the same place: try again.",
            transient=True,
        )


def _says_exists(error: BaseException) -> bool:
    # moto and AWS through s3fs: FileExistsError. Swift: a plain OSError over a 412. AWS says 409 to writers
    # that meet at the same moment.
    return isinstance(error, FileExistsError) or http_status(error) in (409, 412)


# ---------------------------------------------------------------------------------------------- local files


@contextmanager
def _pieces(data: bytes | Path) -> Iterator[Iterator[bytes]]:
    """Lend the content in pieces of at most CHUNK_BYTES; bytes are one piece."""
    if isinstance(data, bytes):
        yield iter([data])
        return
    with data.open("rb") as file:
        yield iter(lambda: file.read(CHUNK_BYTES), b"")


def _write_local(path: str, data: bytes | Path, publish: Any) -> None:
    """Write a durable temporary file beside `path` and `publish` it there (os.replace, or _link)."""
    folder = os.path.dirname(path)
    temporary = _write_temporary(folder, data)
    try:
        publish(temporary, path)
        _sync_folder(folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_temporary(folder: str, data: bytes | Path) -> str:
    """Return the path of a new durable file in `folder` with `data`; it is gone again if this raises."""
    path = os.path.join(folder, TEMPORARY_PREFIX + uuid.uuid4().hex)
    descriptor = _open_new(folder, path)
    try:
        with open(descriptor, "wb") as file, _pieces(data) as pieces:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(path)
        raise
    return path


def _open_new(folder: str, path: str) -> int:
    # 0o666 under the umask, unlike tempfile's 0o600: other users of a shared folder read the results.
    for _ in range(10):
        _make_folder(Path(folder))
        with suppress(FileNotFoundError):  # a delete() elsewhere removed the folder while it was empty
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    raise StoreError(f"the folder {folder!r} vanishes each time it is made: another program removes it.")


def _is_temporary(path: str) -> bool:
    """Return whether a file is one of `_write_temporary`, and not one of that kind of somebody else."""
    name = os.path.basename(path).removeprefix(TEMPORARY_PREFIX)
    return bool(re.fullmatch("[0-9a-f]{32}", name)) and os.path.isfile(path) and not os.path.islink(path)


def _make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they survive a power cut."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with suppress(FileExistsError, FileNotFoundError):  # raced by another process; _open_new tells
            new.mkdir()
            _sync_folder(str(new.parent))


def _sync_folder(folder: str) -> None:
    with suppress(FileNotFoundError):  # emptied and removed by a delete() elsewhere
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _link(source: str, target: str) -> None:
    """Give the file a second name; unlike a rename, this fails when the name is taken."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        raise StoreError(
            f"cannot create {target!r} exclusively: its file system has no hard links ({error.strerror}). Choose "
            "an output on an ordinary local disk, NFS, or S3."
        ) from error


# -------------------------------------------------------------------------------------------------- listing


def _kind(fs: Any, path: str) -> str | None:
    """Return 'file', 'directory' or None. Unlike with fsspec's isfile(), a refused access is an error."""
    try:
        info = fs.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if http_status(error) in (None, 404, 410):
            return None
        raise
    return "directory" if info["type"] == "directory" else "file"


def _is_local_fs(fs: Any) -> bool:
    return fs.protocol == ("file", "local")


def _files_below(fs: Any, folder: str, closed: dict[str, str] | None = None) -> dict[str, Entry]:
    """Return size and time of every file below `folder` by its path relative to it; unsorted. closed: see `entries`."""
    if not _is_local_fs(fs):
        return {name: Entry(info["size"], _written(info)) for name, info in _remote_entries(fs, folder).items()}

    def on_error(error: OSError) -> None:
        if closed is None or error.filename == folder:
            _raise_unless_missing(error)
        else:
            closed[os.path.relpath(error.filename, folder)] = f"it cannot be listed: {error.strerror}"

    found = {}
    for name in _walk_local(folder, on_error):
        try:
            status = os.stat(os.path.join(folder, name))
            found[name] = Entry(status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
        except FileNotFoundError:
            continue
        except OSError:  # a link to itself, for one: reading it says so
            found[name] = Entry(0, None)
    return found


def _remote_entries(fs: Any, folder: str, depth: int | None = None) -> dict[str, Mapping[str, Any]]:
    """Return what a remote file system says of every file below `folder`; with depth 1, of files and folders in it."""
    listing = {"maxdepth": depth, "withdirs": depth == 1, "detail": True}
    folder = folder if "s3" in fs.protocol else folder.rstrip("/")
    if "s3" in fs.protocol:
        # By prefix, since s3fs removes the leading slash of a key, and lists the parent of a folder that is not there.
        bucket, key, _ = fs.split_path(f"{folder}/x")
        found = fs.find(bucket, prefix=key[:-1], **listing)
    else:
        found = fs.find(folder, **listing)
    lead = f"{folder}/"
    return {
        name[len(lead) :]: info
        for name, info in found.items()
        if name.startswith(lead) and not name.endswith("/") and (depth == 1 or info["type"] == "file")
    }


def _written(info: Mapping[str, Any]) -> datetime | None:
    """Return when a file was written, as file systems tell in their own ways."""
    times = (info.get(name) for name in ("LastModified", "last_modified", "mtime", "updated"))
    time_ = next((value for value in times if isinstance(value, datetime)), None)
    return time_ and (time_ if time_.tzinfo else time_.replace(tzinfo=UTC)).astimezone(UTC)


def _walk_local(folder: str, on_error: Callable[[OSError], None]) -> Iterator[str]:
    """Yield the path of everything below `folder` that is no folder, relative to it, but for unfinished files."""
    # Not fsspec's find(): when a file vanishes between listing and stat (a writer's temporary file), it drops
    # the whole folder from the answer without a word.
    for parent, folders, names in os.walk(folder, onerror=on_error, followlinks=True):
        folders[:] = sorted(name for name in folders if not _leads_back(folder, os.path.join(parent, name)))
        for name in names:
            if not name.startswith(TEMPORARY_PREFIX):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _leads_back(root: str, path: str) -> bool:
    """Return whether a folder is a symbolic link to one that the walk from `root` went through, or to one above it."""
    if not os.path.islink(path):
        return False
    target, above = os.path.join(os.path.realpath(path), ""), path
    while above != root:
        above = os.path.dirname(above)
        if os.path.join(os.path.realpath(above), "").startswith(target):
            return True
    return False


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


# ------------------------------------------------------------------------------------------------- addresses


def is_local(uri: str) -> bool:
    """Return whether a URI names a file of this machine."""
    return _protocol(uri) in LOCAL_PROTOCOLS


def absolute_uri(uri: str) -> str:
    """Return `uri` with its protocol, a local path made absolute."""
    return f"file://{os.path.abspath(local_path(uri))}" if is_local(uri) else _plain_scheme(uri)


_LOCAL_SCHEME = re.compile(r"(?:file|local):(?://(?:localhost(?=/))?)?", re.IGNORECASE)


def local_path(uri: str) -> str:
    """Return what a plain path, `file:///path`, `file://localhost/path` or `file:/path` names, from the root on.

    A local URI may be percent-encoded: where nothing has a name as it is written, `%20` is a blank.
    """
    path = os.path.join(os.getcwd(), os.path.expanduser(_LOCAL_SCHEME.sub("", uri, count=1)))
    path = path if ".." in path.split("/") else os.path.normpath(path)  # a/link/.. need not be a
    if "%" not in path or not _LOCAL_SCHEME.match(uri):
        return path
    found = ""
    for name in path.split("/"):
        written, decoded = f"{found}{name}", f"{found}{os.fsdecode(unquote_to_bytes(os.fsencode(name)))}"
        other = decoded not in (written, "") and "\0" not in decoded and not os.path.lexists(written)
        found = f"{decoded if other and os.path.lexists(decoded) else written}/"
    return found.removesuffix("/") or "/"


def local_folder(uri: str) -> str:
    """Return the path of a folder of this machine; StoreError for other places, and for what would become one."""
    if not is_local(uri):
        raise StoreError(f"{_shown(uri)} is no folder of this machine")
    Store(uri)  # refuses what is no place
    return local_path(uri)


def public_uri(uri: str) -> str:
    """Return an absolute URI as it may be written down.

    Without user and password, and without what comes after the path of an http(s) URL: signatures are there; of other
    URLs without a query that holds a secret. What Azure has before an '@' is a container. Bytes of a local name that
    are no UTF-8 are percent-encoded.
    """
    if is_local(uri):
        return uri if _is_utf8(uri) else quote(os.fsencode(uri), safe=_ASCII_AS_IT_IS)
    if not re.match(r"(abfss?|wasbs?)://[^/\s:]*@", uri):
        uri = re.sub(r"(?<=://)[^/\s]*@", "", uri)
    path, *query = re.split(r"[?#]", uri, maxsplit=1)
    secret = query and (re.search(r"https?://", uri) or redact(f"?{query[0]}") != f"?{query[0]}")
    return path if secret else uri


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_ASCII_AS_IT_IS = "".join(map(chr, range(32, 127))).replace("%", "")


# --------------------------------------------------------------------------------------------------- inputs


def read_uri(
    uri: str, storage_options: Mapping[str, Any] | None = None, patience_s: float = 0.0, most: int = MOST_BYTES
) -> bytes:
    """Return the bytes at an absolute URI; errors that pass by themselves are waited out for `patience_s` seconds.

    Raises StoreOversizedError for more than `most` bytes, StoreMissingError, StoreForbiddenError or StoreError.
    """

    def read() -> bytes:
        fs, path = open_fs(uri, storage_options)
        with _translating("read", uri):
            _check_regular(fs, path)
            return b"".join(_content(fs, path, uri, most))

    return patiently(read, patience_s)


def _content(fs: Any, path: str, uri: str, most: int) -> Iterator[bytes]:
    """Yield a file's bytes in pieces, none of them empty.

    Raises StoreOversizedError for more than `most`, and StoreError for a remote file that comes too slowly.
    """
    if _is_local_fs(fs) or not {"http", "s3"} & {*fs.protocol}:
        pieces = _from_file(fs, path, uri)
    else:
        pieces = _from_answer(fs, path, uri)
    read = 0
    for piece in pieces:
        read += len(piece)
        if read > most:
            pieces.close()
            raise StoreOversizedError(
                f"{_shown(uri)} has more than the {most} bytes that are accepted. Give a smaller file or, if it is a "
                "reference, raise references.max_bytes."
            )
        yield piece


def _start_of(pieces: Iterator[bytes], count: int) -> bytes:
    start = b""
    while len(start) < count and (piece := next(pieces, b"")):
        start += piece
    return start[:count]


class _Pace:
    """Watches how fast a remote file comes, from its first byte on."""

    def __init__(self, uri: str):
        self._uri, self._began, self._read = uri, time.monotonic(), 0

    @property
    def seconds_left(self) -> float:
        """How long the next bytes may take."""
        return self._began + GRACE_S + self._read / LEAST_BYTES_S - time.monotonic()

    def add(self, count: int) -> None:
        """Take note of bytes that came; StoreError if they came too late."""
        self._read += count
        if self.seconds_left <= 0:
            raise StoreError(
                f"{_shown(self._uri)} came too slowly: {self._read} bytes in {time.monotonic() - self._began:.0f} "
                f"seconds, expected {LEAST_BYTES_S} a second. Download it, or copy it to a storage nearby."
            )


def _from_file(fs: Any, path: str, uri: str) -> Generator[bytes]:
    """Yield the bytes of a file of a file system that is asked for one range after another."""
    remote = not _is_local_fs(fs)
    with fs.open(path, "rb", **({"block_size": CHUNK_BYTES, "cache_type": "readahead"} if remote else {})) as file:
        pace = _Pace(uri)
        while piece := file.read(PIECE_BYTES if remote else CHUNK_BYTES):
            if remote:
                pace.add(len(piece))
            yield piece


def _from_answer(fs: Any, path: str, uri: str) -> Generator[bytes]:
    """Yield the bytes of one answer over HTTP as they come, whatever the server said of their number before."""
    get = _get_s3 if "s3" in fs.protocol else _get_http
    body, close = sync(fs.loop, get, fs, path, timeout=FIRST_BYTE_S)
    try:
        piece = sync(fs.loop, body.read, PIECE_BYTES, timeout=FIRST_BYTE_S)
        pace = _Pace(uri)
        while piece:
            pace.add(len(piece))
            yield piece
            try:
                piece = sync(fs.loop, _filled, body, PIECE_BYTES, timeout=max(pace.seconds_left, 0.001))
            except FSTimeoutError:
                pace.add(0)
                raise
    finally:
        fs.loop.call_soon_threadsafe(close)


async def _get_http(fs: Any, path: str) -> tuple[Any, Callable[[], None]]:
    """Ask for a file; return what its bytes are read from, and what ends that."""
    from aiohttp import ClientTimeout

    session, request = await fs.set_session(), dict(fs.kwargs)
    headers = {"Accept-Encoding": "identity", **request.pop("headers", {})}
    no_total = ClientTimeout(total=None, sock_connect=30, sock_read=60)
    answer = await session.get(fs.encode_url(path), headers=headers, timeout=no_total, **request)
    try:
        fs._raise_not_found_for_status(answer, path)
    except BaseException:
        answer.close()
        raise
    return answer.content, answer.close


async def _get_s3(fs: Any, path: str) -> tuple[Any, Callable[[], None]]:
    bucket, key, _ = fs.split_path(path)
    body = (await fs._call_s3("get_object", Bucket=bucket, Key=key, **fs.req_kw))["Body"]
    return body, body.close


async def _filled(body: Any, count: int) -> bytes:
    """Return the next `count` bytes, or those up to the end."""
    pieces: list[bytes] = []
    while count > 0 and (piece := await body.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _check_regular(fs: Any, path: str) -> None:
    """Raise OSError for a local path that is no regular file: opening a FIFO waits for its writer, perhaps for ever."""
    if not _is_local_fs(fs):
        return
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.scandir(path).close()  # an error of its own for a folder that may not be looked into
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", path)
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _SPECIAL_FILES if is_kind(mode)), "a special file")
        raise OSError(f"it is {kind}, and only regular files are read: write its content into a file")


_SPECIAL_FILES = (
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def list_uris(uri: str, glob: str = "*", storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Return the absolute URIs of the files that `uri` names, sorted.

    `uri` is a file (then `glob` plays no part, and its name may hold `*` or `[`), a folder whose files match
    `glob` relative to it (`*.mp4`, `*/left.mp4`, `**/*.mp4`), or itself a pattern such as
    `s3://b/refs/*.mp4`. As in a shell, hidden files and folders (names with a leading dot) match only a pattern with
    that dot; unlike there, `*.mp4` matches `A.MP4` too. Brackets in the name of a folder that exists are no pattern.

    Only folders that the pattern leads to are looked into. One of them that cannot be listed is among the URIs
    itself, as is what no bytes can be read of (a broken link, a FIFO): reading them says what is wrong.

    Raises StoreMissingError when nothing matches, StoreForbiddenError or StoreError.
    """
    uri = absolute_uri(uri)
    if re.match(r"https?://[^?]*\?", uri):
        return [uri]  # the query of a URL is no pattern
    fs, path = open_fs(uri, storage_options)
    with _translating("list", uri):
        if _is_local_fs(fs) and os.path.islink(path) and not os.path.exists(path):
            return [fs.unstrip_protocol(path)]
        kind = _kind(fs, path)
        if kind == "file" and not _is_folder_too(fs, uri, path, glob):
            return [fs.unstrip_protocol(path)]
        folder, pattern = (path, glob) if kind is not None else _split_pattern(fs, path)
        if pattern is None:
            raise StoreMissingError(
                f"{_shown(uri)} does not exist: there is neither a file nor a folder of this name. {_misspelt(uri)}"
                "Check its spelling."
            )
        names = _matching(fs, folder if "s3" in fs.protocol else folder.rstrip("/"), pattern)
    if not names:
        brackets = "; a bracket that is part of a name is written [[]" if "[" in pattern else ""
        braces = "; braces are no pattern: give a list of patterns" if re.search(r"\{.*,.*\}", pattern) else ""
        raise StoreMissingError(
            f"no file matches {pattern!r} in {_shown(fs.unstrip_protocol(folder))}. {_misspelt(uri)}Check the folder's "
            f"spelling and the pattern: upper and lower case differ, '**/' reaches into subfolders{brackets}{braces}."
        )
    return [fs.unstrip_protocol(name) for name in sorted(names)]


def _is_folder_too(fs: Any, uri: str, path: str, glob: str) -> bool:
    """Return whether the key of an object on S3 is a folder of objects as well, and that folder is meant."""
    named = not uri.endswith("/") and _is_named(path.rsplit("/", 1)[-1], glob, last=True)
    return "s3" in fs.protocol and not named and bool(_remote_entries(fs, path, depth=1))


def _split_pattern(fs: Any, path: str) -> tuple[str, str | None]:
    """Split `a/b/*.mp4` into `a/b` and `*.mp4`; a path without wildcards has no pattern."""
    segments = path.split("/")
    first = next((n for n, part in enumerate(segments) if not _is_literal(fs, part, "/".join(segments[: n + 1]))), None)
    if first is None:
        return path, None
    return "/".join(segments[:first]) or "/", "/".join(segments[first:])


def _is_literal(fs: Any, step: str, path: str) -> bool:
    """Return whether a part of a pattern, which leads to `path`, is a name: no wildcards, or brackets of a folder."""
    if not re.search(r"[*?\[]", step):
        return True
    try:
        return "[" in step and _kind(fs, path) == "directory"
    except OSError:  # of a folder that cannot be looked into, which listing it says
        return False


def _matching(fs: Any, folder: str, pattern: str) -> list[str]:
    """Return the paths of the files below a folder that match a pattern, and of folders there that cannot be listed."""
    steps = [part for part in pattern.split("/") if part not in ("", ".") or "s3" in fs.protocol]
    if any("**" in step and step != "**" for step in steps):
        raise ValueError(f"the pattern {pattern!r} is not valid: '**' stands alone between slashes, as in '**/*.mp4'")
    closed: list[str] = []

    def listed(at: str, deep: bool = False) -> dict[str, bool]:
        try:
            return _names_below(fs, at, closed.append) if deep else _names_in(fs, at)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:  # a loop of links, a dead mount, no permission
            if at == folder or is_transient(error):
                raise
            closed.append(at)
            return {}

    def next_folders(at: str, step: str) -> list[str]:
        if _is_literal(fs, step, f"{at}/{step}"):
            return [f"{at}/{step}"]
        return [f"{at}/{name}" for name, is_folder in listed(at).items() if is_folder and _is_named(name, step)]

    folders = [folder]
    with ThreadPoolExecutor(_LIST_THREADS) as pool:
        while len(steps) > 1 and steps[0] != "**":
            step = steps.pop(0)
            folders = [found for some in pool.map(partial(next_folders, step=step), folders) for found in some]
        found = list(pool.map(partial(listed, deep=steps[0] == "**"), folders))
    files = [
        f"{at}/{name}"
        for at, names in zip(folders, found, strict=True)
        for name, is_folder in names.items()
        if not is_folder and _fits(name.split("/"), steps)
    ]
    return [*files, *closed]


_LIST_THREADS = 16  # waiting for storage, not computing


def _names_in(fs: Any, folder: str) -> dict[str, bool]:
    """Return the names in a folder, and whether each is a folder."""
    if not _is_local_fs(fs):
        return {name: info["type"] == "directory" for name, info in _remote_entries(fs, folder, depth=1).items()}
    with os.scandir(folder or "/") as entries:
        return {entry.name: os.path.isdir(entry) if entry.is_symlink() else entry.is_dir() for entry in entries}


def _names_below(fs: Any, folder: str, on_closed: Callable[[str], None]) -> dict[str, bool]:
    """Return the relative paths of the files below a folder, none of which is a folder."""
    if not _is_local_fs(fs):
        return dict.fromkeys(_remote_entries(fs, folder), False)

    root = folder or "/"

    def on_error(error: OSError) -> None:
        if error.filename == root:
            raise error
        if "/." not in error.filename[len(folder) :]:  # a hidden folder is not asked for
            on_closed(error.filename)

    return dict.fromkeys(_walk_local(root, on_error), False)


def _fits(parts: Sequence[str], steps: Sequence[str]) -> bool:
    """Return whether the path of a file fits a pattern, both in their parts."""
    if not steps:
        return not parts
    if steps[0] == "**":
        crossed = len(list(takewhile(lambda part: not part.startswith("."), parts)))
        return any(_fits(parts[skipped:], steps[1:]) for skipped in range(crossed + 1))
    return bool(parts) and _is_named(parts[0], steps[0], last=len(parts) == 1) and _fits(parts[1:], steps[1:])


def _is_named(name: str, pattern: str, last: bool = False) -> bool:
    """Return whether a name fits one part of a pattern. last: of a file, whose ending may be in capitals."""
    if name.startswith(".") and not pattern.startswith("."):
        return False
    if not (name + pattern).isascii():
        name, pattern = unicodedata.normalize("NFC", name), unicodedata.normalize("NFC", pattern)
    if name == pattern or fnmatchcase(name, pattern):
        return True
    (stem, _, ending), (stems, dot, endings) = name.rpartition("."), pattern.rpartition(".")
    return last and dot != "" and endings.isalnum() and ending.lower() == endings.lower() and fnmatchcase(stem, stems)


def fingerprint(uri: str, storage_options: Mapping[str, Any] | None = None, most: int | None = None) -> str:
    """Return a short text that changes when the file's content changes: its size with its ETag or mtime.

    Costs one look-up. Where the storage reports neither (some HTTP servers), the content is read and hashed, up to
    `most` bytes; see `sha256_of`.

    Raises StoreMissingError, StoreForbiddenError or StoreError.
    """
    fs, path = open_fs(uri, storage_options)
    with _translating("look up", uri):
        _check_regular(fs, path)
        info = fs.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(f"{path} is a folder, not a file")
    marks = (info.get(name) for name in ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated"))
    mark = next((str(mark).strip('"') for mark in marks if mark), None)
    return f"{info.get('size')}-{mark}" if mark else f"sha256-{sha256_of(uri, storage_options, most)}"


def sha256_of(uri: str, storage_options: Mapping[str, Any] | None = None, most: int | None = None) -> str:
    """Return the SHA-256 in hex of the file at `uri`, reading it in pieces.

    most: bytes that are read of a remote file (None: MOST_BYTES); a local one is read as a whole, whatever it has.

    Raises StoreOversizedError, StoreMissingError, StoreForbiddenError or StoreError.
    """
    fs, path = open_fs(uri, storage_options)
    digest = hashlib.sha256()
    with _translating("read", uri):
        _check_regular(fs, path)
        limit = os.stat(path).st_size if _is_local_fs(fs) else most or MOST_BYTES
        for piece in _content(fs, path, uri, limit):
            digest.update(piece)
    return digest.hexdigest()
