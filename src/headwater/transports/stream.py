"""The client's end of a socket: unix (same host) or TCP.

Small frames are sent and received by the thread that wants them, without a hand-over. Bulk payloads are sent
by a sender thread, and received by a prefetch thread while the caller computes. One thread at a time reads;
others wait for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from headwater import interrupts
from headwater.errors import (
    AuthenticationFailed,
    DeadlineExceeded,
    HeadwaterError,
    LinkBroken,
    ProtocolError,
    Unreachable,
)
from headwater.transports import forks
from headwater.transports.address import Address, family
from headwater.transports.receiver import Arrived, Receiver, descriptors
from headwater.wire import auth
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind, encode, seal

INLINE = 128 << 10  # bytes: a larger payload is left to the sender thread
TICK = 0.5  # seconds: how often a blocked call looks at its deadline
HANDSHAKE = 10.0  # seconds
SEND = 60  # seconds in which the other side must take some bytes
SPIN = 100e-6  # seconds
_DONTWAIT = int(socket.MSG_DONTWAIT)  # a number: see ``receiver``
LAST = 2.0  # seconds that a thread of a closed connection has to end


class Handler(Protocol):
    """Who a link talks to."""

    def landing(self, frame: Frame) -> memoryview: ...
    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None: ...


class Link(Protocol):
    """One ordered connection to a coordinator or server."""

    shared: bool  # memory can be passed along it

    @property
    def error(self) -> HeadwaterError | None: ...  # what broke it
    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None: ...
    def pump(self, done: Callable[[], bool], deadline: float) -> None: ...
    def prefetch(self, done: Callable[[], bool]) -> None: ...
    def close(self) -> None: ...


def connect(address: Address, token: bytes | None, timeout: float) -> socket.socket:
    """Connect and shake hands. Raises ``Unreachable`` or ``AuthenticationFailed``."""
    try:
        if address.scheme == "local":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout)
            sock.connect("\0" + address.host)
        else:
            sock = socket.socket(family(address), socket.SOCK_STREAM)
            sock.settimeout(timeout)
            sock.connect((address.host, address.port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        sock.close()
        raise Unreachable(
            f"nobody answers at {address} ({error.strerror or error}); is the cluster running and the address right?"
        ) from None
    try:
        sock.settimeout(min(timeout, HANDSHAKE))
        _shake_hands(sock, token or b"")
    except (OSError, HeadwaterError) as error:
        sock.close()
        if isinstance(error, HeadwaterError) and not isinstance(error, LinkBroken):
            raise
        raise Unreachable(f"{address} accepted the connection but did not finish the handshake: {error}") from None
    return sock


def _shake_hands(sock: socket.socket, token: bytes) -> None:
    """The client's side of FORMAT.md, section 3: the server proves itself first."""
    mine = auth.nonce()
    receiver = Receiver(sock, _no_payload, limit=4096)
    sock.sendall(encode(Frame(Kind.HELLO, body=m.pack(m.Hello(mine, "headwater")))))
    challenge = m.unpack(_expect(receiver, Kind.CHALLENGE).body, m.Challenge)
    auth.check_nonce(challenge.nonce)
    auth.check(token, "server", mine, challenge.nonce, challenge.proof)
    answer = auth.proof(token, "client", mine, challenge.nonce)
    sock.sendall(encode(Frame(Kind.PROOF, body=m.pack(m.Proof(answer)))))
    _expect(receiver, Kind.WELCOME)


def _expect(receiver: Receiver, kind: Kind) -> Frame:
    frames: list[Arrived] = []
    while not frames:
        frames += receiver.read()
    frame = frames[0][0]
    if frame.kind == Kind.ERROR:
        raise m.read_error(frame.body)
    if frame.kind != kind:
        raise ProtocolError(f"{frame.kind.name} instead of {kind.name} in the handshake")
    return frame


def _no_payload(frame: Frame) -> memoryview:
    raise ProtocolError(f"{frame.kind.name} with a payload during the handshake")


