"""The file systems that an address may name, and the options of each that a spec may set. All else is refused.

A spec may come from a stranger. fsspec knows file systems that write local files (`filecache`), evaluate templates
(`reference`) or open others in a chain (`a::b`), and options that name local files, or a server that would be sent this
machine's tokens. What is not listed here has to come from the environment, which the user owns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Value:
    """What an option may be."""

    expected: str
    fits: Callable[[Any], bool]


_Options = Mapping[str, "_Value | _Options"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(*names: str) -> _Value:
    return _Value(" or ".join(names), lambda value: value in names)


_SWITCH = _Value("true or false", lambda value: isinstance(value, bool))
_COUNT = _Value("a whole number of at least 1", lambda value: _is_number(value) and value >= 1 and value % 1 == 0)
_SECONDS = _Value("seconds above 0", lambda value: _is_number(value) and value > 0)
_TEXT = _Value("a text", lambda value: isinstance(value, str))
_ADDRESS = _Value(
    "an address http://... or https://...", lambda value: isinstance(value, str) and bool(re.match("https?://", value))
)
_TEXTS = _Value(
    "texts by name",
    lambda value: isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair),
)

TOKEN_KINDS = ("anon", "google_default", "cloud")
"""Ways to get a token of Google's storage that are no secrets themselves; other values are tokens, or files of them."""

_COMMON: _Options = {"use_listings_cache": _SWITCH, "listings_expiry_time": _SECONDS, "skip_instance_cache": _SWITCH}
_S3: _Options = {
    **_COMMON,
    **dict.fromkeys(("anon", "use_ssl", "requester_pays", "cache_regions", "default_fill_cache"), _SWITCH),
    "fixed_upload_size": _SWITCH,
    "endpoint_url": _ADDRESS,  # requests are signed: the secret itself is never sent there
    "profile": _TEXT,
    "default_block_size": _COUNT,
    "max_concurrency": _COUNT,
    # verify: a file of certificates comes from AWS_CA_BUNDLE.
    "client_kwargs": {"region_name": _TEXT, "use_ssl": _SWITCH, "verify": _SWITCH, "endpoint_url": _ADDRESS},
    "config_kwargs": {
        **dict.fromkeys(("connect_timeout", "read_timeout"), _SECONDS),
        **dict.fromkeys(("use_dualstack_endpoint", "use_fips_endpoint", "tcp_keepalive"), _SWITCH),
        **dict.fromkeys(("region_name", "signature_version", "user_agent_extra"), _TEXT),
        **dict.fromkeys(
            ("request_checksum_calculation", "response_checksum_validation"), _one_of("when_required", "when_supported")
        ),
        "max_pool_connections": _COUNT,
        "retries": {"mode": _one_of("legacy", "standard", "adaptive"), "max_attempts": _COUNT,
                    "total_max_attempts": _COUNT},
        "s3": {"addressing_style": _one_of("auto", "path", "virtual"), "us_east_1_regional_endpoint": _TEXT,
               **dict.fromkeys(("use_accelerate_endpoint", "payload_signing_enabled", "use_arn_region"), _SWITCH)},
    },
    "s3_additional_kwargs": {
        **dict.fromkeys(("ServerSideEncryption", "SSEKMSKeyId", "StorageClass", "ExpectedBucketOwner"), _TEXT),
        "BucketKeyEnabled": _SWITCH,
        "RequestPayer": _one_of("requester"),
        "ACL": _one_of("private", "bucket-owner-read", "bucket-owner-full-control"),
    },
}  # fmt: skip
# Of Google, Azure and the hub no endpoint: requests carry a token, which another server could use.
_GOOGLE: _Options = {
    **_COMMON, "project": _TEXT, "requester_pays": _SWITCH, "token": _one_of(*TOKEN_KINDS), "access": _TEXT,
    "default_location": _TEXT, "version_aware": _SWITCH,
}  # fmt: skip
_AZURE: _Options = {
    **_COMMON, "account_name": _Value("the name of an account", lambda name: bool(re.fullmatch(r"\w+", str(name)))),
    "anon": _SWITCH, "client_id": _TEXT, "tenant_id": _TEXT, "location_mode": _one_of("primary", "secondary"),
    "assume_container_exists": _SWITCH, "max_concurrency": _COUNT,
    **dict.fromkeys(("socket_timeout", "connection_timeout", "read_timeout"), _SECONDS),
}  # fmt: skip
_WEB: _Options = {
    **_COMMON, "headers": _TEXTS, "encoded": _SWITCH, "ssl": _SWITCH, "simple_links": _SWITCH, "same_scheme": _SWITCH,
    "client_kwargs": {"trust_env": _SWITCH},
}  # fmt: skip
_HUB: _Options = {**_COMMON, "expand_info": _SWITCH}

OPTIONS: Mapping[str, _Options] = {
    "file": {},
    "local": {},
    **dict.fromkeys(("s3", "s3a"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GOOGLE),
    **dict.fromkeys(("az", "abfs", "abfss"), _AZURE),
    **dict.fromkeys(("http", "https"), _WEB),
    "hf": _HUB,
}
"""The options of every protocol that is opened."""


class OptionError(ValueError):
    """An option that is refused. key: its name, with those of the options it stands in."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


def options_for(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a spec's options that a protocol has, as a copy; one spec may use several protocols.

    Raises OptionError for an option that no protocol has, or that is none of what it may be.
    """
    _check(options, [*OPTIONS.values()], "storage_options")
    return _chosen(options, OPTIONS[protocol])


def _check(options: Mapping[str, Any], tables: list[_Options], key: str) -> None:
    for name, value in options.items():
        if value is None:
            continue
        allowed = [table[name] for table in tables if name in table]
        where = f"{key}.{name}"
        if not allowed:
            valid = ", ".join(sorted({name for table in tables for name in table}))
            raise OptionError(
                where,
                f"there is no such option here; valid are {valid}. Others could read or write files, or send secrets "
                "to another server: set them in the environment",
            )
        nested = [inner for inner in allowed if isinstance(inner, Mapping)]
        if nested and isinstance(value, Mapping):
            _check(value, nested, where)
        elif nested or not any(inner.fits(value) for inner in _values(allowed)):
            expected = {"options by name"} if nested else {inner.expected for inner in _values(allowed)}
            raise OptionError(where, f"{value!r:.100} is not valid: expected {' or '.join(sorted(expected))}")


def _values(allowed: list[_Value | _Options]) -> Iterator[_Value]:
    return (inner for inner in allowed if isinstance(inner, _Value))


def _chosen(options: Mapping[str, Any], table: _Options) -> dict[str, Any]:
    chosen = {}
    for name in options.keys() & table.keys():
        allowed, value = table[name], options[name]
        if value is None:
            continue
        if isinstance(value, Mapping):
            value = _chosen(value, allowed) if isinstance(allowed, Mapping) else dict(value)
        chosen[name] = value
    return chosen
