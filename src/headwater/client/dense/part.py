"""A dense table's part on one shard: ranges of bytes that leave from flat memory and land there."""

from __future__ import annotations

import math
from collections import deque

import torch

from headwater.client.dense.geometry import ShardGeometry, Span
from headwater.client.dense.memory import Mapped
from headwater.client.part import TablePart
from headwater.client.session import Session
from headwater.errors import ProtocolError
from headwater.types import Segment
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind

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


class DensePart(TablePart):
    """``flat_gradients`` is the table's memory that gradients leave from; where values land is said by ``land_in``.

    ``live``: the values in the table's flat memory are the server's own.
    """

    def __init__(
        self, session: Session, table: int, geometry: ShardGeometry, flat_gradients: memoryview, *, live: bool = False
    ) -> None:
        super().__init__(session, table)
        self.geometry = geometry
        self.size = geometry.size
        self.live = live
        self.mapped: Mapped | None = None  # the server's memory, where it is shared
        self.fresh = self.size  # local bytes from 0 that have arrived; all of them, unless a pull is under way
        self.awaiting = 0  # answers to pulls that are still to come, abandoned ones too
        self._flat_gradients = flat_gradients
        self._flat_values = memoryview(b"")
        self._clock = 0  # of the last pull
        self._mean: Mean | None = None  # asked for and not taken yet

    def land_in(self, flat_values: memoryview) -> None:
        """Values that arrive are written into this memory, which is laid out as the table."""
        self._flat_values = flat_values

    # ---- out -----------------------------------------------------------------------------------

    def push_spans(self, spans: list[Span], clock: int, members: int, flags: int, body: bytes, first: int = 0) -> None:
        """Send ``spans``; ``flags`` (END, WANT, SKIP) go on the last frame, ``body`` and ``first`` on the first."""
        frames = self._frames(spans, clock, members)
        frames[0].body = body
        frames[0].flags |= first
        frames[-1].flags |= flags
        if flags & Flag.WANT:
            self.expect()
        self.send_numbered(frames)

    def push_streaming(self, clock: int, members: int) -> None:
        """Everything out, every block back as soon as it is applied (Async only)."""
        self.expect()
        frames = self._frames([(0, self.size)], clock, members)
        for frame in frames:
            frame.flags |= Flag.WANT
        frames.append(self._frame(Flag.END, 0, 0, clock, members))
        self.send_numbered(frames)

    def _frames(self, spans: list[Span], clock: int, members: int) -> list[Frame]:
        """One frame per block where bytes travel; a doorbell per span where they are shared; an empty one for none."""
        if self.mapped is not None:
            return [self._frame(Flag.SHARED, start, stop, clock, members) for start, stop in spans or ((0, 0),)]
        gradients, frames = self._flat_gradients, []
        for start, stop, at in self.geometry.cut(spans):
            frame = self._frame(Flag.NONE, start, stop, clock, members)
            frame.payload = gradients[at : at + stop - start]
            frames.append(frame)
        return frames or [self._frame(Flag.NONE, 0, 0, clock, members)]

    def _frame(self, flags: int, start: int, stop: int, clock: int, members: int) -> Frame:
        return Frame(Kind.PUSH, flags, 0, self.table, 0, 0, 0, self.lsn, clock, start, stop, members)

    def pull(self, clock: int) -> None:
        """Ask for all values; ``current`` when they are here."""
        self.expect()
        self._clock = clock
        self.session.send(Frame(Kind.PULL, table=self.table, lsn=self.lsn, clock=clock, stop=self.size))

    def assign(self, pieces: list[tuple[Segment, memoryview]], clock: int = 0, members: int = 0) -> None:
        """Overwrite segments. With ``clock`` they belong to that step, and are acknowledged with it."""
        flags = Flag.WROTE if clock else Flag.NONE
        frames = [
            Frame(
                Kind.ASSIGN, flags, table=self.table, clock=clock, start=segment.offset,
                stop=segment.offset + len(data), members=members, payload=data,
            ) for segment, data in pieces
        ]  # fmt: skip
        if clock:
            self.send_numbered(frames)
        else:
            self.assign_frames(frames)

    def ask_mean(self, clock: int, members: int, landing: memoryview, past: bool, body: bytes) -> None:
        """Ask for the step's aggregate; it lands in ``landing``, laid out as the table. ``met`` when it is here."""
        self.push_spans([], clock, members, 0, body)  # its number is the question's
        self._mean = Mean(landing, clock, members, past)
        self._ask_mean_again()

    def _ask_mean_again(self) -> None:
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

    def send_again(self, done: int) -> None:
        """Values that were on their way come with the step that is sent again, or are asked for once more."""
        awaited, self.awaiting, self.fresh = bool(self.awaiting), 0, self.size
        self._forget_applied(done)
        if any(
            (frame.payload is not None) == (self.mapped is not None)
            for frame in self._unacked
            if frame.stop > frame.start
        ):
            self._reframe(done)
        ends = [frame for frame in self._unacked if frame.flags & Flag.END and frame.seq > done]
        if awaited and ends and ends[-1].kind == Kind.PUSH:
            ends[-1].flags |= Flag.WANT
            self.expect()
        for frame in list(self._unacked):
            self.session.send(frame)
        self._ask_mean_again()
        if awaited and not self.awaiting:
            self.pull(self._clock)

    def _reframe(self, done: int) -> None:
        """From shared memory to bytes on the wire, or back: the frames are others, and so are their numbers."""
        old, self._unacked = self._unacked, deque()
        self.sent_seq = max([done, *(frame.seq for frame in old if frame.seq <= done)])
        for frame in old:
            if frame.seq <= done or frame.kind == Kind.ASSIGN or not frame.length:
                pieces = [frame]
            else:
                pieces = self._frames([(frame.start, frame.stop)], frame.clock, frame.members)
                pieces[0].body = frame.body
                pieces[-1].flags |= frame.flags & ~Flag.SHARED
            for piece in pieces:
                if frame.seq > done:
                    self.sent_seq += 1
                    piece.seq = self.sent_seq
                self._unacked.append(piece)

    def push_again(self, members: int) -> None:
        """Values and the mean that the step was to bring are awaited still."""
        if not self.awaiting and any(frame.flags & Flag.WANT for frame in self._unacked if frame.clock):
            self.expect()
        super().push_again(members)
        if self._mean is not None:
            self._mean.members = members
        self._ask_mean_again()

    # ---- in ------------------------------------------------------------------------------------

    def landing(self, frame: Frame) -> memoryview:
        """In the table's values, or in what the mean was asked for with."""
        frame.must_be_plain()
        if frame.stop > self.size:
            raise ProtocolError(f"{self.session.name} sent bytes past the end of table {self.table}")
        at = self.geometry.flat(frame.start) if frame.length else 0
        if frame.flags & Flag.MEAN:
            if self._mean is None:
                raise ProtocolError(f"{self.session.name} sent a gradient of table {self.table} that nobody asked for")
            return self._mean.landing[at : at + frame.length]
        return self._flat_values[at : at + frame.length]

    def arrived(self, frame: Frame) -> None:
        """Blocks come in their order; the last one says that it is."""
        if frame.flags & Flag.MEAN:
            if self._mean is not None:
                self._mean.arrived(frame)
            return
        self.lag = frame.members
        self.lsn = max(self.lsn, frame.lsn)
        self.fresh = frame.stop
        if frame.flags & Flag.END and self.fresh == self.size:
            self.awaiting = max(0, self.awaiting - 1)
            if self.awaiting:
                self.fresh = 0

    def nothing_comes(self) -> None:
        """After a refusal: neither values nor the mean."""
        self._mean = None
        self.fresh, self.awaiting = self.size, 0

    def give_up(self) -> None:
        super().give_up()
        self._mean = None

    # ---- waiting -------------------------------------------------------------------------------

    def met(self) -> bool:
        """The aggregate that was asked for is here, or there will be none."""
        return self._mean is None or self._mean.here or self.error is not None

    def current(self, upto: float = math.inf) -> bool:
        """Local bytes below ``upto`` are fresh."""
        if self.awaiting > 1:
            return self.error is not None
        return not self.awaiting or self.fresh >= min(upto, self.size) or self.error is not None

    def finished(self) -> bool:
        """The step is acknowledged and its values are here, or it must be pushed again."""
        return (self.settled() and self.current()) or self.lost is not None

    def copy_out(self, target: torch.Tensor) -> None:
        """Shared memory under stale and asynchronous policies: one copy, block by block."""
        assert self.mapped is not None
        for block in self.geometry.blocks:
            self.mapped.copy(block.local, block.local + block.size, target[block.start : block.start + block.size])
