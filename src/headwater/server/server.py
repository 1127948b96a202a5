"""A server without its sockets: the replicas it hosts, and which connection belongs to which of them."""

from __future__ import annotations

import logging
from itertools import count

from headwater.cluster.fleet import members_of
from headwater.errors import ProtocolError, StaleEpoch
from headwater.server import COORDINATOR
from headwater.server.node import Node, Setting
from headwater.transports.memory import close_all
from headwater.versions.backfill import Backfills
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Instruction, Outgoing

log = logging.getLogger("headwater")


class Server:
    """Frames in, frames and dials out. A connection belongs to a shard from its first request on."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.nodes: dict[int, Node] = {}
        self._of_peer: dict[int, Node] = {}
        self._dials: dict[int, Node] = {}
        self._keys = count(1)
        self._backfills = Backfills(setting.part_store, self._keys, setting.wake)
        self._now = 0.0
        self._readers: set[int] = set()  # connections that fetch parts of versions
        self._retired = (0, 0)  # bytes pushed and pulled at shards that have moved on

    # ---- from the loop ---------------------------------------------------------------------------

    def landing(self, peer: int, frame: Frame) -> memoryview:
        """Where a payload goes. Raises ``ProtocolError``."""
        if peer in self._backfills:
            return self._backfills.landing(peer, frame)
        node = self._of_peer.get(peer)
        if node is None:
            raise ProtocolError(f"{frame.kind.name} with a payload before a session was opened")
        return node.landing(peer, frame)

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...] = ()) -> list[Instruction]:
        """A frame of a client, another server or (peer 0) the coordinator; ``fds`` are closed in any case."""
        if peer == COORDINATOR:
            close_all(fds)
            return self._noted(self._coordinator(frame))
        if peer in self._readers:
            close_all(fds)
            return self._noted(self.setting.part_store.receive(peer, frame))
        if peer in self._backfills:
            close_all(fds)
            return self._noted(self._backfills.receive(peer, frame))
        node = self._of_peer.get(peer)
        if node is None:
            return self._noted(self._first(peer, frame, fds))
        return self._noted(node.receive(peer, frame, fds))

    def _first(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        """A connection's first frame says which shard it is for."""
        if frame.kind == Kind.NOTICE:  # another server that has dialed in vain says goodbye
            return []
        try:
            request = m.unpack_request(frame.body) if frame.kind == Kind.REQUEST else None
        except ProtocolError:
            close_all(fds)
            raise
        if not isinstance(request, m.Open):
            close_all(fds)
        if isinstance(request, v.Fetch):
            self._readers.add(peer)
            return self.setting.part_store.receive(peer, frame)
        if not isinstance(request, m.Open | m.Follow):
            error = ProtocolError(f"{frame.kind.name} before a session was opened")
            return [Outgoing(peer, Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(error)), close=True)]
        node = self.nodes.get(request.shard)
        if node is None:
            close_all(fds if isinstance(request, m.Open) else ())
            stale = StaleEpoch(
                f"shard {request.shard} is not on server {self.setting.server}; ask the coordinator where it is"
            )
            return [Outgoing(peer, Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(stale)), close=True)]
        self._of_peer[peer] = node
        if isinstance(request, m.Follow):
            return node.follow(peer, frame, request)
        return node.receive(peer, frame, fds)

    def closed(self, peer: int) -> list[Instruction]:
        """A connection ended."""
        if peer in self._readers:
            self._readers.discard(peer)
            self.setting.part_store.closed(peer)
            return []
        if peer in self._backfills:
            self._backfills.closed(peer)
            return []
        node = self._of_peer.pop(peer, None)
        return [] if node is None else self._noted(node.closed(peer))

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        """What became of a dial: the new connection's number, or None."""
        if self._backfills.dials(key):
            return self._backfills.dialed(key, peer)
        node = self._dials.pop(key, None)
        if node is None or node.dialing != key:
            if peer is None:
                return []
            return [Outgoing(peer, Frame(Kind.NOTICE), close=True)]
        if peer is not None:
            self._of_peer[peer] = node
        return self._noted(node.dialed(peer))

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        self._now = now
        ticked = [x for node in self.nodes.values() for x in node.tick(now)]
        return self._noted([*ticked, *self._woken()])

    def woken(self) -> list[Instruction]:
        """A thread has finished something."""
        return self._noted(self._woken())

    def _woken(self) -> list[Instruction]:
        return [*self.setting.part_store.woken(), *self._backfills.woken()]

    def work(self) -> list[Instruction]:
        """What may come after the answers: followers apply what they have accepted."""
        out: list[Instruction] = []
        for node in self.nodes.values():
            if node.upstream is not None:
                out += node.work()
        return self._noted(out) if out or self.setting.part_store.outbox else out

    def sync(self) -> list[Instruction]:
        """Once per turn: what was logged meanwhile is put on the disk, at once for all of it, and counts."""
        out: list[Instruction] = []
        nodes = list(self.nodes.values()) if self.setting.data is not None else []
        while True:
            for node in nodes:
                out += node.sync()
            if not any(node.disk is not None and node.disk.dirty for node in nodes):
                return self._noted(out)

    def _noted(self, instructions: list[Instruction]) -> list[Instruction]:
        """Versions whose moment has come; what there is to say of them; and which replica dials."""
        for node in self.nodes.values():
            if node.cuts:
                instructions = [*instructions, *node.due()]
        part_store = self.setting.part_store
        if part_store.outbox:
            reports, part_store.outbox = part_store.outbox, []
            notices = (Frame(Kind.NOTICE, shard=done.shard, body=m.pack(done)) for done in reports)
            instructions = [*instructions, *(Outgoing(COORDINATOR, notice) for notice in notices)]
        for x in instructions:
            if not isinstance(x, Outgoing) and not self._backfills.dials(x.key):
                self._dials[x.key] = next(node for node in self.nodes.values() if node.dialing == x.key)
        return instructions

    # ---- from the coordinator --------------------------------------------------------------------

    def _coordinator(self, frame: Frame) -> list[Instruction]:
        if frame.kind == Kind.ERROR:
            log.warning("the coordinator: %s", m.read_error(frame.body))
            return []
        message = m.unpack_request(frame.body) if frame.kind == Kind.REQUEST else m.unpack_notice(frame.body)
        if isinstance(message, m.View):
            return self.adopt(message)
        if isinstance(message, v.DropVersion):
            for holder in self.nodes.values():
                holder.cuts = [cut for cut in holder.cuts if cut.number not in message.numbers]
            return [*self._backfills.drop(message.numbers), *self.setting.part_store.drop(message.numbers)]
        if isinstance(message, v.Hold):
            return self._backfills.begin(message)
        node = self.nodes.get(frame.shard)
        return [] if node is None else node.coordinator(frame, message)

    def adopt(self, view: m.View) -> list[Instruction]:
        """A shard's view: this server begins, changes or ends its part in it."""
        me = self.setting.server
        member = me in members_of(view)
        node = self.nodes.get(view.shard)
        if node is None:
            if not member:
                return []
            node = self.nodes[view.shard] = Node(view.shard, self.setting, self._keys)
            node.tick(self._now)
            if node.disk is not None:
                node.disk.begin()
        out = node.adopt(view)
        if not member and node.view.epoch == view.epoch:
            out += node.hang_up()
            del self.nodes[view.shard]
            self._retired = (
                self._retired[0] + node.clients.pushed_bytes, self._retired[1] + node.clients.pulled_bytes
            )  # fmt: skip
            node.close()
            if node.disk is not None:
                node.disk.remove()
        return out

    def replay(self, shards: list[int]) -> None:
        """Begin with what is on this server's disk. Raises ``StateCorrupt``."""
        for shard in shards:
            node = Node(shard, self.setting, self._keys)
            if node.disk is not None and node.disk.replay():
                self.nodes[shard] = node
            else:
                node.close()

    def ready_again(self) -> list[Instruction]:
        """For a coordinator that has forgotten: steps that wait for its verdict."""
        self.setting.part_store.report_all()
        return self._noted([x for node in self.nodes.values() for x in node.ready_again()])

    @property
    def replayed(self) -> bool:
        """Whether the coordinator has not yet answered to what was on this server's disk."""
        return any(node.view.epoch == 0 for node in self.nodes.values())

    def hosted(self) -> tuple[m.Hosted, ...]:
        return tuple(node.hosted() for node in self.nodes.values())

    def heartbeat(self) -> m.Heartbeat:
        """For ``headwater status``."""
        nodes, parts = list(self.nodes.values()), self.setting.part_store
        leading = [node for node in nodes if node.leads]
        clocks: dict[int, int] = {}
        for node in leading:
            for number, t in node.shard.tables.items():
                clock = max(t.gathering.clock, max(t.clocks.clock.values(), default=0))
                clocks[number] = max(clocks.get(number, 0), clock)
        shards = tuple((n.shard.number, n.shard.lsn, max(n.shard.log.behind().values(), default=0)) for n in leading)
        return m.Heartbeat(
            pushed_bytes=self._retired[0] + sum(n.clients.pushed_bytes for n in nodes),
            pulled_bytes=self._retired[1] + sum(n.clients.pulled_bytes for n in nodes) + parts.sent_bytes,
            nbytes=parts.nbytes + sum(t.dense.nbytes for n in nodes for t in n.shard.tables.values()),
            sessions=sum(len(n.clients) for n in leading),
            tables=tuple(clocks.items()), shards=shards, server=self.setting.server, session=self.setting.session,
        )  # fmt: skip
