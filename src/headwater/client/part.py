"""A table's part on one shard, as the client sees it: what was sent, what is acknowledged, what is fresh."""

from __future__ import annotations

import math

import torch

from headwater.client.flat import Mapped
from headwater.client.session import Session
from headwater.cluster.placement import Block
from headwater.errors import HeadwaterError, ProtocolError
from headwater.types import Segment
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind

Span = tuple[int, int]


class Part:
    """Shard-local bytes here are pieces (``blocks``) of the table's flat memories."""

    def __init__(self, session: Session, table: int, blocks: tuple[Block, ...], segments: tuple[Segment, ...]) -> None:
        self.session = session
        self.table = table
        self.blocks = blocks
        self.segments = segments
        self.size = sum(block.size for block in blocks)
        self.mapped: Mapped | None = None
        self.flat_values: memoryview = memoryview(b"")  # where DATA lands
        self.flat_gradients: memoryview = memoryview(b"")
        self.acked_seq = 0
        self.sent_seq = 0
        self.skipped = False
        self.norm: float | None = None
        self.staleness = 0
        self.lag = 0
        self.lsn = 0
        self.members = 0
        self.fresh = self.size  # local bytes from 0 that have arrived; all of them, unless a pull is under way
        self.awaiting = 0  # answers to pulls that are still to come, abandoned ones too
        self.error: HeadwaterError | None = None
        self._assigned = 0

    # ---- out -----------------------------------------------------------------------------------

    def push(self, spans: list[Span], clock: int, members: int, flags: int, body: bytes) -> None:
        """Send ``spans``; ``flags`` (END, WANT, SKIP) go on the last frame, ``body`` on the first."""
        frames = [self._frame(span, clock, members) for span in self._cut(spans) or [(0, 0)]]
        frames[0].body = body
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
            frame.seq = self.sent_seq = self.session.next_seq()
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
        self.session.send(Frame(Kind.PULL, table=self.table, lsn=self.lsn, clock=clock, length=self.size))

    def assign(self, pieces: list[tuple[Segment, memoryview]]) -> None:
        """Overwrite segments; ``assigned`` turns true when the shard has all of them."""
        self._assigned = 1
        for i, (segment, data) in enumerate(pieces):
            frame = Frame(Kind.ASSIGN, table=self.table, seq=0, start=segment.offset, length=len(data), payload=data)
            frame.flags = Flag.END if i + 1 == len(pieces) else 0
            self.session.send(frame)

    def expect(self) -> None:
        """Values are on their way; those of an earlier pull that nobody waited for come before them."""
        self.awaiting += 1
        self.fresh = 0

    # ---- in ------------------------------------------------------------------------------------

    def landing(self, frame: Frame) -> memoryview:
        if frame.start + frame.length > self.size:
            raise ProtocolError(f"{self.session.name} sent bytes past the end of table {self.table}")
        at = self._flat(frame.start)
        return self.flat_values[at : at + frame.length]

    def arrived(self, frame: Frame) -> None:
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
        if frame.seq == 0:
            self._assigned = 0
            return
        self.acked_seq = max(self.acked_seq, frame.seq)
        if frame.flags & Flag.END:
            self.staleness = frame.start
            self.skipped = bool(frame.flags & Flag.SKIP)
            self.norm = m.unpack(frame.body, m.AckBody).norm if frame.body else None

    def failed(self, frame: Frame, error: HeadwaterError) -> None:
        self.members = max(self.members, frame.members)
        if 0 < frame.seq <= self.acked_seq:
            return  # of a step that has failed already: each of its pushes is refused
        self.error = error
        self._assigned = 0
        self.fresh, self.awaiting = self.size, 0

    # ---- waiting -------------------------------------------------------------------------------

    def assigned_or_failed(self) -> bool:
        return not self._assigned or self.error is not None

    def settled(self) -> bool:
        """The last step is acknowledged, or has failed."""
        return self.acked_seq >= self.sent_seq or self.error is not None

    def current(self, upto: float = math.inf) -> bool:
        """Local bytes below ``upto`` are fresh."""
        if self.awaiting > 1:
            return self.error is not None
        return not self.awaiting or self.fresh >= min(upto, self.size) or self.error is not None

    def finished(self) -> bool:
        return self.settled() and self.current()

    def copy_out(self, target: torch.Tensor) -> None:
        """Shared memory under stale and asynchronous policies: one copy, block by block."""
        assert self.mapped is not None
        for block in self.blocks:
            self.mapped.copy(block.local, block.local + block.size, target[block.start : block.start + block.size])
