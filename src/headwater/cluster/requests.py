"""What may be asked of a coordinator and said to it: one line of a table for each kind of message.

To add a kind: define it in ``wire/messages.py``, write its handler here, enter both in ``REQUESTS`` or ``NOTICES``. A
handler checks who is asking and passes the message to the machine whose job it is. What it raises goes back to whoever
asked as an ERROR; the state must be unchanged then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headwater.cluster import lateness
from headwater.errors import ClusterError, ProtocolError
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker

if TYPE_CHECKING:
    from headwater.cluster.coordinator import Coordinator


def answer(c: Coordinator, asker: Asker, message: m.Request) -> None:
    """Pass a request to its handler."""
    handler = REQUESTS.get(type(message))
    if handler is None:
        raise ProtocolError(f"{type(message).__name__} does not go to the coordinator")
    handler(c, asker, message)


def hear(c: Coordinator, peer: int, message: m.Notice) -> None:
    """Pass a notice to its handler."""
    handler = NOTICES.get(type(message))
    if handler is None:
        raise ProtocolError(f"{type(message).__name__} does not go to the coordinator")
    handler(c, peer, message)


# ---- requests ------------------------------------------------------------------------------------


def _join(c: Coordinator, asker: Asker, ask: m.Join) -> None:
    c.joining.join(asker, ask, c.now)


def _leave(c: Coordinator, asker: Asker, _: m.Leave) -> None:
    c.roster.leave(asker, c.now)


def _declare(c: Coordinator, asker: Asker, ask: m.Declare) -> None:
    member = c.membership.require(asker.peer)
    c.views.require_served()
    table = c.tables.use(asker, ask.spec, ask.claim)
    if member.rank >= 0:
        c.roster.expect()
    c.tables.answer(asker, table)


def _initialised(c: Coordinator, asker: Asker, ask: m.Initialised) -> None:
    c.tables.initialised(asker, ask.table)


def _barrier(c: Coordinator, asker: Asker, ask: m.Barrier) -> None:
    c.barriers.wait(asker, c.membership.require_worker(asker.peer), ask)


def _find(c: Coordinator, asker: Asker, ask: m.Find) -> None:
    c.views.require_served(ask.shard)
    c.outbox.reply(asker, c.views.find(ask.shard))


def _drain(c: Coordinator, asker: Asker, ask: m.Drain) -> None:
    c.views.drain(asker, ask.server)


def _plan_next(c: Coordinator, asker: Asker, ask: m.PlanNext) -> None:
    worker = c.membership.require_worker(asker.peer)
    settled = c.snapshots.settled(c.tables.committed())
    c.outbox.reply(asker, c.plans.ask(worker.join.session, ask, settled))


def _take_snapshot(c: Coordinator, asker: Asker, _: m.TakeSnapshot) -> None:
    c.membership.require(asker.peer)
    if not c.tables.any_ready:
        raise ClusterError("there is no table yet, so there is nothing to write")
    c.snapshots.ask(asker, c.now)
    c.snapshots.tick(c.now, c.served)


def _pause(c: Coordinator, asker: Asker, ask: m.Pause) -> None:
    c.roster.pause(asker, c.membership.require_worker(asker.peer), ask.paused)


def _who_is_late(c: Coordinator, asker: Asker, ask: m.WhoIsLate) -> None:
    c.views.require_served()
    worker = c.membership.worker(asker.peer)
    c.outbox.reply(asker, lateness.of(ask, worker, c.membership, c.tables, c.barriers))


def _status(c: Coordinator, asker: Asker, _: m.Status) -> None:
    c.outbox.reply(asker, c.status())


def _publish(c: Coordinator, asker: Asker, ask: v.Publish) -> None:
    c.membership.require(asker.peer)
    c.publications.lifecycle.publish(asker, ask)


def _await(c: Coordinator, asker: Asker, ask: v.Await) -> None:
    c.publications.lifecycle.await_ready(asker, ask.number)


def _watch(c: Coordinator, asker: Asker, ask: v.Watch) -> None:
    c.membership.require(asker.peer)
    c.publications.leases.watch(asker, ask)


def _lease(c: Coordinator, asker: Asker, ask: v.Lease) -> None:
    member = c.membership.require(asker.peer)
    c.publications.leases.lease(asker, member.join.session, ask)


def _list_versions(c: Coordinator, asker: Asker, ask: v.ListVersions) -> None:
    c.publications.leases.show(asker, ask)


def _set_tag(c: Coordinator, asker: Asker, ask: v.SetTag) -> None:
    c.membership.require(asker.peer)
    c.publications.lifecycle.set_tag(asker, ask)


def _retire(c: Coordinator, asker: Asker, ask: v.Retire) -> None:
    c.membership.require(asker.peer)
    c.publications.lifecycle.retire(asker, ask)


REQUESTS: dict[type, Callable[[Coordinator, Asker, Any], None]] = {
    m.Join: _join,
    m.Leave: _leave,
    m.Declare: _declare,
    m.Initialised: _initialised,
    m.Barrier: _barrier,
    m.Find: _find,
    m.Drain: _drain,
    m.PlanNext: _plan_next,
    m.TakeSnapshot: _take_snapshot,
    m.Pause: _pause,
    m.WhoIsLate: _who_is_late,
    m.Status: _status,
    v.Publish: _publish,
    v.Await: _await,
    v.Watch: _watch,
    v.Lease: _lease,
    v.ListVersions: _list_versions,
    v.SetTag: _set_tag,
    v.Retire: _retire,
}


# ---- notices -------------------------------------------------------------------------------------


def _heartbeat(c: Coordinator, peer: int, beat: m.Heartbeat) -> None:
    if beat.server >= 0:
        c.fleet.heard(beat.server, beat, c.now)
    else:
        c.membership.heard(peer, beat, c.now)


def _ready(c: Coordinator, peer: int, ready: m.Ready) -> None:
    if c.fleet.leads(peer, ready.shard):
        c.tables.ready(ready.shard, ready)
        c.publications.lifecycle.advance()


def _synced(c: Coordinator, peer: int, synced: m.Synced) -> None:
    c.fleet.synced(synced, c.fleet.sender(peer))


def _suspect(c: Coordinator, peer: int, suspect: m.Suspect) -> None:
    c.fleet.suspect(suspect, c.fleet.sender(peer))


def _cut_done(c: Coordinator, peer: int, done: m.CutDone) -> None:
    if c.fleet.leads(peer, done.shard):
        c.snapshots.part(done, c.now)


def _release(c: Coordinator, peer: int, release: v.Release) -> None:
    member = c.membership.of(peer)
    if member is not None:
        c.publications.leases.release(member.join.session, release.number, release.turn)


def _holding(c: Coordinator, peer: int, holding: v.Holding) -> None:
    member = c.membership.of(peer)
    if member is not None:
        c.publications.leases.holding(member.join.session, holding)


def _part_done(c: Coordinator, peer: int, done: v.PartDone) -> None:
    c.fleet.check_sender(peer, done.server)
    c.publications.lifecycle.part(done, leads=c.fleet.leads(peer, done.shard))


NOTICES: dict[type, Callable[[Coordinator, int, Any], None]] = {
    m.Heartbeat: _heartbeat,
    m.Ready: _ready,
    m.Synced: _synced,
    m.Suspect: _suspect,
    m.CutDone: _cut_done,
    v.Release: _release,
    v.Holding: _holding,
    v.PartDone: _part_done,
}
