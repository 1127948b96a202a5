"""A shard at its primary: typed events in, typed instructions out. No sockets, no clock.

A push goes `Shard._admit` → `Collective.contribute` or `Paced.apply_now` → `Proposals.propose` → every follower
accepts → `Replica.apply` → `TableStore.change` → torch's kernel → `Shard._react`. Every record has the next LSN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

import torch

from headwater.errors import (
    ClusterError,
    HeadwaterError,
    ProtocolError,
    SessionExpired,
    StaleEpoch,
    UnknownTable,
    WorkerLost,
)
from headwater.server import events as e
from headwater.server.collective import Collective
from headwater.server.paced import Paced
from headwater.server.proposals import Proposals
from headwater.server.replication import records as r
from headwater.server.replication.log import Log
from headwater.server.replication.records import Record
from headwater.server.replication.replica import Happened, Memory, Replica
from headwater.server.table import Session, Table
from headwater.wire.frames import Flag
from headwater.wire.messages import Commit, Follow, Members

NEWER = 1024  # membership epochs by which a client may be ahead of the shard
STRANGERS = 1 << 16  # sessions beyond those that the coordinator has named: more are refused

Asked = TypeVar("Asked", e.Push, e.Pull, e.AskMean)

Observer = Callable[["Shard", Record], None]


class Shard:
    """Has one replica, and decides for it while this server is the primary.

    A *reign* is the epoch in which a primary began; it names the primary's log. ``since``: when this server became the
    primary; what a client sent to an earlier one is refused. ``reign``: of the log that the replica holds now.
    ``before``: the reign of the log that it held when it became the primary, and ``base`` the last record of that log.
    ``applied``: called after each record that a primary has applied; a snapshot is taken between two records.

    More than 25 methods: one for each event, and for what views and followers change.
    """

    observer: Observer | None = None  # called after each record, at a follower too: the simulator's oracles look

    def __init__(self, number: int, memory: Memory) -> None:
        self.number = number
        self.replica = Replica(number, memory)
        self.tables, self.sessions = self.replica.tables, self.replica.sessions
        self.epoch = 0
        self.primary = False
        self.since = self.reign = self.before = self.base = 0
        self.proposals = Proposals(self.replica, memory)
        self.applied: list[Callable[[], None]] = []
        self._collective = Collective(self.proposals, number)
        self._paced = Paced(self.proposals)
        self._left: list[Record] = []  # proposed and not applied when this server stepped down
        self._told = 0  # the membership epoch of the last record about it

    @property
    def lsn(self) -> int:
        """The last record that is applied."""
        return self.replica.lsn

    @property
    def log(self) -> Log:
        return self.proposals.log

    # ---- views -----------------------------------------------------------------------------------

    def lead(self, epoch: int, backups: Collection[int], blocked: bool) -> list[e.Instruction]:
        """This server is the primary in ``epoch``, and may not go on without these ``backups``."""
        first = not self.primary
        self.epoch = epoch
        if first:
            self.primary, self.since = True, epoch
            self.before, self.base, self.reign = self.reign, self.replica.lsn, epoch
            self.proposals.begin()
            self._left = []
            self._told = self.replica.members.epoch
            for session in self.sessions.values():
                session.seq, session.inflight = dict(session.done), 0
                session.gradients.clear()
            for table in self.tables.values():
                table.follow_none()
        for server in backups:
            self.log.required.setdefault(server, self.replica.lsn if first else 0)
        self.log.blocked = blocked
        if first:  # the old primary's READY may be lost, or the verdict on its way to it
            self.proposals.out += [
                self.replica.ready(table) for table in self.tables.values() if table.prepared is not None
            ]
        return self._drain()

    def step_down(self, epoch: int) -> None:
        """Another server is the primary, or will be."""
        self.epoch = epoch
        if self.primary:
            self.primary = False
            self._left = list(self.log.pending)
            self.proposals.begin()
            for table in self.tables.values():
                table.follow_none()

    @property
    def tail(self) -> int:
        """The last record that this replica knows: as the former primary, more than it has applied."""
        return self._left[-1].lsn if self._left else self.replica.lsn

    @property
    def ahead(self) -> list[Record]:
        """What this replica knows and has not applied."""
        return [*self.log.pending, *self._left]

    def catch_up(self, lsn: int) -> None:
        """The new primary holds what this one had proposed up to ``lsn``; the rest is void."""
        for record in self._left:
            if self.replica.lsn < record.lsn <= lsn:
                self.mirror(record)
        self._left = []

    def mirror(self, record: Record) -> None:
        """The next record of a primary's, at a follower. Raises if it cannot be applied: the replica ends then."""
        for happened in self.replica.apply(record):
            if isinstance(happened, e.Refused):
                raise happened.error
        if self.observer is not None:
            self.observer(self, record)

    def continues(self, request: Follow) -> bool:
        """Whether a follower's state is a point of this log: then it needs no more than the records after it."""
        if request.lsn < 0:
            return False
        if request.reign == self.reign:
            return self.replica.lsn <= request.lsn <= self.log.last
        same = request.reign == self.before and self.replica.lsn == self.base
        return same and request.lsn <= self.base <= max(request.lsn, request.tail)

    def followed(self, server: int, lsn: int) -> None:
        """A server follows from ``lsn`` on, and is waited for from now on."""
        self.log.required[server] = lsn

    def unfollowed(self, server: int) -> list[e.Instruction]:
        """A server is not waited for any more."""
        self.log.required.pop(server, None)
        return self._drain()

    def accepted(self, server: int, lsn: int) -> list[e.Instruction]:
        """A follower has every record up to ``lsn``."""
        self.log.accepted(server, lsn)
        return self._drain()

    # ---- events ----------------------------------------------------------------------------------

    def handle(self, event: e.Event) -> list[e.Instruction]:
        """Take one event. Refusals of pushes and pulls are instructions; anything else raises a typed error."""
        if isinstance(event, e.Push):
            self._guard(self._admit, event)
        elif isinstance(event, e.Pull):
            self._guard(self._read, event)
        elif isinstance(event, e.AskMean):
            self._guard(self._ask_mean, event)
        else:
            self._rare(event)
        return self._drain()

    def _rare(self, event: e.Rare) -> None:  # noqa: C901 - one line per kind
        match event:
            case Commit():
                self._collective.decided(event)
            case Members():
                if event.epoch > self._told:  # a coordinator that comes back repeats itself
                    self._told = event.epoch
                    self.proposals.propose(event)
            case e.Create():
                if event.table not in self.tables:
                    self.proposals.propose(r.Begin(event.table, event.spec, event.restore))
            case e.Forget():
                self.proposals.propose(r.Drop(event.table))  # a follower may have it even if it could not be made here
            case e.BeginVersion():
                self.proposals.propose(r.Publish(event.version, event.tables))
            case e.Opened():
                self._open(event)
            case e.Closed():
                self._close(event)
            case e.Attached():
                self._attach(event)
            case e.Assign():
                self._assigned(event)
            case e.AssignSlots():
                self._assigned_slots(event)
            case e.PauseTable():
                self._pause_table(event)

    def _guard(self, act: Callable[[Asked], None], event: Asked) -> None:
        try:
            act(event)
        except HeadwaterError as error:
            number = event.request if isinstance(event, e.Pull) else event.seq
            push = isinstance(event, e.Push)
            self.proposals.out.append(
                e.Fail(event.session, number, event.table, event.clock, error.code, str(error), push)
            )

    # ---- the log ---------------------------------------------------------------------------------

    def _drain(self) -> list[e.Instruction]:
        """Apply what everyone has; what follows from that may be proposed and applied in the same turn."""
        while (record := self.log.next_accepted()) is not None:
            happened = self.replica.apply(record)
            if self.observer is not None:
                self.observer(self, record)
            self._react(happened)
            for act in self.applied:
                act()
        out, self.proposals.out = self.proposals.out, []
        return out

    def _react(self, happened: list[Happened]) -> None:
        for x in happened:
            if isinstance(x, Table):
                if x.collective:
                    self._collective.check(x)
                self._paced.let_go_on(x)
            elif not isinstance(x, e.Pull):
                self.proposals.out.append(x)
            elif x.session in self.sessions:
                self._paced.serve(self.sessions[x.session], self.tables[x.table], x)

    # ---- sessions --------------------------------------------------------------------------------

    def check_open(self, event: e.Opened) -> None:
        """Raises ``ProtocolError``, ``ClusterError`` or ``SessionExpired`` if not; nothing has changed then."""
        known = self.sessions.get(event.session)
        if known is None and len(self.sessions) >= len(self.replica.members.sessions) + STRANGERS:
            raise ClusterError(
                f"shard {self.number} has {len(self.sessions)} sessions, most of which the coordinator does not know; "
                "no more are opened before it has ended some"
            )
        if event.members > self.replica.members.epoch + NEWER:
            raise ProtocolError(
                f"membership epoch {event.members} of a session, where {self.replica.members.epoch} is known"
            )
        if known is not None and known.rank != event.rank:
            raise ProtocolError(f"session {event.session:016x} is of worker {known.rank}, not {event.rank}")
        listed = event.session in self.replica.members.sessions or event.members >= self.replica.members.epoch
        if known is None and event.rank >= 0 and not listed:
            raise SessionExpired(
                f"session {event.session:016x} of worker {event.rank} has ended: it was silent for too long, or has "
                "left; what it had not acknowledged may or may not be applied. Connect again"
            )

    def _open(self, event: e.Opened) -> None:
        self.check_open(event)
        if event.rank < 0:
            self.sessions.setdefault(event.session, Session(event.session, -1))
            self.proposals.out.append(e.Seated(event.session))
        else:
            self.proposals.propose(r.Seat(event.session, event.rank, event.members))

    def _close(self, event: e.Closed) -> None:
        session = self.sessions.get(event.session)
        if session is None:
            return
        for table in self.tables.values():
            table.waiting = [p for p in table.waiting if p.session != session.number]
        if session.rank < 0:
            del self.sessions[session.number]

    def _attach(self, event: e.Attached) -> None:
        session = self.session(event.session)
        self.table(event.table)
        if event.gradients is not None:
            session.gradients[event.table] = event.gradients
        # Pushes before the base are done with, or the client has given them up.
        session.seq[event.table] = max(session.seq.get(event.table, 0), event.base - 1)
        self.proposals.out.append(e.Joined(event.session, event.request, event.table, event.shared))

    def table(self, number: int) -> Table:
        """Raises ``UnknownTable``."""
        found = self.tables.get(number)
        if found is None:
            raise UnknownTable(f"table {number} does not exist on shard {self.number}; declare it first")
        return found

    def session(self, number: int) -> Session:
        """Raises ``SessionExpired``."""
        found = self.sessions.get(number)
        if found is None:
            raise SessionExpired(
                f"shard {self.number} does not know session {number:016x}; "
                "what it had not acknowledged may or may not be applied. Connect again"
            )
        return found

    def staging(self, session: int, table: int) -> torch.Tensor:
        """Where the bytes of a session's pushes wait when they cannot be applied on arrival."""
        gradients = self.session(session).gradients
        if table not in gradients:
            gradients[table] = torch.zeros(self.table(table).size, dtype=torch.uint8, device="cpu")
        return gradients[table]

    # ---- pushes ----------------------------------------------------------------------------------

    def _admit(self, event: e.Push) -> None:
        session, table = self.session(event.session), self.table(event.table)
        if not self.since <= event.epoch <= self.epoch:
            raise StaleEpoch(
                f"push {event.seq} was sent to epoch {event.epoch} of shard {self.number}, which is in "
                f"{self.epoch}; nothing was applied. Ask the coordinator for the view and send it again"
            )
        if event.seq <= session.seq.get(table.number, 0):
            self._again(session, table, event)
            return
        self._sequence(session, table, event.seq)
        if event.length:
            table.store.check(event.start, event.start + event.length)
        session.seq[table.number] = event.seq
        if table.collective:
            self._collective.contribute(session, table, event)
        else:
            self._paced.apply_now(session, table, event)

    def _sequence(self, session: Session, table: Table, seq: int) -> None:
        last = session.seq.get(table.number, 0)
        if seq != last + 1:
            raise ProtocolError(f"push {seq} came after {last}: one in between is missing")
        _refuse_reader(session, "push")

    def _again(self, session: Session, table: Table, event: e.Push) -> None:
        """A duplicate: acknowledged again if it is applied, else the answer is still to come."""
        if event.seq > session.done.get(table.number, 0):
            if table.collective and event.members < table.gathering.lost:  # undone, and the word of it was lost
                raise WorkerLost(self.replica.why_lost(event.clock))
            part = table.gathering.parts.get(session.rank)
            if part is not None and part.seq == event.seq and event.flags & Flag.WANT:
                part.wants = True
            return
        last = table.last_commit
        known = last if last is not None and last.clock == event.clock else None
        self.proposals.out.append(
            e.Ack(
                session.number, event.seq, event.table, event.clock, self.replica.lsn, 0, bool(event.flags & Flag.END),
                known is not None and known.skip, known.norm if known is not None else None,
            )
        )  # fmt: skip

    # ---- reads -----------------------------------------------------------------------------------

    def _read(self, event: e.Pull) -> None:
        session, table = self.session(event.session), self.table(event.table)
        if event.keys:
            table.store.check_keys(event.keys)
        self._paced.read(session, table, event)

    def _ask_mean(self, event: e.AskMean) -> None:
        session, table = self.session(event.session), self.table(event.table)
        if not table.collective:
            raise ProtocolError(f"table {table.spec.name!r} has no step of all workers whose mean could be asked for")
        _refuse_reader(session, "ask for gradients")
        self._collective.ask_mean(session, table, event)

    def _pause_table(self, event: e.PauseTable) -> None:
        session, table = self.session(event.session), self.table(event.table)
        _refuse_reader(session, "be waited for")
        self.proposals.propose(r.TablePaused(table.number, session.number, event.request, event.paused))

    # ---- assignments -----------------------------------------------------------------------------

    def _assigned(self, event: e.Assign) -> None:
        session, table = self.session(event.session), self.table(event.table)
        _refuse_reader(session, "assign")
        if event.request <= session.seq.get(table.number, 0):
            if event.request <= session.done.get(table.number, 0) and event.last:
                self.proposals.out.append(e.Ack(event.session, event.request, event.table, 0, self.replica.lsn))
            return
        self._sequence(session, table, event.request)
        start, length = event.start, event.data.numel()
        if length:
            table.store.check(start, start + length)
        session.seq[table.number] = event.request
        if event.clock:
            part = self._collective.part(session, table, event.clock, event.members)
            part.seq = event.request
            if length:
                part.writes.append((start, event.data.clone()))
            return
        data = event.data.clone() if self.log.replicated else event.data
        self.proposals.propose(
            r.Values(table.number, session.number, event.request, start, length, event.last), data, start
        )

    def _assigned_slots(self, event: e.AssignSlots) -> None:
        session, table = self.session(event.session), self.table(event.table)
        _refuse_reader(session, "assign")
        self.proposals.propose(r.SetSlots(table.number, session.number, event.request, event.slots, event.reset))

    def validate(self) -> None:
        """Invariants, for tests: raises ``AssertionError`` with the state that breaks one."""
        for table in self.tables.values():
            g = table.gathering
            assert all(p.gradients is not None for p in g.parts.values() if p.ranges), f"nothing to add up: {g.parts}"
            table.store.validate()
            assert not (table.collective and (table.held or table.waiting)), "bulk steps neither hold nor delay"
        lsns = [record.lsn for record in self.log.pending]
        assert lsns == list(range(self.replica.lsn + 1, self.replica.lsn + 1 + len(lsns))), (
            f"records after {self.replica.lsn}: {lsns}"
        )
        for session in self.sessions.values():
            ahead = {t: n for t, n in session.done.items() if self.primary and n > session.seq.get(t, 0)}
            assert not ahead, f"applied before accepted: {session}"


def _refuse_reader(session: Session, what: str) -> None:
    """Raises ``ClusterError`` if a reader tries to write."""
    if session.rank < 0:
        raise ClusterError(f"a reader cannot {what}; connect with role='worker'")
