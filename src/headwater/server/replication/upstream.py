"""The follower's side of replication: records and state from the primary, accepted at once and applied in order."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from headwater.errors import HeadwaterError, ProtocolError
from headwater.server.replication import records as r
from headwater.server.replication import state as s
from headwater.server.replication.records import Record
from headwater.server.shard import Shard
from headwater.server.table import Prepared
from headwater.transports import memory
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind
from headwater.wire.outgoing import Outgoing

if TYPE_CHECKING:
    from headwater.server.replication.disk import DiskLog

SPARE = 2  # buffers per table that are kept for the next records
AHEAD = 1 << 16  # records: how far the primary may be ahead of what is applied here
BUFFERS = 2  # that a primary may lend for one table

# What the state machine raises for a record or a piece of state that does not fit it.
_MISFITS = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError)


class Upstream:
    """The connection to the primary of one shard.

    ``learning``: the state is still arriving, so a record is applied only when a block (or the end) says that
    the primary has applied it. Otherwise a record is accepted first and applied right after (``work``).
    ``disk``: nothing is accepted before it is there (``synced``); a state, when all of it is.
    """

    def __init__(
        self,
        shard: Shard,
        peer: int,
        server: int,
        epoch: int,
        host: str = "",
        disk: DiskLog | None = None,
        session: int = 0,
    ) -> None:
        self.shard = shard
        self.peer = peer
        self.learning = False
        self.ready = False  # the primary has answered
        self.broken: HeadwaterError | None = None  # why what was accepted cannot be applied
        self._server = server
        self._epoch = epoch
        self._host, self._session = host, session
        self._disk = disk
        self._owed = False  # something waits for the disk to be accepted
        self._arrived = False  # the state has, and is not all on the disk yet
        self._lent: dict[tuple[int, int], torch.Tensor] = {}  # the primary's buffers, by table and index
        self._received = shard.lsn
        self._blocks = 0
        self._queue: deque[Record] = deque()
        self._buffers: dict[int, torch.Tensor] = {}  # by LSN: gradients that are arriving
        self._free: dict[int, list[torch.Tensor]] = {}  # by table: buffers to use again
        self._landed: dict[int, torch.Tensor] = {}  # by id of the frame

    def follow(self, lsn: int) -> Outgoing:
        """Ask to follow from ``lsn`` on."""
        shard = self.shard
        if shard.replica.partial or (self._disk is not None and not self._disk.whole):  # no point of any log
            lsn = -1
        mine = self._server, lsn, shard.reign, shard.tail, self._host, self._session
        body = m.pack(m.Follow(shard.number, self._epoch, *mine))
        return Outgoing(self.peer, Frame(Kind.REQUEST, shard=self.shard.number, seq=1, body=body))

    # ---- payloads --------------------------------------------------------------------------------

    def landing(self, frame: Frame) -> memoryview:
        """Where a payload of the primary goes. Raises ``ProtocolError`` before anything is allocated by its word."""
        if not self.ready:
            raise ProtocolError(f"{frame.kind.name} with a payload from a primary that has not answered")
        size = self._size(frame.table)
        if frame.kind == Kind.STATE and not frame.flags & Flag.WANT:
            table, length = self.shard.tables.get(frame.table), frame.payload_length
            if table is None or length > table.store.chunk_limit:
                raise ProtocolError(f"{length} bytes of state for a table of {size}; nothing was allocated")
            target = self._landed[id(frame)] = torch.empty(length, dtype=torch.uint8, device="cpu")
            return s.view(target)
        next_ = frame.kind == Kind.STATE or frame.lsn == self._received + 1
        frame.must_be_plain()
        if frame.stop > size or not (next_ and 0 <= frame.lsn - self.shard.lsn <= AHEAD):
            raise ProtocolError(f"record {frame.lsn} of bytes {frame.start}:{frame.stop} is not next")
        return s.view(self._buffer(frame.table, frame.lsn, size)[frame.start : frame.stop])

    def _size(self, number: int) -> int:
        """Bytes of a table on this shard; it may begin in a record that is not applied yet."""
        table = self.shard.tables.get(number)
        if table is not None:
            return table.size
        for record in self._queue:
            if isinstance(record.body, r.Begin) and record.body.table == number:
                return self.shard.replica.size_of(record.body.spec)
        raise ProtocolError(f"bytes for table {number}, which is not here")

    def _buffer(self, table: int, lsn: int, size: int) -> torch.Tensor:
        found = self._buffers.get(lsn)
        if found is None:
            free = self._free.get(table)
            found = self._buffers[lsn] = free.pop() if free else torch.zeros(size, dtype=torch.uint8, device="cpu")
        if len(found) != size:
            raise ProtocolError(f"record {lsn} is of one table with {len(found)} bytes, and of one with {size}")
        return found

    def _release(self, record: Record) -> None:
        """A gradient that is applied: its buffer serves again."""
        table = getattr(record.body, "table", 0)
        if record.gradient is not None and table in self.shard.tables:
            self._give_back(table, record.gradient)

    def _give_back(self, table: int, gradient: torch.Tensor) -> None:
        lent = any(gradient is lent for lent in self._lent.values())
        if not lent and len(self._free.get(table, ())) < SPARE:
            self._free.setdefault(table, []).append(gradient)

    def lent(self, request: m.Lend, fds: tuple[int, ...]) -> None:
        """A buffer of the primary's. Raises ``ProtocolError``."""
        if len(fds) != 1:
            raise ProtocolError(f"a buffer was lent with {len(fds)} descriptors beside it")
        if not 0 <= request.index < BUFFERS or request.size != self._size(request.table):
            raise ProtocolError(f"buffer {request.index} of {request.size} bytes was lent for table {request.table}")
        memory.verify(fds[0], request.size)
        region = memory.Region([memory.Piece(fds[0], 0, request.size)], writable=False)
        tensor = torch.frombuffer(region.buffer, dtype=torch.uint8)[: request.size]
        self._lent[request.table, request.index] = tensor

    # ---- frames ----------------------------------------------------------------------------------

    def receive(self, frame: Frame, fds: tuple[int, ...] = ()) -> list[Outgoing]:
        """A frame of the primary. Raises ``ProtocolError`` for what makes no sense here."""
        try:
            return self._receive(frame, fds)
        except _MISFITS as error:
            self._give_up()
            what = f"{type(error).__name__}: {error}"
            raise ProtocolError(f"{frame.kind.name} {frame.lsn} does not fit: {what}") from None
        except HeadwaterError:
            if frame.kind == Kind.STATE:
                self._give_up()
            raise

    def _give_up(self) -> None:
        """What the primary says makes no sense: nothing more of it is applied, and what is here may be half of it."""
        self._queue.clear()
        self.shard.replica.partial = self.shard.replica.partial or self.ready

    def _receive(self, frame: Frame, fds: tuple[int, ...]) -> list[Outgoing]:
        if frame.kind != Kind.REPLY and not self.ready:
            raise ProtocolError(f"{frame.kind.name} from a primary that has not answered")
        if frame.kind == Kind.REQUEST:
            request = m.unpack_request(frame.body)
            if not isinstance(request, m.Lend):
                raise ProtocolError(f"a primary asked for {type(request).__name__}")
            self.lent(request, fds)
            return []
        if frame.kind == Kind.RECORD:
            return self._record(frame)
        if frame.kind == Kind.STATE:
            return self._state(frame)
        if frame.kind == Kind.REPLY:
            return self._following(frame)
        raise ProtocolError(f"{frame.kind.name} from a primary")

    def _following(self, frame: Frame) -> list[Outgoing]:
        reply = m.unpack_reply(frame.body)
        if not isinstance(reply, m.Following):
            raise ProtocolError(f"a primary answered {type(reply).__name__} to a follower")
        if self.ready or reply.lsn < 0 or reply.epoch < 0 or reply.since < 0:
            raise ProtocolError(f"a primary answered {reply} to a follower")
        self.ready = True
        self.learning = reply.whole
        self.shard.catch_up(-1 if reply.whole else reply.lsn)
        self._received = reply.lsn
        self.shard.reign = reply.since
        self.shard.epoch = max(self.shard.epoch, reply.epoch)
        if self._disk is not None:
            if reply.whole:
                self._disk.abandon()
            else:
                self._disk.mark()
        return []

    def _record(self, frame: Frame) -> list[Outgoing]:
        if not frame.flags & Flag.END:  # a sign of life: a long record takes its time on a slow link
            return [] if self._owed else [self._accept()]
        if frame.lsn != self._received + 1:
            raise ProtocolError(f"record {frame.lsn} after {self._received}: one in between is missing")
        gradient = self._buffers.pop(frame.lsn, None)
        if frame.flags & Flag.SHARED:
            gradient = self._lent.get((frame.table, frame.members))
            if gradient is None:
                raise ProtocolError(f"record {frame.lsn} in a buffer that was not lent")
        self._received = frame.lsn
        record = Record(frame.lsn, r.unpack(frame.body), gradient)
        self._queue.append(record)
        if self._disk is None or self.learning:
            return [self._accept()]
        self._disk.append(record)
        self._disk.write()
        self._owed = True
        return []

    def synced(self) -> list[Outgoing]:
        """What is on the disk now is accepted."""
        done = self._arrived and self._disk is not None and self._disk.whole
        if not self._owed and not done:
            return []
        self._owed = False
        self._arrived = self._arrived and not done
        return [self._accept(Flag.END if done else 0)]

    def _accept(self, flags: int = 0) -> Outgoing:
        shard = self.shard
        frame = Frame(Kind.ACCEPT, flags, shard.number, epoch=shard.epoch, lsn=self._received, seq=self._blocks)
        return Outgoing(self.peer, frame)

    def work(self) -> None:
        """Apply what was accepted; called when the acceptances are on their way."""
        if self.learning or self.broken is not None:
            return
        try:
            self._apply_upto(self._received)
        except HeadwaterError as error:
            self.broken = error
        except _MISFITS as error:
            self.broken = ProtocolError(f"a record does not fit this replica: {type(error).__name__}: {error}")
        if self.broken is not None:
            self._give_up()

    def _apply_upto(self, upto: int) -> None:
        while self._queue and self._queue[0].lsn <= upto:
            record = self._queue.popleft()
            prepared = self._prepared_steps() if isinstance(record.body, m.Commit | m.Members) else {}
            self.shard.mirror(record)
            if not self._holds(record):
                self._release(record)
            kept = self._prepared_steps() if prepared else {}
            for number, step in prepared.items():
                if kept.get(number) is not step:
                    for source in step.sources:
                        self._give_back(number, source.gradient)

    def _holds(self, record: Record) -> bool:
        """Whether a prepared step waits for its verdict with this record's gradient."""
        table = self.shard.tables.get(getattr(record.body, "table", 0))
        return table is not None and table.prepared is not None and table.prepared.body is record.body

    def _prepared_steps(self) -> dict[int, Prepared]:
        return {n: table.prepared for n, table in self.shard.tables.items() if table.prepared is not None}

    # ---- state -----------------------------------------------------------------------------------

    def _state(self, frame: Frame) -> list[Outgoing]:
        if not self.learning:
            raise ProtocolError("a piece of state for a follower that did not ask for it")
        if frame.flags & Flag.WANT:
            if frame.flags & Flag.END:
                self._prepared(frame)
            return []
        body = s.unpack(frame.body)
        match body:
            case s.ShardState():
                self.shard.replica.begin_anew(frame.lsn, body.members, body.sessions)
            case s.TableState():
                self.shard.replica.begin_table(body)
            case s.ChunkHead():
                self._apply_upto(frame.lsn)
                self._chunk(body, self._landed.pop(id(frame), torch.empty(0, dtype=torch.uint8, device="cpu")))
                self._blocks += 1
                return [self._accept()]
            case s.Finished():
                self._apply_upto(self._received)
                for table in self.shard.tables.values():
                    table.store.complete()
                self.learning = self.shard.replica.partial = False
                if self._disk is not None:
                    self._disk.renew()
                    self._arrived = True
                    return []
                return [self._accept(Flag.END)]
        return []

    def _prepared(self, frame: Frame) -> None:
        body = r.unpack(frame.body)
        if not isinstance(body, r.Prepare | r.Values) or body.table not in self.shard.tables:
            raise ProtocolError(f"a {type(body).__name__} among the state")
        table = self.shard.tables[body.table]
        record = Record(frame.lsn, body, self._buffers.pop(frame.lsn, None))
        if isinstance(body, r.Prepare):
            table.prepared = Prepared(body, record.sources(body.ranges), 1)
        elif record.gradient is not None:
            table.writes.append((body.start, record.gradient[body.start : body.start + body.length].clone()))
            self._give_back(table.number, record.gradient)

    def _chunk(self, body: s.ChunkHead, payload: torch.Tensor) -> None:
        table = self.shard.tables.get(body.table)
        if table is None:  # dropped meanwhile
            return
        table.store.write_chunk(body.start, body.stop, body.body, payload)
