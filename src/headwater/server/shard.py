"""A shard: one slice of every table, as a state machine. Typed events in, typed instructions out.

No sockets, no clock. A push goes `_push` → `_contribute` (bulk) or `_apply_now` (stale, async) →
`tables.dense.DenseShard.apply` → torch's kernel. Every change of the values gets the next LSN.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from headwater.cluster.placement import BLOCK
from headwater.errors import (
    ClusterError,
    HeadwaterError,
    ProtocolError,
    SessionExpired,
    ShapeMismatch,
    StaleEpoch,
    UnknownTable,
    WorkerLost,
)
from headwater.server import events as e
from headwater.server.sync import Clocks, Gathering
from headwater.server.sync.bulk import Part, union
from headwater.server.tables.dense import DenseShard
from headwater.server.tables.plan import Contribution
from headwater.types import Bulk, Hyper, TableSpec, Version
from headwater.wire.frames import Flag
from headwater.wire.messages import Commit, Members, Ready, StepBody
from headwater.wire.tensors import from_bytes

Asked = TypeVar("Asked", e.Push, e.Pull)


@dataclass(slots=True)
class Session:
    """One client's ordered conversation with this shard."""

    number: int
    rank: int
    seq: int = 0  # the last push that was accepted
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)  # by table: shared or staged


