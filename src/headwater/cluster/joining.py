"""The way into a cluster: servers, workers and readers, new ones and those that come back."""

from __future__ import annotations

from headwater.cluster.fleet import Fleet
from headwater.cluster.membership import DIED, Member, Membership
from headwater.cluster.outbox import Outbox
from headwater.cluster.publications import Publications
from headwater.cluster.recovery import Recovery
from headwater.cluster.roster import Roster
from headwater.cluster.rules import Rules
from headwater.cluster.tables import Tables
from headwater.cluster.views import Views
from headwater.errors import ClusterError, HeadwaterError, UsageError
from headwater.wire import messages as m
from headwater.wire.outgoing import Asker


class Joining:
    """Clients that come before the cluster can serve them wait at the door."""

    def __init__(
        self,
        rules: Rules,
        outbox: Outbox,
        fleet: Fleet,
        membership: Membership,
        tables: Tables,
        publications: Publications,
        views: Views,
        roster: Roster,
        recovery: Recovery,
    ) -> None:
        self._rules = rules
        self._outbox = outbox
        self._fleet = fleet
        self._membership = membership
        self._tables = tables
        self._publications = publications
        self._views = views
        self._roster = roster
        self._recovery = recovery
        self._waiting: list[tuple[Asker, m.Join]] = []

    def join(self, asker: Asker, join: m.Join, now: float) -> None:
        """Somebody wants to come in. Raises what it is refused with."""
        if join.role not in ("server", "worker", "reader"):
            raise UsageError(f"role {join.role!r} is none of 'server', 'worker' and 'reader'")
        self._refuse_twice(asker.peer)
        if join.role == "server":
            self._server(asker, join, now)
        else:
            self._client(asker, join, now)

    def _refuse_twice(self, peer: int) -> None:
        waits = any(asker.peer == peer for asker, _ in self._waiting)
        if waits or self._membership.holds(peer) or any(s.peer == peer for s in self._fleet.servers.values()):
            raise ClusterError("this connection has joined already")

    # ---- servers ---------------------------------------------------------------------------------

    def _server(self, asker: Asker, join: m.Join, now: float) -> None:
        server = self._fleet.join(asker.peer, join, now)
        r = self._rules
        welcome = m.Welcome(server.number, r.shards, r.replicas, r.min_copies, r.ack, r.heartbeat, r.durable)
        self._outbox.reply(asker, welcome)
        self._recovery.save()
        self._views.save_server(server)
        if join.resume:
            self._recovery.resumed(server, join.hosted)
        if self._fleet.begin() and not self._views.unserved():
            self._recovery.revive()
            self.let_in(now)

    # ---- clients ---------------------------------------------------------------------------------

    def let_in(self, now: float) -> None:
        """Clients that wait at the door, if nothing keeps them there any more."""
        waiting, self._waiting = self._waiting, []
        for asker, join in waiting:
            try:
                self._client(asker, join, now)
            except HeadwaterError as error:
                self._outbox.fail(asker, error)

    def _client(self, asker: Asker, join: m.Join, now: float) -> None:
        member = self._membership.resume(asker.peer, join, now) if join.resume else None
        if member is None:
            self._refuse(join)
            if self._closed():
                self._waiting.append((asker, join))
                return
            member = self._admit(asker.peer, join, now)
        world = self._membership.world or len(self._membership.workers)
        r = self._rules
        joined = m.Joined(member.rank, world, r.heartbeat, self._views.all(), self._membership.epoch, r.durable)
        self._outbox.reply(asker, joined)

    def _refuse(self, join: m.Join) -> None:
        if join.resume and join.role == "worker":
            raise ClusterError(
                f"worker {join.rank} was given up while it was away; its unfinished step was not applied. "
                "Connect again as a new worker"
            )
        if self._recovery.refusal is not None:
            raise self._recovery.refusal

    def _closed(self) -> bool:
        """Whether whoever comes must wait: for servers, for tables of a snapshot, or for logs on disks."""
        lost = self._rules.ack == "disk" and bool(self._views.unserved())
        return not self._fleet.views or self._recovery.settling or self._tables.reviving or lost

    def _admit(self, peer: int, join: m.Join, now: float) -> Member:
        if join.role == "worker":
            self._views.require_served()
        holder = self._membership.workers.get(-1 if join.rank is None else join.rank)
        if holder is not None and holder.gone is not None:  # it may not come back: another has its rank now
            self._roster.depart(holder, now, clean=False, why=DIED)
        member = self._membership.admit(peer, join, now)
        self._publications.leases.joined(join.session)
        if member.rank >= 0:
            self._roster.announce()
        return member

    def created(self, table: int, shard: int, now: float) -> None:
        """A shard has a table; clients may have waited for that."""
        self._tables.created(table, shard)
        if not self._tables.reviving:
            self.let_in(now)

    def refused(self, number: int, why: HeadwaterError, now: float) -> None:
        """A server could not create a table."""
        table = self._tables.by_number.get(number)
        if table is not None:
            self._recovery.refused(table, why)
            self._tables.give_up(table, why)
            self.let_in(now)

    def disconnected(self, peer: int) -> None:
        """Nobody waits at this connection any more."""
        self._waiting = [(asker, join) for asker, join in self._waiting if asker.peer != peer]
