"""Faults: a WSGI filter in front of the storage server that fails on demand, as networks and servers do.

It runs in the proxy's process, before everything else, so that a client meets a fault where S3 would have one. Its
orders are a JSON file, `{"log": path, "rules": [...]}`, which is replaced as a whole; every request is written to the
log before it is answered. The first rule that strikes decides:

    403, 500, 503   S3's error takes the place of the answer; nothing happened
    "drop"          the connection is closed without an answer; nothing happened
    "lost"          the request takes effect, then the connection is closed: the client cannot know
    "cut"           the connection is closed in the middle of the answer's body
    "slow"          the request is handled `seconds` later

The standard library only, but for `slow`: the tests import `Rule` where eventlet is not installed.
"""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Application = Callable[[dict, Callable], Iterable[bytes]]

ERRORS = {
    403: ("403 Forbidden", "AccessDenied", "Access Denied."),
    500: ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    503: ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
}


@dataclass
class Rule:
    """Which requests meet a fault: of these methods, with this text in "path?query", at this rate, so many times.

    Whether the n-th of them does is decided by the seed and n alone.
    """

    status: int | str
    rate: float = 1.0
    seed: int = 0
    times: int | None = None
    methods: list[str] | None = None
    path_contains: str | None = None
    seconds: float = 0.0
    _seen: int = field(default=0, init=False)
    _struck: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.status not in (*ERRORS, "drop", "lost", "cut", "slow"):
            raise ValueError(f"a rule's status is {self.status!r}; valid: 403, 500, 503, drop, lost, cut, slow")

    def strikes(self, method: str, target: str) -> bool:
        """Return whether this request meets the fault, and count it if it is one of the rule's."""
        if (self.methods and method not in self.methods) or (self.path_contains or "") not in target:
            return False
        self._seen += 1
        worn_out = self.times is not None and self._struck >= self.times
        hit = not worn_out and random.Random(f"{self.seed}-{self._seen}").random() < self.rate
        self._struck += hit
        return hit


class FaultFilter:
    """The filter: follows the orders, writes the log, and makes conditional writes atomic.

    Swift looks for an object before an upload and stores it after, so that several writers that meet all win; S3 does
    both at once. Conditional writes therefore go one by one here.
    """

    def __init__(self, application: Application, orders: str) -> None:
        self.application = application
        self.orders = Path(orders)
        self.text = ""
        self.log = Path()
        self.rules: list[Rule] = []
        self.creating = threading.Lock()  # of green threads: Swift has patched the module

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        self._take_orders()
        method, target = environ["REQUEST_METHOD"], _target(environ)
        rule = next((rule for rule in self.rules if rule.strikes(method, target)), None)
        self._record(method, target, rule)
        if rule is None:
            return self._pass_on(environ, start_response)
        if isinstance(rule.status, int):
            return _refuse(rule.status, method, start_response)
        return getattr(self, f"_{rule.status}")(rule, environ, start_response)

    def _take_orders(self) -> None:
        text = self.orders.read_text()
        if text != self.text:
            orders = json.loads(text)
            self.text, self.log = text, Path(orders["log"])
            self.rules = [Rule(**rule) for rule in orders["rules"]]

    def _record(self, method: str, target: str, rule: Rule | None) -> None:
        line = {"method": method, "target": target, "fault": rule and str(rule.status)}
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _pass_on(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ or environ["REQUEST_METHOD"] not in ("PUT", "POST"):
            return self.application(environ, start_response)
        with self.creating:
            return [_whole(self.application(environ, start_response))]

    def _drop(self, rule: Rule, environ: dict, start_response: Callable) -> Iterable[bytes]:
        return _hang_up(environ, start_response)

    def _lost(self, rule: Rule, environ: dict, start_response: Callable) -> Iterable[bytes]:
        _whole(self._pass_on(environ, lambda status, headers, exc_info=None: None))
        return _hang_up(environ, start_response)

    def _cut(self, rule: Rule, environ: dict, start_response: Callable) -> Iterator[bytes]:
        environ["eventlet.minimum_write_chunk_size"] = 1  # else a short half would be held back
        body = _whole(self._pass_on(environ, start_response))
        yield body[: len(body) // 2]
        _shut(environ)

    def _slow(self, rule: Rule, environ: dict, start_response: Callable) -> Iterable[bytes]:
        import eventlet

        eventlet.sleep(rule.seconds)  # not time.sleep, which would stop the whole server
        return self._pass_on(environ, start_response)


def _target(environ: dict) -> str:
    path = environ["PATH_INFO"].encode("latin-1").decode(errors="replace")  # WSGI's idea of text
    query = environ.get("QUERY_STRING")
    return f"{path}?{query}" if query else path


def _whole(answer: Iterable[bytes]) -> bytes:
    try:
        return b"".join(answer)
    finally:
        getattr(answer, "close", lambda: None)()


def _refuse(status: int, method: str, start_response: Callable) -> list[bytes]:
    line, code, message = ERRORS[status]
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    start_response(line, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [] if method == "HEAD" else [body.encode()]


def _hang_up(environ: dict, start_response: Callable) -> list[bytes]:
    _shut(environ)
    start_response("500 Connection closed", [])  # for the server's sake: nobody hears it
    return []


def _shut(environ: dict) -> None:
    environ["eventlet.input"].get_socket().shutdown(socket.SHUT_RDWR)


def filter_factory(global_conf: dict, **conf: Any) -> Callable[[Application], FaultFilter]:
    """Paste's entry point; `orders` is the path of the orders."""
    return lambda application: FaultFilter(application, conf["orders"])
