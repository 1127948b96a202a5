"""Versions at the coordinator: its catalogue, leases and lifecycle, and what these need to know of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.cluster.fleet import in_sync
from headwater.errors import ClusterError, HeadwaterError, ProtocolError
from headwater.types import TableSpec
from headwater.versions import listing
from headwater.versions.catalogue import Catalogue
from headwater.versions.entries import Entry
from headwater.versions.leases import Leases
from headwater.versions.lifecycle import Known, Lifecycle
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Asker, Outgoing

if TYPE_CHECKING:
    from headwater.cluster.coordinator import Coordinator


class Publications:
    """The coordinator's desk for versions."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.catalogue = Catalogue()
        self.leases = Leases(self, self.catalogue, coordinator.shards, lambda: coordinator.now)
        self.lifecycle = Lifecycle(self, self.catalogue, self.leases, lambda: coordinator.now)

    # ---- in --------------------------------------------------------------------------------------

    def request(self, asker: Asker, message: v.VersionRequest) -> None:
        """A client's question. Raises what it is refused with."""
        match message:
            case v.Publish():
                self._session(asker.peer)
                self.lifecycle.publish(asker, message)
            case v.Await():
                self.lifecycle.await_ready(asker, message.number)
            case v.Watch():
                self._session(asker.peer)
                self.leases.watch(asker, message)
            case v.Lease():
                self.leases.lease(asker, self._session(asker.peer), message)
            case v.ListVersions():
                self.leases.show(asker, message)
            case v.SetTag():
                self._session(asker.peer)
                self.lifecycle.set_tag(asker, message)
            case v.Retire():
                self._session(asker.peer)
                self.lifecycle.retire(asker, message)
            case v.Fetch():
                raise ProtocolError("the coordinator holds no parts of versions; ask a server")

    def notice(self, peer: int, message: v.VersionNotice) -> None:
        """What a reader or a server says."""
        match message:
            case v.Release() | v.Holding():
                member = self._coordinator.membership.of(peer)
                if member is not None and isinstance(message, v.Release):
                    self.leases.release(member.join.session, message.number, message.turn)
                elif member is not None and isinstance(message, v.Holding):
                    self.leases.holding(member.join.session, message)
            case v.PartDone():
                self._coordinator.check_sender(peer, message.server)
                self.lifecycle.part(message, leads=self._coordinator.leads(peer, message.shard))
            case _:
                raise ProtocolError(f"{type(message).__name__} does not go to the coordinator")

    def gone(self, peer: int) -> None:
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

    def _session(self, peer: int) -> int:
        member = self._coordinator.membership.of(peer)
        if member is None:
            raise ClusterError("join first: only a member can publish or lease")
        return member.join.session

    # ---- what leases and the lifecycle say and ask -----------------------------------------------

    def reply(self, asker: Asker, message: m.Reply) -> None:
        self._coordinator.reply(asker, message)

    def fail(self, asker: Asker, error: HeadwaterError) -> None:
        self._coordinator.fail(asker, error)

    def save(self, key: str, value: bytes | None) -> None:
        self._coordinator.save(key, value)

    def tell(self, shard: int, message: v.CutVersion) -> None:
        self._coordinator.tell(shard, message)

    def drop(self, numbers: tuple[int, ...]) -> None:
        body = m.pack(v.DropVersion(numbers))
        for server in self._coordinator.fleet.servers.values():
            if server.peer is not None:
                self._coordinator.say(Outgoing(server.peer, Frame(Kind.NOTICE, body=body)))

    def removed(self, entry: Entry) -> None:
        self.drop((entry.number,))
        if entry.state in ("ready", "lost"):  # else it was never saved
            self.save(f"version/{entry.number}", None)

    def spec(self, table: int) -> TableSpec:
        return self.table(table).spec

    def table(self, number: int) -> Known:
        table = self._coordinator.tables.get(number)
        if table.state != "ready":
            raise ClusterError(f"table {table.spec.name!r} has no values yet; nothing was published")
        known = table.spec.sync.collective and len(table.participants) > 1
        return Known(table.spec, table.participants, table.clock if known else None)

    def copies(self, shard: int) -> tuple[int, ...]:
        view = self._coordinator.fleet.views.get(shard)
        return () if view is None else tuple(sorted(each.server for each in in_sync(view)))

    def order(self, server: int, message: v.Hold) -> None:
        member = self._coordinator.fleet.servers.get(server)
        if member is not None and member.peer is not None:
            self._coordinator.say(Outgoing(member.peer, Frame(Kind.NOTICE, shard=message.shard, body=m.pack(message))))

    def holder(self, server: int) -> v.Holder | None:
        member = self._coordinator.fleet.servers.get(server)
        if member is None or not member.alive:
            return None
        return v.Holder(member.join.address, member.join.local, member.join.host)
