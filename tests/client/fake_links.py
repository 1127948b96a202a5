"""Links whose other end a test scripts, under a time that stands still."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from headwater.errors import DeadlineExceeded, HeadwaterError, LinkBroken
from headwater.testing import FakeClock
from headwater.transports.stream import Handler
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind

Answer = m.Reply | HeadwaterError | None


class Still:
    """A runtime whose time moves by sleeping only."""

    def __init__(self) -> None:
        self.now = FakeClock(100.0)

    def sleep(self, seconds: float) -> None:
        self.now.advance(seconds)

    def every(self, period: float, act: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def lock(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def token(self) -> int:
        return 7


class Line:
    """A link; ``answer`` says what comes back for a request (None: nothing, and time runs out)."""

    shared = False

    def __init__(self, handler: Handler, runtime: Still, answer: Callable[[m.Request], Answer] | None = None) -> None:
        self.sent: list[Frame] = []
        self.error: HeadwaterError | None = None
        self.closed = False
        self._handler, self._runtime, self._answer = handler, runtime, answer

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(replace(frame))
        if frame.kind == Kind.REQUEST and self._answer is not None:
            try:
                answer = self._answer(m.unpack_request(frame.body))
            except LinkBroken as error:
                self.error = error
                return
            if isinstance(answer, HeadwaterError):
                self._handler.receive(Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(answer)), ())
            elif answer is not None:
                self._handler.receive(Frame(Kind.REPLY, seq=frame.seq, body=m.pack(answer)), ())

    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        if self.error is not None and not done():
            raise self.error
        if not done():
            self._runtime.now.advance(max(0.0, deadline - self._runtime.now()))
            raise DeadlineExceeded("nothing came")

    def prefetch(self, done: Callable[[], bool]) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self.error = self.error or LinkBroken("closed")


def joined(durable: bool) -> m.Joined:
    return m.Joined(1, 2, 0.5, (m.ShardView(0, 1, "tcp://a:1", "", ""),), 1, durable)
