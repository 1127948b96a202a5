"""The primary's side of replication: who follows, what each was sent, and the state that a newcomer needs first.

A newcomer gets the state block by block, in one stream with the records. A block says after which LSN it was read;
the newcomer applies every later record to it, and earlier ones not. So nothing stops and nothing is copied twice.
Whoever follows is waited for (``log.Log``), so no more than a few blocks and records are ever under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from headwater.errors import ProtocolError
from headwater.server.replication import records as r
from headwater.server.replication import state as s
from headwater.server.replication.lending import Buffer, Lending
from headwater.server.replication.records import Record
from headwater.server.shard import Shard
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind, seal
from headwater.wire.outgoing import Outgoing

CREDITS = 4  # blocks of state under way to one newcomer
PATIENCE = 1.0  # seconds that a follower may take to accept a record, or to come back after its connection ended
CHUNK = 4 << 20  # bytes per frame

Where = tuple[int, int, int]  # table, first byte, last byte + 1


@dataclass(slots=True)
class Follower:
    """One server that follows. ``state``: blocks that it still needs; ``synced``: it has everything."""

    server: int
    peer: int
    shared: bool = False  # it can map the buffers
    lent: set[tuple[int, int]] = field(default_factory=set)  # those that it has: (table, index)
    state: Iterator[Where] | None = None
    sent: int = 0  # blocks
    arrived: int = 0
    synced: bool = False
    waits_since: float | None = None
    accepted: int = 0


@dataclass(slots=True)
class Followers:
    """All followers of one shard at its primary."""

    shard: Shard
    lending: Lending
    host: str = ""
    checked: bool = False  # payloads carry a checksum
    by_peer: dict[int, Follower] = field(default_factory=dict)
    absent: dict[int, float] = field(default_factory=dict)  # view members that do not follow, since when
    suspected: dict[int, float] = field(default_factory=dict)  # when the coordinator was told
    since: dict[int, int] = field(default_factory=dict)  # the epoch in which each became a member of the view

    def begin(self, peer: int, request: m.Follow, view: m.View, now: float) -> list[Outgoing]:
        """A server wants to follow. What it needs first is in the answer."""
        shard = self.shard
        for old in [f for f in self.by_peer.values() if f.server == request.server]:
            del self.by_peer[old.peer]
        whole = not shard.continues(request)
        shared = bool(self.host) and request.host == self.host
        follower = self.by_peer[peer] = Follower(request.server, peer, shared)
        self.absent.pop(request.server, None)
        if whole:
            follower.accepted = shard.lsn
        else:
            follower.accepted = request.lsn if request.reign == shard.reign else shard.base
        shard.followed(request.server, follower.accepted)
        out = [Outgoing(peer, self.standing(whole, follower.accepted))]
        if whole:
            out += self.state(follower)
        else:
            follower.synced = True
        for record in shard.log.pending:
            if record.lsn > follower.accepted:
                out += self.record(peer, record)
        return out + self.synced_again(view)

    def standing(self, whole: bool, lsn: int) -> Frame:
        """Where the log stands for one who follows from ``lsn`` on."""
        shard = self.shard
        body = m.pack(m.Following(shard.epoch, lsn, whole, shard.reign))
        return Frame(Kind.REPLY, shard=shard.number, epoch=shard.epoch, seq=1, lsn=lsn, body=body)

    def synced_again(self, view: m.View) -> list[Outgoing]:
        """Learners that have everything: the coordinator may have missed it, or was at another epoch."""
        learners = {x.server for x in view.learners}
        return [self.synced(f) for f in self.by_peer.values() if f.synced and f.server in learners]

    # ---- records ---------------------------------------------------------------------------------

    def replicate(self, record: Record) -> list[Outgoing]:
        """A record to everyone who follows."""
        out: list[Outgoing] = []
        for peer in self.by_peer:
            out += self.record(peer, record)
        return out

    def record(self, peer: int, record: Record, kind: Kind = Kind.RECORD, flags: int = 0) -> list[Outgoing]:
        self.shard.proposals.materialise(record)
        follower = self.by_peer[peer]
        buffer = self.lending.of(record.gradient) if follower.shared and follower.synced else None
        if buffer is not None and buffer.fd >= 0:
            return self._doorbell(follower, record, buffer)
        spans = [
            (at, min(at + CHUNK, stop)) for start, stop in r.spans(record.body) for at in range(start, stop, CHUNK)
        ]
        frames = []
        table = getattr(record.body, "table", 0)
        for start, stop in spans or [(0, 0)]:
            frame = Frame(kind, 0, self.shard.number, table, epoch=self.shard.epoch, lsn=record.lsn)
            frame.start, frame.stop = start, stop
            if stop > start:
                assert record.gradient is not None
                frame.payload = s.view(record.gradient[start - record.base : stop - record.base])
                if self.checked:
                    seal(frame)
            frames.append(frame)
        frames[-1].flags |= Flag.END
        for frame in frames:
            frame.flags |= flags
        frames[-1].body = r.pack(record.body)
        return [Outgoing(peer, frame) for frame in frames]

    def _doorbell(self, follower: Follower, record: Record, buffer: Buffer) -> list[Outgoing]:
        """A record whose gradient the follower maps."""
        out = []
        shard = self.shard.number
        if (buffer.table, buffer.index) not in follower.lent:
            follower.lent.add((buffer.table, buffer.index))
            body = m.pack(m.Lend(buffer.table, buffer.index, len(buffer.tensor)))
            out.append(Outgoing(follower.peer, Frame(Kind.REQUEST, shard=shard, body=body), (buffer.fd,)))
        flags = Flag.END | Flag.SHARED
        frame = Frame(Kind.RECORD, flags, shard, buffer.table, epoch=self.shard.epoch, lsn=record.lsn)
        frame.members, frame.body = buffer.index, r.pack(record.body)
        return [*out, Outgoing(follower.peer, frame)]

    def accepted(self, follower: Follower, frame: Frame) -> list[Outgoing]:
        """An ACCEPT: how far the follower is; more of the state, if it needs more."""
        if frame.lsn > self.shard.log.last or frame.seq > follower.sent:
            raise ProtocolError(
                f"server {follower.server} has accepted record {frame.lsn} and {frame.seq} blocks, but was sent "
                f"records to {self.shard.log.last} and {follower.sent} blocks"
            )
        follower.accepted = max(follower.accepted, frame.lsn)
        follower.arrived = max(follower.arrived, frame.seq)
        follower.waits_since = None
        self.suspected.pop(follower.server, None)
        out = self.more(follower)
        if frame.flags & Flag.END and not follower.synced:
            follower.synced = True
            out.append(self.synced(follower))
        return out

    def synced(self, follower: Follower) -> Outgoing:
        """For the coordinator: this learner has everything."""
        shard = self.shard
        body = m.pack(m.Synced(shard.number, shard.epoch, follower.server, follower.accepted))
        return Outgoing(0, Frame(Kind.NOTICE, shard=shard.number, body=body))

    # ---- state -----------------------------------------------------------------------------------

    def state(self, follower: Follower) -> list[Outgoing]:
        shard = self.shard
        sessions = tuple(
            s.SessionState(x.number, x.rank, x.members, tuple(x.done.items()))
            for x in shard.sessions.values() if x.rank >= 0
        )  # fmt: skip
        out = [self._tell(follower.peer, s.ShardState(shard.replica.members, sessions))]
        for table in shard.tables.values():
            out.append(self._tell(follower.peer, s.table_state(table)))
            for start, data in table.writes:
                clock, members = table.gathering.clock + 1, table.gathering.members
                values = r.Values(table.number, 0, 0, start, len(data), False, clock, members)
                out += self.record(follower.peer, Record(shard.lsn, values, data, start), Kind.STATE, Flag.WANT)
            if table.prepared is not None:
                p = table.prepared
                kept = Record(shard.lsn, p.body, contributions=p.sources, divide=p.divide)
                out += self.record(follower.peer, kept, Kind.STATE, Flag.WANT)
                if kept.gradient is not None:
                    p.sources, p.divide = kept.sources(p.body.ranges), 1
        follower.state = iter([(n, *chunk) for n, table in shard.tables.items() for chunk in table.store.chunks()])
        return out + self.more(follower)

    def _tell(self, peer: int, body: s.State, flags: int = 0, payload: memoryview | None = None) -> Outgoing:
        shard = self.shard
        frame = Frame(Kind.STATE, flags, shard.number, epoch=shard.epoch, lsn=shard.lsn, body=s.pack(body))
        frame.table = getattr(body, "table", 0)
        if payload is not None:
            frame.payload = payload
            if self.checked:
                seal(frame)
        return Outgoing(peer, frame)

    def more(self, follower: Follower) -> list[Outgoing]:
        """The next blocks, as they are now."""
        out: list[Outgoing] = []
        while follower.state is not None and follower.sent - follower.arrived < CREDITS:
            where = next(follower.state, None)
            if where is None:
                follower.state = None
                out.append(self._tell(follower.peer, s.Finished(), Flag.END))
            elif where[0] in self.shard.tables:
                follower.sent += 1
                out.append(self._chunk(follower.peer, *where))
        return out

    def _chunk(self, peer: int, number: int, start: int, stop: int) -> Outgoing:
        body, payload = self.shard.tables[number].store.read_chunk(start, stop)
        return self._tell(peer, s.ChunkHead(number, start, stop, body), payload=s.view(payload))

    # ---- ends ------------------------------------------------------------------------------------

    def adopt(self, view: m.View, now: float) -> list[Outgoing]:
        """Those who are not in the view are let go; those who are and do not follow are missed from now on."""
        members = {x.server for x in (*view.backups, *view.learners)}
        self.suspected = {server: at for server, at in self.suspected.items() if server in members}
        self.since = {server: self.since.get(server, view.epoch) for server in members}
        here = {f.server for f in self.by_peer.values()}
        self.absent = {server: self.absent.get(server, now) for server in members if server not in here}
        out = []
        for peer, follower in list(self.by_peer.items()):
            if follower.server not in members:
                del self.by_peer[peer]
                out.append(self._let_go(peer))
        return out + self.synced_again(view)

    def _let_go(self, peer: int) -> Outgoing:
        body = m.pack(m.ErrorBody("StaleEpoch", "this server is not in the shard's view any more"))
        return Outgoing(peer, Frame(Kind.ERROR, shard=self.shard.number, body=body), close=True)

    def closed(self, peer: int, view: m.View, now: float) -> Follower | None:
        """A follower's connection ended: it is missed from now on."""
        follower = self.by_peer.pop(peer, None)
        if follower is not None and follower.server in {x.server for x in (*view.backups, *view.learners)}:
            self.absent[follower.server] = now
        return follower

    def forgive(self, seconds: float) -> None:
        """This server stood still: its followers could not be heard."""
        self.absent = {server: since + seconds for server, since in self.absent.items()}
        for follower in self.by_peer.values():
            if follower.waits_since is not None:
                follower.waits_since += seconds

    def overdue(self, now: float, patience: float) -> list[tuple[int, int | None, str]]:
        """Servers that should be let go: (server, peer or None, why)."""
        found: list[tuple[int, int | None, str]] = []
        last = self.shard.log.last
        for follower in self.by_peer.values():
            waits = follower.accepted < last or follower.sent > follower.arrived
            if not waits:
                follower.waits_since = None
            elif follower.waits_since is None:
                follower.waits_since = now
            elif now - follower.waits_since > patience:
                found.append((follower.server, follower.peer, f"it has accepted nothing for {patience:g} s"))
        for server, since in self.absent.items():
            if now - since > patience:
                found.append((server, None, "its connection ended and it did not come back"))
        return [x for x in found if now - self.suspected.get(x[0], float("-inf")) >= patience]
