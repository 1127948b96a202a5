"""One replica of a shard without its sockets: what it is in the shard's view, and the memory its tables live in.

As the primary it serves clients (``clients.py``) and followers (``followers.py``); as a backup or learner it has one
connection, to the primary (``upstream.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

from headwater.errors import ClusterError, HeadwaterError, NotEnoughMemory, ProtocolError, StaleEpoch
from headwater.layout import kinds
from headwater.layout.dense import BLOCK, PAGE, Block, layout, only
from headwater.server import COORDINATOR
from headwater.server import events as e
from headwater.server.clients import Clients, Kept
from headwater.server.replication import records as r
from headwater.server.replication.disk import DISK, DiskLog
from headwater.server.replication.followers import PATIENCE, Followers
from headwater.server.replication.lending import Lending
from headwater.server.replication.state import view
from headwater.server.replication.upstream import Upstream
from headwater.server.shard import Shard
from headwater.server.snapshots.part import Part, fill
from headwater.server.snapshots.restore import Snapshot
from headwater.server.table import Table
from headwater.server.tables.dense import state_bytes
from headwater.transports import memory
from headwater.types import DenseSpec, TableSpec
from headwater.versions.part_store import PartStore
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial, Instruction, Outgoing

log = logging.getLogger("headwater")

PAUSE = 0.5  # seconds between two ticks, which come more often, that mean that this process was stopped
AGAIN = 0.1  # seconds until a follower looks for its primary again


def _unlimited() -> int:
    return 1 << 62


def _nothing(table: int, ranges: tuple[tuple[int, int], ...]) -> None:
    """No answer refers to the values."""


@dataclass(slots=True)
class Setting:
    """What all replicas on one server share.

    ``share``: keep values in memfds so that clients of this host can map them. ``available`` tells the bytes
    of memory that may still be taken. ``detach(table, ranges)`` is called before values are overwritten.
    ``data``: the folder for logs, where an acknowledgement waits for the disk. ``threads``: snapshots are copied and
    written by threads of their own, else by ``work``. ``wake``, which any thread may call, makes the loop look for what
    threads have finished; without it versions are copied at once. ``part_store``: parts of versions that are held here.
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
    """One shard on one server. ``key`` names its dials."""

    def __init__(self, number: int, setting: Setting, keys: count[int]) -> None:
        self.shard = Shard(number, self)
        self.view = m.View(number, 0, None)
        self._setting = setting
        self._keys = keys
        self._kept: dict[int, Kept] = {}
        self.clients = Clients(self.shard, self._kept, self.run, setting.checked)
        self.lending = Lending(setting.share)
        self.followers = Followers(
            self.shard, lambda table: self._kept[table].blocks, self.lending, setting.host, setting.checked
        )
        data = setting.data
        self.disk = None if data is None else DiskLog(data, self.shard, lambda table: self._kept[table].blocks)
        self.part = Part(self.shard, threads=setting.threads)
        self.shard.applied = self.part.due
        self.cuts: list[v.CutVersion] = []  # versions whose moment is still to come
        self.upstream: Upstream | None = None
        self.dialing = 0  # the key of the dial under way
        self._retry = 0.0
        self._now = 0.0

    # ---- views -----------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        named = self.view.primary is not None and self.view.primary.server == self._setting.server
        return named and not self.shard.partial  # half a state is no state

    @property
    def role(self) -> str:
        """``primary``, ``backup``, ``learner``, or empty: this server is not in the view."""
        me = self._setting.server
        if self.leads:
            return "primary"
        if any(x.server == me for x in self.view.backups):
            return "backup"
        return "learner" if any(x.server == me for x in self.view.learners) else ""

    def adopt(self, new: m.View) -> list[Instruction]:
        """A view from the coordinator; an older one is passed over."""
        if new.epoch < self.view.epoch:
            return []
        old, self.view = self.view, new
        out: list[Instruction] = []
        if self.leads:
            out += self.hang_up()
            backups = {x.server for x in new.backups}
            blocked = 1 + len(backups) < self._setting.min_copies
            if self.disk is not None:
                backups.add(DISK)
            out += self._lead(new.epoch, backups, blocked)
            out += self.followers.adopt(new, self._now)
            here = backups | {f.server for f in self.followers.by_peer.values()}
            for server in [s for s in self.shard.log.required if s not in here]:
                out += self.take(self.shard.unfollowed(server))
            return out
        self.part.drop()
        self.cuts.clear()
        out += self._dismiss(new)
        if self.shard.partial and new.primary is not None and new.primary.server == self._setting.server:
            log.error("shard %d: this server was made the primary and has only half of its state", new.shard)
            out.append(self._suspect(self._setting.server, "it has only half of the state"))
        if old.primary != new.primary:
            out += self.hang_up()
        if self.role and self.upstream is None and not self.dialing:
            out += self._dial()
        return out

    def _lead(self, epoch: int, waited: set[int], blocked: bool) -> list[Instruction]:
        first = not self.shard.primary
        if first and self.disk is not None:
            self.disk.sync()  # what this replica has applied it may acknowledge
        out = self.shard.lead(epoch, waited, blocked)
        if first and self.disk is not None:
            self.disk.mark()
            self.disk.sync()
        return list(self.take(out))

    def _dismiss(self, new: m.View) -> list[Instruction]:
        """No primary, or not any more."""
        self.shard.step_down(new.epoch)
        self.lending.drop()
        out: list[Instruction] = list(self.followers.adopt(m.View(new.shard, new.epoch, None), self._now))
        why = StaleEpoch(f"shard {new.shard} is in epoch {new.epoch}, with another primary; ask the coordinator for it")
        return out + list(self.clients.dismiss(why))

    def hang_up(self) -> list[Instruction]:
        """Leave the primary that was."""
        self.dialing = 0
        upstream, self.upstream = self.upstream, None
        if upstream is None:
            return []
        upstream.work()  # what was accepted counts
        return [self._bye(upstream.peer)]

    def _dial(self) -> list[Instruction]:
        primary = self.view.primary
        if primary is None:
            return []
        self.dialing = next(self._keys)
        return [Dial(self.dialing, primary.address, primary.local, primary.host)]

    def dialed(self, peer: int | None) -> list[Instruction]:
        """The connection to the primary stands, or could not be made."""
        self.dialing = 0
        if peer is None:
            self._retry = self._now + AGAIN
            return []
        setting = self._setting
        self.upstream = Upstream(
            self.shard, peer, setting.server, self.shard.epoch, setting.host, self.disk, setting.session
        )
        return [self.upstream.follow(self.shard.lsn)]

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed: give up on followers that do not answer, look for the primary again."""
        gap, self._now = now - self._now, now
        if gap > PAUSE:
            self.followers.forgive(gap)
        out: list[Instruction] = []
        if self.leads:
            for server, peer, why in self.followers.overdue(now, self._setting.patience):
                out += self._give_up(server, peer, why)
            out += self._cut_done()
        elif self.role and self.upstream is None and not self.dialing and now >= self._retry:
            out += self._dial()
        return out

    def _give_up(self, server: int, peer: int | None, why: str) -> list[Instruction]:
        """A member of the view may be left behind only with the coordinator's consent; a learner at once."""
        out: list[Instruction] = []
        follower = self.followers.by_peer.get(peer) if peer is not None else None
        learner = follower is not None and not follower.synced
        if learner and peer is not None:
            del self.followers.by_peer[peer]
            self.followers.absent[server] = self._now  # said again until the view is another
            out += self.take(self.shard.unfollowed(server))
            out.append(self._bye(peer))
        return [*out, self._suspect(server, why)]

    def _suspect(self, server: int, why: str) -> Outgoing:
        self.followers.suspected[server] = self._now
        body = m.pack(m.Suspect(self.shard.number, self.shard.epoch, server, why))
        return Outgoing(COORDINATOR, Frame(Kind.NOTICE, shard=self.shard.number, body=body))

    def _bye(self, peer: int) -> Outgoing:
        return Outgoing(peer, Frame(Kind.NOTICE, shard=self.shard.number), close=True)

    # ---- frames ----------------------------------------------------------------------------------

    def landing(self, peer: int, frame: Frame) -> memoryview:
        """Where a payload goes. Raises ``ProtocolError`` before anything is allocated by its word."""
        if self.upstream is not None and peer == self.upstream.peer:
            return self.upstream.landing(frame)
        return self.clients.landing(peer, frame)

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...] = ()) -> list[Instruction]:
        """A frame from a client, a follower or the primary."""
        if self.upstream is not None and peer == self.upstream.peer:
            try:
                return self._from_primary(frame, fds)
            finally:
                memory.close_all(fds)
        if peer in self.followers.by_peer:
            memory.close_all(fds)
            return self._from_follower(peer, frame)
        if not self.leads:
            memory.close_all(fds)
            error = StaleEpoch(
                f"server {self._setting.server} is not the primary of shard {self.shard.number} (epoch "
                f"{self.view.epoch}); nothing was applied. Ask the coordinator for the view"
            )
            return [Outgoing(peer, Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(error)), close=True)]
        return list(self.clients.receive(peer, frame, fds))

    def follow(self, peer: int, frame: Frame, request: m.Follow) -> list[Instruction]:
        """Another server wants to follow this one."""
        since = self.followers.since.get(request.server, self.view.epoch + 1)
        known = {x.server: x.session for x in (*self.view.backups, *self.view.learners)}
        itself = known.get(request.server) == request.session
        if not self.leads or not itself or not since <= request.epoch <= self.view.epoch:
            error = StaleEpoch(
                f"server {request.server} may not follow server {self._setting.server} in epoch {self.view.epoch} of "
                f"shard {self.shard.number}: ask again when both know the same view"
            )
            return [Outgoing(peer, Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(error)), close=True)]
        if request.server in {x.server for x in self.view.backups} and not self.shard.continues(request):
            # Not in sync, whatever the view says: it must become a learner first.
            error = StaleEpoch(f"server {request.server} is behind shard {self.shard.number}, and is no learner yet")
            refusal = Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(error))
            return [self._suspect(request.server, str(error)), Outgoing(peer, refusal, close=True)]
        before = {p for p, f in self.followers.by_peer.items() if f.server == request.server}
        out: list[Instruction] = [self._bye(p) for p in before]
        out += self.followers.begin(peer, request, self.view, self._now)
        return out + self.take(self.shard.accepted(request.server, self.followers.by_peer[peer].accepted))

    def _from_follower(self, peer: int, frame: Frame) -> list[Instruction]:
        if frame.kind == Kind.NOTICE:
            return list(self.closed(peer))
        if frame.kind != Kind.ACCEPT:
            raise ProtocolError(f"{frame.kind.name} from a follower")
        follower, out = self.followers.accepted(peer, frame)
        if follower is None:
            return list(out)
        return [*out, *self.take(self.shard.accepted(follower.server, follower.accepted))]

    def _from_primary(self, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        assert self.upstream is not None
        if frame.kind in (Kind.ERROR, Kind.NOTICE):  # it does not know the view yet, or is going
            return self._lost_primary()
        try:
            return list(self.upstream.receive(frame, fds))
        except HeadwaterError:
            self._lost_primary()
            raise

    def _lost_primary(self) -> list[Instruction]:
        out = self.hang_up()
        self._retry = self._now + AGAIN
        return out

    def work(self) -> list[Instruction]:
        """Apply what was accepted."""
        out: list[Instruction] = []
        if self.upstream is not None:
            self.upstream.work()
            if self.upstream.broken is not None:
                log.warning("shard %d follows no more: %s", self.shard.number, self.upstream.broken)
                why = f"it could not apply a record: {self.upstream.broken}"
                out = [*self._lost_primary(), self._suspect(self._setting.server, why)]
        if not self._setting.threads:
            self.part.advance()
        return out

    def sync(self) -> list[Instruction]:
        """Put the log on the disk, and count what is there; called once per turn."""
        if self.disk is None:
            return []
        self.disk.sync()
        out: list[Instruction] = []
        if self.leads:
            out += self.take(self.shard.accepted(DISK, self.disk.written))
        self.disk.step()
        return out if self.upstream is None else [*out, *self.upstream.synced()]

    def closed(self, peer: int) -> list[Instruction]:
        """A connection ended."""
        if self.upstream is not None and peer == self.upstream.peer:
            self.upstream.work()
            self.upstream = None
            self._retry = self._now
            return []
        follower = self.followers.closed(peer, self.view, self._now)
        if follower is None:
            return list(self.clients.closed(peer))
        if not follower.synced:
            return list(self.take(self.shard.unfollowed(follower.server)))
        self.followers.absent.setdefault(follower.server, self._now)
        return []

    # ---- from the coordinator --------------------------------------------------------------------

    def coordinator(self, frame: Frame, message: m.Request | m.Notice) -> list[Instruction]:
        """A request or notice of the coordinator for this shard; only the primary acts on it."""
        if not self.leads:
            return []
        match message:
            case m.Commit() | m.Members():
                return list(self.run(message))
            case m.Drop():
                return list(self.run(e.Forget(message.table)))
            case m.Create():
                return self._create(message)
            case m.Cut():
                self.part.cut(message)
                return []
            case v.CutVersion():
                self._cut_version(message)
                return self.due()
            case _:
                raise ProtocolError(f"the coordinator sent {type(message).__name__}")

    def _create(self, request: m.Create) -> list[Instruction]:
        if request.table in self.shard.tables:
            return [self._created(request.table, self.shard.tables[request.table].dense.nbytes)]
        try:
            self._check_room(request.spec)
            if request.restore:  # before it is a record, which nothing could take back
                Snapshot(Path(request.restore)).close()
            return list(self.run(e.Create(request.table, request.spec, request.restore)))
        except HeadwaterError as error:
            refusal: HeadwaterError = error
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where memory is refused
            self.discard(request.table)
            refusal = NotEnoughMemory(f"table {request.spec.name!r}: {error}; it was not created")
        return [self._refused(request.table, refusal)]

    def _created(self, table: int, nbytes: int) -> Outgoing:
        body = m.pack(m.Created(table, nbytes))
        return Outgoing(COORDINATOR, Frame(Kind.REPLY, shard=self.shard.number, seq=table, body=body))

    def _refused(self, table: int, error: HeadwaterError) -> Outgoing:
        body = m.error_body(error)
        return Outgoing(COORDINATOR, Frame(Kind.ERROR, shard=self.shard.number, seq=table, body=body))

    def _check_room(self, spec: TableSpec) -> None:
        dense = only(spec)
        kinds.check_table(spec)
        segments = layout(dense, self._setting.shards).segments[self.shard.number]
        needed, free = state_bytes(dense, segments), self._setting.available()
        if needed > free:
            raise NotEnoughMemory(
                f"table {spec.name!r} takes {needed / 2**20:.0f} MiB on shard {self.shard.number} "
                f"(values, optimizer state, one gradient), {free / 2**20:.0f} MiB are free; it was not created"
            )

    def _cut_done(self) -> list[Instruction]:
        """What became of this shard's part of a snapshot, once."""
        self.part.due()
        done = self.part.result()
        if done is None:
            return []
        return [Outgoing(COORDINATOR, Frame(Kind.NOTICE, shard=self.shard.number, body=m.pack(done)))]

    # ---- versions ----------------------------------------------------------------------------------

    def _cut_version(self, message: v.CutVersion) -> None:
        """The coordinator wants this shard's part of a version, perhaps not for the first time."""
        part_store, number = self._setting.part_store, self.shard.number
        coming = any(isinstance(x.body, r.Publish) and x.body.version == message.number for x in self.shard.log.pending)
        if part_store.has_begun(message.number, number):
            part_store.report(message.number, number)
        elif message.late and not coming:
            why = f"the primary of shard {number} died before its part of the version was on another server"
            part_store.outbox.append(v.PartDone(message.number, number, self._setting.server, error=why))
        elif not coming and message not in self.cuts:
            self.cuts.append(message)

    def due(self) -> list[Instruction]:
        """Begin the versions whose moment has come: everything that was decided until now is in the log before it."""
        out: list[Instruction] = []
        for cut in list(self.cuts) if self.leads else ():
            # A table on this shard alone takes its steps by itself; those of others came before the coordinator's word.
            alone = [(self.shard.tables.get(number), clock) for number, clock in cut.clocks]
            if all(t is None or not t.alone or not t.collective or t.gathering.clock >= clock for t, clock in alone):
                self.cuts.remove(cut)
                out += self.run(e.Publish(cut.number, cut.tables))
        return out

    def publish(self, body: r.Publish) -> None:
        """A version's moment; the same on every replica. In a log that is read back it is past: they live in memory."""
        if not self.shard.partial and self.view.epoch:
            tables = [self.shard.tables[number] for number in body.tables if number in self.shard.tables]
            self._setting.part_store.begin(body.version, self.shard.number, [table.source() for table in tables])

    def hosted(self) -> m.Hosted:
        """What the coordinator must know of this replica when it has forgotten."""
        commits = tuple(t.last_commit for t in self.shard.tables.values() if t.last_commit is not None)
        return m.Hosted(self.shard.number, self.view.epoch, self.role, self.shard.lsn, commits)

    def ready_again(self) -> list[Instruction]:
        """For a coordinator that has forgotten: the steps that wait for its verdict."""
        self.part.drop()  # nobody waits for it any more
        if not self.leads:
            return []
        ready = [self._ready(self.shard.ready(t)) for t in self.shard.tables.values() if t.prepared is not None]
        self.followers.suspected.clear()
        return [*ready, *self.followers.synced_again(self.view)]

    # ---- memory of the tables ----------------------------------------------------------------------

    def size(self, spec: TableSpec) -> int:
        kinds.check_table(spec)
        return kinds.place(spec, self._setting.shards).sizes[self.shard.number]

    def create(self, number: int, spec: TableSpec) -> Table:
        """Memory for a table. Raises ``NotEnoughMemory``."""
        self._check_room(spec)
        dense = only(spec)
        plan = layout(dense, self._setting.shards)
        segments, size = plan.segments[self.shard.number], plan.sizes[self.shard.number]
        kept = self._kept[number] = self._allocate(dense, plan.blocks_of(self.shard.number), size)
        alone = len(plan.participants) == 1
        table = Table(number, dense, segments, kept.values, alone=alone, versions=kept.versions)
        table.dense.after_block = lambda start, stop: self.clients.drop(number, start, stop)
        return table

    def discard(self, number: int) -> None:
        """Give a table's memory back."""
        self.lending.drop(number)
        kept = self._kept.pop(number, None)
        if kept is not None:
            memory.close_all(kept.fds)

    def lend(self, table: int, size: int, lsn: int, accepted: int) -> torch.Tensor | None:
        """Memory for the gradient of a record that followers may map; ``None``: not now."""
        buffer = self.lending.take(table, size, lsn, accepted)
        return None if buffer is None else buffer.tensor

    def load(self, table: Table, folder: str) -> None:
        """Fill a table that was just made from a snapshot. Raises ``SnapshotCorrupt``."""
        with Snapshot(Path(folder)) as snapshot:
            fill(table, snapshot)

    def before_write(self, table: int, ranges: tuple[tuple[int, int], ...]) -> None:
        self.part.before_write(table, ranges)
        self._setting.part_store.before_write(self.shard.number, table, ranges)
        self._setting.detach(self.shard.number, table, ranges)

    def _allocate(self, spec: DenseSpec, blocks: tuple[Block, ...], size: int) -> Kept:
        limit = max((block.size for block in blocks), default=0)
        if not self._setting.share:
            values = torch.zeros(size, dtype=torch.uint8, device="cpu")
            return Kept(spec, blocks, values, view(values), None, (), limit)
        count = -(-size // BLOCK)
        fd = memory.create(spec.name[:64], size)
        marks = memory.create(f"{spec.name[:64]}.versions", -(-count * 8 // PAGE) * PAGE)
        region = memory.Region([memory.Piece(fd, 0, size)])
        versions = memory.Region([memory.Piece(marks, 0, -(-count * 8 // PAGE) * PAGE)])
        values = torch.frombuffer(region.buffer, dtype=torch.uint8)[:size]
        return Kept(spec, blocks, values, region.view, versions.view[: count * 8].cast("Q"), (fd, marks), limit)

    def close(self) -> None:
        """Give all memory back."""
        self.part.drop()
        for number in list(self._kept):
            self.discard(number)
        self.lending.drop()

    # ---- instructions ----------------------------------------------------------------------------

    def run(self, event: e.Event) -> list[Outgoing]:
        """Hand an event to the shard, and carry out what follows."""
        return self.take(self.shard.handle(event))

    def take(self, instructions: list[e.Instruction]) -> list[Outgoing]:
        """Instructions of the shard as frames."""
        out: list[Outgoing] = []
        for x in instructions:
            if isinstance(x, e.Ack):
                out += self.clients.ack(x)
            elif isinstance(x, e.Send):
                out += self.clients.send(x)
            elif isinstance(x, e.Replicate):
                if self.disk is not None:
                    self.disk.append(x.record)
                out += self.followers.send(x.record)
            else:
                out += self._take_rare(x)
        return out

    def _take_rare(self, x: e.Instruction) -> list[Outgoing]:
        match x:
            case e.Fail():
                return self.clients.fail(x)
            case e.SendMean():
                return self.clients.send_mean(x)
            case e.Seated():
                return self.clients.seated(x)
            case e.Done():
                return self.clients.done(x)
            case e.Created():
                return [self._created(x.table, x.nbytes)]
            case e.Refused():
                return [self._refused(x.table, x.error)]
            case m.Ready():
                return [self._ready(x)]
            case _:
                raise ClusterError(f"an instruction {x} that nobody carries out")

    def _ready(self, ready: m.Ready) -> Outgoing:
        return Outgoing(COORDINATOR, Frame(Kind.NOTICE, shard=self.shard.number, body=m.pack(ready)))
