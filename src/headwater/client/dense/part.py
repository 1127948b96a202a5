"""A table's part on one shard, as the client sees it: what was sent, what is acknowledged, what is fresh."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from headwater.client.dense.memory import Mapped
from headwater.client.session import Session
from headwater.errors import HeadwaterError, ProtocolError, WorkerLost
from headwater.layout.dense import Block
from headwater.types import Segment
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind

Span = tuple[int, int]
Ranges = tuple[Span, ...]


class Mean:
    """An aggregate that was asked for: where its bytes land, and what is here of it."""

    __slots__ = ("clock", "here", "landing", "members", "past", "ranges")

    def __init__(self, landing: memoryview, clock: int, members: int, past: bool) -> None:
        self.landing = landing
        self.past = past
        self.clock = clock
        self.members = members
        self.here = False
        self.ranges: Ranges = ()

    def arrived(self, frame: Frame) -> None:
        if frame.body:
            self.ranges = m.unpack(frame.body, m.MeanBody).ranges
        self.here = bool(frame.flags & Flag.END)


class Part:
    """Shard-local bytes here are pieces (``blocks``) of the table's flat memories.

    Pushes are numbered from 1. What is not acknowledged is kept (``_unacked``), so that it can be sent again under
    the same number to a new primary, or under a new one in a step that another worker's death undid.
    """

    def __init__(self, session: Session, table: int, blocks: tuple[Block, ...], segments: tuple[Segment, ...]) -> None:
        self.session = session
        self.table = table
        self.blocks = blocks
        self.segments = segments
        self.size = sum(block.size for block in blocks)
        self.mapped: Mapped | None = None
        self.live = False  # the values in the table's flat memory are the server's own
        self.flat_values: memoryview = memoryview(b"")  # where DATA lands
        self.flat_gradients: memoryview = memoryview(b"")
        self.acked_seq = 0
        self.sent_seq = 0
        self.skipped = False
        self.norm: float | None = None
        self.note = m.AckBody()  # what else was said of the last step
        self.staleness = 0
        self.lag = 0
        self.lsn = 0
        self.members = 0
        self.known = self.clock = 0  # as of the last attachment: the shard's membership epoch and clock
        self.fresh = self.size  # local bytes from 0 that have arrived; all of them, unless a pull is under way
        self.awaiting = 0  # answers to pulls that are still to come, abandoned ones too
        self.attach: Callable[[float], None]  # the table's: on a new connection, by a deadline
        self.error: HeadwaterError | None = None
        self.lost: WorkerLost | None = None  # another worker's death undid the step: it must be pushed again
        self._unacked: deque[Frame] = deque()
        self._refused = 0  # refusals of pushes up to here are of a step that is pushed again already
        self._assigning = 0  # the number of the last assignment that is not acknowledged
        self._clock = 0  # of the last pull
        self._mean: Mean | None = None  # asked for and not taken yet

    def spans(self, wanted: set[int]) -> list[Span]:
        """The local byte ranges of these parameters (by index), neighbours joined."""
        spans: list[Span] = []
        last = -2
        for i, segment in enumerate(self.segments):
            if segment.parameter in wanted:
                if last == i - 1:
                    spans[-1] = (spans[-1][0], segment.end)
                else:
                    spans.append((segment.offset, segment.end))
                last = i
        return spans

    # ---- out -----------------------------------------------------------------------------------

    def push(self, spans: list[Span], clock: int, members: int, flags: int, body: bytes, first: int = 0) -> None:
        """Send ``spans``; ``flags`` (END, WANT, SKIP) go on the last frame, ``body`` and ``first`` on the first."""
        frames = [self._frame(span, clock, members) for span in self._cut(spans) or [(0, 0)]]
        frames[0].body = body
        frames[0].flags |= first
        frames[-1].flags |= flags
        if flags & Flag.WANT:
            self.expect()
        self._send(frames)

    def push_pull(self, clock: int, members: int, body: bytes) -> None:
        """Everything out, every block back as soon as it is applied (Async only)."""
        self.expect()
        frames = [self._frame(span, clock, members) for span in self._cut([(0, self.size)])]
        frames[0].body = body
        for frame in frames:
            frame.flags |= Flag.WANT
        frames.append(self._frame((0, 0), clock, members))
        frames[-1].flags |= Flag.END
        self._send(frames)

    def _send(self, frames: list[Frame]) -> None:
        for frame in frames:
            self.sent_seq += 1
            frame.seq = self.sent_seq
            self._unacked.append(frame)
            self.session.pushed_bytes += frame.length
            self.session.send(frame)

    def _cut(self, spans: list[Span]) -> list[Span]:
        """One frame per block where bytes travel; a doorbell per span where they are shared."""
        if self.mapped is not None:
            return spans
        cut = []
        for start, stop in spans:
            for block in self.blocks:
                a, b = max(start, block.local), min(stop, block.local + block.size)
                if a < b:
                    cut.append((a, b))
        return cut

    def _frame(self, span: Span, clock: int, members: int) -> Frame:
        start, stop = span
        frame = Frame(
            Kind.PUSH, table=self.table, lsn=self.lsn, clock=clock, start=start, length=stop - start, members=members
        )
        if self.mapped is not None:
            frame.flags = Flag.SHARED
        elif stop > start:
            at = self._flat(start)
            frame.payload = self.flat_gradients[at : at + stop - start]
        return frame

    def _flat(self, local: int) -> int:
        """The flat offset of a local byte."""
        for block in self.blocks:
            if block.local <= local < block.local + block.size:
                return block.start + local - block.local
        raise ProtocolError(f"byte {local} is past the {self.size} bytes of table {self.table} on this shard")

    def pull(self, clock: int) -> None:
        self.expect()
        self._ask(clock)

    def _ask(self, clock: int) -> None:
        self._clock = clock
        self.session.send(Frame(Kind.PULL, table=self.table, lsn=self.lsn, clock=clock, length=self.size))

    def assign(self, pieces: list[tuple[Segment, memoryview]], clock: int = 0, members: int = 0) -> None:
        """Overwrite segments; ``assigned`` turns true when the shard has all of them.

        With ``clock`` they belong to that step, and are acknowledged with it.
        """
        frames = [
            Frame(
                Kind.ASSIGN, Flag.WROTE if clock else Flag.NONE, table=self.table, clock=clock, start=segment.offset,
                length=len(data), members=members, payload=data,
            ) for segment, data in pieces
        ]  # fmt: skip
        if not clock:
            frames[-1].flags = Flag.END
            self._assigning = self.sent_seq + len(frames)
        self._send(frames)

    def ask_mean(self, clock: int, members: int, landing: memoryview, past: bool, body: bytes) -> None:
        """Ask for the step's aggregate; it lands in ``landing``, laid out as the table. ``met`` when it is here."""
        self.push([], clock, members, 0, body)  # its number is the question's
        self._mean = Mean(landing, clock, members, past)
        self._ask_again()

    def _ask_again(self) -> None:
        mean = self._mean
        if mean is not None and not mean.here:
            seq, clock, members = self.sent_seq, mean.clock, mean.members
            flags = Flag.MEAN | (Flag.END if mean.past else Flag.NONE)
            self.session.send(Frame(Kind.PULL, flags, table=self.table, seq=seq, clock=clock, members=members))

    def take_mean(self) -> Ranges:
        """The shard-local ranges of the aggregate that has arrived."""
        mean, self._mean = self._mean, None
        return () if mean is None else mean.ranges

    def expect(self) -> None:
        """Values are on their way; those of an earlier pull that nobody waited for come before them."""
        self.awaiting += 1
        self.fresh = 0

    # ---- again ---------------------------------------------------------------------------------

    @property
    def base(self) -> int:
        """The first push that is not acknowledged, or the next one."""
        return self._unacked[0].seq if self._unacked else self.sent_seq + 1

    def resume(self, done: int) -> None:
        """On a new connection: send again what the shard has not applied (after ``done``).

        Of a step that is applied only its end goes once more, empty, so that its acknowledgement tells the norm.
        """
        awaited, self.awaiting, self.fresh = bool(self.awaiting), 0, self.size
        again = [self._again(frame, done) for frame in self._unacked]
        self._unacked = deque(frame for frames in again for frame in frames)
        if any((frame.payload is not None) == (self.mapped is not None) for frame in self._unacked if frame.length):
            self._reframe(done)
        ends = [frame for frame in self._unacked if frame.flags & Flag.END and frame.seq > done]
        if awaited and ends and ends[-1].kind == Kind.PUSH:
            ends[-1].flags |= Flag.WANT
            self.expect()
        for frame in list(self._unacked):
            self.session.send(frame)
        self._ask_again()
        if awaited and not self.awaiting:
            self.pull(self._clock)

    def _again(self, frame: Frame, done: int) -> list[Frame]:
        if frame.seq > done:
            frame.flags &= ~Flag.WANT
            return [frame]
        self.acked_seq = max(self.acked_seq, frame.seq if not frame.flags & Flag.END else 0)
        if not frame.flags & Flag.END:
            return []
        if frame.kind == Kind.ASSIGN:
            return [replace(frame, length=0, payload=None)]
        bare = replace(frame, length=0, payload=None, body=b"")
        bare.flags &= ~Flag.WANT
        return [bare]

    def _reframe(self, done: int) -> None:
        """From shared memory to bytes on the wire, or back: the frames are others, and so are their numbers."""
        old, self._unacked = self._unacked, deque()
        self.sent_seq = max([done, *(frame.seq for frame in old if frame.seq <= done)])
        for frame in old:
            if frame.seq <= done or frame.kind == Kind.ASSIGN or not frame.length:
                pieces = [frame]
            else:
                spans = self._cut([(frame.start, frame.start + frame.length)])
                pieces = [self._frame(span, frame.clock, frame.members) for span in spans]
                pieces[0].body = frame.body
                pieces[-1].flags |= frame.flags & ~Flag.SHARED
            for piece in pieces:
                if frame.seq > done:
                    self.sent_seq += 1
                    piece.seq = self.sent_seq
                self._unacked.append(piece)

    def push_again(self, members: int) -> None:
        """Another worker's death undid the step: push it under the new membership, with new numbers."""
        self.lost = None
        self._refused = self.sent_seq
        step = [frame for frame in self._unacked if frame.clock]
        self._unacked = deque(frame for frame in self._unacked if not frame.clock)
        wanted = any(frame.flags & Flag.WANT for frame in step)
        for frame in step:
            frame.members = members
        if wanted and not self.awaiting:
            self.expect()
        self._send(step)
        if self._mean is not None:
            self._mean.members = members
        self._ask_again()

    # ---- in ------------------------------------------------------------------------------------

    def landing(self, frame: Frame) -> memoryview:
        if frame.start + frame.length > self.size:
            raise ProtocolError(f"{self.session.name} sent bytes past the end of table {self.table}")
        at = self._flat(frame.start) if frame.length else 0
        if frame.flags & Flag.MEAN:
            if self._mean is None:
                raise ProtocolError(f"{self.session.name} sent a gradient of table {self.table} that nobody asked for")
            return self._mean.landing[at : at + frame.length]
        return self.flat_values[at : at + frame.length]

    def arrived(self, frame: Frame) -> None:
        if frame.flags & Flag.MEAN:
            if self._mean is not None:
                self._mean.arrived(frame)
            return
        self.lag = frame.members
        self.lsn = max(self.lsn, frame.lsn)
        self.fresh = frame.start + frame.length
        if frame.flags & Flag.END and self.fresh == self.size:
            self.awaiting = max(0, self.awaiting - 1)
            if self.awaiting:
                self.fresh = 0

    def acked(self, frame: Frame) -> None:
        self.lsn = max(self.lsn, frame.lsn)
        self.members = max(self.members, frame.members)
        self.acked_seq = max(self.acked_seq, frame.seq)
        while self._unacked and self._unacked[0].seq <= frame.seq:
            self._unacked.popleft()
        if self._assigning and frame.seq >= self._assigning:
            self._assigning = 0
        elif frame.flags & Flag.END:
            self.staleness = frame.start
            self.skipped = bool(frame.flags & Flag.SKIP)
            self.note = m.unpack(frame.body, m.AckBody) if frame.body else m.AckBody()
            self.norm = self.note.norm

    def failed(self, frame: Frame, error: HeadwaterError) -> None:
        self.members = max(self.members, frame.members)
        if 0 < frame.seq <= max(self.acked_seq, self._refused):
            return  # of a step that has failed already: each of its pushes is refused
        if isinstance(error, WorkerLost):
            self.lost = error
            return
        self.error = error
        self._mean = None
        self._assigning = 0
        self.fresh, self.awaiting = self.size, 0

    def give_up(self) -> None:
        """What is not acknowledged is not waited for any more, and not sent again."""
        self.error = self.lost = None
        self.acked_seq = self.sent_seq
        self._refused = self.sent_seq
        self._unacked.clear()
        self._mean = None

    # ---- waiting -------------------------------------------------------------------------------

    def assigned_or_failed(self) -> bool:
        return not self._assigning or self.error is not None

    def met(self) -> bool:
        """The aggregate that was asked for is here, or there will be none."""
        return self._mean is None or self._mean.here or self.error is not None

    def settled(self) -> bool:
        """The last step is acknowledged, or has failed."""
        return self.acked_seq >= self.sent_seq or self.error is not None

    def current(self, upto: float = math.inf) -> bool:
        """Local bytes below ``upto`` are fresh."""
        if self.awaiting > 1:
            return self.error is not None
        return not self.awaiting or self.fresh >= min(upto, self.size) or self.error is not None

    def finished(self) -> bool:
        return (self.settled() and self.current()) or self.lost is not None

    def copy_out(self, target: torch.Tensor) -> None:
        """Shared memory under stale and asynchronous policies: one copy, block by block."""
        assert self.mapped is not None
        for block in self.blocks:
            self.mapped.copy(block.local, block.local + block.size, target[block.start : block.start + block.size])
