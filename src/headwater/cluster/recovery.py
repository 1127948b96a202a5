"""How a coordinator begins: with nothing, with a snapshot, or with its own state after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from headwater.cluster.dataplan import DataPlans
from headwater.cluster.fleet import Fleet, ServerProcess, in_sync
from headwater.cluster.outbox import Outbox
from headwater.cluster.rules import Rules, shape
from headwater.cluster.tables import DeclaredTable, Tables
from headwater.cluster.views import Views
from headwater.errors import ClusterError, HeadwaterError, UsageError
from headwater.types import TableSpec
from headwater.wire import messages as m

GRACE = 1.5  # seconds after a restart in which servers may come back before others take over


class RestoredTable(NamedTuple):
    """A table of a snapshot that a cluster begins with. ``clock``: its last bulk step."""

    number: int
    spec: TableSpec
    clock: int


class Restored(NamedTuple):
    """A snapshot that a cluster begins with; ``folder`` is where the servers find it."""

    folder: str
    tables: tuple[RestoredTable, ...]
    plan: bytes


class _Saved(msgspec.Struct, frozen=True):
    rules: Rules
    next_server: int


class Recovery:
    """After a restart a cluster is ``settling``: the views stand, and no worker is given up, until every primary has
    said what it had committed. What one shard has committed, all others commit then.

    A cluster that begins with a snapshot is open to clients when its tables are there; ``refusal`` says why they cannot
    be.
    """

    def __init__(
        self,
        rules: Rules,
        outbox: Outbox,
        fleet: Fleet,
        tables: Tables,
        plans: DataPlans,
        views: Views,
        snapshot: Restored | None,
    ) -> None:
        self.settling = False
        self.refusal: HeadwaterError | None = None
        self._rules = rules
        self._outbox = outbox
        self._fleet = fleet
        self._tables = tables
        self._plans = plans
        self._views = views
        self._snapshot = snapshot

    # ---- with a snapshot -------------------------------------------------------------------------

    def revive(self) -> None:
        """A new cluster begins with a snapshot's tables and data plans, before anybody may use it."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None or self._tables.by_number:
            return
        if snapshot.plan:
            self._plans.restore(snapshot.plan)
        for table in snapshot.tables:
            self._tables.revive(table.number, table.spec, table.clock, snapshot.folder)

    def refused(self, table: DeclaredTable, why: HeadwaterError) -> None:
        """A server could not create a table. If that is one of the snapshot's, whoever joins is told."""
        if table.restore:
            self.refusal = ClusterError(f"this cluster could not begin with its snapshot {table.restore}: {why}")

    # ---- with its own state ----------------------------------------------------------------------

    def save(self) -> None:
        """What a coordinator must know before it reads the rest of its state."""
        saved = _Saved(self._rules, self._fleet.next_number)
        self._outbox.save("cluster", msgspec.msgpack.encode(saved))

    def restore(self, state: Mapping[str, bytes], now: float) -> None:
        """After a restart. Raises ``UsageError`` if the state is of a cluster of another shape."""
        saved = msgspec.msgpack.decode(state["cluster"], type=_Saved)
        kept = msgspec.structs.replace(self._rules, silence=saved.rules.silence, grace=saved.rules.grace)
        if shape(kept) != shape(saved.rules):
            raise UsageError(
                f"the state is of a cluster with {shape(saved.rules)} (servers, shards, replicas, min_copies), "
                f"not {shape(kept)}; start it with the same, or in another state folder"
            )
        self._views.restore(state, now, max(GRACE, 1.5 * self._rules.silence))
        self._fleet.numbers_from(saved.next_server)
        self.settling = bool(self._fleet.views)
        if self.settling:
            self._snapshot = None

    def resumed(self, server: ServerProcess, hosted: tuple[m.Hosted, ...]) -> None:
        """A server that comes back says what it has; it is told its views, and what it may have missed."""
        for replica in hosted if self.settling else ():
            # A backup that is in sync counts as its primary does: the primary may have died before it could say what
            # was committed.
            view = self._fleet.views.get(replica.shard)
            synced = view is not None and server.number in {x.server for x in in_sync(view)}
            if replica.role == "primary" or synced:
                for commit in replica.commits:
                    self._tables.learned(commit)
        self._views.catch_up(server, {replica.shard for replica in hosted}, brief=not self.settling)

    def settle(self, now: float) -> bool:
        """End the settling if it is time; whether it has ended now. Membership and views may change from then on."""
        if not self.settling or (self._fleet.missing() and not self._waited_enough(now)):
            return False
        self.settling = False
        for view in self._fleet.views.values():
            self._views.brief(view)
        return True

    def _waited_enough(self, now: float) -> bool:
        """With logs on disks nobody is missing for good as long as nobody else has what it knows."""
        return now >= self._fleet.frozen_until and (self._rules.ack != "disk" or self._fleet.served())
