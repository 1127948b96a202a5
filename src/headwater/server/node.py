"""One replica of a shard without its sockets: what it is in the shard's view, and who is connected to it.

As the primary it serves clients (``clients.py``) and followers (``replication/followers.py``); as a backup or learner
it has one connection, to the primary (``replication/upstream.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from headwater.errors import ClusterError, HeadwaterError, NotEnoughMemory, ProtocolError, StaleEpoch
from headwater.server import COORDINATOR
from headwater.server import events as e
from headwater.server.clients import ClientLink, Clients
from headwater.server.effects import Effects
from headwater.server.memory import TableMemory
from headwater.server.peers import Peer
from headwater.server.replication import records as r
from headwater.server.replication.disk import DISK, DiskLog
from headwater.server.replication.followers import PATIENCE, Follower, Followers
from headwater.server.replication.upstream import Upstream
from headwater.server.shard import Shard
from headwater.server.snapshots.part import SnapshotPart
from headwater.server.snapshots.restore import Snapshot
from headwater.versions.part_store import PartStore
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial

log = logging.getLogger("headwater")

PAUSE = 0.5  # seconds between two ticks, which come more often, that mean that this process was stopped
AGAIN = 0.1  # seconds until a follower looks for its primary again


def _unlimited() -> int:
    return 1 << 62


@dataclass(slots=True)
class Setting:
    """What all replicas on one server share.

    ``share``: keep values in memfds so that clients of this host can map them. ``available`` tells the bytes
    of memory that may still be taken. ``detach(shard, table, ranges)`` is called before values are overwritten.
    ``data``: the folder for logs, where an acknowledgement waits for the disk. ``threads``: snapshots are copied and
    written by threads of their own. ``wake``, which any thread may call, makes the loop look for what threads have
    finished; without it versions are copied at once. ``part_store``: the parts of versions that are held here.
    """

    server: int = 0
    shards: int = 1
    min_copies: int = 1
    patience: float = PATIENCE
    share: bool = False
    session: int = 0  # the incarnation of this process
    host: str = ""  # servers of the same one share gradients with their followers
    checked: bool = False
    available: Callable[[], int] = _unlimited
    detach: Callable[[int, int, tuple[tuple[int, int], ...]], None] = lambda shard, table, ranges: None
    threads: bool = True
    data: Path | None = None
    wake: Callable[[], None] | None = None
    part_store: PartStore = field(init=False)

    def __post_init__(self) -> None:
        self.part_store = PartStore(self.server, self.shards, share=self.share, wake=self.wake, checked=self.checked)


class Node:
    """One shard on one server. ``keys`` numbers dials; ``effects``: the server's, for what follows from anything.

    More than 25 methods: views, connections, orders of the coordinator and versions each have a few, and all of them
    change who leads or what is sent.
    """

    def __init__(self, number: int, setting: Setting, keys: count[int], effects: Effects) -> None:
        self.memory = TableMemory(number, setting)
        self.shard = Shard(number, self.memory)
        self.view = m.View(number, 0, None)
        self.effects = effects
        self._setting = setting
        self._keys = keys
        self.clients = Clients(self.shard, effects, setting.checked)
        self.followers = Followers(self.shard, self.memory.lending, setting.host, setting.checked)
        self.disk = None if setting.data is None else DiskLog(setting.data, self.shard)
        self.part = SnapshotPart(self.shard, threads=setting.threads)
        self.shard.applied.append(self.part.due)
        self.memory.copiers += [self.part.before_write, partial(setting.part_store.before_write, number),
                                partial(setting.detach, number)]  # fmt: skip
        self.memory.consumed = self.clients.consumed
        self.cuts: list[v.CutVersion] = []  # versions whose moment is still to come
        self.upstream: Upstream | None = None
        self.dialing = 0  # the key of the dial under way
        self._retry = 0.0
        self._now = 0.0

    # ---- views -----------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        named = self.view.primary is not None and self.view.primary.server == self._setting.server
        return named and not self.shard.replica.partial  # half a state is no state

    @property
    def role(self) -> str:
        """``primary``, ``backup``, ``learner``, or empty: this server is not in the view."""
        me = self._setting.server
        if self.leads:
            return "primary"
        if any(x.server == me for x in self.view.backups):
            return "backup"
        return "learner" if any(x.server == me for x in self.view.learners) else ""

    def adopt(self, new: m.View) -> None:
        """A view from the coordinator; an older one is passed over."""
        if new.epoch < self.view.epoch:
            return
        old, self.view = self.view, new
        if self.leads:
            self._lead(new)
            return
        self.part.drop()
        self.cuts.clear()
        self._dismiss(new)
        if self.shard.replica.partial and new.primary is not None and new.primary.server == self._setting.server:
            log.error("shard %d: this server was made the primary and has only half of its state", new.shard)
            self._suspect(self._setting.server, "it has only half of the state")
        if old.primary != new.primary:
            self.hang_up()
        if self.role and self.upstream is None and not self.dialing:
            self._dial()

    def _lead(self, new: m.View) -> None:
        self.hang_up()
        backups = {x.server for x in new.backups}
        blocked = 1 + len(backups) < self._setting.min_copies
        if self.disk is not None:
            backups.add(DISK)
        first = not self.shard.primary
        if first and self.disk is not None:
            self.disk.sync()  # what this replica has applied it may acknowledge
        out = self.shard.lead(new.epoch, backups, blocked)
        if first and self.disk is not None:
            self.disk.mark()
            self.disk.sync()
        self.carry_out(out)
        self.effects.instructions += self.followers.adopt(new, self._now)
        here = backups | {f.server for f in self.followers.by_peer.values()}
        for server in [s for s in self.shard.log.required if s not in here]:
            self.carry_out(self.shard.unfollowed(server))

    def _dismiss(self, new: m.View) -> None:
        """No primary, or not any more."""
        self.shard.step_down(new.epoch)
        self.memory.lending.drop()
        self.effects.instructions += self.followers.adopt(m.View(new.shard, new.epoch, None), self._now)
        self.clients.dismiss(
            StaleEpoch(f"shard {new.shard} is in epoch {new.epoch}, with another primary; ask the coordinator for it")
        )

    def hang_up(self) -> None:
        """Leave the primary that was."""
        self.dialing = 0
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.work()  # what was accepted counts
            self.effects.bye(upstream.peer, self.shard.number)

    def _dial(self) -> None:
        primary = self.view.primary
        if primary is not None:
            self.dialing = next(self._keys)
            self.effects.dial(self, Dial(self.dialing, primary.address, primary.local, primary.host))

    def dialed(self, key: int, peer: int | None) -> Peer | None:
        """The connection to the primary stands, or could not be made."""
        if key != self.dialing:  # that primary is none any more
            if peer is not None:
                self.effects.bye(peer)
            return None
        self.dialing = 0
        if peer is None:
            self._retry = self._now + AGAIN
            return None
        setting = self._setting
        self.upstream = Upstream(
            self.shard, peer, setting.server, self.shard.epoch, setting.host, self.disk, setting.session
        )
        self.effects.instructions.append(self.upstream.follow(self.shard.lsn))
        return PrimaryPeer(self, self.upstream)

    def tick(self, now: float) -> None:
        """Time has passed: give up on followers that do not answer, look for the primary again."""
        gap, self._now = now - self._now, now
        if gap > PAUSE:
            self.followers.forgive(gap)
        if self.leads:
            for server, peer, why in self.followers.overdue(now, self._setting.patience):
                self._give_up(server, peer, why)
            self._tell_cut()
        elif self.role and self.upstream is None and not self.dialing and now >= self._retry:
            self._dial()

    def _give_up(self, server: int, peer: int | None, why: str) -> None:
        """A member of the view may be left behind only with the coordinator's consent; a learner at once."""
        follower = self.followers.by_peer.get(peer) if peer is not None else None
        learner = follower is not None and not follower.synced
        if learner and peer is not None:
            del self.followers.by_peer[peer]
            self.followers.absent[server] = self._now  # said again until the view is another
            self.carry_out(self.shard.unfollowed(server))
            self.effects.bye(peer, self.shard.number)
        self._suspect(server, why)

    def _suspect(self, server: int, why: str) -> None:
        self.followers.suspected[server] = self._now
        self._notify(m.Suspect(self.shard.number, self.shard.epoch, server, why))

    def _notify(self, notice: m.Notice) -> None:
        self.effects.tell(COORDINATOR, Frame(Kind.NOTICE, shard=self.shard.number, body=m.pack(notice)))

    def _refuse(self, peer: int, frame: Frame, error: HeadwaterError) -> None:
        self.effects.tell(peer, Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(error)), close=True)

    # ---- who is connected ------------------------------------------------------------------------

    def refuse_client(self, peer: int, frame: Frame) -> None:
        """A client's frame, and this server does not lead."""
        self._refuse(peer, frame, StaleEpoch(
            f"server {self._setting.server} is not the primary of shard {self.shard.number} (epoch "
            f"{self.view.epoch}); nothing was applied. Ask the coordinator for the view"
        ))  # fmt: skip

    def follow(self, peer: int, frame: Frame, request: m.Follow) -> Peer | None:
        """Another server wants to follow this one: who it is from now on, or ``None`` if it may not."""
        since = self.followers.since.get(request.server, self.view.epoch + 1)
        known = {x.server: x.session for x in (*self.view.backups, *self.view.learners)}
        itself = known.get(request.server) == request.session
        if not self.leads or not itself or not since <= request.epoch <= self.view.epoch:
            self._refuse(peer, frame, StaleEpoch(
                f"server {request.server} may not follow server {self._setting.server} in epoch {self.view.epoch} of "
                f"shard {self.shard.number}: ask again when both know the same view"
            ))  # fmt: skip
            return None
        if request.server in {x.server for x in self.view.backups} and not self.shard.continues(request):
            # Not in sync, whatever the view says: it must become a learner first.
            error = StaleEpoch(f"server {request.server} is behind shard {self.shard.number}, and is no learner yet")
            self._suspect(request.server, str(error))
            self._refuse(peer, frame, error)
            return None
        for before in [p for p, f in self.followers.by_peer.items() if f.server == request.server]:
            self.effects.bye(before, self.shard.number)
        self.effects.instructions += self.followers.begin(peer, request, self.view, self._now)
        follower = self.followers.by_peer[peer]
        self.carry_out(self.shard.accepted(request.server, follower.accepted))
        return FollowerPeer(self, follower)

    def lost_follower(self, follower: Follower) -> None:
        """Its connection ended."""
        if self.followers.closed(follower.peer, self.view, self._now) is None:
            return
        if follower.synced:
            self.followers.absent.setdefault(follower.server, self._now)
        else:
            self.carry_out(self.shard.unfollowed(follower.server))

    def lost_primary(self) -> None:
        """It does not know the view yet, or is going, or makes no sense: look for it again."""
        self.hang_up()
        self._retry = self._now + AGAIN

    def primary_closed(self) -> None:
        """The connection to the primary ended."""
        if self.upstream is not None:
            self.upstream.work()
            self.upstream = None
            self._retry = self._now

    def work(self) -> None:
        """Apply what was accepted."""
        if self.upstream is None:
            return
        self.upstream.work()
        broken = self.upstream.broken
        if broken is not None:
            log.warning("shard %d follows no more: %s", self.shard.number, broken)
            self.lost_primary()
            self._suspect(self._setting.server, f"it could not apply a record: {broken}")

    def sync(self) -> None:
        """Put the log on the disk, and count what is there; called once per turn."""
        if self.disk is None:
            return
        self.disk.sync()
        if self.leads:
            self.carry_out(self.shard.accepted(DISK, self.disk.written))
        self.disk.step()
        if self.upstream is not None:
            self.effects.instructions += self.upstream.synced()

    # ---- from the coordinator --------------------------------------------------------------------

    def obey(self, message: m.Request | m.Notice) -> None:
        """A request or notice of the coordinator for this shard; only the primary acts on it."""
        if not self.leads:
            return
        match message:
            case m.Commit() | m.Members():
                self.carry_out(self.shard.handle(message))
            case m.Drop():
                self.carry_out(self.shard.handle(e.Forget(message.table)))
            case m.Create():
                self._create(message)
            case m.Cut():
                self.part.cut(message)
            case v.CutVersion():
                self._cut_version(message)
                self.begin_due()
            case _:
                raise ProtocolError(f"the coordinator sent {type(message).__name__}")

    def _create(self, request: m.Create) -> None:
        if request.table in self.shard.tables:
            self._created(request.table, self.shard.tables[request.table].store.nbytes)
            return
        try:
            self.memory.check_room(request.spec)
            if request.restore:  # before it is a record, which nothing could take back
                Snapshot(Path(request.restore)).close()
            self.carry_out(self.shard.handle(e.Create(request.table, request.spec, request.restore)))
            return
        except HeadwaterError as error:
            refusal: HeadwaterError = error
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where memory is refused
            self.memory.discard(request.table)
            refusal = NotEnoughMemory(f"table {request.spec.name!r}: {error}; it was not created")
        self._refused(request.table, refusal)

    def _created(self, table: int, nbytes: int) -> None:
        body = m.pack(m.Created(table, nbytes))
        self.effects.tell(COORDINATOR, Frame(Kind.REPLY, shard=self.shard.number, seq=table, body=body))

    def _refused(self, table: int, error: HeadwaterError) -> None:
        body = m.error_body(error)
        self.effects.tell(COORDINATOR, Frame(Kind.ERROR, shard=self.shard.number, seq=table, body=body))

    def _tell_cut(self) -> None:
        """What became of this shard's part of a snapshot, once."""
        self.part.due()
        done = self.part.result()
        if done is not None:
            self._notify(done)

    # ---- versions ----------------------------------------------------------------------------------

    def _cut_version(self, message: v.CutVersion) -> None:
        """The coordinator wants this shard's part of a version, perhaps not for the first time."""
        part_store, number = self._setting.part_store, self.shard.number
        coming = any(isinstance(x.body, r.Publish) and x.body.version == message.number for x in self.shard.log.pending)
        if part_store.has_begun(message.number, number):
            part_store.report(message.number, number)
        elif message.late and not coming:
            why = f"the primary of shard {number} died before its part of the version was on another server"
            part_store.outbox.reports.append(v.PartDone(message.number, number, self._setting.server, error=why))
        elif not coming and message not in self.cuts:
            self.cuts.append(message)

    def begin_due(self) -> None:
        """Begin the versions whose moment has come: everything that was decided until now is in the log before it."""
        # One at a time, looked up anew: to carry out the one may begin the others already (``carry_out``).
        while self.leads and (cut := next(filter(self._is_due, self.cuts), None)) is not None:
            self.cuts.remove(cut)
            self.carry_out(self.shard.handle(e.BeginVersion(cut.number, cut.tables)))

    def _is_due(self, cut: v.CutVersion) -> bool:
        """A table on this shard alone takes its steps by itself; those of others came before the coordinator's word."""
        alone = [(self.shard.tables.get(number), clock) for number, clock in cut.clocks]
        return all(t is None or not t.alone or not t.collective or t.gathering.clock >= clock for t, clock in alone)

    def forget_cuts(self, numbers: Sequence[int]) -> None:
        """Nobody wants these versions any more."""
        self.cuts = [cut for cut in self.cuts if cut.number not in numbers]

    def hosted(self) -> m.Hosted:
        """What the coordinator must know of this replica when it has forgotten."""
        commits = tuple(t.last_commit for t in self.shard.tables.values() if t.last_commit is not None)
        return m.Hosted(self.shard.number, self.view.epoch, self.role, self.shard.lsn, commits)

    def ready_again(self) -> None:
        """For a coordinator that has forgotten: the steps that wait for its verdict."""
        self.part.drop()  # nobody waits for it any more
        if not self.leads:
            return
        for table in self.shard.tables.values():
            if table.prepared is not None:
                self._notify(self.shard.replica.ready(table))
        self.followers.suspected.clear()
        self.effects.instructions += self.followers.synced_again(self.view)

    def close(self) -> None:
        """Give all memory back."""
        self.part.drop()
        self.memory.close()

    # ---- instructions of the shard -----------------------------------------------------------------

    def carry_out(self, instructions: list[e.Instruction]) -> None:
        """What the shard says, as frames; then the versions whose moment has come with it."""
        for x in instructions:
            if isinstance(x, e.Ack):
                self.clients.acknowledge(x)
            elif isinstance(x, e.Send):
                self.clients.send_values(x)
            elif isinstance(x, e.Replicate):
                if self.disk is not None:
                    self.disk.append(x.record)
                    self.effects.unsynced = True
                self.effects.instructions += self.followers.replicate(x.record)
            else:
                self._carry_out_rare(x)
        if self.cuts:
            self.begin_due()

    def _carry_out_rare(self, x: e.Instruction) -> None:
        match x:
            case e.Fail():
                self.clients.refuse(x)
            case e.SendMean():
                self.clients.send_mean(x)
            case e.Seated():
                self.clients.seated(x)
            case e.Joined():
                self.clients.joined(x)
            case e.Done():
                self.clients.done(x)
            case e.Created():
                self._created(x.table, x.nbytes)
            case e.Refused():
                self._refused(x.table, x.error)
            case m.Ready():
                self._notify(x)
            case _:
                raise ClusterError(f"an instruction {x} that nobody carries out")


