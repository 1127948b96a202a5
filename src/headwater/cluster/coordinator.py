"""The control plane as a state machine: frames and ticks in, frames out. No sockets, no clock, no tensors.

It keeps the membership (``membership.py``) and the views (``fleet.py``), agrees on tables, and commits
bulk-synchronous steps: when every shard of a table is READY for a step, and not before, it tells all of them to COMMIT.

What must survive it is in ``changes()``: the host makes these durable before it sends what came with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from headwater.cluster import claims, lateness, status
from headwater.cluster.barriers import Barriers
from headwater.cluster.dataplan import ALL, DataPlans
from headwater.cluster.fleet import Fleet, Member, in_sync, members_of
from headwater.cluster.membership import Member as Worker
from headwater.cluster.membership import Membership, given_up
from headwater.cluster.publications import Publications
from headwater.cluster.rules import Rules as Rules
from headwater.cluster.rules import check, shape
from headwater.cluster.snapshot_desk import SnapshotDesk
from headwater.cluster.snapshots import Discard, Outcome, Publish, Published, Restored, Snapshots, Start, Started
from headwater.cluster.tables import Tables
from headwater.errors import ClusterError, HeadwaterError, ProtocolError, UsageError
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Asker, Dial, Instruction, Outgoing
from headwater.wire.versions import VersionNotice, VersionRequest

PAUSE = 0.5  # seconds between two ticks, which come ten times as often, that mean that this process was stopped
GRACE = 1.5  # seconds after a restart in which servers may come back before others take over


class _Saved(msgspec.Struct, frozen=True):
    rules: Rules
    next_server: int


class Coordinator:
    """One cluster. ``rules.servers`` must have joined before clients are let in.

    ``state``: what ``changes()`` gave before a restart. ``begin``: a snapshot that a new cluster begins with; one that
    has begun before is past it. Raises ``UsageError`` for rules that cannot be kept.
    """

    def __init__(
        self,
        rules: Rules | int,
        now: float = 0.0,
        state: Mapping[str, bytes] | None = None,
        begin: Restored | None = None,
    ) -> None:
        rules = Rules(rules) if isinstance(rules, int) else rules
        self.rules = check(msgspec.structs.replace(rules, shards=rules.shards or rules.servers))
        self.membership = Membership(self.rules.worker_silence, self.rules.grace)
        self.fleet = Fleet(self.rules.servers, self.rules.shards, self.rules.replicas, self.rules.silence)
        self.tables = Tables(self, self.rules.shards)
        self._joining: list[tuple[Asker, m.Join]] = []
        self.plans = DataPlans(state)
        self.snapshots = Snapshots(self.rules.snapshots, self.rules.snapshot_every, now)
        self._begin_with = begin
        self._refusal: HeadwaterError | None = None  # why the cluster could not begin with its snapshot
        self._cuts = SnapshotDesk(self)
        self.barriers = Barriers(self)
        self._draining: list[tuple[Asker, int]] = []
        self._settling = False  # after a restart, until the primaries have said what they had committed
        self._since = self.now = self._ticked = now
        self.publications = Publications(self)
        self._out: list[Instruction] = []
        self._changes: dict[str, bytes | None] = {}
        if state:
            self._restore(state, now)
        else:
            self._save_cluster()

    @property
    def shards(self) -> int:
        return self.rules.shards

    # ---- events ------------------------------------------------------------------------------

    def receive(self, peer: int, frame: Frame, now: float) -> list[Instruction]:
        """A frame from ``peer``. A refusal goes back as an ERROR frame; the state is unchanged then."""
        self.now = now
        try:
            if frame.kind == Kind.REQUEST:
                self._request(Asker(peer, frame.seq), m.unpack_request(frame.body))
            elif frame.kind == Kind.NOTICE:
                self._notice(peer, m.unpack_notice(frame.body))
            elif frame.kind == Kind.REPLY:
                self._created(peer, frame.shard, m.unpack_reply(frame.body))
            elif frame.kind == Kind.ERROR:
                self._refused(peer, frame)
            else:
                raise ProtocolError(f"{frame.kind.name} does not go to the coordinator")
        except HeadwaterError as error:
            self.fail(Asker(peer, frame.seq), error)
        return self._flush()

    def disconnected(self, peer: int, now: float) -> list[Instruction]:
        """The connection of ``peer`` ended."""
        self.now = now
        self._joining = [(asker, join) for asker, join in self._joining if asker.peer != peer]
        self._draining = [(asker, server) for asker, server in self._draining if asker.peer != peer]
        self.snapshots.gone(peer)
        self.publications.gone(peer)
        server = self.fleet.disconnected(peer)
        if server is not None:  # is its process gone, or only the way there?
            self._out.append(Dial(server.number + 1, server.join.address, server.join.local, server.join.host))
        member = self.membership.of(peer)
        if member is not None:
            self.tables.missed(peer)
            if member.rank >= 0 and self.membership.grace:
                member.peer, member.gone = None, now
            else:
                self._depart(member, clean=False, why="died: its connection ended")
        return self._flush()

    def dialed(self, key: int, reached: bool, now: float) -> list[Instruction]:
        """What became of looking for a server whose connection ended."""
        self.now = now
        server = None if reached else self.fleet.refused(key - 1)
        if server is not None:
            self._bury(server)
        return self._flush()

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        gap, self.now, self._ticked = now - self._ticked, now, now
        if gap > PAUSE:  # this process stood still: nobody else was silent for that
            self.fleet.forgive(gap)
            self.membership.forgive(gap)
        for member in self.fleet.tick(now):
            self._bury(member)
        if self._settling and (not self.fleet.missing() or self._waited_enough(now)):
            self._settled()
        if not self._settling:
            for worker, why in self.membership.lost_now(now):
                self._depart(worker, clean=False, why=why)
                if worker.rank < 0 and worker.peer is not None:
                    refusal = Frame(Kind.ERROR, body=m.error_body(given_up(why)))
                    self._out.append(Outgoing(worker.peer, refusal, close=True))
        self._cuts.do(self.snapshots.tick(now, self.served()))
        self.publications.tick(now)
        return self._flush()

    def jobs(self) -> list[Start | Publish | Discard]:
        """File work for the host, once; a ``Start`` and a ``Publish`` are answered by ``kept``."""
        return self._cuts.take_jobs()

    def kept(self, outcome: Outcome, now: float) -> list[Instruction]:
        """What became of the host's file work."""
        self.now = now
        match outcome:
            case Started():
                self._cuts.do(self.snapshots.started(outcome, self.rules.shards))
            case Published():
                self._cuts.do(self.snapshots.published(outcome, now))
            case _:
                self._cuts.do(self.snapshots.failed(outcome, now))
        return self._flush()

    def changes(self) -> dict[str, bytes | None]:
        """Keys that must be durable before what was returned with them is sent; None deletes one."""
        changes, self._changes = self._changes | self.plans.changes(), {}
        return changes

    # ---- requests ----------------------------------------------------------------------------

    def _request(self, asker: Asker, message: m.Request) -> None:  # noqa: C901 - one line per question
        match message:
            case m.Join(role="server"):
                self._join_server(asker, message)
            case m.Join(role="worker" | "reader"):
                self._join(asker, message)
            case m.Join():
                raise UsageError(f"role {message.role!r} is none of 'server', 'worker' and 'reader'")
            case m.Leave():
                self._leave(asker)
            case m.Declare():
                self._known(asker.peer)
                self._refuse_if_unserved()
                self.tables.declare(asker, message.spec, message.claim)
            case m.Initialised():
                self.tables.initialised(asker, message.table)
            case m.Barrier():
                self.barriers.wait(asker, self._worker(asker.peer), message)
            case m.Find():
                self._refuse_if_unserved(message.shard)
                self.reply(asker, self._shard_view(message.shard))
            case m.Drain():
                self.fleet.drain(message.server)
                self._draining.append((asker, message.server))
            case m.PlanNext():
                worker = self._worker(asker.peer)
                self.reply(asker, self.plans.ask(worker.join.session, message, self._cuts.settled_clock()))
            case m.TakeSnapshot():
                self._known(asker.peer)
                if not any(table.state == "ready" for table in self.tables.by_number.values()):
                    raise ClusterError("there is no table yet, so there is nothing to write")
                self.snapshots.ask(asker, self.now)
                self._cuts.do(self.snapshots.tick(self.now, self.served()))
            case m.Rest():
                if self.membership.rest(self._worker(asker.peer), message.away):
                    self._announce()
                self.reply(asker, m.Rested(self.membership.epoch))
            case m.WhoIsLate():
                self._refuse_if_unserved()
                who = self.membership.worker(asker.peer)
                self.reply(asker, lateness.of(message, who, self.membership, self.tables, self.barriers))
            case m.Status():
                self.reply(asker, self.status())
            case _ if isinstance(message, VersionRequest):
                self.publications.request(asker, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} does not go to the coordinator")

    def _join_server(self, asker: Asker, join: m.Join) -> None:
        self._refuse_twice(asker.peer)
        member = self.fleet.join(asker.peer, join, self.now)
        r = self.rules
        self.reply(asker, m.Welcome(member.number, r.shards, r.replicas, r.min_copies, r.ack, r.heartbeat, r.durable))
        self._save_cluster()
        self.save(f"server/{member.number}", msgspec.msgpack.encode(join))
        if join.resume:
            self._resumed(member, join.hosted)
        if self.fleet.begin() and not self._unserved():
            self._revive()
            self._let_in()

    def _let_in(self) -> None:
        """Clients that wait at the door, if nothing keeps them there any more."""
        waiting, self._joining = self._joining, []
        for other, request in waiting:
            try:
                self._join(other, request)
            except HeadwaterError as error:
                self.fail(other, error)

    def _resumed(self, server: Member, hosted: tuple[m.Hosted, ...]) -> None:
        """A server that comes back says what it has; it is told its views, and what it may have missed."""
        for replica in hosted if self._settling else ():
            view = self.fleet.views.get(replica.shard)
            synced = view is not None and server.number in {x.server for x in in_sync(view)}
            said = replica.role == "primary" or synced  # a backup may know what its primary died with
            for commit in replica.commits if said else ():
                self.tables.learned(commit)
        claims = {replica.shard for replica in hosted}
        for shard, view in self.fleet.views.items():
            if shard in self.fleet.unpublished:
                continue  # all who are in it will hear when it is durable
            if server.peer is not None and (shard in claims or server.number in members_of(view)):
                self._notify(server.peer, view)
            if view.primary is not None and view.primary.server == server.number and not self._settling:
                self._brief(view)

    def _join(self, asker: Asker, join: m.Join) -> None:
        self._refuse_twice(asker.peer)
        member = self.membership.resume(asker.peer, join, self.now) if join.resume else None
        if member is None:
            if join.resume and join.role == "worker":
                raise ClusterError(
                    f"worker {join.rank} was given up while it was away; its unfinished step was not applied. "
                    "Connect again as a new worker"
                )
            if self._refusal is not None:
                raise self._refusal
            waits = self.rules.ack == "disk" and bool(self._unserved())
            if not self.fleet.views or self._settling or self.tables.reviving or waits:
                self._joining.append((asker, join))
                return
            if join.role == "worker":
                self._refuse_if_unserved()
            holder = self.membership.workers.get(-1 if join.rank is None else join.rank)
            if holder is not None and holder.gone is not None:  # it may not come back: another has its rank now
                self._depart(holder, clean=False, why="died: its connection ended")
            member = self.membership.admit(asker.peer, join, self.now)
            self.publications.leases.joined(join.session)
            if member.rank >= 0:
                self._announce()
        world = self.membership.world or len(self.membership.workers)
        views = tuple(self._shard_view(shard) for shard in sorted(self.fleet.views))
        r = self.rules
        self.reply(asker, m.Joined(member.rank, world, r.heartbeat, views, self.membership.epoch, r.durable))

    def _shard_view(self, shard: int) -> m.ShardView:
        view = self.fleet.views.get(shard)
        if view is None or view.primary is None:
            raise ClusterError(f"shard {shard} does not exist in this cluster")
        p = view.primary
        return m.ShardView(shard, view.epoch, p.address, p.local, p.host)

    def _leave(self, asker: Asker) -> None:
        member = self.membership.of(asker.peer)
        if member is not None:
            self.tables.missed(asker.peer)
            self._depart(member, clean=True)
        self.reply(asker, m.Done())

    def _depart(self, member: Worker, *, clean: bool, why: str = "") -> None:
        self.membership.depart(member, clean=clean, why=why)
        if not self.membership.has(member.join.session):  # a reader may be back before its old connection ends
            self.publications.leases.left(member.join.session, self.now, clean=clean)
        if member.rank < 0:
            return
        self.tables.left(member.join.session, clean)
        self.membership.expect(claims.owed(self.tables.by_number.values(), self.membership))
        self.plans.forget(member.join.session, ALL if clean else self.committed())
        self._announce()
        self.barriers.departed(member.rank, clean)

    def expect(self) -> None:
        """Somebody uses a table now that others may not have used."""
        if self.membership.expect(claims.owed(self.tables.by_number.values(), self.membership)):
            self._announce()

    def _announce(self) -> None:
        """The shards answer again under the new membership."""
        self.save("members", self.membership.dump())
        self.tables.members_changed()
        for shard in self.fleet.views:
            self.tell(shard, self._members())

    def _members(self) -> m.Members:
        s = self.membership
        return m.Members(s.epoch, s.needed(), s.lost, s.reason, s.sessions())

    def _unserved(self) -> list[m.View]:
        """Shards whose only copies are gone."""
        up = {s.number for s in self.fleet.servers.values() if s.alive}
        learners = {shard: {x.server for x in view.learners} for shard, view in self.fleet.views.items()}
        return [view for shard, view in self.fleet.views.items() if not (members_of(view) - learners[shard]) & up]

    def _refuse_if_unserved(self, shard: int | None = None) -> None:
        for view in self._unserved() if self.rules.ack != "disk" else ():  # its log may come back
            if shard not in (None, view.shard):
                continue
            server = view.primary.server if view.primary is not None else -1
            raise ClusterError(
                f"server {server} is dead and shard {view.shard} has no other copy; "
                "this cluster must be started again, from a snapshot if there is one (--restore)"
            )

    def _refuse_twice(self, peer: int) -> None:
        waits = any(asker.peer == peer for asker, _ in self._joining)
        if waits or self.membership.holds(peer) or any(s.peer == peer for s in self.fleet.servers.values()):
            raise ClusterError("this connection has joined already")

    def committed(self) -> int:
        """The last bulk step that is decided, over all tables; a table on one shard tells by heartbeats."""
        bulk = {t.number for t in self.tables.by_number.values() if t.spec.sync.collective}
        decided = [t.decided.clock for t in self.tables.by_number.values() if t.decided is not None]
        told = [clock for s in self.fleet.servers.values() for number, clock in s.report.tables if number in bulk]
        return max([*decided, *told], default=0)

    def _known(self, peer: int) -> None:
        if not self.membership.holds(peer):
            raise ClusterError("join first: only a member can use tables")

    def _worker(self, peer: int) -> Worker:
        member = self.membership.worker(peer)
        if member is not None:
            return member
        raise ClusterError("only a worker that has joined can do this; a reader or a stranger cannot")

    # ---- servers and views -------------------------------------------------------------------

    def _bury(self, server: Member) -> None:
        """A server is dead. Where nobody can take over, nobody waits for what it cannot create any more."""
        self._forget_if_gone(server.number)
        self.publications.lifecycle.buried(server.number)
        alone = {
            v.shard for v in self.fleet.views.values()
            if v.primary is not None and v.primary.server == server.number and not v.backups
        }  # fmt: skip
        for table in list(self.tables.by_number.values()):
            if table.creating & alone:
                why = ClusterError(f"server {server.number} died while it created {table.spec.name!r}")
                self.tables.give_up(table, why)

    def _forget_if_gone(self, number: int) -> None:
        """A dead server that is in no view need not be known after a restart."""
        server = self.fleet.servers.get(number)
        if server is not None and not server.alive and self.fleet.empty(number):
            self.save(f"server/{number}", None)

    def _publish(self, old: m.View, new: m.View) -> None:
        """A view is durable first, then all who are in it, or were, hear of it."""
        self.save(f"view/{new.shard}", msgspec.msgpack.encode(new))
        for number in members_of(new):  # one that was forgotten as dead may be back
            if number in self.fleet.servers:
                self.save(f"server/{number}", msgspec.msgpack.encode(self.fleet.servers[number].join))
        for number in sorted(members_of(old) | members_of(new)):
            peer = self.fleet.servers[number].peer if number in self.fleet.servers else None
            if peer is not None:
                self._notify(peer, new)
        for number in members_of(old) - members_of(new):
            self._forget_if_gone(number)
        if old.primary != new.primary or new.shard in self.fleet.reborn:
            self.fleet.reborn.discard(new.shard)
            self._cuts.do(self.snapshots.moved(new.shard, self.now))
            self._brief(new)

    def _brief(self, view: m.View) -> None:
        """A new primary hears what the old one may not have passed on, in this order."""
        self.tables.brief(view.shard)
        if self.membership.epoch:
            self.tell(view.shard, self._members())
        self.publications.lifecycle.moved(view.shard)

    def _waited_enough(self, now: float) -> bool:
        """With logs on disks nobody is missing for good as long as nobody else has what it knows."""
        return now >= self.fleet.frozen_until and (self.rules.ack != "disk" or self.fleet.served())

    def _settled(self) -> None:
        """After a restart: what one shard has committed, all commit; then the membership may change."""
        self._settling = False
        for view in self.fleet.views.values():
            self._brief(view)
        self.publications.lifecycle.advance()  # what waited for a step that was committed before the restart
        self._let_in()

    def _sender(self, peer: int) -> int:
        """The server at this connection. Raises ``ProtocolError``."""
        for server in self.fleet.servers.values():
            if server.peer == peer:
                return server.number
        raise ProtocolError("only a server that has joined can say this")

    def check_sender(self, peer: int, server: int) -> None:
        """Raises ``ProtocolError`` if another one than ``server`` is at this connection."""
        if self._sender(peer) != server:
            raise ProtocolError(f"this connection is not server {server}'s")

    def _created(self, peer: int, shard: int, reply: m.Reply) -> None:
        if isinstance(reply, m.Created) and self.leads(peer, shard):
            self.tables.created(reply.table, shard)
            if self._joining and not self.tables.reviving:
                self._let_in()

    def _refused(self, peer: int, frame: Frame) -> None:
        """A server could not create a table."""
        table = self.tables.by_number.get(frame.seq)
        if table is not None and self.leads(peer, frame.shard):
            why = m.read_error(frame.body)
            if table.restore:
                self._refusal = ClusterError(f"this cluster could not begin with its snapshot {table.restore}: {why}")
            self.tables.give_up(table, why)
            self._let_in()

    def leads(self, peer: int, shard: int) -> bool:
        """Whether the server at this connection is the shard's primary."""
        view = self.fleet.views.get(shard)
        return view is not None and view.primary is not None and view.primary.server == self._sender(peer)

    # ---- notices -----------------------------------------------------------------------------

    def _notice(self, peer: int, message: m.Notice) -> None:
        match message:
            case m.Heartbeat():
                if message.server >= 0:
                    self.fleet.heard(message.server, message, self.now)
                else:
                    self.membership.heard(peer, message, self.now)
            case m.Ready():
                if self.leads(peer, message.shard):
                    self.tables.ready(message.shard, message)
                    self.publications.lifecycle.advance()
            case m.Synced():
                self.fleet.synced(message, self._sender(peer))
            case m.Suspect():
                self.fleet.suspect(message, self._sender(peer))
            case m.CutDone():
                if self.leads(peer, message.shard):
                    self._cuts.do(self.snapshots.part(message, self.now))
            case _ if isinstance(message, VersionNotice):
                self.publications.notice(peer, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} does not go to the coordinator")

    def status(self) -> m.ClusterStatus:
        """What is there now, from the last heartbeats."""
        found = status.of(self.rules, self.fleet, self.membership, self.tables, self.now, self._since)
        return msgspec.structs.replace(found, models=self.publications.models())

    # ---- snapshots ---------------------------------------------------------------------------

    def served(self) -> bool:
        """Every shard has its primary, so a snapshot can be taken."""
        if self._settling or not self.fleet.views or self._unserved():
            return False
        return any(table.state == "ready" for table in self.tables.by_number.values())

    def _revive(self) -> None:
        """A new cluster begins with a snapshot's tables and data plans, before anybody may use it."""
        begin, self._begin_with = self._begin_with, None
        if begin is None or self.tables.by_number:
            return
        if begin.plan:
            self.plans.restore(begin.plan)
        for kept in begin.tables:
            self.tables.revive(kept, begin.folder)

    # ---- what must be durable ----------------------------------------------------------------

    def save(self, key: str, value: bytes | None) -> None:
        """Make a key durable before anything is sent."""
        self._changes[key] = value

    def _save_cluster(self) -> None:
        self.save("cluster", msgspec.msgpack.encode(_Saved(self.rules, self.fleet.next_number)))

    def _restore(self, state: Mapping[str, bytes], now: float) -> None:
        saved = msgspec.msgpack.decode(state["cluster"], type=_Saved)
        kept = msgspec.structs.replace(self.rules, silence=saved.rules.silence, grace=saved.rules.grace)
        if shape(kept) != shape(saved.rules):
            raise UsageError(
                f"the state is of a cluster with {shape(saved.rules)} (servers, shards, replicas, min_copies), "
                f"not {shape(kept)}; start it with the same, or in another state folder"
            )
        views = [msgspec.msgpack.decode(v, type=m.View) for k, v in state.items() if k.startswith("view/")]
        known = {int(k[7:]): v for k, v in state.items() if k.startswith("server/")}
        joins = {number: msgspec.msgpack.decode(v, type=m.Join) for number, v in known.items()}
        self.fleet.restore(views, joins, now, max(GRACE, 1.5 * self.rules.silence))
        self.fleet.numbers_from(saved.next_server)
        for key in sorted(k for k in state if k.startswith("table/")):
            self.tables.restore(state[key])
        if "barriers" in state:
            self.barriers.restore(state["barriers"])
        if "met" in state:
            self.barriers.restore_met(state["met"])
        if "members" in state:
            self.membership.load(state["members"], now)
        self.publications.lifecycle.restore(state)
        self._settling = bool(views)
        if views:
            self._begin_with = None

    def _drained(self, server: int) -> bool:
        """Whether nothing is lost with a server."""
        return self.fleet.empty(server) and not self.publications.lifecycle.only(server)

    # ---- out ---------------------------------------------------------------------------------

    def _flush(self) -> list[Instruction]:
        if not self._settling:
            for old, new in self.fleet.plan():
                self._publish(old, new)
            for asker, server in [x for x in self._draining if self._drained(x[1])]:
                self._draining.remove((asker, server))
                self.reply(asker, m.Done())
                peer = self.fleet.servers[server].peer
                if peer is not None:  # it may end
                    self._out.append(Outgoing(peer, Frame(Kind.REQUEST, body=m.pack(m.Drain(server)))))
        out, self._out = self._out, []
        return out

    def reply(self, asker: Asker, message: m.Reply) -> None:
        """Answer a request."""
        self._out.append(Outgoing(asker.peer, Frame(Kind.REPLY, seq=asker.seq, body=m.pack(message))))

    def fail(self, asker: Asker, error: HeadwaterError) -> None:
        """Refuse a request."""
        self._out.append(Outgoing(asker.peer, Frame(Kind.ERROR, seq=asker.seq, body=m.error_body(error))))

    def say(self, out: Outgoing) -> None:
        """Send a frame."""
        self._out.append(out)

    def tell(self, shard: int, message: m.Notice | m.Request, seq: int = 0) -> None:
        """To the primary of a shard, if it is there; a later one is briefed."""
        view = self.fleet.views.get(shard)
        member = self.fleet.servers.get(view.primary.server) if view is not None and view.primary is not None else None
        if member is not None and member.peer is not None:
            kind = Kind.REQUEST if isinstance(message, m.Create) else Kind.NOTICE
            self._out.append(Outgoing(member.peer, Frame(kind, shard=shard, seq=seq, body=m.pack(message))))

    def _notify(self, peer: int, view: m.View) -> None:
        self._out.append(Outgoing(peer, Frame(Kind.NOTICE, shard=view.shard, body=m.pack(view))))
