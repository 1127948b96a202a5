"""What follows when the workers change: the shards, tables, data plans, versions and barriers hear of it."""

from __future__ import annotations

from headwater.cluster import claims
from headwater.cluster.barriers import Barriers
from headwater.cluster.dataplan import ALL, DataPlans
from headwater.cluster.fleet import Fleet
from headwater.cluster.membership import DIED, Member, Membership, given_up
from headwater.cluster.outbox import Outbox
from headwater.cluster.publications import Publications
from headwater.cluster.tables import Tables
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Asker, Outgoing


class Roster:
    """``Membership`` says who is there; this class tells all others when that changes."""

    def __init__(
        self,
        outbox: Outbox,
        fleet: Fleet,
        membership: Membership,
        tables: Tables,
        barriers: Barriers,
        plans: DataPlans,
        publications: Publications,
    ) -> None:
        self._outbox = outbox
        self._fleet = fleet
        self._membership = membership
        self._tables = tables
        self._barriers = barriers
        self._plans = plans
        self._publications = publications

    def announce(self) -> None:
        """The workers have changed: the shards answer again under the new membership."""
        self._outbox.save("members", self._membership.dump())
        self._tables.members_changed()
        for shard in self._fleet.views:
            self._outbox.tell(shard, self._membership.announcement())

    def expect(self) -> None:
        """A table is used by somebody now, or not any more: of those that left, others may be expected again."""
        if self._membership.expect(claims.owed(self._tables.by_number.values(), self._membership)):
            self.announce()

    def pause(self, asker: Asker, worker: Member, paused: bool) -> None:
        """Bulk steps do without a worker, or need it again."""
        if self._membership.pause(worker, paused):
            self.announce()
        self._outbox.reply(asker, m.Paused(self._membership.epoch))

    def leave(self, asker: Asker, now: float) -> None:
        """Whoever asks has finished its steps and goes."""
        member = self._membership.of(asker.peer)
        if member is not None:
            self._tables.missed(asker.peer)
            self.depart(member, now, clean=True)
        self._outbox.reply(asker, m.Done())

    def depart(self, member: Member, now: float, *, clean: bool, why: str = "") -> None:
        """A worker or reader is gone for good; ``clean`` says that it had finished its steps."""
        self._membership.depart(member, clean=clean, why=why)
        if not self._membership.has(member.join.session):  # a reader may be back before its old connection ends
            self._publications.leases.left(member.join.session, now, clean=clean)
        if member.rank < 0:
            return
        self._tables.left(member.join.session, clean)
        self._membership.expect(claims.owed(self._tables.by_number.values(), self._membership))
        self._plans.forget(member.join.session, ALL if clean else self._tables.committed())
        self.announce()
        self._barriers.departed(member.rank, clean)

    def disconnected(self, peer: int, now: float) -> None:
        """A worker whose connection ended has died, unless it may come back over another one."""
        member = self._membership.of(peer)
        if member is None:
            return
        self._tables.missed(peer)
        if member.rank >= 0 and self._membership.grace:
            member.peer, member.gone = None, now
        else:
            self.depart(member, now, clean=False, why=DIED)

    def tick(self, now: float) -> None:
        """Gives up those that were silent for too long, or have not come back."""
        for member, why in self._membership.lost_now(now):
            self.depart(member, now, clean=False, why=why)
            if member.rank < 0 and member.peer is not None:
                refusal = Frame(Kind.ERROR, body=m.error_body(given_up(why)))
                self._outbox.put(Outgoing(member.peer, refusal, close=True))
