"""A replica of a shard: records in, the same state everywhere, and out comes what happened.

The primary's decisions are in ``shard.py``; here is only what follows from a record. Whatever decides about
state must be in the record or in the state itself: no clock, no connection, no memory of a client's, no role.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch

from headwater.errors import HeadwaterError, NotEnoughMemory, ShapeMismatch
from headwater.server import events as e
from headwater.server.replication import records as r
from headwater.server.replication.records import Record
from headwater.server.replication.state import SessionState, TableState, restore
from headwater.server.table import Prepared, Session, Table
from headwater.server.tables.base import Contribution, Ranges
from headwater.types import TableSpec
from headwater.wire.messages import Commit, Members, Ready
from headwater.wire.tensors import from_bytes


class Memory(Protocol):
    """Who owns the bytes of the tables. ``create`` raises ``NotEnoughMemory``."""

    def size(self, spec: TableSpec) -> int: ...
    def create(self, number: int, spec: TableSpec) -> Table: ...
    def discard(self, number: int) -> None: ...
    def load(self, table: Table, folder: str) -> None: ...
    def lend(self, table: int, size: int, lsn: int, accepted: int) -> torch.Tensor | None: ...
    def before_write(self, table: int, ranges: Ranges) -> None: ...
    def publish(self, version: int, tables: list[Table]) -> None: ...


_OF_TABLES = (r.Update, Commit, r.Prepare, r.Values, r.SetSlots, r.TablePaused)

Happened = e.Instruction | e.Pull | Table
"""What a primary does about a record that was applied, in this order. An instruction: it says so. A pull: it answers
that, now or later; the worker asked for it with its push. A table: it looks at what waits there.
"""


class Replica:
    """``tables`` and ``sessions`` are the same two dictionaries from beginning to end.

    More than 25 methods: one for each kind of record, and the state as it arrives.
    """

    def __init__(self, number: int, memory: Memory) -> None:
        self.number = number
        self.lsn = 0
        self.partial = False  # the state of another replica has begun to arrive and is not complete
        self.tables: dict[int, Table] = {}
        self.sessions: dict[int, Session] = {}
        self.members = Members(0, (), 0)
        self._memory = memory
        self._happened: list[Happened] = []

    def size_of(self, spec: TableSpec) -> int:
        """Bytes of a table's values on this shard."""
        return self._memory.size(spec)

    def begin_anew(self, lsn: int, members: Members, sessions: tuple[SessionState, ...]) -> None:
        """Forget everything: the state of another replica follows."""
        for number in list(self.tables):
            del self.tables[number]
            self._memory.discard(number)
        self.lsn, self.members, self.partial = lsn, members, True
        self.sessions.clear()
        for s in sessions:
            self.sessions[s.number] = Session(s.number, s.rank, s.members, dict(s.done), dict(s.done))

    def begin_table(self, state: TableState) -> None:
        """A table whose blocks follow."""
        table = self._memory.create(state.table, state.spec)
        self.tables[state.table] = table
        self._place(table)
        restore(table, state)
        table.store.begin_partial()

    # ---- records ---------------------------------------------------------------------------------

    def apply(self, record: Record) -> list[Happened]:  # noqa: C901 - one line per kind
        """Take the next record."""
        self._happened = []
        self.lsn = record.lsn
        body = record.body
        void = isinstance(body, _OF_TABLES) and body.table not in self.tables
        match body:
            case _ if void:
                """The table was dropped while this was on its way; so it is on every replica."""
            case r.Update():
                self._update(record, body)
            case Commit():
                self._commit(body)
            case r.Prepare():
                self._prepare(record, body)
            case r.Seat():
                self._seat(body)
            case Members():
                self._members(body)
            case r.Begin():
                self._begin(body)
            case r.Drop():
                self.tables.pop(body.table, None)
                self._memory.discard(body.table)
            case r.Values():
                self._assign(record, body)
            case r.SetSlots():
                self._set_slots(body)
            case r.TablePaused():
                self._pause_table(body)
            case r.Publish():
                self._publish(body)
        return self._happened

    def _publish(self, body: r.Publish) -> None:
        """A version's moment; the same on every replica that is whole."""
        if not self.partial:
            self._memory.publish(body.version, [self.tables[n] for n in body.tables if n in self.tables])

    def _begin(self, body: r.Begin) -> None:
        if body.table in self.tables:  # the coordinator asked again before the first was applied
            self._emit(e.Created(body.table, self.tables[body.table].store.nbytes))
            return
        table = self._made(body)
        if table is None:
            return
        self.tables[body.table] = table
        self._place(table)
        self._emit(e.Created(table.number, table.store.nbytes))

    def _made(self, body: r.Begin) -> Table | None:
        """The table with its first values; ``None``: it cannot be, which has happened too."""
        refusal: HeadwaterError
        try:
            table = self._memory.create(body.table, body.spec)
            if body.restore:
                self._memory.load(table, body.restore)
            else:
                table.store.initialise()
            return table
        except HeadwaterError as error:
            refusal = error
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where memory is refused
            refusal = NotEnoughMemory(f"table {body.spec.name!r}: {error}; it was not created")
        self._memory.discard(body.table)
        self._emit(e.Refused(body.table, refusal))
        return None

    def _seat(self, body: r.Seat) -> None:
        """A session begins or goes on."""
        session = self.sessions.get(body.session)
        if session is None:
            session = self.sessions[body.session] = Session(body.session, body.rank)
        session.members = max(session.members, body.members)
        self._emit(e.Seated(session.number))

    def _members(self, body: Members) -> None:
        if body.epoch <= self.members.epoch:
            return  # said again: a step that is prepared under it stays so
        self.members = body
        ended = [
            s for s in self.sessions.values()
            if s.rank >= 0 and s.number not in body.sessions and s.members <= body.epoch
        ]  # fmt: skip
        for session in ended:
            self._end(session)
        for table in self.tables.values():
            self._place(table)

    def _end(self, session: Session) -> None:
        del self.sessions[session.number]
        for table in self.tables.values():
            table.waiting = [p for p in table.waiting if p.session != session.number]
            table.held = [p for p in table.held if p.session != session.number]
            table.staged.pop(session.number, None)
            table.clocks.resume(session.rank, session.number)
            table.words.end(session.number)

    def _place(self, table: Table) -> None:
        """Tell a table who its workers are; a step that was prepared with others is void."""
        m = self.members
        table.prepared, table.writes = None, []
        table.words.new = True  # another rank may be the lowest now
        for part in table.gathering.members_changed(m.epoch, m.ranks, m.lost):
            table.words.undo()
            if part.ended or part.asked:
                reason = self.why_lost(table.gathering.clock + 1)
                clock = table.gathering.clock + 1
                self._emit(e.Fail(part.session, part.seq, table.number, clock, "WorkerLost", reason))
        table.clocks.members(m.ranks)
        self._emit(table)

    def why_lost(self, clock: int) -> str:
        """What a worker is told about a step that another's death undid."""
        m = self.members
        return (
            f"{m.reason}; step {clock} was not applied on any shard and the parameters are those of the step "
            f"before. {len(m.ranks)} workers remain: push the step again to go on with them"
        )

    # ---- bulk ------------------------------------------------------------------------------------

    def _prepare(self, record: Record, body: r.Prepare) -> None:
        table = self.tables[body.table]
        gathering = table.gathering
        if body.members != gathering.members or body.clock != gathering.clock + 1:
            gathering.announced = False  # the membership changed while it was on its way: void, on every replica
            self._emit(table)
            return
        table.prepared = Prepared(body, record.sources(body.ranges), record.divide)
        table.writes = table.writes[len(table.writes) - body.writes :]  # before them: of a primary that died over it
        if body.commit is not None:
            self._commit(body.commit)
        else:
            self._emit(self.ready(table))

    def ready(self, table: Table) -> Ready:
        """What a shard says once a step is prepared: it can be committed whatever becomes of one server."""
        assert table.prepared is not None
        b = table.prepared.body
        return Ready(b.table, self.number, b.clock, b.members, b.squares, b.skip)

    def _commit(self, body: Commit) -> None:
        table = self.tables[body.table]
        prepared = table.prepared
        if prepared is None or body.clock != table.gathering.clock + 1 or body.members != prepared.body.members:
            return
        writes, table.writes = table.writes, []
        for start, data in writes:
            self._write_values(table, start, data)
        if not body.skip:
            if prepared.body.groups is not None:
                table.store.set_groups(prepared.body.groups)
            self._change(table, prepared.sources, prepared.divide, body.scale)
        table.prepared, table.last_commit = None, body
        wants = {part.session for part in table.gathering.finish() if part.wants}
        table.clocks.applied += 1
        for part in prepared.parts:
            self._finish_part(table, part, body, part.wants or part.session in wants)
        self._emit(table)

    def _finish_part(self, table: Table, part: r.Contributor, body: Commit, wants: bool) -> None:
        session = self.sessions.get(part.session)
        if session is not None:
            session.finish(table.number, part.seq)
        note = table.notes.pop(part.rank, None)
        self._emit(
            e.Ack(part.session, part.seq, table.number, body.clock, self.lsn, 0, True, body.skip, body.norm, note)
        )
        if wants:
            self._emit(e.Send(part.session, 0, table.number, body.clock, self.lsn, 0, 0, table.size))

    def _change(
        self, table: Table, contributions: Sequence[Contribution], divide: int = 1, scale: float | None = None
    ) -> None:
        """The one place where a gradient changes values."""
        store = table.store
        if not store.whole:
            contributions = store.present(contributions)
        if contributions:
            ranges = store.touched(contributions)
            self._memory.before_write(table.number, ranges)
            store.change(contributions, ranges, divide, scale)

    # ---- stale and asynchronous ------------------------------------------------------------------

    def _update(self, record: Record, body: r.Update) -> None:
        table = self.tables[body.table]
        if body.groups is not None:
            table.store.set_groups(body.groups)
        if body.ranges and not body.skip:
            self._change(table, record.sources(body.ranges), 1, body.scale)
        session = self.sessions.get(body.session)
        if session is not None:
            session.finish(table.number, body.seq)
            session.inflight = max(0, session.inflight - 1)
        table.inflight = max(0, table.inflight - 1)
        if body.end:
            staleness = table.clocks.pushed(body.rank, body.clock)
            self._emit(
                e.Ack(body.session, body.seq, table.number, body.clock, self.lsn, staleness, True, body.skip, body.norm)
            )
            if body.want:
                self._emit(e.Pull(body.session, 0, table.number, body.clock, 0, table.size))
        elif body.want:
            for start, stop in body.ranges:
                self._emit(e.Pull(body.session, 0, table.number, body.clock, start, stop - start))
        self._emit(table)

    def _pause_table(self, body: r.TablePaused) -> None:
        table, session = self.tables[body.table], self.sessions.get(body.session)
        if session is not None:
            act = table.clocks.pause if body.paused else table.clocks.resume
            act(session.rank, session.number)
        self._emit(e.Done(body.session, body.request))
        self._emit(table)

    # ---- assignments -----------------------------------------------------------------------------

    def _assign(self, record: Record, body: r.Values) -> None:
        table = self.tables[body.table]
        for start, stop in r.spans(body):
            assert record.gradient is not None
            data = record.gradient[start - record.base : stop - record.base]
            if body.clock:
                self._keep(table, body, data if record.lasting else data.clone())
            else:
                self._write_values(table, start, data)
        session = self.sessions.get(body.session)
        if session is not None:
            session.finish(body.table, body.seq)
        if body.last:
            self._emit(e.Ack(body.session, body.seq, body.table, 0, self.lsn))

    def _keep(self, table: Table, body: r.Values, data: torch.Tensor) -> None:
        """Until the step is committed nobody sees what it starts from; void with the membership, on every replica."""
        gathering = table.gathering
        if (body.clock, body.members) == (gathering.clock + 1, gathering.members):
            table.writes.append((body.start, data))

    def _write_values(self, table: Table, first: int, data: torch.Tensor) -> None:
        for start, stop in table.store.written(first, first + len(data)):
            self._memory.before_write(table.number, ((start, stop),))
            table.store.assign(start, stop, data[start - first : stop - first])

    def _set_slots(self, body: r.SetSlots) -> None:
        table = self.tables[body.table]
        refusal: HeadwaterError | None = None
        self._memory.before_write(body.table, ((0, table.size),))
        try:
            if body.reset:
                table.store.reset_slots()
            for slot in body.slots:
                piece = from_bytes(slot.data, slot.dtype, slot.shape)
                table.store.write_slot(slot.parameter, slot.name, slot.start, piece)
        except HeadwaterError as error:  # on every replica alike
            refusal = error
        except (RuntimeError, ValueError, OverflowError) as error:
            refusal = ShapeMismatch(f"a slot of table {table.spec.name!r}: {error}")
        self._emit(e.Done(body.session, body.request, refusal))

    def _emit(self, happened: Happened) -> None:
        self._happened.append(happened)

    # ---- for tests -------------------------------------------------------------------------------

    def digest(self) -> str:
        """SHA-256 of what replicas must agree on: values, optimizer state, clocks and session numbers."""
        found = hashlib.sha256()
        for number, table in sorted(self.tables.items()):
            for piece in table.store.fingerprint():
                found.update(piece)
            clocks = (sorted(table.clocks.clock.items()), sorted(table.clocks.paused.items()))
            found.update(f"{number} {table.gathering.clock} {table.clocks.applied} {clocks}".encode())
        workers = [s for s in self.sessions.values() if s.rank >= 0]  # readers are known to the primary only
        for session in sorted(workers, key=lambda s: s.number):
            found.update(f"{session.number} {session.rank} {sorted(session.done.items())}".encode())
        return found.hexdigest()
