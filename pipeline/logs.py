"""A job's log: one event a line, from the driver and from every process that works for it.

Asked for by the environment variable DITFLOW_LOG where `ditflow run` is started, or by the key `log` of the job spec:
`json` or `text`, with a level behind a colon if it is not info (`json:debug`). The variable comes before the key, and
`off` there silences a spec: how a run is watched is the business of who runs it, and decides no row. The driver writes
its choice into the Job that the processes are sent, because a variable would not reach other machines.

Every line goes to the standard error of its process, which Ray keeps in its session's logs
(/tmp/ray/session_latest/logs/worker-*.err on each machine), and by `pipeline.relay` also to the driver's standard
error. A line of JSON has `time` (UTC), `level`, `event`, `job`, `node` and `pid`, and what its event tells:

of the driver
- lease_taken, lease_given_back, lease_lost: number, reason
- run_begun: kind, rows (of the job), todo, output, model (its revision)
- run_ended: ok, failed, quarantined (of this run), seconds
- job_stopped: reason
- no_room: message (a pool that the cluster has no room for as it was asked)

of a worker; whose work it was stands in row_id or motion_id
- reference_read, motion_extracted, row_measured: status, attempts, seconds, error_kind, message
- row_begun: motion_id, variant, seed; at the level debug also prompt
- row_ended: status, attempts, seconds (by phase), loss_first, loss_final, peak_memory_bytes, error_kind, error_class,
  message
- attempt_failed: stage, attempt, error_kind, error_class, message, again (whether it is tried again)
- rung_lowered: it is tried once more, in the way that needs the least memory
- process_ended: the process ends itself over this work, for the reason that is told

Credentials are replaced by `***` in all of it, see `pipeline.store.redact`. Prompts are written at the level debug
only, but for an error message that quotes one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ditflow.errors import SettingsError
from pipeline.store import redact

VARIABLE = "DITFLOW_LOG"
DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR
_LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR}
_EXPECTED = "json, text or off, with a level of debug, info, warning or error behind a colon: json:debug"
_NOTHING = logging.CRITICAL + 1

_LOGGER = logging.getLogger("ditflow.job")
_LOGGER.setLevel(_NOTHING)
_LOGGER.propagate = False


@dataclass(frozen=True)
class LogSettings:
    """How a log is written, and from which level on."""

    format: str
    level: int

    @property
    def asked(self) -> bool:
        """Whether anything is written."""
        return self.format != "off"

    @classmethod
    def parse(cls, text: str | Literal[False] | None, key: str) -> LogSettings:
        """Return what a text like `json:debug` asks for. Raises SettingsError that names `key`."""
        form, _, level = (text or "off").partition(":")
        if form not in _FORMATTERS or level not in ("", *_LEVELS):
            raise SettingsError(key, text, _EXPECTED)
        return cls(form, _NOTHING if form == "off" else _LEVELS[level or "info"])


def chosen(spec_key: str | Literal[False] | None) -> str | Literal[False] | None:
    """Return how this process's environment wants its jobs logged, or else what the spec says."""
    text = os.environ.get(VARIABLE, "").strip()
    LogSettings.parse(text or None, VARIABLE)
    return text or spec_key


def begin(text: str | Literal[False] | None, job: str, forward: Callable[[str], None] | None = None) -> None:
    """Write this process's events from now on as `text` asks; they are those of the job of this name.

    forward: takes each line as well.
    """
    asked = (text, job, forward)
    if any(getattr(handler, "asked", None) == asked for handler in _LOGGER.handlers):
        return
    settings = LogSettings.parse(text, "log")
    _LOGGER.handlers = [_Lines(settings, asked)]
    _LOGGER.setLevel(settings.level)


def event(name: str, level: int = INFO, **facts: Any) -> None:
    """Write one line, if the log is asked for at that level; what is None is left out."""
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, name, extra={"facts": facts})


def is_debug() -> bool:
    """Whether what is for debugging is written."""
    return _LOGGER.isEnabledFor(DEBUG)


class _Lines(logging.Handler):
    """Writes lines to the standard error that this process has at that moment. asked: what `begin` was given."""

    def __init__(self, settings: LogSettings, asked: tuple[Any, str, Callable[[str], None] | None]):
        super().__init__()
        self.asked, self._format = asked, _FORMATTERS[settings.format]
        _, self._job, self._forward = asked

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as one line."""
        try:
            line = self._format(self._facts(record))
            print(line, file=sys.stderr, flush=True)
            if self._forward is not None:
                self._forward(line)
        except Exception:  # no row fails for its log
            self.handleError(record)

    def _facts(self, record: logging.LogRecord) -> dict[str, Any]:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        facts: dict[str, Any] = {
            "time": time,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "job": self._job,
        }
        facts |= {"node": socket.gethostname(), "pid": record.process, **getattr(record, "facts", {})}
        return {name: _clean(value) for name, value in facts.items() if value is not None}


def _clean(value: Any) -> Any:
    """Return a value as JSON can hold it, without credentials."""
    if isinstance(value, Mapping):
        return {str(name): _clean(inner) for name, inner in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int) else redact(str(value))


def _json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, allow_nan=False)


def _text(facts: Mapping[str, Any]) -> str:
    """One line for people: time, level, event, then name=value."""
    time, level, name, *others = _flat(facts)
    told = " ".join(f"{key}={json.dumps(value)}" for key, value in others)
    return f"{time[1]} {level[1].upper():<7} {name[1]} {told}"


def _flat(facts: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{lead}{name}.")
        else:
            yield f"{lead}{name}", value


_FORMATTERS: dict[str, Callable[[Mapping[str, Any]], str]] = {"json": _json, "text": _text, "off": str}