class StreamLink:
    """A connected, authenticated socket. ``pump`` must be called for anything to arrive."""

    def __init__(self, sock: socket.socket, handler: Handler, checked: bool = False) -> None:
        self.shared = sock.family == socket.AF_UNIX
        self._sock = sock
        self._handler = handler
        self._checked = checked
        self._receiver = Receiver(sock, handler.landing)
        self._poller = select.poll()
        self._poller.register(sock.fileno(), select.POLLIN)
        self._error: HeadwaterError | None = None
        self._abandoned = False
        forks.watch(self)
        self._reading = threading.RLock()
        self._arrived = threading.Condition()
        self._waiters = 0
        self._sending = threading.Lock()
        self._backlog: deque[tuple[list[memoryview], tuple[int, ...]]] = deque()
        self._has_backlog = threading.Condition(self._sending)
        self._sender: threading.Thread | None = None
        self._wanted: deque[Callable[[], bool]] = deque()
        self._has_wanted = threading.Condition()
        self._prefetcher: threading.Thread | None = None
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND, 0))

    @property
    def error(self) -> HeadwaterError | None:
        """What broke the link, if anything has."""
        return self._error

    # ---- sending -------------------------------------------------------------------------------

    @interrupts.deferred
    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        """Send, or queue behind what is being sent. The payload must stay unchanged until it is acknowledged."""
        if self._error is not None:
            raise self._error
        payload = frame.payload
        if self._checked:
            seal(frame)
        head = encode(frame)
        parts = [memoryview(head)] + ([payload] if payload is not None else [])
        with self._sending:
            if not self._backlog and (payload is None or len(payload) <= INLINE):
                try:  # the caller never waits for the other side to take it: the sender thread does
                    parts, fds = self._send_now(parts, fds, _DONTWAIT), ()
                except BlockingIOError:
                    pass
                except OSError as error:
                    raise self._break(error) from None
            if parts:
                self._backlog.append((parts, fds))
                self._start_sender()
                self._has_backlog.notify()

    def _send_now(self, parts: list[memoryview], fds: tuple[int, ...], flags: int = 0) -> list[memoryview]:
        """One send call; what is left of the parts."""
        return _rest(parts, self._sock.sendmsg(parts, descriptors(fds), flags))

    def _start_sender(self) -> None:
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_backlog, name="headwater-send", daemon=True)
            self._sender.start()

    def _send_backlog(self) -> None:
        while self._send_first():
            pass

    def _send_first(self) -> bool:
        """Send the first of the backlog, when there is one; False when the link is broken.

        A function of its own, so that nothing refers to what was sent while the thread waits for more.
        """
        with self._sending:
            while not self._backlog:
                if self._error is not None:
                    return False
                self._has_backlog.wait(TICK)
            parts, fds = self._backlog[0]
        try:
            # outside the lock: the entry stays in the backlog, so nobody overtakes it
            while parts:
                parts, fds = self._send_now(parts, fds), ()
        except OSError as error:
            self._break(error)
            return False
        with self._sending:
            self._backlog.popleft()
        return True

    # ---- receiving -------------------------------------------------------------------------------

    @interrupts.deferred
    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        """Receive until ``done()``. Raises ``DeadlineExceeded``, or what broke the link.

        What is there already is looked at, even if the deadline has passed.
        """
        looked = False
        while not done():
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                if not looked and self._look():
                    looked = True
                    continue
                raise DeadlineExceeded(
                    "the other side did not answer in time; what was sent may still be applied. "
                    "Is another worker slower than the timeout, or stopped?"
                )
            if self._reading.acquire(blocking=False):
                try:
                    if not done() and not self._spin():
                        self._wait(deadline)
                finally:
                    self._reading.release()
                    if self._waiters:
                        with self._arrived:
                            self._arrived.notify_all()
            else:
                with self._arrived:
                    self._waiters += 1
                    self._arrived.wait(0.01)
                    self._waiters -= 1
                interrupts.check()

    def _look(self) -> bool:
        """One receive call without waiting; whether something came."""
        if not self._reading.acquire(blocking=False):
            return False
        try:
            return self._read_once(_DONTWAIT)
        finally:
            self._reading.release()

    def _wait(self, deadline: float) -> None:
        """Sleep until something comes, a tick or the deadline."""
        left = min(TICK, deadline - time.monotonic())
        if left > 0 and interrupts.interruptible(self._poller.poll, left * 1000):
            self._read_once(_DONTWAIT)

    def _read_once(self, flags: int = 0) -> bool:
        """One receive call; False if nothing came."""
        try:
            for frame, fds in self._receiver.read(flags):
                self._handler.receive(frame, fds)
        except BlockingIOError:
            return False
        except LinkBroken as error:
            raise self._break(error) from None
        except ProtocolError as error:
            self._break(error)
            raise
        return True

    def _spin(self) -> bool:
        """Look for an answer without sleeping: waking a core takes longer than a small message's whole work."""
        until = time.monotonic() + SPIN
        while time.monotonic() < until:
            if self._read_once(_DONTWAIT):
                return True
            os.sched_yield()
        return False

    def prefetch(self, done: Callable[[], bool]) -> None:
        """Receive in the background until ``done()``: the caller computes meanwhile."""
        with self._has_wanted:
            self._wanted.append(done)
            if self._prefetcher is None:
                self._prefetcher = threading.Thread(target=self._prefetch, name="headwater-receive", daemon=True)
                self._prefetcher.start()
            self._has_wanted.notify()

    def _prefetch(self) -> None:
        while self._error is None:
            with self._has_wanted:
                while not self._wanted and self._error is None:
                    self._has_wanted.wait(TICK)
                done = self._wanted.popleft() if self._wanted else _true
            with contextlib.suppress(HeadwaterError):  # whoever waits for the data is told
                self.pump(done, time.monotonic() + 3600.0)

    def _break(self, error: BaseException) -> HeadwaterError:
        if self._error is None:
            if isinstance(error, ProtocolError | AuthenticationFailed | LinkBroken):
                self._error = error
            else:
                self._error = LinkBroken(f"the connection broke: {error}")
            self._error.add_note("pushes that were not acknowledged may or may not be applied")
            self._shut()
        return self._error

    @interrupts.deferred
    def close(self) -> None:
        """Close, and end the threads: one that runs on while Python ends, and then frees a tensor, aborts it."""
        if self._abandoned:
            return
        if self._error is None:
            self._error = LinkBroken("this client has closed the connection")
        self._shut()
        for awaited in (self._has_backlog, self._has_wanted):
            with awaited:
                awaited.notify_all()
        for thread in (self._sender, self._prefetcher):
            if thread is not None and thread is not threading.current_thread():
                thread.join(LAST)
        self._backlog.clear()

    def abandon(self) -> None:
        """In a forked child: the parent goes on with the connection, this process has none."""
        self._error, self._abandoned = forks.refusal(), True
        with contextlib.suppress(OSError):
            os.close(self._sock.detach())  # without a shutdown, which would be the parent's too

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._reading:
            self._sock.close()
            self._receiver.close()


def _rest(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of ``parts`` when ``sent`` bytes of them are on their way."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left


def _true() -> bool:
    return True
