"""Steps that each worker takes by itself, and reads: what may go on now, and what waits for others.

``sync/clocks.py`` knows the limits; here is who is held back by them, and the record that a push becomes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from headwater.errors import ProtocolError
from headwater.server import events as e
from headwater.server.proposals import Proposals
from headwater.server.replication import records as r
from headwater.server.table import Session, Table
from headwater.server.tables.base import Ranges, union
from headwater.wire.frames import Flag
from headwater.wire.messages import StepBody

LEND = 64 << 10  # bytes from which a push is worth a copy into memory that followers share


class Paced:
    """The steps and the reads of one shard's workers."""

    def __init__(self, proposals: Proposals) -> None:
        self._proposals = proposals
        self._replica = proposals.replica
        self._sessions = proposals.replica.sessions

    def apply_now(self, session: Session, table: Table, event: e.Push) -> None:
        table.hear(session, event.body)
        table.words.count()
        end = bool(event.flags & Flag.END)
        if table.eager and event.gradient is not None:
            span = ((event.start, event.start + event.length),)
            gradient, base = self._stable(table, event)
            self._propose_update(session, table, event, span, gradient, base)
            return
        if event.length:
            session.gradients_of(table)
            table.staged.setdefault(session.number, []).append((event.start, event.start + event.length))
        if end:
            if not table.held and self._may_apply(session, table):
                self._end_step(session, table, event)
            else:  # behind those that wait already: they have the older values
                table.held.append(event)
                self.let_go_on(table)

    def _stable(self, table: Table, event: e.Push) -> tuple[torch.Tensor, int]:
        """The push's gradient where followers can have it, and it stays until all do."""
        assert event.gradient is not None
        if not self._proposals.log.replicated:
            return event.gradient, event.base
        start, stop, base = event.start, event.start + event.length, event.base
        lent = None
        if event.length >= LEND:
            lent = self._proposals.lend(table)
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
        ranges = union(table.staged.pop(session.number, []))
        gradient = session.gradients_of(table) if ranges else None
        if gradient is not None and self._proposals.log.replicated:
            # The worker's next push lands where this one did, perhaps before every follower has it.
            lent = self._proposals.lend(table)
            gradient = gradient.clone() if lent is None else lent.copy_(gradient)
        self._propose_update(session, table, event, ranges, gradient, 0)

    def _propose_update(
        self, session: Session, table: Table, event: e.Push, ranges: Ranges, gradient: torch.Tensor | None, base: int
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
        self._proposals.propose(update, gradient, base)

    def read(self, session: Session, table: Table, event: e.Pull) -> None:
        """A worker that reads again is less stale: a step that waited for it may go on."""
        if event.start + event.length > table.size:
            shard = self._replica.number
            raise ProtocolError(f"a pull past the end of table {table.spec.name!r} on shard {shard}")
        self._read(session, table, event)
        if table.held:
            self.let_go_on(table)

    def _read(self, session: Session, table: Table, event: e.Pull) -> None:
        held = any(push.session == session.number for push in table.held)
        if held or session.inflight:  # a worker reads its own writes
            table.waiting.append(event)
        else:
            self.serve(session, table, event)

    def serve(self, session: Session, table: Table, event: e.Pull) -> None:
        """Answer a read, or let it wait for the slowest."""
        if not table.collective and not table.clocks.may_read(session.rank, event.clock):
            table.waiting.append(event)
            return
        clocks = table.clocks
        staleness = (
            0 if table.collective else max(clocks.clock.values(), default=0) - min(clocks.clock.values(), default=0)
        )
        clocks.was_read(session.rank)
        start, length = event.start, event.length
        self._proposals.out.append(
            e.Send(
                event.session, event.request, event.table, event.clock, self._replica.lsn, staleness, start, length,
                event.keys,
            )
        )  # fmt: skip

    def _held_ranks(self, table: Table) -> set[int]:
        return {self._sessions[push.session].rank for push in table.held if push.session in self._sessions}

    def let_go_on(self, table: Table) -> None:
        """Something was applied or someone left: what waited may go on now, first come first served."""
        i = 0
        while i < len(table.held):
            push = table.held[i]
            session = self._sessions.get(push.session)
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
                reader = self._sessions.get(pull.session)
                if reader is not None:
                    self._read(reader, table, pull)
