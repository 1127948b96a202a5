"""A table's part on one shard, of whatever kind: what was sent, what is acknowledged, what is sent again."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import final

from headwater.client.session import Session
from headwater.errors import HeadwaterError, ProtocolError, WorkerLost
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind

PLAIN = m.AckBody()


class TablePart:
    """Pushes and assignments are numbered from 1; what they carry and what lands here is a subclass's.

    What is not acknowledged is kept (``_unacked``), so that it can be sent again: to a new primary under the same
    number; in a step that another worker's death undid, under a new one.
    """

    def __init__(self, session: Session, table: int) -> None:
        self.session = session
        self.table = table
        self.acked_seq = 0
        self.sent_seq = 0
        self.skipped = False
        self.note = PLAIN  # what else was said of the last step
        self.staleness = 0
        self.lag = 0
        self.lsn = 0
        self.members = 0
        self.known = self.clock = 0  # as of the last attachment: the shard's membership epoch and clock
        self.error: HeadwaterError | None = None
        self.lost: WorkerLost | None = None  # another worker's death undid the step: it must be pushed again
        self._unacked: deque[Frame] = deque()
        self._refused = 0  # refusals of pushes up to here are of a step that is pushed again already
        self._assigning = 0  # the number of the last assignment that is not acknowledged

    # ---- out -----------------------------------------------------------------------------------

    def send_numbered(self, frames: list[Frame]) -> None:
        """Send pushes or assignments, and keep them until they are acknowledged."""
        session = self.session
        for frame in frames:
            self.sent_seq = frame.seq = self.sent_seq + 1
            self._unacked.append(frame)
            session.pushed_bytes += frame.stop - frame.start or (0 if frame.payload is None else len(frame.payload))
            session.send(frame)

    def assign_frames(self, frames: list[Frame]) -> None:
        """Overwrite values outside any step; ``assigned`` turns true when the shard has all of them."""
        frames[-1].flags |= Flag.END
        self._assigning = self.sent_seq + len(frames)
        self.send_numbered(frames)

    # ---- again ---------------------------------------------------------------------------------

    @property
    def base(self) -> int:
        """The first push that is not acknowledged, or the next one."""
        return self._unacked[0].seq if self._unacked else self.sent_seq + 1

    def send_again(self, done: int) -> None:
        """On a new connection: send again what the shard has not applied (after ``done``)."""
        self._forget_applied(done)
        for frame in list(self._unacked):
            self.session.send(frame)

    def _forget_applied(self, done: int) -> None:
        """Keep of the frames up to ``done`` only the ends of steps, empty, so that their acknowledgements tell more."""
        again = [self._rest_of(frame, done) for frame in self._unacked]
        self._unacked = deque(frame for frame in again if frame is not None)

    def _rest_of(self, frame: Frame, done: int) -> Frame | None:
        if frame.seq > done:
            frame.flags &= ~Flag.WANT
            return frame
        if not frame.flags & Flag.END:
            self.acked_seq = max(self.acked_seq, frame.seq)
            return None
        body = frame.body if frame.kind == Kind.ASSIGN else b""
        return replace(
            frame, flags=frame.flags & ~Flag.WANT, stop=frame.start, payload_length=0, payload=None, body=body
        )

    @property
    def ended(self) -> bool:
        """Whether all of a step has been sent and is not acknowledged."""
        return bool(self._unacked) and bool(self._unacked[-1].flags & Flag.END)

    def push_again(self, members: int) -> None:
        """Another worker's death undid the step: push it under the new membership, with new numbers."""
        self.lost = None
        self._refused = self.sent_seq
        step = [frame for frame in self._unacked if frame.clock]
        self._unacked = deque(frame for frame in self._unacked if not frame.clock)
        for frame in step:
            frame.members = members
        self.send_numbered(step)

    # ---- in ------------------------------------------------------------------------------------

    def landing(self, frame: Frame) -> memoryview:
        """Where the payload of DATA goes. Raises ``ProtocolError``."""
        raise ProtocolError(f"{self.session.name} sent bytes of table {self.table}, which takes none")

    def arrived(self, frame: Frame) -> None:
        """DATA is here, its payload where ``landing`` said."""

    def acked(self, frame: Frame) -> None:
        """Everything up to the frame's number has been applied."""
        seq = frame.seq
        if frame.lsn > self.lsn:
            self.lsn = frame.lsn
        if frame.members > self.members:
            self.members = frame.members
        if seq > self.acked_seq:
            self.acked_seq = seq
        unacked = self._unacked
        while unacked and unacked[0].seq <= seq:
            unacked.popleft()
        if self._assigning and seq >= self._assigning:
            self._assigning = 0
        elif frame.flags & Flag.END:
            self.staleness = frame.start
            self.skipped = bool(frame.flags & Flag.SKIP)
            self.note = m.unpack(frame.body, m.AckBody) if frame.body else PLAIN

    def failed(self, frame: Frame, error: HeadwaterError) -> None:
        """A push was refused."""
        self.members = max(self.members, frame.members)
        if 0 < frame.seq <= max(self.acked_seq, self._refused):
            return  # of a step that has failed already: each of its pushes is refused
        if isinstance(error, WorkerLost):
            self.lost = error
            return
        self.error = error
        self._assigning = 0
        self.nothing_comes()

    def nothing_comes(self) -> None:
        """What was asked for is not waited for any more."""

    def give_up(self) -> None:
        """What is not acknowledged is not waited for any more, and not sent again."""
        self.error = self.lost = None
        self.acked_seq = self._refused = self.sent_seq
        self._unacked.clear()

    # ---- waiting -------------------------------------------------------------------------------

    def assigned(self) -> bool:
        """Assignments are acknowledged, or have failed."""
        return not self._assigning or self.error is not None

    @final
    def settled(self) -> bool:
        """The last step is acknowledged, or has failed."""
        return self.acked_seq >= self.sent_seq or self.error is not None
