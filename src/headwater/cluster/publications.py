"""Versions at the coordinator: its catalogue, leases and lifecycle, and what these need to know of the rest."""

from __future__ import annotations

from collections.abc import Callable

from headwater.cluster.fleet import Fleet, in_sync
from headwater.cluster.outbox import Outbox
from headwater.cluster.tables import Tables
from headwater.errors import ClusterError, HeadwaterError
from headwater.types import TableSpec
from headwater.versions import listing
from headwater.versions.catalogue import Catalogue
from headwater.versions.entries import Entry
from headwater.versions.leases import Leases
from headwater.versions.lifecycle import Known, Lifecycle
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker


class Publications:
    """The coordinator's side of versions: what they need of the other machines."""

    def __init__(self, outbox: Outbox, fleet: Fleet, tables: Tables, clock: Callable[[], float]) -> None:
        self._outbox = outbox
        self._fleet = fleet
        self._tables = tables
        self.catalogue = Catalogue()
        self.leases = Leases(self, self.catalogue, fleet.shards, clock)
        self.lifecycle = Lifecycle(self, self.catalogue, self.leases, clock)

    def disconnected(self, peer: int) -> None:
        """Whoever asked over this connection is not there any more."""
        self.leases.gone(peer)
        self.lifecycle.gone(peer)

    def tick(self, now: float) -> None:
        """Time has passed."""
        self.leases.tick(now)
        self.lifecycle.tick(now)

    def models(self) -> tuple[m.ModelStatus, ...]:
        """For ``headwater status``."""
        return listing.models(self.catalogue)

    # ---- what leases and the lifecycle say and ask -----------------------------------------------

    def reply(self, asker: Asker, message: m.Reply) -> None:
        self._outbox.reply(asker, message)

    def fail(self, asker: Asker, error: HeadwaterError) -> None:
        self._outbox.fail(asker, error)

    def save(self, key: str, value: bytes | None) -> None:
        self._outbox.save(key, value)

    def tell(self, shard: int, message: v.CutVersion) -> None:
        self._outbox.tell(shard, message)

    def drop(self, numbers: tuple[int, ...]) -> None:
        for server in self._fleet.servers.values():
            if server.peer is not None:
                self._outbox.notify(server.peer, v.DropVersion(numbers))

    def removed(self, entry: Entry) -> None:
        self.drop((entry.number,))
        if entry.state in ("ready", "lost"):  # else it was never saved
            self.save(f"version/{entry.number}", None)

    def spec(self, table: int) -> TableSpec:
        return self.table(table).spec

    def table(self, number: int) -> Known:
        table = self._tables.get(number)
        if table.state != "ready":
            raise ClusterError(f"table {table.spec.name!r} has no values yet; nothing was published")
        known = table.spec.sync.collective and len(table.participants) > 1
        return Known(table.spec, table.participants, table.clock if known else None)

    def copies(self, shard: int) -> tuple[int, ...]:
        view = self._fleet.views.get(shard)
        return () if view is None else tuple(sorted(each.server for each in in_sync(view)))

    def order(self, server: int, message: v.Hold) -> None:
        member = self._fleet.servers.get(server)
        if member is not None and member.peer is not None:
            self._outbox.notify(member.peer, message, message.shard)

    def holder(self, server: int) -> v.Holder | None:
        member = self._fleet.servers.get(server)
        if member is None or not member.alive:
            return None
        return v.Holder(member.join.address, member.join.local, member.join.host)
