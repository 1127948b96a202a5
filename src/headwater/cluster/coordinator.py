"""The control plane as a state machine: frames and ticks in, frames out. No sockets, no clock, no tensors.

It keeps the membership, hands shards to servers, agrees on tables, and commits bulk-synchronous steps:
when every shard of a table is READY for a step, and not before, it tells all of them to COMMIT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from headwater.cluster.membership import HEARTBEAT, SILENCE, Member, Membership
from headwater.cluster.placement import check_table, layout
from headwater.errors import (
    ClusterError,
    HeadwaterError,
    ProtocolError,
    TableConflict,
    UnknownTable,
    UsageError,
    WorkerLost,
)
from headwater.types import TableSpec
from headwater.wire import messages as m
from headwater.wire.exact import clip_factor, merge
from headwater.wire.frames import Frame, Kind, Outgoing


class _Asker(NamedTuple):
    peer: int
    seq: int


@dataclass(slots=True)
class _Server:
    peer: int
    join: m.Join
    shard: int
    epoch: int
    since: float
    heard: float
    report: m.Heartbeat = field(default_factory=m.Heartbeat)
    alive: bool = True


@dataclass(slots=True)
class _Table:
    number: int
    spec: TableSpec
    participants: tuple[int, ...]
    creating: set[int]
    state: str = "creating"  # creating, assigning, ready
    initialiser: int | None = None  # the peer that assigns the values
    waiting: list[_Asker] = field(default_factory=list)
    ready: dict[int, m.Ready] = field(default_factory=dict)


class Coordinator:
    """One cluster. ``servers`` is how many servers must have joined before clients are let in."""

    def __init__(self, servers: int, now: float = 0.0) -> None:
        if servers < 1:
            raise UsageError(f"a cluster needs at least one server, not {servers}")
        self.shards = servers
        self.membership = Membership()
        self._servers: dict[int, _Server] = {}  # by shard
        self._tables: dict[int, _Table] = {}
        self._names: dict[str, int] = {}
        self._joining: list[tuple[_Asker, m.Join]] = []
        self._barriers: dict[str, dict[int, _Asker]] = {}
        self._since = self._now = now
        self._out: list[Outgoing] = []

    # ---- events ------------------------------------------------------------------------------

    def receive(self, peer: int, frame: Frame, now: float) -> list[Outgoing]:
        """A frame from ``peer``. A refusal goes back as an ERROR frame; the state is unchanged then."""
        self._now = now
        try:
            if frame.kind == Kind.REQUEST:
                self._request(_Asker(peer, frame.seq), m.unpack_request(frame.body))
            elif frame.kind == Kind.NOTICE:
                self._notice(peer, m.unpack_notice(frame.body))
            elif frame.kind == Kind.REPLY:
                self._created(peer, m.unpack_reply(frame.body))
            elif frame.kind == Kind.ERROR:
                self._refused(peer, frame)
            else:
                raise ProtocolError(f"{frame.kind.name} does not go to the coordinator")
        except HeadwaterError as error:
            self._fail(_Asker(peer, frame.seq), error)
        return self._flush()

    def disconnected(self, peer: int, now: float) -> list[Outgoing]:
        """The connection of ``peer`` ended."""
        self._now = now
        for server in self._servers.values():
            if server.peer == peer:
                self._bury(server)
        self._joining = [(asker, join) for asker, join in self._joining if asker.peer != peer]
        self._depart(peer, clean=False, why="died: its connection ended")
        return self._flush()

    def tick(self, now: float) -> list[Outgoing]:
        """Time has passed."""
        self._now = now
        for member in self.membership.silent(now):
            self._depart(member.peer, clean=False, why=f"was silent for {SILENCE:.0f} s")
        for server in self._servers.values():
            if now - server.heard > SILENCE:
                self._bury(server)
        return self._flush()

    def _bury(self, server: _Server) -> None:
        """A server is dead: nobody waits for what it cannot create any more."""
        server.alive = False
        for table in list(self._tables.values()):
            if server.shard in table.creating:
                self._give_up(table, ClusterError(f"server {server.shard} died while it created {table.spec.name!r}"))

    # ---- requests ----------------------------------------------------------------------------

    def _request(self, asker: _Asker, message: m.Request) -> None:
        match message:
            case m.Join(role="server"):
                self._join_server(asker, message)
            case m.Join(role="worker" | "reader"):
                self._join(asker, message)
            case m.Join():
                raise UsageError(f"role {message.role!r} is none of 'server', 'worker' and 'reader'")
            case m.Leave():
                self._depart(asker.peer, clean=True)
                self._reply(asker, m.Done())
            case m.Declare():
                self._declare(asker, message.spec)
            case m.Initialised():
                self._initialised(asker, message.table)
            case m.Barrier():
                self._barrier(asker, message.name)
            case m.Status():
                self._reply(asker, self.status())
            case _:
                raise ProtocolError(f"{type(message).__name__} does not go to the coordinator")

    def _join_server(self, asker: _Asker, join: m.Join) -> None:
        self._refuse_twice(asker.peer)
        shard = len(self._servers)
        if shard >= self.shards:
            raise ClusterError(f"this cluster was started for {self.shards} servers and has them")
        self._servers[shard] = _Server(asker.peer, join, shard, 1, self._now, self._now)
        self._reply(asker, m.Welcome(shard, self.shards, 1, HEARTBEAT))
        if len(self._servers) == self.shards:
            waiting, self._joining = self._joining, []
            for other, request in waiting:
                try:
                    self._join(other, request)
                except HeadwaterError as error:
                    self._fail(other, error)

    def _join(self, asker: _Asker, join: m.Join) -> None:
        self._refuse_twice(asker.peer)
        if len(self._servers) < self.shards:
            self._joining.append((asker, join))
            return
        self._refuse_if_dead()
        member = self.membership.admit(asker.peer, join, self._now)
        world = self.membership.world or len(self.membership.workers)
        views = tuple(
            m.ShardView(s.shard, s.epoch, s.join.address, s.join.local, s.join.host) for s in self._servers.values()
        )
        self._reply(asker, m.Joined(member.rank, world, HEARTBEAT, views))
        if member.rank >= 0:
            self._announce()

    def _depart(self, peer: int, *, clean: bool, why: str = "") -> None:
        member = self.membership.depart(peer, clean=clean, why=why)
        for table in self._tables.values():
            table.waiting = [a for a in table.waiting if a.peer != peer]
            if table.state == "assigning" and table.initialiser in (peer, None):
                self._pass_on(table)
        if member is None or member.rank < 0:
            return
        self._announce()
        for name, askers in list(self._barriers.items()):
            askers.pop(member.rank, None)
            if not clean:
                for asker in self._barriers.pop(name).values():
                    self._fail(asker, _lost(self.membership))
            else:
                self._check_barrier(name)

    def _announce(self) -> None:
        for table in self._tables.values():
            table.ready.clear()  # the shards answer again under the new membership
        s = self.membership
        for server in self._servers.values():
            self._notify(server.peer, m.Members(s.epoch, s.ranks(), s.lost, s.reason))

    def _barrier(self, asker: _Asker, name: str) -> None:
        member = self._member(asker.peer)
        self._barriers.setdefault(name, {})[member.rank] = asker
        self._check_barrier(name)

    def _check_barrier(self, name: str) -> None:
        askers = self._barriers.get(name, {})
        if askers and set(self.membership.ranks()) <= set(askers):
            for asker in self._barriers.pop(name).values():
                self._reply(asker, m.Done())

    def _refuse_if_dead(self) -> None:
        dead = [s for s in self._servers.values() if not s.alive]
        if dead:
            raise ClusterError(f"server {dead[0].shard} is dead; this cluster must be started again")

    def _refuse_twice(self, peer: int) -> None:
        waits = any(asker.peer == peer for asker, _ in self._joining)
        if waits or self.membership.holds(peer) or any(s.peer == peer for s in self._servers.values()):
            raise ClusterError("this connection has joined already")

    def _known(self, peer: int) -> None:
        if not self.membership.holds(peer):
            raise ClusterError("join first: only a member can use tables")

    def _member(self, peer: int) -> Member:
        for member in self.membership.workers.values():
            if member.peer == peer:
                return member
        raise ClusterError("only a worker that has joined can do this; a reader or a stranger cannot")

    # ---- tables ------------------------------------------------------------------------------

    def _declare(self, asker: _Asker, spec: TableSpec) -> None:
        number = self._names.get(spec.name)
        self._known(asker.peer)
        if number is None:
            check_table(spec)
            self._refuse_if_dead()
            self._create(asker, spec)
            return
        table = self._tables[number]
        difference = _difference(table.spec, spec)
        if difference:
            raise TableConflict(
                f"table {spec.name!r} exists with {difference}; nothing was changed. "
                "Use another name, or declare it everywhere in the same way"
            )
        if table.state == "ready":
            self._declared(asker, table, assign=False)
        elif table.initialiser == asker.peer:  # asked again, say after a wrong value
            self._declared(asker, table, assign=True)
        else:
            table.waiting.append(asker)
            if table.state == "assigning" and table.initialiser is None:
                self._pass_on(table)

    def _create(self, asker: _Asker, spec: TableSpec) -> None:
        number = len(self._tables) + 1
        parts = layout(spec, self.shards).participants
        table = _Table(number, spec, parts, set(parts), waiting=[asker])
        self._tables[number] = table
        self._names[spec.name] = number
        body = m.pack(m.Create(number, spec))
        for shard in parts:
            self._out.append(Outgoing(self._servers[shard].peer, Frame(Kind.REQUEST, seq=number, body=body)))

    def _created(self, peer: int, reply: m.Reply) -> None:
        if not isinstance(reply, m.Created) or reply.table not in self._tables:
            return
        table = self._tables[reply.table]
        table.creating -= {s.shard for s in self._servers.values() if s.peer == peer}
        if table.creating or table.state != "creating":
            return
        if any(parameter.init.kind == "values" for parameter in table.spec.parameters):
            self._pass_on(table)
        else:
            self._release(table)

    def _pass_on(self, table: _Table) -> None:
        """Let the lowest rank assign its values once it asks: which worker came first must not matter."""
        table.state, table.initialiser = "assigning", None
        lowest = self.membership.workers.get(min(self.membership.ranks(), default=-1))
        for asker in table.waiting:
            if lowest is not None and asker.peer == lowest.peer:
                table.waiting.remove(asker)
                table.initialiser = asker.peer
                self._declared(asker, table, assign=True)
                return

    def _initialised(self, asker: _Asker, number: int) -> None:
        table = self._table(number)
        if table.state != "assigning" or table.initialiser != asker.peer:
            raise ClusterError(f"another worker assigns the values of table {table.spec.name!r}, or they are assigned")
        self._reply(asker, m.Done())
        self._release(table)

    def _release(self, table: _Table) -> None:
        table.state = "ready"
        waiting, table.waiting = table.waiting, []
        for asker in waiting:
            self._declared(asker, table, assign=False)

    def _declared(self, asker: _Asker, table: _Table, *, assign: bool) -> None:
        self._reply(asker, m.Declared(table.number, table.spec, assign, self.membership.epoch))

    def _refused(self, peer: int, frame: Frame) -> None:
        """A server could not create a table."""
        table = self._tables.get(frame.seq)
        if table is not None and any(s.peer == peer for s in self._servers.values()):
            self._give_up(table, m.read_error(frame.body))

    def _give_up(self, table: _Table, why: HeadwaterError) -> None:
        """Whoever asked for the table is told, the name is free again, and no server keeps memory for it."""
        if table.state != "creating":
            return
        self._names.pop(table.spec.name, None)
        for asker in table.waiting:
            self._fail(asker, why)
        table.waiting, table.state = [], "refused"
        for shard in table.participants:
            self._notify(self._servers[shard].peer, m.Drop(table.number))

    def _table(self, number: int) -> _Table:
        if number not in self._tables:
            raise UnknownTable(f"table {number} does not exist in this cluster")
        return self._tables[number]

    # ---- notices -----------------------------------------------------------------------------

    def _notice(self, peer: int, message: m.Notice) -> None:
        if isinstance(message, m.Heartbeat):
            self.membership.heard(peer, message, self._now)
            for server in self._servers.values():
                if server.peer == peer:
                    server.heard, server.report = self._now, message
                    server.alive = True  # it was busy, not dead: its connection still stands
        elif isinstance(message, m.Ready):
            self._ready(peer, message)
        else:
            raise ProtocolError(f"{type(message).__name__} does not go to the coordinator")

    def _ready(self, peer: int, message: m.Ready) -> None:
        table = self._table(message.table)
        if message.shard not in table.participants or self._servers[message.shard].peer != peer:
            raise ProtocolError(f"READY for shard {message.shard} of table {message.table} from another server")
        if message.members != self.membership.epoch:
            return  # the membership changed meanwhile; the shard will say so again
        table.ready[message.shard] = message
        if len(table.ready) < len(table.participants):
            return
        answers, table.ready = list(table.ready.values()), {}
        commit = decide(table.spec, answers)
        for shard in table.participants:
            self._notify(self._servers[shard].peer, commit)

    # ---- status ------------------------------------------------------------------------------

    def status(self) -> m.ClusterStatus:
        """What is there now, from the last heartbeats."""
        servers = tuple(self._server_status(s) for s in self._servers.values())
        members = [*self.membership.workers.values(), *self.membership.readers.values()]
        workers = tuple(self._worker_status(member) for member in members)
        tables = tuple(self._table_status(t) for t in self._tables.values() if t.state != "refused")
        return m.ClusterStatus(self._now - self._since, self.membership.epoch, servers, workers, tables)

    def _server_status(self, s: _Server) -> m.ServerStatus:
        state, r = ("alive" if s.alive else "dead"), s.report
        return m.ServerStatus(
            s.shard, s.join.address, s.join.pid, state, len(r.tables), r.nbytes, r.sessions, s.epoch, r.lsn,
            r.pushed_bytes, r.pulled_bytes, self._now - s.since,
        )  # fmt: skip

    def _worker_status(self, member: Member) -> m.WorkerStatus:
        r, heard = member.report, self._now - member.heard
        state = "alive" if heard < 4 * HEARTBEAT else "silent"
        return m.WorkerStatus(
            member.rank, member.join.role, member.join.pid, state, r.clock,
            r.pushed_bytes, r.pulled_bytes, r.staleness, heard,
        )  # fmt: skip

    def _table_status(self, t: _Table) -> m.TableStatus:
        elements = sum(p.numel for p in t.spec.parameters)
        nbytes = sum(p.nbytes for p in t.spec.parameters)
        clocks = [clock for s in self._servers.values() for number, clock in s.report.tables if number == t.number]
        return m.TableStatus(
            t.spec.name, t.number, len(t.spec.parameters), elements, nbytes, t.spec.optimizer.name,
            repr(t.spec.sync), max(clocks, default=0), layout(t.spec, self.shards).sizes,
        )  # fmt: skip

    # ---- out ---------------------------------------------------------------------------------

    def _flush(self) -> list[Outgoing]:
        out, self._out = self._out, []
        return out

    def _reply(self, asker: _Asker, message: m.Reply) -> None:
        self._out.append(Outgoing(asker.peer, Frame(Kind.REPLY, seq=asker.seq, body=m.pack(message))))

    def _fail(self, asker: _Asker, error: HeadwaterError) -> None:
        self._out.append(Outgoing(asker.peer, Frame(Kind.ERROR, seq=asker.seq, body=m.error_body(error))))

    def _notify(self, peer: int, message: m.Notice) -> None:
        self._out.append(Outgoing(peer, Frame(Kind.NOTICE, body=m.pack(message))))


def decide(spec: TableSpec, answers: list[m.Ready]) -> m.Commit:
    """The verdict on a bulk step whose shards are all ready: skipped by all, or applied with one clip factor."""
    first = answers[0]
    if any(answer.skip for answer in answers):
        return m.Commit(first.table, first.clock, first.members, skip=True)
    if spec.max_grad_norm is None:
        return m.Commit(first.table, first.clock, first.members, skip=False)
    norm, scale = clip_factor(spec.max_grad_norm, merge([answer.squares for answer in answers]))
    return m.Commit(first.table, first.clock, first.members, skip=False, norm=norm, scale=scale)


def _lost(membership: Membership) -> HeadwaterError:
    return WorkerLost(f"{membership.reason}; the barrier was given up, {len(membership.ranks())} workers remain")


def _difference(old: TableSpec, new: TableSpec) -> str:
    """What differs, in words; empty if the two agree."""
    if len(old.parameters) != len(new.parameters):
        return f"{len(old.parameters)} parameters instead of {len(new.parameters)}"
    for a, b in zip(old.parameters, new.parameters, strict=True):
        if a != b:
            return f"parameter {msgspec.to_builtins(a)} instead of {msgspec.to_builtins(b)}"
    for field_name in ("optimizer", "sync", "max_grad_norm", "nonfinite", "seed"):
        if getattr(old, field_name) != getattr(new, field_name):
            return f"{field_name} {getattr(old, field_name)!r} instead of {getattr(new, field_name)!r}"
    return ""
