"""Views made known: who must hear of a new one, what its primary is told, and what follows when a server has died."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from headwater.cluster.fleet import Fleet, ServerProcess, in_sync, members_of
from headwater.cluster.membership import Membership
from headwater.cluster.outbox import Outbox
from headwater.cluster.publications import Publications
from headwater.cluster.rules import Rules
from headwater.cluster.snapshots import Snapshots
from headwater.cluster.tables import Tables
from headwater.errors import ClusterError
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Asker, Outgoing


class Views:
    """What ``Fleet`` has decided, carried to those whom it concerns. Views and servers are durable from here."""

    def __init__(
        self,
        rules: Rules,
        outbox: Outbox,
        fleet: Fleet,
        membership: Membership,
        tables: Tables,
        snapshots: Snapshots,
        publications: Publications,
    ) -> None:
        self._rules = rules
        self._outbox = outbox
        self._fleet = fleet
        self._membership = membership
        self._tables = tables
        self._snapshots = snapshots
        self._publications = publications
        self._draining: list[tuple[Asker, int]] = []  # who waits until which server is empty

    # ---- questions -------------------------------------------------------------------------------

    def find(self, shard: int) -> m.ShardView:
        """Where a shard's primary is. Raises ``ClusterError``."""
        view = self._fleet.views.get(shard)
        if view is None or view.primary is None:
            raise ClusterError(f"shard {shard} does not exist in this cluster")
        p = view.primary
        return m.ShardView(shard, view.epoch, p.address, p.local, p.host)

    def all(self) -> tuple[m.ShardView, ...]:
        """Where the primaries of all shards are."""
        return tuple(self.find(shard) for shard in sorted(self._fleet.views))

    def unserved(self) -> list[m.View]:
        """Views of shards whose only copies are gone."""
        up = {s.number for s in self._fleet.servers.values() if s.alive}
        return [view for view in self._fleet.views.values() if not {x.server for x in in_sync(view)} & up]

    def require_served(self, shard: int | None = None) -> None:
        """Raises ``ClusterError`` if this shard (None: any shard) is lost. With ack=disk its log may come back."""
        for view in self.unserved() if self._rules.ack != "disk" else ():
            if shard not in (None, view.shard):
                continue
            server = view.primary.server if view.primary is not None else -1
            raise ClusterError(
                f"server {server} is dead and shard {view.shard} has no other copy; "
                "this cluster must be started again, from a snapshot if there is one (--restore)"
            )

    # ---- making them known -----------------------------------------------------------------------

    def announce(self, now: float) -> None:
        """Bring the views in line with who is there, and tell of those that have changed."""
        for old, new in self._fleet.plan():
            self._announce(old, new, now)
        self._answer_drains()

    def _announce(self, old: m.View, new: m.View, now: float) -> None:
        """A view is durable first, then all who are in it, or were, hear of it."""
        self._outbox.save(f"view/{new.shard}", msgspec.msgpack.encode(new))
        for number in members_of(new):  # one that was forgotten as dead may be back
            if number in self._fleet.servers:
                self.save_server(self._fleet.servers[number])
        for number in sorted(members_of(old) | members_of(new)):
            peer = self._fleet.servers[number].peer if number in self._fleet.servers else None
            if peer is not None:
                self._outbox.notify(peer, new, new.shard)
        for number in members_of(old) - members_of(new):
            self._forget_if_gone(number)
        if old.primary != new.primary or new.shard in self._fleet.reborn:
            self._fleet.reborn.discard(new.shard)
            self._snapshots.moved(new.shard, now)
            self.brief(new)

    def brief(self, view: m.View) -> None:
        """A new primary hears what the old one may not have passed on: verdicts before the members, since a prepared
        step is void under other members than it was prepared with."""
        self._tables.brief(view.shard)
        if self._membership.epoch:
            self._outbox.tell(view.shard, self._membership.announcement())
        self._publications.lifecycle.moved(view.shard)

    def catch_up(self, server: ServerProcess, hosted: Collection[int], *, brief: bool) -> None:
        """A server that comes back is told its views, and (``brief``) what it may have missed as a primary."""
        for shard, view in self._fleet.views.items():
            if shard in self._fleet.unpublished:
                continue  # all who are in it will hear when it is durable
            if server.peer is not None and (shard in hosted or server.number in members_of(view)):
                self._outbox.notify(server.peer, view, shard)
            if brief and view.primary is not None and view.primary.server == server.number:
                self.brief(view)

    # ---- servers that go -------------------------------------------------------------------------

    def bury(self, server: ServerProcess) -> None:
        """A server is dead. Where nobody can take over, nobody waits for what it cannot create any more."""
        self._forget_if_gone(server.number)
        self._publications.lifecycle.buried(server.number)
        alone = {
            v.shard for v in self._fleet.views.values()
            if v.primary is not None and v.primary.server == server.number and not v.backups
        }  # fmt: skip
        for table in list(self._tables.by_number.values()):
            if table.creating & alone:
                why = ClusterError(f"server {server.number} died while it created {table.spec.name!r}")
                self._tables.give_up(table, why)

    def _forget_if_gone(self, number: int) -> None:
        """A dead server that is in no view need not be known after a restart."""
        server = self._fleet.servers.get(number)
        if server is not None and not server.alive and self._fleet.empty(number):
            self._outbox.save(f"server/{number}", None)

    def drain(self, asker: Asker, number: int) -> None:
        """Move everything off a server; ``asker`` is answered when nothing would be lost with it."""
        self._fleet.drain(number)
        self._draining.append((asker, number))

    def _answer_drains(self) -> None:
        for asker, number in [x for x in self._draining if self._drained(x[1])]:
            self._draining.remove((asker, number))
            self._outbox.reply(asker, m.Done())
            peer = self._fleet.servers[number].peer
            if peer is not None:  # it may end
                self._outbox.put(Outgoing(peer, Frame(Kind.REQUEST, body=m.pack(m.Drain(number)))))

    def _drained(self, number: int) -> bool:
        """Whether nothing is lost with a server."""
        return self._fleet.empty(number) and not self._publications.lifecycle.only(number)

    def disconnected(self, peer: int) -> None:
        """Nobody waits at this connection any more."""
        self._draining = [(asker, number) for asker, number in self._draining if asker.peer != peer]

    # ---- what must be durable --------------------------------------------------------------------

    def save_server(self, server: ServerProcess) -> None:
        """A server must be known after a restart."""
        self._outbox.save(f"server/{server.number}", msgspec.msgpack.encode(server.join))

    def restore(self, state: Mapping[str, bytes], now: float, grace: float) -> None:
        """The views from before a restart stand; their servers have ``grace`` seconds to come back."""
        views = [msgspec.msgpack.decode(v, type=m.View) for k, v in state.items() if k.startswith("view/")]
        known = {int(k[len("server/") :]): v for k, v in state.items() if k.startswith("server/")}
        joins = {number: msgspec.msgpack.decode(v, type=m.Join) for number, v in known.items()}
        self._fleet.restore(views, joins, now, grace)
