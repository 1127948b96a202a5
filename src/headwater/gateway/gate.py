"""What every request passes: who is it, what became of it, which version answered. One log line each.

Errors become answers here. A client that has left gets none.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from headwater.errors import HeadwaterError
from headwater.gateway.problems import Refusal, refusal_of, unforeseen

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from headwater.gateway.auth import Keys
    from headwater.gateway.metrics import Metrics
    from headwater.gateway.served import Served
    from headwater.types import VersionInfo

log = logging.getLogger("headwater.gateway")

OPEN = ("/healthz", "/readyz")
"""Paths that need no key: what a load balancer asks, and what tells nothing about the model."""

_QUIET = (*OPEN, "/metrics")
"""Paths that are asked every few seconds: no line of the log."""

_RECORD = "headwater.record"

_SHOWN = "!#$&'()*+/:;=?@[]~ "
"""What a header shows of a name as it is; all else is percent-encoded, commas too."""
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
"""What is taken from a client as the request's id: it is sent back in a header, and logged."""
_MOST_NAMED = 16
"""Ignored fields that the header names; of more, the number."""


def _open(scope: Scope) -> bool:
    """Whether it needs no key. The page in the browser is the same whatever the model is; it asks with one."""
    return scope["path"] in OPEN or (scope["path"] == "/" and scope["method"] in ("GET", "HEAD"))


def plain(path: str) -> bool:
    """Whether errors at a path have the form of the Hugging Face API, and not OpenAI's."""
    return path == "/" or path.startswith("/models/")


class ClientGone(Exception):
    """The client hung up; nobody is there to be answered."""


class RequestRecord:
    """What is known of one request; handlers add to it."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.route = "other"
        self.status = 0
        self.versions: list[VersionInfo] = []
        self.first_token: float | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.streamed = False
        self.gone = False
        self.admitted = False
        self.problem = ""
        self.id = f"req_{secrets.token_hex(16)}"
        self.ignored: list[str] = []

    def named_by(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """The client's own id for the request, if it sends one that can be sent back."""
        given = next((value for name, value in headers if name == b"x-request-id"), b"")
        if _REQUEST_ID.fullmatch(given):
            self.id = given.decode("ascii")

    def answered_by(self, version: VersionInfo | None) -> None:
        if version is not None and version not in self.versions:
            self.versions.append(version)


def record_of(request: Request) -> RequestRecord:
    found: RequestRecord = request.scope[_RECORD]
    return found


class Gate:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, served: Served, metrics: Metrics, keys: Keys | None) -> None:
        self._app = app
        self._served = served
        self._metrics = metrics
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[_RECORD] = RequestRecord()
        record.named_by(scope["headers"])
        self._metrics.active.inc()
        try:
            await self._answer(scope, receive, self._naming_versions(record, send), record)
        finally:
            self._metrics.active.dec()
            self._book(scope, record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        try:
            if self._keys is None or not _open(scope):
                if self._keys is not None:
                    self._keys.check(scope["headers"])
                record.admitted = True
            await self._app(scope, receive, send)
        except ClientGone:
            record.gone = True
        except HeadwaterError as error:
            await self._refuse(refusal_of(error), scope, receive, send, record)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await self._refuse(unforeseen(), scope, receive, send, record)

    async def _refuse(
        self, refusal: Refusal, scope: Scope, receive: Receive, send: Send, record: RequestRecord
    ) -> None:
        record.problem = refusal.slug or ""
        if record.status:
            raise refusal  # half an answer is out already: the connection is closed, which a client notices
        await refusal.response(plain=plain(scope["path"]))(scope, receive, send)

    def _naming_versions(self, record: RequestRecord, send: Send) -> Send:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], *_own_headers(record), *self._version_headers(record)]
            await send(message)

        return named

    def _version_headers(self, record: RequestRecord) -> list[tuple[bytes, bytes]]:
        """An answer that no version computed (an error, a list) names the one that would answer now.

        Without a key that is needed, there is nothing to be learnt.
        """
        if not record.admitted:
            return []
        standing = self._served.standing()
        versions = record.versions or ([standing.version] if standing else [])
        if not versions:
            return []
        named = {
            "x-headwater-version": ", ".join(_shown(version.name) for version in versions),
            "x-headwater-version-number": ", ".join(str(version.number) for version in versions),
            "x-headwater-version-step": ", ".join(str(version.step) for version in versions),
        }
        if standing and standing.stale_since is not None:
            named["x-headwater-stale"] = str(max(0, round(time.time() - standing.stale_since)))
        return [(name.encode(), value.encode("latin-1")) for name, value in named.items()]

    def _book(self, scope: Scope, record: RequestRecord) -> None:
        route = scope.get("route")
        record.route = getattr(route, "path", "other")
        seconds = time.monotonic() - record.began
        if record.gone:
            self._metrics.hang_ups.labels(record.route).inc()
        else:
            self._metrics.requests.labels(record.route, record.status).inc()
            self._metrics.seconds.labels(record.route).observe(seconds)
        if record.first_token is not None:
            self._metrics.first_token.observe(record.first_token - record.began)
        self._metrics.tokens.labels("prompt").inc(record.prompt_tokens)
        self._metrics.tokens.labels("completion").inc(record.completion_tokens)
        log.log(logging.DEBUG if scope["path"] in _QUIET else logging.INFO, "%s", _line(scope, record, seconds))


def _shown(name: str, more: str = "") -> str:
    """A name as a header shows it: HTTP allows a value no space at its ends. ``more``: also shown as they are."""
    shown = quote(name, safe=_SHOWN + more, errors="replace")
    return shown if shown == shown.strip() else shown.replace(" ", "%20")


def _own_headers(record: RequestRecord) -> list[tuple[bytes, bytes]]:
    """The request's id, and what of the request was ignored."""
    named = [_shown(field[:100], '"') or '""' for field in record.ignored[:_MOST_NAMED]]
    if len(record.ignored) > _MOST_NAMED:
        named.append(f"and {len(record.ignored) - _MOST_NAMED} more")
    found = [(b"x-request-id", record.id.encode())]
    return [*found, (b"x-headwater-ignored", ", ".join(named).encode())] if named else found


def _line(scope: Scope, record: RequestRecord, seconds: float) -> str:
    client = scope.get("client")
    parts = [client[0] if client else "-", scope["method"], quote(scope["path"])[:200]]
    parts.append("gone" if record.gone else str(record.status))
    parts.append(f"{seconds:.3f}s")
    if record.versions:
        parts.append(", ".join(f"{version.name}#{version.number}" for version in record.versions))
    if record.completion_tokens or record.prompt_tokens:
        parts.append(f"{record.prompt_tokens}+{record.completion_tokens} tokens")
    if record.first_token is not None:
        parts.append(f"first after {record.first_token - record.began:.3f}s")
    if record.streamed:
        parts.append("streamed")
    if record.ignored:
        parts.append(f"ignored {len(record.ignored)} fields")
    if record.problem:
        parts.append(record.problem)
    return " ".join(parts)
