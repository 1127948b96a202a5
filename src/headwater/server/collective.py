"""Steps of all workers at a primary: who has contributed what, and the record that is made when all have."""

from __future__ import annotations

from headwater.errors import ProtocolError, SessionExpired, WorkerLost
from headwater.server import events as e
from headwater.server import meeting
from headwater.server.proposals import Proposals
from headwater.server.sync.bulk import Part
from headwater.server.table import Session, Table
from headwater.wire.frames import Flag
from headwater.wire.messages import Commit


class Collective:
    """The steps of one shard's tables that all workers take together."""

    def __init__(self, proposals: Proposals, number: int) -> None:
        self._proposals = proposals
        self._replica = proposals.replica
        self._number = number

    def part(self, session: Session, table: Table, clock: int, members: int) -> Part:
        """What this worker has contributed to the step under way. Raises if it is another step, or has ended."""
        gathering = table.gathering
        if members < gathering.lost:
            raise WorkerLost(self._replica.why_lost(clock))
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

    def contribute(self, session: Session, table: Table, event: e.Push) -> None:
        part = self.part(session, table, event.clock, event.members)
        table.hear(session, event.body)
        part.seq = event.seq
        if event.body is not None:
            part.based = max(part.based, event.body.based)
        if event.flags & Flag.ANEW:
            part.anew()
        if event.length:
            part.gradients = session.gradients_of(table)
            part.ranges.append((event.start, event.start + event.length))
        if event.flags & Flag.END:
            part.ended, part.skip = True, bool(event.flags & Flag.SKIP)
            part.wants = bool(event.flags & Flag.WANT)
            part.merged, part.wrote = bool(event.flags & Flag.MERGED), bool(event.flags & Flag.WROTE)
            self.check(table)

    def ask_mean(self, session: Session, table: Table, event: e.AskMean) -> None:
        part = self.part(session, table, event.clock, event.members)
        part.asked, part.past = event.seq, event.past
        self._check_mean(table)

    def check(self, table: Table) -> None:
        """Somebody has contributed, or is gone: perhaps that was what the others waited for."""
        self._check_complete(table)
        self._check_mean(table)

    def _check_mean(self, table: Table) -> None:
        """Whoever asks sees the aggregate of what all have contributed; nothing is applied."""
        if table.gathering.meets():
            self._proposals.out += meeting.answers(table)

    def _check_complete(self, table: Table) -> None:
        """With a contribution of every worker: aggregate them, and have the followers keep the result."""
        gathering = table.gathering
        if gathering.announced or table.prepared is not None or not gathering.complete():
            return
        if (why := gathering.disagreement()) is not None:
            self._proposals.out += meeting.give_up(table, why)
            return
        gathering.announced = True
        for values, data in meeting.writes(table):
            self._proposals.propose(values, data, values.start, lasting=True)
        self._proposals.propose_step(*meeting.prepare(table, self._number))

    def decided(self, event: Commit) -> None:
        """The coordinator's verdict; one for a membership that is gone, or that came before, is passed over."""
        table = self._replica.tables.get(event.table)
        if table is None or table.prepared is None:
            return
        body = table.prepared.body
        if (body.clock, body.members) == (event.clock, event.members):
            self._proposals.propose(event)