class ClientPeer:
    """A client's connection to the primary."""

    def __init__(self, node: Node, number: int) -> None:
        self._node = node
        self._number = number
        self._link: ClientLink | None = None

    def landing(self, frame: Frame) -> memoryview:
        link = self._link or ClientLink(self._number)
        return self._node.clients.landing(link, frame)

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        node = self._node
        if not node.leads:
            node.refuse_client(self._number, frame)
            return
        link = self._link
        if link is None:
            link = self._link = node.clients.connected(self._number)
        try:
            event = node.clients.event(link, frame, fds)
            if event is not None:
                node.carry_out(node.shard.handle(event))
        except HeadwaterError as error:
            fatal = isinstance(error, ProtocolError)
            reply = Frame(Kind.ERROR, table=frame.table, seq=frame.seq, clock=frame.clock, body=m.error_body(error))
            node.effects.tell(self._number, reply, close=fatal)

    def closed(self) -> None:
        event = self._node.clients.left(self._link) if self._link is not None else None
        if event is not None:
            self._node.carry_out(self._node.shard.handle(event))


class FollowerPeer:
    """A server that follows this one, the primary. What it says after it was let go does not count."""

    def __init__(self, node: Node, follower: Follower) -> None:
        self._node = node
        self._follower = follower

    def landing(self, frame: Frame) -> memoryview:
        raise ProtocolError(f"{frame.kind.name} with a payload from a follower")

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        node, follower = self._node, self._follower
        if node.followers.by_peer.get(follower.peer) is not follower:
            return
        if frame.kind == Kind.NOTICE:
            node.lost_follower(follower)
            return
        if frame.kind != Kind.ACCEPT:
            raise ProtocolError(f"{frame.kind.name} from a follower")
        node.effects.instructions += node.followers.accepted(follower, frame)
        node.carry_out(node.shard.accepted(follower.server, follower.accepted))

    def closed(self) -> None:
        if self._node.followers.by_peer.get(self._follower.peer) is self._follower:
            self._node.lost_follower(self._follower)


class PrimaryPeer:
    """The primary that this server follows, until it hangs up."""

    def __init__(self, node: Node, upstream: Upstream) -> None:
        self._node = node
        self._upstream = upstream

    def landing(self, frame: Frame) -> memoryview:
        if self._node.upstream is not self._upstream:
            raise ProtocolError(f"{frame.kind.name} with a payload from a server that was the primary")
        return self._upstream.landing(frame)

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        node = self._node
        if node.upstream is not self._upstream:
            return
        if frame.kind in (Kind.ERROR, Kind.NOTICE):  # it does not know the view yet, or is going
            node.lost_primary()
            return
        try:
            node.effects.instructions += self._upstream.receive(frame, fds)
        except HeadwaterError:
            node.lost_primary()
            raise
        node.effects.accepted = True

    def closed(self) -> None:
        if self._node.upstream is self._upstream:
            self._node.primary_closed()
