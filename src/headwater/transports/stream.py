"""The client's end of a channel.

Small frames are sent and received by the thread that wants them, without a hand-over. Bulk payloads are sent
by a sender thread, and received by a prefetch thread while the caller computes. One thread at a time reads;
others wait for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from headwater import interrupts
from headwater.errors import AuthenticationFailed, DeadlineExceeded, HeadwaterError, LinkBroken, ProtocolError
from headwater.transports import forks
from headwater.transports.channel import Channel
from headwater.transports.receiver import Receiver
from headwater.transports.spin import SPIN, Spinning
from headwater.wire.frames import Frame, encode, seal

JOINED = 4 << 10  # bytes: a smaller payload is copied behind its header rather than sent as a second buffer
INLINE = 128 << 10  # bytes: a larger payload is left to the sender thread
TICK = 0.5  # seconds: how often a blocked call looks at its deadline
BRIEF = 1  # milliseconds that signal handlers may wait: to let them run takes as long as many an answer
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


class StreamLink:
    """A connected, authenticated channel. ``pump`` must be called for anything to arrive."""

    def __init__(self, channel: Channel, handler: Handler, checked: bool = False) -> None:
        self.shared = channel.shares
        self._channel = channel
        self._handler = handler
        self._checked = checked
        self._receiver = Receiver(channel, handler.landing)
        self._poller = select.poll()
        self._poller.register(channel.fileno(), select.POLLIN)
        self._spinning = Spinning()
        self._error: HeadwaterError | None = None
        self._abandoned = False
        forks.watch(self)
        self._reading = threading.RLock()
        self._arrived = threading.Condition()
        self._waiters = 0
        self._sending = threading.Lock()
        self._backlog: deque[tuple[list[memoryview | bytes], tuple[int, ...]]] = deque()
        self._has_backlog = threading.Condition(self._sending)
        self._sender: threading.Thread | None = None
        self._wanted: deque[Callable[[], bool]] = deque()
        self._has_wanted = threading.Condition()
        self._prefetcher: threading.Thread | None = None

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
        parts: list[memoryview | bytes] = [head]
        if payload is not None:
            parts = [head + payload] if len(payload) <= JOINED else [head, payload]
        with self._sending:
            if not self._backlog and (payload is None or len(payload) <= INLINE):
                try:  # the caller never waits for the other side to take it: the sender thread does
                    sent = self._channel.send(parts, fds)
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    raise self._break(error) from None
                if len(parts) == 1 and sent == len(parts[0]):
                    return
                if sent:
                    parts, fds = _rest(parts, sent), ()
            if parts:
                self._backlog.append((parts, fds))
                self._start_sender()
                self._has_backlog.notify()

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
                parts, fds = _rest(parts, self._channel.send(parts, fds, wait=True)), ()
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
        """One receive call, if something is there; whether it is."""
        if not self._reading.acquire(blocking=False):
            return False
        try:
            return (self._channel.pending or bool(self._poller.poll(0))) and self._read_once()
        finally:
            self._reading.release()

    def _wait(self, deadline: float) -> None:
        """Sleep until something comes, a tick or the deadline."""
        poll, left = self._poller.poll, 1000 * min(TICK, deadline - time.monotonic())
        if left <= 0:
            return
        if self._channel.pending or poll(min(left, BRIEF)) or interrupts.interruptible(poll, left):
            self._read_once()

    def _read_once(self) -> bool:
        """One receive call; False if nothing came."""
        receiver, receive = self._receiver, self._handler.receive
        try:
            receiver.fill()
            while (arrived := receiver.next()) is not None:
                receive(*arrived)
        except BlockingIOError:
            return False
        except LinkBroken as error:
            raise self._break(error) from None
        except ProtocolError as error:
            self._break(error)
            raise
        return True

    def _spin(self) -> bool:
        """Look for an answer without sleeping."""
        if not self._spinning.pays():
            return False
        poll, until = self._poller.poll, time.monotonic() + SPIN
        while True:
            if self._channel.pending or poll(0):
                self._spinning.hit()
                return self._read_once()
            if time.monotonic() >= until:
                self._spinning.missed()
                return False
            os.sched_yield()

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
        self._channel.abandon()

    def _shut(self) -> None:
        self._channel.shut()
        with self._reading:
            self._channel.close()
            self._receiver.close()


def _rest(parts: list[memoryview | bytes], sent: int) -> list[memoryview | bytes]:
    """What is left of ``parts`` when ``sent`` bytes of them are on their way."""
    left: list[memoryview | bytes] = []
    for part in parts:
        if sent < len(part):
            left.append(memoryview(part)[sent:])
        sent = max(0, sent - len(part))
    return left


def _true() -> bool:
    return True
