"""One client's conversation with one shard, over as many connections as it takes; routes what comes back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from headwater import interrupts
from headwater.client.runtime import Runtime
from headwater.errors import DeadlineExceeded, HeadwaterError, LinkBroken, LinkError, ProtocolError, StaleEpoch
from headwater.transports.memory import close_all
from headwater.transports.stream import Link
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind

TURN = 0.25  # seconds after which one asks whether a silent server is still its shard's primary
_REQUEST = 1 << 62  # numbers of requests; pushes count from 1


class FrameSink(Protocol):
    """Where frames of one table go. ``lost``: another worker's death undid its step, all of which has ``ended``."""

    table: int

    @property
    def lost(self) -> HeadwaterError | None: ...
    @property
    def ended(self) -> bool: ...
    def landing(self, frame: Frame) -> memoryview: ...
    def acked(self, frame: Frame) -> None: ...
    def arrived(self, frame: Frame) -> None: ...
    def failed(self, frame: Frame, error: HeadwaterError) -> None: ...


class Undone(NamedTuple):
    """The step of one table on one shard, which another worker's death undid: it must be pushed again."""

    session: Session
    part: FrameSink


@dataclass(slots=True)
class Answers:
    """The replies to one request."""

    replies: list[m.Reply] = field(default_factory=list)
    fds: tuple[int, ...] = ()
    error: HeadwaterError | None = None
    done: bool = False


class Session:
    """``link`` is set once connected. Requests block; pushes and pulls do not."""

    def __init__(
        self, name: str, number: int, runtime: Runtime, shard: int = 0, undone: list[Undone] | None = None
    ) -> None:
        self.name = name  # for messages: "server 1", "coordinator"
        self.number = number
        self.link: Link | None = None
        self.shard = shard
        self.epoch = 0
        self.damaged = 0  # connections in a row that ended without an answer
        self.address = ""  # of the server that is at the other end
        self.parts: dict[int, FrameSink] = {}
        self.pushed_bytes = self.pulled_bytes = 0
        self._requests: dict[int, Answers] = {}
        self._ids = itertools.count(_REQUEST)
        self._runtime = runtime
        self._undone = [] if undone is None else undone  # where to note what a worker's death undid

    def send(self, frame: Frame) -> None:
        """Send a push, pull or assignment. On a broken link it is lost; whoever waits for the answer mends the link."""
        frame.session, frame.shard, frame.epoch = self.number, self.shard, self.epoch
        assert self.link is not None
        try:
            self.link.send(frame)
        except LinkError:
            if self.link.error is None:  # the frame is at fault, not the link
                raise

    @interrupts.deferred
    def request(
        self,
        message: m.Request,
        timeout: float,
        fds: tuple[int, ...] = (),
        there: Callable[[], bool] | None = None,
    ) -> Answers:
        """Ask, and wait for the whole answer. Raises what the other side refused with, or a deadline.

        ``there``: whether the other side is who it was, asked now and then while nothing comes; ``LinkBroken`` if not.
        """
        assert self.link is not None
        number = next(self._ids)
        answers = self._requests[number] = Answers()
        try:
            self.link.send(Frame(Kind.REQUEST, session=self.number, seq=number, body=m.pack(message)), fds)
            self._await(answers, self._runtime.now() + timeout, there)
        finally:
            del self._requests[number]
        if answers.error is not None:
            raise answers.error
        return answers

    def _await(self, answers: Answers, deadline: float, there: Callable[[], bool] | None) -> None:
        assert self.link is not None
        while True:
            turn = deadline if there is None else min(deadline, self._runtime.now() + TURN)
            try:
                self.link.pump(lambda: answers.done, turn)
                return
            except DeadlineExceeded:
                if there is None or self._runtime.now() >= deadline:
                    raise DeadlineExceeded(
                        f"{self.name} did not answer in time (HEADWATER_TIMEOUT, unless the call says how long it may "
                        "take); what was asked may still happen. Is its process stopped, or its machine overloaded?"
                    ) from None
                if not there():
                    raise LinkBroken(f"{self.name} is not who serves the shard any more") from None

    def notify(self, message: m.Notice) -> None:
        assert self.link is not None
        self.link.send(Frame(Kind.NOTICE, body=m.pack(message)))

    def close(self) -> None:
        if self.link is not None:
            self.link.close()

    # ---- from the link -----------------------------------------------------------------------

    def landing(self, frame: Frame) -> memoryview:
        part = self.parts.get(frame.table)
        if frame.kind != Kind.DATA or part is None:
            raise ProtocolError(f"{self.name} sent {frame.kind.name} for table {frame.table}, which nobody asked for")
        return part.landing(frame)

    def receive(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        part = self.parts.get(frame.table)
        if frame.kind in (Kind.ACK, Kind.DATA):
            self.damaged = 0
        if frame.kind == Kind.ACK and part is not None:
            part.acked(frame)
        elif frame.kind == Kind.DATA and part is not None:
            self.pulled_bytes += frame.stop - frame.start
            part.arrived(frame)
        elif frame.kind == Kind.REPLY:
            self._replied(frame, tuple(fds))
        elif frame.kind == Kind.ERROR:
            self._failed(frame, part)
        else:
            raise ProtocolError(f"{self.name} sent an unexpected {frame.kind.name}")

    def _replied(self, frame: Frame, fds: tuple[int, ...]) -> None:
        answers = self._requests.get(frame.seq)
        if answers is None:  # nobody waits any more
            close_all(fds)
            return
        reply = m.unpack_reply(frame.body)
        answers.replies.append(reply)
        answers.fds += fds
        answers.done = not (isinstance(reply, m.SlotPart) and reply.more)

    def _failed(self, frame: Frame, part: FrameSink | None) -> None:
        error = m.read_error(frame.body)
        answers = self._requests.get(frame.seq)
        if answers is not None:
            answers.error, answers.done = error, True
        elif frame.seq >= _REQUEST:
            return  # nobody waits any more
        elif isinstance(error, StaleEpoch) or not frame.seq:  # it answers nothing: the connection is what it ends
            self.damaged += isinstance(error, ProtocolError)
            raise LinkBroken(f"{self.name} ended the connection: {error}")
        elif part is not None:
            part.failed(frame, error)
            if part.lost is not None:
                self._undone.append(Undone(self, part))
        else:
            raise error