class Table:
    """One table's slice and what its policy remembers."""

    def __init__(self, event: e.Created) -> None:
        self.spec: TableSpec = event.spec
        self.number = event.table
        self.dense = DenseShard(event.spec, event.segments, event.values.numel(), event.values)
        self.values = event.values
        self.size = event.values.numel()
        self.alone = event.alone
        self.versions = event.versions
        self.bulk = isinstance(event.spec.sync, Bulk)
        self.gathering = Gathering()
        self.clocks = Clocks(event.spec.sync)
        self.groups: dict[int, tuple[dict[str, Hyper], ...]] = {}
        self.waiting: list[e.Pull] = []
        self.held: list[e.Push] = []
        self.staged: dict[int, list[tuple[int, int]]] = {}
        self._starts = [s.offset for s in event.segments]
        self._ends = [s.end for s in event.segments]
        self._sound: set[tuple[int, int]] = {(0, 0), (0, self.size)}
        sync = event.spec.sync
        capped = getattr(sync, "max_staleness", None) is not None
        self.eager = not self.bulk and not capped and event.spec.max_grad_norm is None
        self.dense.initialise()

    def check_range(self, start: int, stop: int) -> None:
        """A range must begin and end on segments (padding included). Raises ``ProtocolError``."""
        if (start, stop) in self._sound:
            return
        i, j = bisect_left(self._starts, start), bisect_right(self._ends, stop) - 1
        begins = i < len(self._starts) and self._starts[i] == start
        ends = j >= i and (j + 1 == len(self._starts) or self._starts[j + 1] >= stop)
        if not (0 <= start < stop <= self.size and begins and ends):
            raise ProtocolError(
                f"bytes {start}:{stop} of table {self.spec.name!r} do not lie on whole segments of its "
                f"{self.size} bytes here; nothing was applied"
            )
        self._sound.add((start, stop))

    def touch(self, ranges: tuple[tuple[int, int], ...]) -> None:
        """Turn the block versions of ``ranges``: odd before a write, even after."""
        if self.versions is None:
            return
        for start, stop in ranges:
            for block in range(start // BLOCK, -(-stop // BLOCK)):
                self.versions[block] += 1


def _nothing(table: int, ranges: tuple[tuple[int, int], ...]) -> None:
    """No one needs to know before values change."""


class Shard:
    """``before_write(table, ranges)`` is called before values change, so that queued answers can be saved."""

    def __init__(
        self,
        number: int,
        epoch: int,
        before_write: Callable[[int, tuple[tuple[int, int], ...]], None] = _nothing,
    ) -> None:
        self.number = number
        self.epoch = epoch
        self.lsn = 0
        self.tables: dict[int, Table] = {}
        self.sessions: dict[int, Session] = {}
        self._members = Members(0, (), 0)
        self._before_write = before_write
        self._out: list[e.Instruction] = []

    @property
    def version(self) -> Version:
        return Version(self.epoch, self.lsn)

    @property
    def members_epoch(self) -> int:
        return self._members.epoch

    def handle(self, event: e.Event) -> list[e.Instruction]:
        """Take one event. Refusals of pushes and pulls are instructions; anything else raises a typed error."""
        if isinstance(event, e.Push):
            self._guard(self._push, event)
        elif isinstance(event, e.Pull):
            self._guard(self._read, event)
        else:
            self._rare(event)
        out, self._out = self._out, []
        return out

    def _rare(self, event: e.Rare) -> None:
        match event:
            case Commit():
                self._commit(event)
            case Members():
                self._members_changed(event)
            case e.Created():
                self._create(event)
            case e.Opened():
                self._open(event)
            case e.Closed():
                self._close(event)
            case e.Attached():
                self._attach(event)
            case e.Assign():
                self._assign(event)
            case e.AssignSlots():
                self._assign_slots(event)

    def _guard(self, act: Callable[[Asked], None], event: Asked) -> None:
        try:
            act(event)
        except HeadwaterError as error:
            self._fail(event, error)

    def _fail(self, event: e.Push | e.Pull, error: HeadwaterError) -> None:
        number = event.seq if isinstance(event, e.Push) else event.request
        self._out.append(e.Fail(event.session, number, event.table, event.clock, error.code, str(error)))

    # ---- tables and sessions -------------------------------------------------------------------

    def _create(self, event: e.Created) -> None:
        table = Table(event)
        self.tables[event.table] = table
        self._seat(table)

    def _open(self, event: e.Opened) -> None:
        known = self.sessions.get(event.session)
        if known is None:
            self.sessions[event.session] = Session(event.session, event.rank)

    def _close(self, event: e.Closed) -> None:
        session = self.sessions.pop(event.session, None)
        if session is None:
            return
        for table in self.tables.values():
            table.waiting = [p for p in table.waiting if p.session != session.number]
            table.held = [p for p in table.held if p.session != session.number]
            table.staged.pop(session.number, None)
            table.gathering.forget(session.rank, session.number)

    def _attach(self, event: e.Attached) -> None:
        session = self._session(event.session)
        self.table(event.table)
        if event.gradients is not None:
            session.gradients[event.table] = event.gradients

    def table(self, number: int) -> Table:
        """Raises ``UnknownTable``."""
        found = self.tables.get(number)
        if found is None:
            raise UnknownTable(f"table {number} does not exist on shard {self.number}; declare it first")
        return found

    def _session(self, number: int) -> Session:
        found = self.sessions.get(number)
        if found is None:
            raise SessionExpired(
                f"shard {self.number} does not know session {number:016x}; "
                "what it had not acknowledged may or may not be applied. Connect again"
            )
        return found

    def staging(self, session: int, table: int) -> torch.Tensor:
        """Where the bytes of a session's pushes wait when they cannot be applied on arrival."""
        gradients = self._session(session).gradients
        if table not in gradients:
            gradients[table] = torch.zeros(self.table(table).size, dtype=torch.uint8)
        return gradients[table]

    # ---- pushes --------------------------------------------------------------------------------

    def _push(self, event: e.Push) -> None:
        session, table = self._session(event.session), self.table(event.table)
        if event.epoch != self.epoch:
            raise StaleEpoch(
                f"push {event.seq} was sent to epoch {event.epoch} of shard {self.number}, which is in "
                f"{self.epoch}; nothing was applied. Ask the coordinator for the view and send it again"
            )
        if event.seq <= session.seq:
            self._again(session, table, event)
            return
        if event.seq != session.seq + 1:
            raise ProtocolError(f"push {event.seq} came after {session.seq}: one in between is missing")
        if session.rank < 0:
            raise ClusterError("a reader cannot push; connect with role='worker'")
        if event.length:
            table.check_range(event.start, event.start + event.length)
        session.seq = event.seq
        if table.bulk:
            self._contribute(session, table, event)
        else:
            self._apply_now(session, table, event)

    def _again(self, session: Session, table: Table, event: e.Push) -> None:
        """A duplicate: acknowledged again if it is applied, else the answer is still to come."""
        part = table.gathering.parts.get(session.rank)
        pending = part is not None and event.seq <= part.seq
        held = any(push.session == session.number and push.seq == event.seq for push in table.held)
        if not pending and not held:
            self._out.append(e.Ack(session.number, event.seq, event.table, event.clock, self.lsn))

    def _contribute(self, session: Session, table: Table, event: e.Push) -> None:
        gathering = table.gathering
        if event.members < gathering.lost:
            raise WorkerLost(self._why_lost(event.clock))
        if event.clock != gathering.clock + 1:
            raise ProtocolError(
                f"worker {session.rank} pushes step {event.clock} of table {table.spec.name!r}, "
                f"which is at step {gathering.clock}; nothing was applied"
            )
        if session.rank not in gathering.ranks and event.members <= gathering.members:
            raise SessionExpired(
                f"worker {session.rank} is no member any more (it was silent for too long, or has left); "
                "nothing was applied. Connect again"
            )
        part = gathering.part(session.rank, session.number)
        if part.ended:
            raise ProtocolError(f"worker {session.rank} pushes to step {event.clock}, which it has ended")
        if event.body is not None and event.body.groups is not None:
            table.dense.check_groups(event.body.groups)
            table.groups[session.rank] = event.body.groups
        part.seq = event.seq
        if event.length:
            part.gradients = self._gradients(session, table)
            part.ranges.append((event.start, event.start + event.length))
        if event.flags & Flag.END:
            part.ended, part.skip = True, bool(event.flags & Flag.SKIP)
            part.wants = bool(event.flags & Flag.WANT)
            self._check_complete(table)

    def _gradients(self, session: Session, table: Table) -> torch.Tensor:
        found = session.gradients.get(table.number)
        if found is None:
            raise ProtocolError(f"a push to table {table.spec.name!r} without bytes and without shared memory")
        return found

    def _why_lost(self, clock: int) -> str:
        m = self._members
        return (
            f"{m.reason}; step {clock} was not applied on any shard and the parameters are those of the step "
            f"before. {len(m.ranks)} workers remain: push the step again to go on with them"
        )

    def _check_complete(self, table: Table) -> None:
        gathering = table.gathering
        if gathering.announced or not gathering.complete():
            return
        gathering.announced = True
        skip = any(part.skip for part in gathering.seated())
        squares: tuple[float, ...] = ()
        if table.spec.max_grad_norm is not None and not skip:
            squares = tuple(table.dense.square_norm(self._contributions(table), self._divide(table)))
        clock = gathering.clock + 1
        ready = Ready(table.number, self.number, clock, gathering.members, squares, skip)
        self._out.append(ready)

    def _contributions(self, table: Table) -> list[Contribution]:
        """In rank order, each with its union of ranges."""
        return [
            Contribution(part.gradients, union(part.ranges))
            for part in table.gathering.seated()
            if part.gradients is not None
        ]

    def _divide(self, table: Table) -> int:
        mean = isinstance(table.spec.sync, Bulk) and table.spec.sync.reduce == "mean"
        return len(table.gathering.ranks) if mean else 1

    def _commit(self, event: Commit) -> None:
        table = self.table(event.table)
        gathering = table.gathering
        if event.members != gathering.members or event.clock != gathering.clock + 1 or not gathering.complete():
            return  # decided for a membership that is gone
        if not event.skip:
            self._set_groups(table)
            self._apply(table, self._contributions(table), self._divide(table), event.scale)
        parts = gathering.finish()
        table.clocks.version += 1
        for part in parts:
            self._finish_part(table, part, event)

    def _finish_part(self, table: Table, part: Part, event: Commit) -> None:
        self._out.append(
            e.Ack(part.session, part.seq, table.number, event.clock, self.lsn, 0, True, event.skip, event.norm)
        )
        if part.wants:
            self._out.append(e.Send(part.session, 0, table.number, event.clock, self.lsn, 0, 0, table.size))

    def _set_groups(self, table: Table) -> None:
        """New hyperparameters of the lowest rank that sent any: all workers run the same schedule."""
        if table.groups:
            table.dense.set_groups(table.groups[min(table.groups)])
            table.groups = {}

    def _apply(
        self, table: Table, contributions: list[Contribution], divide: int = 1, scale: float | None = None
    ) -> None:
        """The one place where a gradient changes values."""
        if contributions:
            ranges = contributions[0].ranges
            if len(contributions) > 1:
                ranges = union([r for c in contributions for r in c.ranges])
            self._before_write(table.number, ranges)
            table.touch(ranges)
            table.dense.apply(contributions, divide, scale)
            table.touch(ranges)
        self.lsn += 1

    # ---- stale and asynchronous -----------------------------------------------------------------

    def _apply_now(self, session: Session, table: Table, event: e.Push) -> None:
        body = event.body
        if body is not None and body.groups is not None:
            table.dense.set_groups(body.groups)
        if event.length:
            span = (event.start, event.start + event.length)
            if table.eager and event.gradient is not None:
                self._apply(table, [Contribution(event.gradient, (span,), event.base)])
                if event.flags & Flag.WANT and not event.flags & Flag.END:
                    self._pull(e.Pull(session.number, 0, table.number, event.clock, event.start, event.length))
            else:
                self._gradients(session, table)
                table.staged.setdefault(session.number, []).append(span)
        if not event.flags & Flag.END:
            return
        if not table.held and table.clocks.may_apply(session.rank):
            self._end_step(session, table, event)
        else:  # behind those that wait already: they have the older values
            table.held.append(event)
        self._progress(table)

    def _end_step(self, session: Session, table: Table, event: e.Push) -> None:
        ranges = table.staged.pop(session.number, None)
        body = event.body or StepBody()
        skip = bool(event.flags & Flag.SKIP)
        if ranges and not skip:
            self._apply(table, [Contribution(self._gradients(session, table), union(ranges))], 1, body.scale)
        staleness = table.clocks.pushed(session.rank, event.clock)
        self._out.append(
            e.Ack(session.number, event.seq, table.number, event.clock, self.lsn, staleness, True, skip, body.norm)
        )
        if event.flags & Flag.WANT:
            self._pull(e.Pull(session.number, 0, table.number, event.clock, 0, table.size))

    def _read(self, event: e.Pull) -> None:
        """A worker that reads again is less stale: a step that waited for it may go on."""
        self._pull(event)
        if self.tables[event.table].held:
            self._progress(self.tables[event.table])

    def _pull(self, event: e.Pull) -> None:
        session, table = self._session(event.session), self.table(event.table)
        if event.start + event.length > table.size:
            raise ProtocolError(f"a pull past the end of table {table.spec.name!r} on shard {self.number}")
        behind = any(push.session == session.number for push in table.held)  # a worker reads its own writes
        if behind or (not table.bulk and not table.clocks.may_read(session.rank, event.clock)):
            table.waiting.append(event)
            return
        clocks = table.clocks
        staleness = 0 if table.bulk else max(clocks.clock.values(), default=0) - min(clocks.clock.values(), default=0)
        clocks.was_read(session.rank)
        start, length = event.start, event.length
        self._out.append(
            e.Send(event.session, event.request, event.table, event.clock, self.lsn, staleness, start, length)
        )

    def _held_ranks(self, table: Table) -> set[int]:
        return {self.sessions[push.session].rank for push in table.held if push.session in self.sessions}

    def _progress(self, table: Table) -> None:
        """Something was applied or someone left: what waited may go on now, first come first served."""
        i = 0
        while i < len(table.held):
            push = table.held[i]
            session = self.sessions.get(push.session)
            if session is None or table.clocks.may_apply(session.rank, self._held_ranks(table)):
                del table.held[i]
                if session is not None:
                    self._end_step(session, table, push)
                i = 0
            else:
                i += 1
        if table.waiting:
            waiting, table.waiting = table.waiting, []
            for pull in waiting:
                self._guard(self._pull, pull)

    # ---- membership ----------------------------------------------------------------------------

    def _members_changed(self, event: Members) -> None:
        self._members = event
        for table in self.tables.values():
            self._seat(table)

    def _seat(self, table: Table) -> None:
        m = self._members
        for part in table.gathering.members_changed(m.epoch, m.ranks, m.lost):
            table.groups = {}
            if part.ended:
                reason = self._why_lost(table.gathering.clock + 1)
                clock = table.gathering.clock + 1
                self._out.append(e.Fail(part.session, part.seq, table.number, clock, "WorkerLost", reason))
        table.clocks.members(m.ranks)
        self._check_complete(table)
        self._progress(table)

    # ---- assignments -----------------------------------------------------------------------------

    def _assign(self, event: e.Assign) -> None:
        table = self._writable(event)
        if event.data.numel():
            span = (event.start, event.start + event.data.numel())
            table.check_range(*span)
            self._before_write(event.table, (span,))
            table.touch((span,))
            table.values[span[0] : span[1]] = event.data
            table.touch((span,))
        self.lsn += 1
        if event.last:
            self._out.append(e.Ack(event.session, event.request, event.table, 0, self.lsn))

    def _assign_slots(self, event: e.AssignSlots) -> None:
        table = self._writable(event)
        if event.reset:
            table.dense.reset_slots()
        for slot in event.slots:
            piece = from_bytes(slot.data, slot.dtype, slot.shape)
            try:
                table.dense.write_slot(slot.parameter, slot.name, slot.start, piece)
            except (RuntimeError, ValueError, OverflowError) as error:
                raise ShapeMismatch(f"slot {slot.name!r} of parameter {slot.parameter}: {error}") from None
        self.lsn += 1

    def _writable(self, event: e.Assign | e.AssignSlots) -> Table:
        if self._session(event.session).rank < 0:
            raise ClusterError("a reader cannot assign; connect with role='worker'")
        return self.table(event.table)

    def validate(self) -> None:
        """Invariants, for tests: raises ``AssertionError`` with the state that breaks one."""
        for table in self.tables.values():
            g = table.gathering
            assert not (g.announced and not g.complete()), f"READY was said for an incomplete step: {g.parts}"
            assert all(p.gradients is not None for p in g.parts.values() if p.ranges), f"nothing to add up: {g.parts}"
            assert all(p.session in self.sessions for p in g.parts.values() if not g.announced), "a part of nobody"
            assert table.versions is None or all(v % 2 == 0 for v in table.versions), "a block was left half written"
            assert not (table.bulk and (table.held or table.waiting)), "bulk steps neither hold nor delay"
