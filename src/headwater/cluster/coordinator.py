"""The control plane as a state machine: frames and ticks in, ``Effects`` out. No sockets, no clock, no tensors.

``Coordinator`` is a router. Each of its machines has one job:

- ``fleet``: which servers are there, and who leads which shard; ``views``: who must hear of that
- ``membership``: which workers and readers are there; ``roster``: who must hear of that; ``joining``: the way in
- ``tables``: what tables there are, and the verdict on each bulk step: when every shard of a table is READY, and not
  before, all of them COMMIT
- ``barriers``, ``plans``, ``snapshots``, ``publications``: barriers, data plans, snapshots, versions
- ``recovery``: the beginning, after a restart and from a snapshot

``requests.py`` says which message goes to which. All of them speak through one ``outbox``, and what is in there after
an event is the event's ``Effects``.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from headwater.cluster import requests, status
from headwater.cluster.barriers import Barriers
from headwater.cluster.dataplan import DataPlans
from headwater.cluster.effects import Effects, Outcome
from headwater.cluster.fleet import Fleet
from headwater.cluster.joining import Joining
from headwater.cluster.membership import Membership
from headwater.cluster.outbox import Outbox
from headwater.cluster.publications import Publications
from headwater.cluster.recovery import Recovery, Restored
from headwater.cluster.roster import Roster
from headwater.cluster.rules import Rules as Rules
from headwater.cluster.rules import check
from headwater.cluster.snapshots import Snapshots
from headwater.cluster.tables import Tables
from headwater.cluster.views import Views
from headwater.errors import HeadwaterError, ProtocolError
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Asker, Dial

PAUSE = 0.5  # seconds between two ticks, which come ten times as often, that mean that this process was stopped


class Coordinator:
    """One cluster. ``rules.servers`` must have joined before clients are let in.

    ``state``: what the store has kept of ``Effects.durable`` before a restart. ``begin``: a snapshot that a new cluster
    begins with; one that has begun before is past it. Raises ``UsageError`` for rules that cannot be kept.
    """

    def __init__(
        self,
        rules: Rules | int,
        now: float = 0.0,
        state: Mapping[str, bytes] | None = None,
        begin: Restored | None = None,
    ) -> None:
        rules = Rules(rules) if isinstance(rules, int) else rules
        self.rules = r = check(msgspec.structs.replace(rules, shards=rules.shards or rules.servers))
        self._since = self.now = self._ticked = now
        self.fleet = fleet = Fleet(r.servers, r.shards, r.replicas, r.silence)
        self.outbox = outbox = Outbox(fleet)
        self.membership = membership = Membership(r.worker_silence, r.grace)
        self.tables = tables = Tables(outbox, fleet, membership)
        self.plans = plans = DataPlans(state)
        self.barriers = Barriers(outbox, membership)
        self.snapshots = Snapshots(outbox, tables, plans, r.snapshots, r.snapshot_every, now)
        self.publications = publications = Publications(outbox, fleet, tables, lambda: self.now)
        self.views = views = Views(r, outbox, fleet, membership, tables, self.snapshots, publications)
        self.roster = Roster(outbox, fleet, membership, tables, self.barriers, plans, publications)
        self.recovery = Recovery(r, outbox, fleet, tables, plans, views, begin)
        self.joining = Joining(r, outbox, fleet, membership, tables, publications, views, self.roster, self.recovery)
        if state:
            self._restore(state)
        else:
            self.recovery.save()

    def _restore(self, state: Mapping[str, bytes]) -> None:
        self.recovery.restore(state, self.now)
        self.tables.restore(state)
        self.barriers.restore(state)
        self.membership.restore(state, self.now)
        self.publications.lifecycle.restore(state)

    @property
    def shards(self) -> int:
        return self.rules.shards

    # ---- events ------------------------------------------------------------------------------

    def start(self) -> Effects:
        """The first event: what a new cluster must have kept before anybody joins."""
        return self._effects()

    def receive(self, peer: int, frame: Frame, now: float) -> Effects:
        """A frame from ``peer``. A refusal goes back as an ERROR frame; the state is unchanged then."""
        self.now = now
        asker = Asker(peer, frame.seq)
        try:
            match frame.kind:
                case Kind.REQUEST:
                    requests.answer(self, asker, m.unpack_request(frame.body))
                case Kind.NOTICE:
                    requests.hear(self, peer, m.unpack_notice(frame.body))
                case Kind.REPLY:
                    self._created(peer, frame.shard, m.unpack_reply(frame.body))
                case Kind.ERROR:
                    self._refused(peer, frame)
                case _:
                    raise ProtocolError(f"{frame.kind.name} does not go to the coordinator")
        except HeadwaterError as error:
            self.outbox.fail(asker, error)
        return self._effects()

    def _created(self, peer: int, shard: int, reply: m.Reply) -> None:
        """A server's answer to ``Create``, the only request that servers get."""
        if isinstance(reply, m.Created) and self.fleet.leads(peer, shard):
            self.joining.created(reply.table, shard, self.now)

    def _refused(self, peer: int, frame: Frame) -> None:
        if frame.seq in self.tables.by_number and self.fleet.leads(peer, frame.shard):
            self.joining.refused(frame.seq, m.read_error(frame.body), self.now)

    def disconnected(self, peer: int, now: float) -> Effects:
        """The connection of ``peer`` ended."""
        self.now = now
        self.joining.disconnected(peer)
        self.views.disconnected(peer)
        self.snapshots.disconnected(peer)
        self.publications.disconnected(peer)
        server = self.fleet.disconnected(peer)
        if server is not None:  # is its process gone, or only the way there?
            self.outbox.put(Dial(server.number + 1, server.join.address, server.join.local, server.join.host))
        self.roster.disconnected(peer, now)
        return self._effects()

    def dialed(self, key: int, reached: bool, now: float) -> Effects:
        """What became of looking for a server whose connection ended."""
        self.now = now
        server = None if reached else self.fleet.refused(key - 1)
        if server is not None:
            self.views.bury(server)
        return self._effects()

    def tick(self, now: float) -> Effects:
        """Time has passed."""
        gap, self.now, self._ticked = now - self._ticked, now, now
        if gap > PAUSE:  # this process stood still: nobody else was silent for that
            self.fleet.forgive(gap)
            self.membership.forgive(gap)
        for server in self.fleet.tick(now):
            self.views.bury(server)
        if self.recovery.settle(now):
            self.publications.lifecycle.advance()  # what waited for a step that was committed before the restart
            self.joining.let_in(now)
        if not self.recovery.settling:
            self.roster.tick(now)
        self.snapshots.tick(now, self.served)
        self.publications.tick(now)
        return self._effects()

    def finished(self, outcome: Outcome, now: float) -> Effects:
        """What became of a job of ``Effects.jobs``."""
        self.now = now
        self.snapshots.finished(outcome, now)
        return self._effects()

    def _effects(self) -> Effects:
        """What the event came to. The views change last: who is there is known now."""
        if not self.recovery.settling:
            self.views.announce(self.now)
        for key, value in self.plans.changes().items():
            self.outbox.save(key, value)
        return self.outbox.take()

    # ---- questions ---------------------------------------------------------------------------

    @property
    def served(self) -> bool:
        """Every shard has a copy, so a snapshot can be taken."""
        if self.recovery.settling or not self.fleet.views or self.views.unserved():
            return False
        return self.tables.any_ready

    def status(self) -> m.ClusterStatus:
        """What is there now, from the last heartbeats."""
        found = status.of(self.rules, self.fleet, self.membership, self.tables, self.now, self._since)
        return msgspec.structs.replace(found, models=self.publications.models())
