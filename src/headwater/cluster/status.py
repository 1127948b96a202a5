"""What ``headwater status`` shows, from the last heartbeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.layout.kinds import place
from headwater.wire import messages as m

if TYPE_CHECKING:
    from headwater.cluster.fleet import Fleet, ServerProcess
    from headwater.cluster.membership import Member, Membership
    from headwater.cluster.rules import Rules
    from headwater.cluster.tables import DeclaredTable, Tables


def of(rules: Rules, fleet: Fleet, membership: Membership, tables: Tables, now: float, since: float) -> m.ClusterStatus:
    """The whole cluster at ``now``."""
    members = [*membership.workers.values(), *membership.readers.values()]
    return m.ClusterStatus(
        now - since,
        membership.epoch,
        rules.replicas,
        rules.min_copies,
        tuple(_server(fleet, s, now) for s in fleet.servers.values()),
        tuple(_shard(fleet, view) for _, view in sorted(fleet.views.items())),
        tuple(_worker(fleet, member, rules.heartbeat, now) for member in members),
        tuple(_table(fleet, t, rules.shards) for t in tables.by_number.values() if t.state != "refused"),
    )


def _server(fleet: Fleet, s: ServerProcess, now: float) -> m.ServerStatus:
    state, r = ("draining" if s.alive and s.draining else "alive" if s.alive else "dead"), s.report
    views = sorted(fleet.views.items())
    return m.ServerStatus(
        s.number, s.join.address, s.join.pid, state,
        tuple(k for k, v in views if v.primary is not None and v.primary.server == s.number),
        tuple(k for k, v in views if any(x.server == s.number for x in v.backups)),
        tuple(k for k, v in views if any(x.server == s.number for x in v.learners)),
        r.nbytes, r.sessions, r.pushed_bytes, r.pulled_bytes, now - s.since,
    )  # fmt: skip


def _shard(fleet: Fleet, view: m.View) -> m.ShardStatus:
    lsn = lag = 0
    primary = view.primary.server if view.primary is not None else -1
    alive = primary in fleet.servers and fleet.servers[primary].alive
    if alive:
        for shard, has, behind in fleet.servers[primary].report.shards:
            if shard == view.shard:
                lsn, lag = has, behind
    copies = alive + sum(fleet.servers[x.server].alive for x in view.backups if x.server in fleet.servers)
    return m.ShardStatus(
        view.shard, view.epoch, primary, tuple(x.server for x in view.backups),
        tuple(x.server for x in view.learners), lsn, lag, copies, fleet.replicas,
    )  # fmt: skip


def _worker(fleet: Fleet, member: Member, heartbeat: float, now: float) -> m.WorkerStatus:
    r, heard = member.report, now - member.heard
    state = "alive" if heard < 4 * heartbeat else "silent"
    refused = [count for s in fleet.servers.values() for who, count in s.report.refused if who == member.join.session]
    return m.WorkerStatus(
        member.rank, member.join.role, member.join.pid, state, r.clock,
        r.pushed_bytes, r.pulled_bytes, r.staleness, heard, sum(refused),
    )  # fmt: skip


def _table(fleet: Fleet, t: DeclaredTable, shards: int) -> m.TableStatus:
    parameters, elements, nbytes = t.spec.parts
    clocks = [clock for s in fleet.servers.values() for number, clock in s.report.tables if number == t.number]
    return m.TableStatus(
        t.spec.name, t.number, parameters, elements, nbytes, t.spec.optimizer.name,
        repr(t.spec.sync), max(clocks, default=0), place(t.spec, shards).sizes,
    )  # fmt: skip
