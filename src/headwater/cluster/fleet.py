"""Servers and views: who holds which shard. Pure: events in, new views out; the clock is passed in.

The rules (docs/reliability.md proves them):

- a primary is replaced only by a backup, which is in sync by definition;
- a server becomes a backup when the primary says that it has everything (``synced``);
- a server leaves a view when it is dead, suspected by the primary, drained, or one too many;
- every change is a new epoch, durable before anybody hears of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from headwater.errors import ClusterError, ProtocolError, StateCorrupt, UsageError
from headwater.wire import messages as m

AVOID = 10.0  # seconds in which a server that could not follow a shard is the last choice for it
KEPT = 16  # dead servers that are remembered
SILENCE = 1.0  # seconds without a heartbeat until another server takes over


@dataclass(slots=True)
class ServerProcess:
    """One server process."""

    number: int
    peer: int | None
    join: m.Join
    since: float
    heard: float
    report: m.Heartbeat
    alive: bool = True
    draining: bool = False

    @property
    def endpoint(self) -> m.Endpoint:
        j = self.join
        return m.Endpoint(self.number, j.address, j.local, j.host, j.session)


class Fleet:
    """``expected`` servers must have joined before there are views. ``views`` by shard.

    One class of many short methods, since each rule for views needs both halves of the state: servers and views.
    """

    def __init__(self, expected: int, shards: int, replicas: int, silence: float = SILENCE) -> None:
        if expected < 1:
            raise UsageError(f"a cluster needs at least one server, not {expected}")
        if shards < 1:
            raise UsageError(f"a cluster needs at least one shard, not {shards}")
        if not 1 <= replicas <= expected:
            raise UsageError(f"{replicas} replicas need as many servers; {expected} were asked for")
        self.expected, self.shards, self.replicas, self.silence = expected, shards, replicas, silence
        self.servers: dict[int, ServerProcess] = {}
        self.views: dict[int, m.View] = {}
        self.frozen_until = 0.0  # after a restart nobody is declared dead before the servers could come back
        self.reborn: set[int] = set()  # shards whose primary is the same server, and a new process
        self._next = 0
        self._now = 0.0
        self._suspects: dict[tuple[int, int], float] = {}  # (shard, server): when it was last suspected
        self._changed: dict[int, m.View] = {}  # by shard: the view before the first change of this turn
        self._settled: tuple[object, ...] | None = None  # what was seen when there was nothing to change

    # ---- events ----------------------------------------------------------------------------------

    def join(self, peer: int, join: m.Join, now: float) -> ServerProcess:
        """A new server, or one that comes back after its connection broke. Raises ``ClusterError``."""
        if join.resume and join.server >= 0:
            return self._resume(peer, join, now)
        member = ServerProcess(self._next, peer, join, now, now, m.Heartbeat())
        self._next += 1
        self.servers[member.number] = member
        self._forget_old()
        return member

    def _forget_old(self) -> None:
        """Of those that are dead and in no view the last few are kept, for ``headwater status``."""
        gone = [n for n, s in self.servers.items() if not s.alive and s.peer is None and self.empty(n)]
        for number in gone[:-KEPT]:
            del self.servers[number]

    def _resume(self, peer: int, join: m.Join, now: float) -> ServerProcess:
        known = self.servers.get(join.server)
        if known is None or known.join.session != join.session:
            raise ClusterError(
                f"server {join.server} is another process now, or is not known here; join as a new server"
            )
        if join.replayed:
            self._check_logs(join)
        known.peer, known.join, known.heard, known.alive = peer, join, now, True
        if join.replayed:
            self._replayed(known)
        return known

    def _check_logs(self, join: m.Join) -> None:
        held = {replica.shard for replica in join.hosted}
        for shard, view in self.views.items():
            if join.server in {x.server for x in in_sync(view)} and shard not in held:
                raise StateCorrupt(f"server {join.server} comes back without the log of shard {shard}, which it held")

    def _replayed(self, member: ServerProcess) -> None:
        """A new process with what an old one had put on its disk; it listens elsewhere.

        As a primary it may lack records that a backup has, and the other way round: it begins a new epoch alone, and
        the others must find out whether they are in sync with it. As a backup it has all that it ever accepted.
        """
        here, number = member.endpoint, member.number
        for view in list(self.views.values()):
            if view.primary is not None and view.primary.server == number:
                self.reborn.add(view.shard)
                self._change(view, primary=here, backups=(), learners=(*view.backups, *view.learners))
            elif number in members_of(view):
                backups = tuple(here if x.server == number else x for x in view.backups)
                learners = tuple(here if x.server == number else x for x in view.learners)
                self._change(view, backups=backups, learners=learners)

    def heard(self, server: int, report: m.Heartbeat, now: float) -> None:
        """A heartbeat. A server that was only slow is alive again; views that went on without it stay as they are."""
        member = self.servers.get(server)
        if member is not None and member.join.session == report.session:
            member.heard, member.report = now, report
            member.alive = member.alive or member.peer is not None

    def disconnected(self, peer: int) -> ServerProcess | None:
        """The control connection of a server ended. That is no death yet: see ``refused``."""
        for member in self.servers.values():
            if member.peer == peer:
                member.peer = None
                return member
        return None

    def refused(self, server: int) -> ServerProcess | None:
        """Nobody listens at the address of a server whose connection ended: its process has died."""
        member = self.servers.get(server)
        if member is None or member.peer is not None or not member.alive:
            return None
        member.alive = False
        return member

    def tick(self, now: float) -> list[ServerProcess]:
        """Declares silent servers dead; returns them."""
        self._now = now
        self._suspects = {key: at for key, at in self._suspects.items() if now - at < AVOID}
        if now < self.frozen_until:
            return []
        dead = [s for s in self.servers.values() if s.alive and now - s.heard > self.silence]
        for member in dead:
            member.alive = False
        return dead

    def forgive(self, seconds: float) -> None:
        """These seconds count for nobody: nobody could be heard."""
        self.frozen_until += seconds
        for member in self.servers.values():
            member.heard += seconds

    def synced(self, message: m.Synced, sender: int) -> None:
        """The primary says that a learner has everything."""
        view = self.views.get(message.shard)
        if view is None or view.primary is None or view.primary.server != sender or view.epoch != message.epoch:
            return
        found = [x for x in view.learners if x.server == message.server]
        if found:
            learners = tuple(x for x in view.learners if x.server != message.server)
            self._change(view, backups=(*view.backups, *found), learners=learners)

    def suspect(self, message: m.Suspect, sender: int) -> None:
        """The primary does not hear from a follower, or that cannot follow any more: go on without it."""
        view = self.views.get(message.shard)
        if view is None or view.primary is None or sender not in (view.primary.server, message.server):
            return
        self._suspects[message.shard, message.server] = self._now
        if message.server != view.primary.server:
            self._without(view, message.server)
            return
        self._promote(view)

    def drain(self, server: int) -> None:
        """Move everything off a server. Raises ``ClusterError`` if it is unknown or the last one."""
        member = self.servers.get(server)
        if member is None or not member.alive:
            raise ClusterError(f"server {server} is not there; nothing was moved")
        if not any(s.alive and not s.draining and s is not member for s in self.servers.values()):
            raise ClusterError(f"server {server} is the only one: start another (headwater add-server) before it goes")
        member.draining = True

    def empty(self, server: int) -> bool:
        """Whether nothing is left on a server."""
        return not any(server in members_of(view) for view in self.views.values())

    # ---- who is who ------------------------------------------------------------------------------

    def sender(self, peer: int) -> int:
        """The server at this connection. Raises ``ProtocolError``."""
        for member in self.servers.values():
            if member.peer == peer:
                return member.number
        raise ProtocolError("only a server that has joined can say this")

    def check_sender(self, peer: int, server: int) -> None:
        """Raises ``ProtocolError`` if another one than ``server`` is at this connection."""
        if self.sender(peer) != server:
            raise ProtocolError(f"this connection is not server {server}'s")

    def leads(self, peer: int, shard: int) -> bool:
        """Whether the server at this connection is the shard's primary. Raises ``ProtocolError`` if none is there."""
        view = self.views.get(shard)
        return view is not None and view.primary is not None and view.primary.server == self.sender(peer)

    # ---- views -----------------------------------------------------------------------------------

    def _change(self, view: m.View, **what: object) -> m.View:
        self._changed.setdefault(view.shard, view)
        new = msgspec.structs.replace(view, epoch=view.epoch + 1, **what)
        self.views[view.shard] = new
        return new

    def _without(self, view: m.View, server: int) -> m.View:
        backups = tuple(x for x in view.backups if x.server != server)
        learners = tuple(x for x in view.learners if x.server != server)
        return self._change(view, backups=backups, learners=learners)

    def begin(self) -> bool:
        """The first views, once enough servers are there: shard k on server k, copies on the next ones."""
        if self.views or len(self.servers) < self.expected:
            return bool(self.views)
        order = sorted(self.servers)
        for shard in range(self.shards):
            chosen = [self.servers[order[(shard + i) % len(order)]].endpoint for i in range(self.replicas)]
            self.views[shard] = m.View(shard, 1, chosen[0], tuple(chosen[1:]))
            self._changed[shard] = m.View(shard, 0, None)
        return True

    def plan(self) -> list[tuple[m.View, m.View]]:
        """Bring the views in line with who is there; (before, now) of every view that changed this turn."""
        seen = self._seen()
        if seen == self._settled and not self._changed:
            return []  # nothing to look at again: this is asked behind every message
        for shard in list(self.views):
            self._repair(shard)
        self._balance()
        changed, self._changed = self._changed, {}
        self._settled = None if changed else seen
        return [(old, self.views[shard]) for shard, old in sorted(changed.items())]

    def _seen(self) -> tuple[object, ...]:
        """All that ``plan`` decides by: what gave no change once gives none again."""
        servers = [(n, s.alive, s.draining) for n, s in self.servers.items()]
        return servers, [(n, view.epoch) for n, view in self.views.items()], list(self._suspects)

    def _up(self, server: int) -> bool:
        member = self.servers.get(server)
        return member is not None and member.alive

    def _stays(self, server: int) -> bool:
        return self._up(server) and not self.servers[server].draining

    def _repair(self, shard: int) -> None:
        view = self.views[shard]
        assert view.primary is not None
        if not self._up(view.primary.server):
            promoted = self._promote(view)
            if promoted is None:
                return  # nobody else has it: wait for the primary to come back
            view = promoted
        for x in (*view.backups, *view.learners):
            if not self._up(x.server):
                view = self._without(view, x.server)
        self._copies(view)

    def _promote(self, view: m.View) -> m.View | None:
        """A backup that is up leads, if there is one; the other backups stay, learners must begin anew."""
        heir = next((x for x in view.backups if self._up(x.server)), None)
        if heir is None:
            return None
        rest = tuple(x for x in view.backups if x != heir and self._up(x.server))
        return self._change(view, primary=heir, backups=rest, learners=())

    def _copies(self, view: m.View) -> None:
        """Enough copies on servers that stay; then let go of those that are too many."""
        assert view.primary is not None
        copies = [view.primary, *view.backups]
        staying = [x for x in copies if self._stays(x.server)]
        coming = [x for x in view.learners if self._stays(x.server)]
        wanted = min(self.replicas, sum(self._stays(s) for s in self.servers))
        if len(staying) + len(coming) < wanted:
            avoided = {server for shard, server in self._suspects if shard == view.shard}
            taken = members_of(view)
            chosen = self._least_loaded(taken | avoided) or self._least_loaded(taken)
            if chosen is not None:
                self._change(view, learners=(*view.learners, chosen.endpoint))
            return
        leaving = [x for x in copies if not self._stays(x.server)]
        if len(staying) >= max(1, wanted) and leaving:
            self._dismiss(view, leaving[0], staying)
        elif not leaving and len(copies) > self.replicas:
            # Of equally loaded ones a backup goes; a primary that goes is a backup at the next look, and goes then.
            most = max([*view.backups, view.primary], key=lambda x: self._load(x.server))
            self._dismiss(view, most, [x for x in copies if x != most])

    def _dismiss(self, view: m.View, who: m.Endpoint, staying: list[m.Endpoint]) -> None:
        """A primary hands over first and goes when its heir leads."""
        if who != view.primary:
            self._without(view, who.server)
            return
        heir = min((x for x in staying if x != who), key=lambda x: self._primaries(x.server))
        self._hand_over(view, heir)

    def _hand_over(self, view: m.View, heir: m.Endpoint) -> None:
        """Both live: the old primary is a backup of the new one, and in sync."""
        assert view.primary is not None
        backups = (view.primary, *(x for x in view.backups if x != heir))
        self._change(view, primary=heir, backups=backups)

    def _balance(self) -> None:
        """While all is redundant: one replica, or one primary, from the most to the least loaded server."""
        if not self.views or any(v.learners or len(v.backups) + 1 < self.replicas for v in self.views.values()):
            return
        stay = [s for s in self.servers if self._stays(s)]
        if len(stay) < 2 or self._changed:
            return
        most, least = max(stay, key=self._load), min(stay, key=self._load)
        if self._load(most) - self._load(least) >= 2:
            shard = next((v for v in self.views.values() if most in members_of(v) and least not in members_of(v)), None)
            if shard is not None:
                self._change(shard, learners=(self.servers[least].endpoint,))
            return
        for view in self.views.values():
            assert view.primary is not None
            for backup in view.backups:
                if self._primaries(view.primary.server) - self._primaries(backup.server) >= 2:
                    self._hand_over(view, backup)
                    return

    def _load(self, server: int) -> int:
        return sum(server in members_of(view) for view in self.views.values())

    def _primaries(self, server: int) -> int:
        return sum(v.primary is not None and v.primary.server == server for v in self.views.values())

    def _least_loaded(self, taken: set[int]) -> ServerProcess | None:
        free = [s for n, s in self.servers.items() if n not in taken and self._stays(n)]
        return min(free, key=lambda s: self._load(s.number), default=None)

    # ---- what must be durable --------------------------------------------------------------------

    def restore(self, views: list[m.View], joins: Mapping[int, m.Join], now: float, grace: float) -> None:
        """After a restart: the views stand; their servers have ``grace`` seconds to come back."""
        self.frozen_until = now + grace
        self.views = {view.shard: view for view in views}
        self.servers = {n: ServerProcess(n, None, join, now, now, m.Heartbeat()) for n, join in sorted(joins.items())}
        self._next = max(self.servers, default=-1) + 1

    def numbers_from(self, number: int) -> None:
        """Numbers of servers are never used twice, also across a restart."""
        self._next = max(self._next, number)

    @property
    def next_number(self) -> int:
        return self._next

    @property
    def unpublished(self) -> set[int]:
        """Shards whose view has changed since the last ``plan``."""
        return set(self._changed)

    def served(self) -> bool:
        """Whether of every shard somebody is connected who is in sync."""
        peers = {n for n, s in self.servers.items() if s.peer is not None}
        return all(peers & {x.server for x in in_sync(view)} for view in self.views.values())

    def missing(self) -> list[int]:
        """Primaries that have not come back after a restart."""
        return [
            v.primary.server for v in self.views.values()
            if v.primary is not None and (s := self.servers.get(v.primary.server)) is not None and s.peer is None
        ]  # fmt: skip


def members_of(view: m.View) -> set[int]:
    """The servers in a view."""
    return {x.server for x in (*in_sync(view), *view.learners)}


def in_sync(view: m.View) -> tuple[m.Endpoint, ...]:
    """Those in a view who have all that is acknowledged."""
    return (*([view.primary] if view.primary else []), *view.backups)
