"""uvicorn, with bounds of our own: the only file that imports it.

uvicorn waits without end for the head of a first request, for a client that has stopped reading, and for a body that
was refused and goes on trickling in. Here each has ``Limits.head_timeout``.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from typing import TYPE_CHECKING, Any

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from headwater.errors import AddressInUse, UsageError
from headwater.gateway.problems import Refusal, unavailable

if TYPE_CHECKING:
    from types import FrameType

    from starlette.applications import Starlette

    from headwater.gateway.limits import Limits

_KEEP_ALIVE = 15
"""Seconds that a connection without a request stays open."""
_GRACE = 2
"""Seconds, beyond the limits', after which whatever still answers is cut off."""
_BACKLOG = 512


def bind(host: str, port: int, *, proven: bool) -> socket.socket:
    """A listening socket. ``proven``: clients must show a key. ``port`` 0 takes a free one.

    Raises:
        UsageError: anybody beyond this machine could ask, without a key; or there is no such address here.
        AddressInUse: the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}; nothing was started") from None
    if not proven and not _is_loopback(str(address[0])):
        raise UsageError(
            f"--host {host} can be reached from other machines, and no API keys are set: give --api-keys FILE, or "
            "serve on 127.0.0.1; nothing was started"
        )
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        if isinstance(error, PermissionError) or error.errno == 99:
            raise UsageError(f"--host {host} --port {port}: {error.strerror}; nothing was started") from None
        raise AddressInUse(f"{host}:{port}: {error.strerror}; give another --port; nothing was started") from None
    return made


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


class Server(uvicorn.Server):
    """uvicorn's server for our application.

    A signal (or ``should_exit``) ends it: no new connection is taken, what runs has ``Limits.grace`` seconds to end,
    then streams end with an error event, and the model is closed. A second Ctrl-C does not wait.
    """

    def __init__(self, app: Starlette, limits: Limits) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=type("Connection", (_Connection,), {"limits": limits}),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=math.ceil(limits.grace) + _GRACE,
            )
        )
        self._gateway = app.state.gateway
        self._grace = limits.grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn, but a signal that has been heeded is not raised again: the command ends with code 0."""
        del frame
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.served.closing = True
        timer = asyncio.get_running_loop().call_later(self._grace, self._gateway.runs.stop)
        await super().shutdown(sockets)
        timer.cancel()


class _Connection(H11Protocol):
    """One connection. uvicorn makes them, of a subclass that knows the limits."""

    limits: Limits

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._unheard: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._say(unavailable(f"{self.limits.connections} connections are open, as many as may", "too_many"))
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.head_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """A request that is not HTTP."""
        self._say(Refusal(400, f"this is not HTTP: {msg}", slug="invalid_http"))

    def _watch(self) -> None:
        """The client's turn has an end, however often a byte comes; ours has the deadlines of what answers."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._unheard is None and not self.transport.is_closing():
            self._unheard = self.loop.call_later(self.limits.head_timeout, self.transport.abort)

    def _forget(self) -> None:
        if self._unheard is not None:
            self._unheard.cancel()
            self._unheard = None

    def _say(self, refusal: Refusal) -> None:
        """Without the application, and for the last time."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = msgspec.json.encode(refusal.answer())
            headers = {**refusal.headers, "content-type": "application/json", "content-length": str(len(body))}
            head = h11.Response(status_code=refusal.status, headers=[*headers.items(), ("connection", "close")])
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
