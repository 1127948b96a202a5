"""A connection to a process that holds parts of versions: questions out, memory or bytes in."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headwater.errors import HeadwaterError, LinkBroken, ProtocolError
from headwater.layout.dense import BLOCK
from headwater.readers.windows import Windows
from headwater.transports.memory import close_all
from headwater.transports.stream import Handler, Link
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind

Dial = Callable[[m.ShardView | None, Handler], Link]
Land = Callable[[v.Part], memoryview]
"""Memory for the ``nbytes`` of a part, or of a delta to it. Raises what is wrong with the part."""
Arrived = Callable[[int, int], None]
"""Bytes ``start:stop`` of that memory are there."""


MEASURED = 1 << 20
"""Bytes from which a part tells how fast its connection is."""


@dataclass(slots=True)
class Answer:
    """What becomes of one question. ``fds``: of a shared part; whoever asked closes them."""

    land: Land
    arrived: Arrived | None = None
    part: v.Part | None = None
    fds: tuple[int, ...] = ()
    done: bool = False
    error: HeadwaterError | None = None
    since: float = 0.0
    target: memoryview = field(default_factory=lambda: memoryview(b""))


class Line:
    """``holder`` is who is at the other end. Not thread-safe; its owner takes turns."""

    def __init__(self, dial: Dial, holder: v.Holder) -> None:
        self.holder = holder
        self.fetched_bytes = 0
        self.windows = Windows()
        self.rate = 0.0  # bytes per second of the last part that came whole
        self._asked: dict[int, Answer] = {}
        self._ids = itertools.count(1)
        number = holder.address.removeprefix("inproc://")
        shard = int(number) if number.isdigit() else 0
        self._link = dial(m.ShardView(shard, 0, holder.address, holder.local, holder.host), self)

    @property
    def shared(self) -> bool:
        """Whether memory can come over it."""
        return self._link.shared

    @property
    def broken(self) -> bool:
        return self._link.error is not None

    def ask(self, fetch: v.Fetch, land: Land, arrived: Arrived | None = None) -> Answer:
        """Ask for a part; ``wait`` for the answer. Raises ``LinkError``."""
        number = next(self._ids)
        answer = self._asked[number] = Answer(land, arrived)
        self._link.send(Frame(Kind.REQUEST, seq=number, body=m.pack(fetch)))
        return answer

    def wait(self, answer: Answer, deadline: float) -> v.Part:
        """The part, when its bytes are where they belong. Raises what was refused, ``LinkError`` or a deadline."""
        self._link.pump(lambda: answer.done, deadline)
        if answer.error is not None:
            raise answer.error
        assert answer.part is not None
        return answer.part

    def unmap(self, key: tuple[int, int, int]) -> None:
        """Say that nothing of a shared part is mapped any more. Raises ``LinkError``."""
        self._link.send(Frame(Kind.NOTICE, body=m.pack(v.Unmap(*key))))

    def close(self) -> None:
        self.windows.close()
        self._link.close()

    # ---- from the link ---------------------------------------------------------------------------

    def landing(self, frame: Frame) -> memoryview:
        answer = self._asked.get(frame.seq)
        if (
            frame.kind == Kind.PIECE
            and answer is not None
            and answer.error is not None
            and frame.payload_length <= BLOCK
        ):
            return memoryview(bytearray(frame.payload_length))  # it goes nowhere
        if frame.kind != Kind.PIECE or answer is None or frame.stop > len(answer.target):
            raise ProtocolError(f"{frame.kind.name} of bytes that nobody asked {self.holder.address} for")
        frame.must_be_plain()
        return answer.target[frame.start : frame.stop]

    def receive(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        answer = self._asked.get(frame.seq)
        if answer is None or frame.kind != Kind.REPLY:
            close_all(fds)
        if answer is None:
            if frame.kind == Kind.ERROR:
                raise LinkBroken(f"{self.holder.address} ended the connection: {m.read_error(frame.body)}")
            raise ProtocolError(f"{frame.kind.name} that answers nothing came from {self.holder.address}")
        if frame.kind == Kind.ERROR:
            answer.error = m.read_error(frame.body)
            self._end(frame.seq, answer)
        elif frame.kind == Kind.REPLY:
            self._replied(frame, answer, tuple(fds))
        elif frame.kind == Kind.PIECE:
            self.fetched_bytes += frame.length
            if answer.arrived is not None:
                answer.arrived(frame.start, frame.stop)
            if frame.flags & Flag.END:
                if answer.part is not None and answer.part.nbytes >= MEASURED:
                    self.rate = answer.part.nbytes / max(1e-9, time.perf_counter() - answer.since)
                self._end(frame.seq, answer)
        else:
            raise ProtocolError(f"{frame.kind.name} from {self.holder.address}, which holds versions")

    def _replied(self, frame: Frame, answer: Answer, fds: tuple[int, ...]) -> None:
        try:
            part = m.unpack_reply(frame.body)
            if not isinstance(part, v.Part) or answer.part is not None:
                raise ProtocolError(f"{type(part).__name__} instead of a part of a version")
        except ProtocolError:
            close_all(fds)
            raise
        answer.part, answer.fds, answer.since = part, fds, time.perf_counter()
        try:
            answer.target = answer.land(part)
        except HeadwaterError as error:
            answer.error = error
        if part.nbytes <= 0:
            self._end(frame.seq, answer)

    def _end(self, number: int, answer: Answer) -> None:
        answer.done = True
        del self._asked[number]
