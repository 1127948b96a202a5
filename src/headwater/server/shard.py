"""A shard at its primary: typed events in, typed instructions out. No sockets, no clock.

A push goes `_push` → `_contribute` (bulk) or `_apply_now` (stale, async) → `propose` → every follower accepts →
`Replica.apply` → `tables.dense.DenseShard.apply` → torch's kernel → `_react`. Every record has the next LSN.
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
from headwater.server import meeting
from headwater.server.replication import records as r
from headwater.server.replication.log import Log
from headwater.server.replication.records import Record
from headwater.server.replication.replica import Happened, Memory, Replica
from headwater.server.sync.bulk import Part
from headwater.server.table import Session, Table
from headwater.wire.frames import Flag
from headwater.wire.messages import Commit, Follow, Members, StepBody

NEWER = 1024  # membership epochs by which a client may be ahead of the shard
STRANGERS = 1 << 16  # sessions beyond those that the coordinator has named: more are refused
LEND = 64 << 10  # bytes from which a push is worth a copy into memory that followers share

Asked = TypeVar("Asked", e.Push, e.Pull, e.AskMean)

Observer = Callable[["Shard", Record], None]


class Shard:
    """Has one replica, and decides for it while this server is the primary.

    A *reign* is the epoch in which a primary began; it names the primary's log. ``since``: when this server became the
    primary; what a client sent to an earlier one is refused. ``reign``: of the log that the replica holds now.
    ``before``: the reign of the log that it held when it became the primary, and ``base`` the last record of that log.
    ``applied``: called after each record that a primary has applied; a snapshot is taken between two records.
    """

    observer: Observer | None = None  # called after each record, at a follower too: the simulator's oracles look

    def __init__(self, number: int, memory: Memory) -> None:
        self.number = number
        self.replica = Replica(number, memory)
        self.tables, self.sessions = self.replica.tables, self.replica.sessions
        self.epoch = 0
        self.primary = False
        self.since = self.reign = self.before = self.base = 0
        self.log = Log()
        self.applied: list[Callable[[], None]] = []
        self._memory = memory
        self._out: list[e.Instruction] = []
        self._left: list[Record] = []  # proposed and not applied when this server stepped down
        self._told = 0  # the membership epoch of the last record about it

    @property
    def lsn(self) -> int:
        """The last record that is applied."""
        return self.replica.lsn

    # ---- views -----------------------------------------------------------------------------------

    def lead(self, epoch: int, backups: Collection[int], blocked: bool) -> list[e.Instruction]:
        """This server is the primary in ``epoch``, and may not go on without these ``backups``."""
        first = not self.primary
        self.epoch = epoch
        if first:
            self.primary, self.since = True, epoch
            self.before, self.base, self.reign = self.reign, self.replica.lsn, epoch
            self.log, self._left = Log(self.replica.lsn), []
            self._told = self.replica.members.epoch
            for session in self.sessions.values():
                session.seq, session.inflight = dict(session.done), 0
                session.gradients.clear()
            for table in self.tables.values():
                table.follow_none()
        for server in backups:
            self.log.required.setdefault(server, self.replica.lsn if first else 0)
        self.log.blocked = blocked
        if first:
            self._out += [self.replica.ready(table) for table in self.tables.values() if table.prepared is not None]
        return self._drain()

    def step_down(self, epoch: int) -> None:
        """Another server is the primary, or will be."""
        self.epoch = epoch
        if self.primary:
            self.primary = False
            self._left = list(self.log.pending)
            self.log = Log(self.replica.lsn)
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
            self._guard(self._push, event)
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
                self._decided(event)
            case Members():
                if event.epoch > self._told:  # a coordinator that comes back repeats itself
                    self._told = event.epoch
                    self.propose(event)
            case e.Create():
                if event.table not in self.tables:
                    self.propose(r.Begin(event.table, event.spec, event.restore))
            case e.Forget():
                self.propose(r.Drop(event.table))  # a follower may have it even if it could not be made here
            case e.Publish():
                self.propose(r.Publish(event.version, event.tables))
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
            self._out.append(e.Fail(event.session, number, event.table, event.clock, error.code, str(error), push))

    # ---- the log ---------------------------------------------------------------------------------

    def propose(
        self, body: r.Body, gradient: torch.Tensor | None = None, base: int = 0, *, lasting: bool = False
    ) -> Record:
        """Give a record its LSN and send it to whoever follows; it is applied when all of them have it."""
        return self._append(Record(self.log.last + 1, body, gradient, base, lasting=lasting))

    def _append(self, record: Record) -> Record:
        self.log.append(record)
        if self.log.required:
            self._out.append(e.Replicate(record))
        return record

    def _drain(self) -> list[e.Instruction]:
        """Apply what everyone has; what follows from that may be proposed and applied in the same turn."""
        while (record := self.log.next_accepted()) is not None:
            happened = self.replica.apply(record)
            if self.observer is not None:
                self.observer(self, record)
            self._react(happened)
            for act in self.applied:
                act()
        out, self._out = self._out, []
        return out

    def _react(self, happened: list[Happened]) -> None:
        for x in happened:
            if isinstance(x, Table):
                self._progress(x)
            elif not isinstance(x, e.Pull):
                self._out.append(x)
            elif x.session in self.sessions:
                self._answer(x)

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
            self._out.append(e.Seated(event.session))
        else:
            self.propose(r.Seat(event.session, event.rank, event.members))

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
        self._out.append(e.Joined(event.session, event.request, event.table, event.shared))

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

    def _push(self, event: e.Push) -> None:
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
            table.check_range(event.start, event.start + event.length)
        session.seq[table.number] = event.seq
        if table.collective:
            self._contribute(session, table, event)
        else:
            self._apply_now(session, table, event)

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
        self._out.append(
            e.Ack(
                session.number, event.seq, event.table, event.clock, self.replica.lsn, 0, bool(event.flags & Flag.END),
                known is not None and known.skip, known.norm if known is not None else None,
            )
        )  # fmt: skip

    def _part(self, session: Session, table: Table, clock: int, members: int) -> Part:
        """What this worker has contributed to the step under way. Raises if it is another step, or has ended."""
        gathering = table.gathering
        if members < gathering.lost:
            raise WorkerLost(self.replica.why_lost(clock))
        if clock != gathering.clock + 1:
            raise ProtocolError(
                f"worker {session.rank} pushes step {clock} of table {table.spec.name!r}, "
                f"which is at step {gathering.clock}; nothing was applied"
            )
        if session.rank not in gathering.ranks and members <= gathering.members:
            raise SessionExpired(
                f"worker {session.rank} is no member any more (it was silent for too long, or has left); "
                "nothing was applied. Connect again"
            )
        part = gathering.part(session.rank, session.number, members)
        if part.ended:
            raise ProtocolError(f"worker {session.rank} pushes to step {clock}, which it has ended")
        return part

    def _contribute(self, session: Session, table: Table, event: e.Push) -> None:
        part = self._part(session, table, event.clock, event.members)
        self._hear(session, table, event)
        part.seq = event.seq
        if event.body is not None:
            part.based = max(part.based, event.body.based)
        if event.flags & Flag.ANEW:
            part.anew()
        if event.length:
            part.gradients = self._gradients(session, table)
            part.ranges.append((event.start, event.start + event.length))
        if event.flags & Flag.END:
            part.ended, part.skip = True, bool(event.flags & Flag.SKIP)
            part.wants = bool(event.flags & Flag.WANT)
            part.merged, part.wrote = bool(event.flags & Flag.MERGED), bool(event.flags & Flag.WROTE)
            self._check_complete(table)
            self._check_mean(table)

    def _hear(self, session: Session, table: Table, event: e.Push) -> None:
        if event.body is not None:
            if event.body.groups is not None:
                table.dense.check_groups(event.body.groups)
            table.words.hear(session.number, event.body)

    def _gradients(self, session: Session, table: Table) -> torch.Tensor:
        found = session.gradients.get(table.number)
        if found is None:
            raise ProtocolError(f"a push to table {table.spec.name!r} without bytes and without shared memory")
        return found

    def _ask_mean(self, event: e.AskMean) -> None:
        session, table = self.session(event.session), self.table(event.table)
        if not table.collective:
            raise ProtocolError(f"table {table.spec.name!r} has no step of all workers whose mean could be asked for")
        _refuse_reader(session, "ask for gradients")
        part = self._part(session, table, event.clock, event.members)
        part.asked, part.past = event.seq, event.past
        self._check_mean(table)

    def _check_mean(self, table: Table) -> None:
        """Whoever asks sees the aggregate of what all have contributed; nothing is applied."""
        if table.gathering.meets():
            self._out += meeting.answers(table)

    def _check_complete(self, table: Table) -> None:
        """With a contribution of every worker: aggregate them, and have the followers keep the result."""
        gathering = table.gathering
        if gathering.announced or table.prepared is not None or not gathering.complete():
            return
        if (why := gathering.disagreement()) is not None:
            self._out += meeting.give_up(table, why)
            return
        gathering.announced = True
        for values, data in meeting.writes(table):
            self.propose(values, data, values.start, lasting=True)
        body, contributions = meeting.prepare(table, self.number)
        record = Record(self.log.last + 1, body, None, 0, contributions, meeting.divisor(table))
        if self.log.replicated:
            self.materialise(record)
        self._append(record)

    def materialise(self, record: Record) -> None:
        """Turn a step's contributions into one aggregate: what followers are sent, and what is applied then."""
        if record.contributions is None or not isinstance(record.body, r.Prepare):
            return
        table = self.tables[record.body.table]
        aggregate = self._memory.lend(table.number, table.size, record.lsn, self.log.accepted_by_all)
        if aggregate is None:
            aggregate = torch.zeros(table.size, dtype=torch.uint8, device="cpu")
        if record.contributions:
            table.dense.aggregate(record.contributions, record.divide, aggregate)
        record.gradient, record.contributions, record.divide = aggregate, None, 1

    def _decided(self, event: Commit) -> None:
        """The coordinator's verdict; one for a membership that is gone, or that came before, is passed over."""
        table = self.tables.get(event.table)
        if table is None or table.prepared is None:
            return
        body = table.prepared.body
        if (body.clock, body.members) == (event.clock, event.members):
            self.propose(event)

    # ---- stale and asynchronous ------------------------------------------------------------------

    def _apply_now(self, session: Session, table: Table, event: e.Push) -> None:
        self._hear(session, table, event)
        table.words.count()
        end = bool(event.flags & Flag.END)
        if table.eager and event.gradient is not None:
            span = ((event.start, event.start + event.length),)
            gradient, base = self._stable(table, event)
            self._propose_update(session, table, event, span, gradient, base)
            return
        if event.length:
            self._gradients(session, table)
            table.staged.setdefault(session.number, []).append((event.start, event.start + event.length))
        if end:
            if not table.held and self._may_apply(session, table):
                self._end_step(session, table, event)
            else:  # behind those that wait already: they have the older values
                table.held.append(event)
                self._progress(table)

    def _stable(self, table: Table, event: e.Push) -> tuple[torch.Tensor, int]:
        """The push's gradient where followers can have it, and it stays until all do."""
        assert event.gradient is not None
        if not self.log.replicated:
            return event.gradient, event.base
        start, stop, base = event.start, event.start + event.length, event.base
        lent = None
        if event.length >= LEND:
            lent = self._memory.lend(table.number, table.size, self.log.last + 1, self.log.accepted_by_all)
        if lent is None:
            return event.gradient[start - base : stop - base].clone(), start  # what is a client's may change
        lent[start:stop] = event.gradient[start - base : stop - base]
        return lent, 0

    def _may_apply(self, session: Session, table: Table, held: Collection[int] = ()) -> bool:
        """Under a cap one step at a time: the next is judged by what the last has changed."""
        if table.capped and table.inflight:
            return False
        return table.clocks.may_apply(session.rank, held)

    def _end_step(self, session: Session, table: Table, event: e.Push) -> None:
        ranges = r.union(table.staged.pop(session.number, []))
        gradient = self._gradients(session, table) if ranges else None
        if gradient is not None and self.log.replicated:  # the worker's next push lands there, perhaps too early
            lent = self._memory.lend(table.number, table.size, self.log.last + 1, self.log.accepted_by_all)
            gradient = gradient.clone() if lent is None else lent.copy_(gradient)
        self._propose_update(session, table, event, ranges, gradient, 0)

    def _propose_update(
        self, session: Session, table: Table, event: e.Push, ranges: r.Ranges, gradient: torch.Tensor | None, base: int
    ) -> None:
        body = event.body or StepBody()
        end, skip = bool(event.flags & Flag.END), bool(event.flags & Flag.SKIP)
        groups = table.words.groups.get(session.number)  # each worker's update is taken with its own
        groups, table.stepped = (None if groups == table.stepped else groups), groups or table.stepped
        session.inflight += 1
        table.inflight += 1
        update = r.Update(
            table.number, session.number, session.rank, event.seq, event.clock, ranges, end,
            bool(event.flags & Flag.WANT), skip, body.scale, body.norm, groups,
        )  # fmt: skip
        self.propose(update, gradient, base)

    def _read(self, event: e.Pull) -> None:
        """A worker that reads again is less stale: a step that waited for it may go on."""
        session, table = self.session(event.session), self.table(event.table)
        if event.start + event.length > table.size:
            raise ProtocolError(f"a pull past the end of table {table.spec.name!r} on shard {self.number}")
        held = any(push.session == session.number for push in table.held)
        if held or session.inflight:  # a worker reads its own writes
            table.waiting.append(event)
        else:
            self._answer(event)
        if table.held:
            self._progress(table)

    def _answer(self, event: e.Pull) -> None:
        session, table = self.session(event.session), self.table(event.table)
        if not table.collective and not table.clocks.may_read(session.rank, event.clock):
            table.waiting.append(event)
            return
        clocks = table.clocks
        staleness = (
            0 if table.collective else max(clocks.clock.values(), default=0) - min(clocks.clock.values(), default=0)
        )
        clocks.was_read(session.rank)
        start, length = event.start, event.length
        self._out.append(
            e.Send(event.session, event.request, event.table, event.clock, self.replica.lsn, staleness, start, length)
        )

    def _held_ranks(self, table: Table) -> set[int]:
        return {self.sessions[push.session].rank for push in table.held if push.session in self.sessions}

    def _progress(self, table: Table) -> None:
        """Something was applied or someone left: what waited may go on now, first come first served."""
        if table.collective:
            self._check_complete(table)
            self._check_mean(table)
        i = 0
        while i < len(table.held):
            push = table.held[i]
            session = self.sessions.get(push.session)
            if session is None or self._may_apply(session, table, self._held_ranks(table)):
                del table.held[i]
                if session is not None:
                    self._end_step(session, table, push)
                i = 0
            else:
                i += 1
        if table.waiting:
            waiting, table.waiting = table.waiting, []
            for pull in waiting:
                self._guard(self._read_again, pull)

    def _read_again(self, event: e.Pull) -> None:
        session, table = self.session(event.session), self.table(event.table)
        if session.inflight or any(push.session == session.number for push in table.held):
            table.waiting.append(event)
        else:
            self._answer(event)

    def _pause_table(self, event: e.PauseTable) -> None:
        session, table = self.session(event.session), self.table(event.table)
        _refuse_reader(session, "be waited for")
        self.propose(r.TablePaused(table.number, session.number, event.request, event.paused))

    # ---- assignments -----------------------------------------------------------------------------

    def _assigned(self, event: e.Assign) -> None:
        session, table = self.session(event.session), self.table(event.table)
        _refuse_reader(session, "assign")
        if event.request <= session.seq.get(table.number, 0):
            if event.request <= session.done.get(table.number, 0) and event.last:
                self._out.append(e.Ack(event.session, event.request, event.table, 0, self.replica.lsn))
            return
        self._sequence(session, table, event.request)
        start, length = event.start, event.data.numel()
        if length:
            table.check_range(start, start + length)
        session.seq[table.number] = event.request
        if event.clock:
            part = self._part(session, table, event.clock, event.members)
            part.seq = event.request
            if length:
                part.writes.append((start, event.data.clone()))
            return
        data = event.data.clone() if self.log.replicated else event.data
        self.propose(r.Values(table.number, session.number, event.request, start, length, event.last), data, start)

    def _assigned_slots(self, event: e.AssignSlots) -> None:
        session, table = self.session(event.session), self.table(event.table)
        _refuse_reader(session, "assign")
        self.propose(r.SetSlots(table.number, session.number, event.request, event.slots, event.reset))

    def validate(self) -> None:
        """Invariants, for tests: raises ``AssertionError`` with the state that breaks one."""
        for table in self.tables.values():
            g = table.gathering
            assert all(p.gradients is not None for p in g.parts.values() if p.ranges), f"nothing to add up: {g.parts}"
            assert table.versions is None or all(v % 2 == 0 for v in table.versions), "a block was left half written"
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
