"""A server without its sockets: the replicas it hosts, and the one mapping of who is at each connection's other end."""

from __future__ import annotations

import logging
from itertools import count

from headwater.cluster.fleet import members_of
from headwater.errors import HeadwaterError, ProtocolError, StaleEpoch
from headwater.server import COORDINATOR
from headwater.server.control import Orders
from headwater.server.effects import Effects
from headwater.server.node import ClientPeer, Node, Setting
from headwater.server.peers import Backfilling, Peer, ReaderPeer
from headwater.transports.memory import close_all
from headwater.versions.backfill import Backfills
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Instruction

log = logging.getLogger("headwater")


class Server:
    """Frames in, frames and dials out (``loop.Host``). Who sends them is decided by a connection's first one."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.nodes: dict[int, Node] = {}
        self.effects = Effects()
        self._peers: dict[int, Peer] = {}
        self._control = Orders(self)
        self._keys = count(1)
        self._backfills = Backfills(setting.part_store, self._keys, setting.wake)
        self._backfilling = Backfilling(self._backfills, self.effects)
        self._now = 0.0
        self._retired = (0, 0)  # bytes pushed and pulled at shards that have moved on
        self.answer_to(self._control)

    def answer_to(self, control: Orders) -> None:
        """Who is at connection 0 from now on."""
        self._control = self._peers[COORDINATOR] = control

    # ---- from the loop ---------------------------------------------------------------------------

    def landing(self, peer: int, frame: Frame) -> memoryview:
        """Where a payload goes. Raises ``ProtocolError``."""
        found = self._peers.get(peer)
        if found is None:
            raise ProtocolError(f"{frame.kind.name} with a payload before a session was opened")
        return found.landing(frame)

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...] = ()) -> list[Instruction]:
        """A frame of a client, another server or (peer 0) the coordinator; ``fds`` are closed in any case."""
        try:
            found = self._peers.get(peer) or self._meet(peer, frame)
            if found is not None:
                found.receive(frame, fds)
        except HeadwaterError:
            self.effects.drain()  # the connection ends, with an error of its own
            raise
        finally:
            if fds:
                close_all(fds)
        return self._said()

    def _meet(self, peer: int, frame: Frame) -> Peer | None:
        """Who it is that says its first word. ``None``: that word is dealt with. (Whom we dialed is known already.)"""
        if frame.kind == Kind.NOTICE:  # another server that has dialed in vain says goodbye
            return None
        request = m.unpack_request(frame.body) if frame.kind == Kind.REQUEST else None
        if isinstance(request, v.Fetch):
            self._peers[peer] = ReaderPeer(peer, self.setting.part_store)
            return self._peers[peer]
        if not isinstance(request, m.Open | m.Follow):
            self._refuse(peer, frame, ProtocolError(f"{frame.kind.name} before a session was opened"))
            return None
        node = self.nodes.get(request.shard)
        if node is None:
            where = f"shard {request.shard} is not on server {self.setting.server}"
            self._refuse(peer, frame, StaleEpoch(f"{where}; ask the coordinator where it is"))
            return None
        if isinstance(request, m.Open):
            self._peers[peer] = ClientPeer(node, peer)
            return self._peers[peer]
        follower = node.follow(peer, frame, request)
        if follower is not None:
            self._peers[peer] = follower
        return None  # what it asked for is done

    def _refuse(self, peer: int, frame: Frame, error: HeadwaterError) -> None:
        self.effects.tell(peer, Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(error)), close=True)

    def closed(self, peer: int) -> list[Instruction]:
        """A connection ended."""
        found = self._peers.pop(peer, None)
        if found is not None:
            found.closed()
        return self._said()

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        """What became of a dial: the new connection's number, or None."""
        asker = self.effects.dials.pop(key, None)
        if asker is None:
            if peer is not None:
                self.effects.bye(peer)
            return self._said()
        found = asker.dialed(key, peer)
        if found is not None and peer is not None:
            self._peers[peer] = found
        return self._said()

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        self._now = now
        for node in self.nodes.values():
            node.tick(now)
        self._woken()
        self._control.tick(now)
        return self._said()

    def woken(self) -> list[Instruction]:
        """A thread has finished something."""
        self._woken()
        return self._said()

    def _woken(self) -> None:
        self.setting.part_store.woken()
        self.effects.add(self._backfills.woken(), self._backfilling)

    def work(self) -> list[Instruction]:
        """What may come after the answers: followers apply what they have accepted."""
        if not self.effects.accepted:
            return []
        self.effects.accepted = False
        for node in self.nodes.values():
            node.work()
        return self._said()

    def sync(self) -> list[Instruction]:
        """Once per turn: what was logged meanwhile is put on the disk, at once for all of it, and counts."""
        if self.setting.data is None:
            return []
        while True:
            self.effects.unsynced = False
            for node in self.nodes.values():
                node.sync()
            if not self.effects.unsynced:
                return self._said()

    def _said(self) -> list[Instruction]:
        """What is to be sent, and behind it what there is to say of versions."""
        versions = self.setting.part_store.outbox
        if versions.reports:
            for done in versions.reports:
                self.effects.tell(COORDINATOR, Frame(Kind.NOTICE, shard=done.shard, body=m.pack(done)))
            versions.reports.clear()
        if versions.frames:
            self.effects.instructions += versions.frames
            versions.frames.clear()
        return self.effects.drain()

    # ---- from the coordinator --------------------------------------------------------------------

    def obey(self, frame: Frame) -> None:
        """What the coordinator says."""
        if frame.kind == Kind.ERROR:
            log.warning("the coordinator: %s", m.read_error(frame.body))
            return
        message = m.unpack_request(frame.body) if frame.kind == Kind.REQUEST else m.unpack_notice(frame.body)
        if isinstance(message, m.View):
            self._adopt(message)
        elif isinstance(message, v.DropVersion):
            for holder in self.nodes.values():
                holder.forget_cuts(message.numbers)
            self.effects.add(self._backfills.drop(message.numbers), self._backfilling)
            self.setting.part_store.drop(message.numbers)
        elif isinstance(message, v.Hold):
            self.effects.add(self._backfills.begin(message), self._backfilling)
        else:
            node = self.nodes.get(frame.shard)
            if node is not None:
                node.obey(message)

    def adopt(self, view: m.View) -> list[Instruction]:
        """A shard's view: this server begins, changes or ends its part in it."""
        self._adopt(view)
        return self._said()

    def _adopt(self, view: m.View) -> None:
        member = self.setting.server in members_of(view)
        node = self.nodes.get(view.shard)
        if node is None:
            if not member:
                return
            node = self.nodes[view.shard] = self._node(view.shard)
            node.tick(self._now)
            if node.disk is not None:
                node.disk.begin()
        node.adopt(view)
        if not member and node.view.epoch == view.epoch:
            node.hang_up()
            del self.nodes[view.shard]
            self._retired = (
                self._retired[0] + node.clients.pushed_bytes, self._retired[1] + node.clients.pulled_bytes
            )  # fmt: skip
            node.close()
            if node.disk is not None:
                node.disk.remove()

    def _node(self, shard: int) -> Node:
        return Node(shard, self.setting, self._keys, self.effects)

    def replay(self, shards: list[int]) -> None:
        """Begin with what is on this server's disk. Raises ``StateCorrupt``."""
        for shard in shards:
            node = self._node(shard)
            node.memory.past = True
            if node.disk is not None and node.disk.replay():
                self.nodes[shard] = node
            else:
                node.close()
            node.memory.past = False

    def ready_again(self) -> None:
        """For a coordinator that has forgotten: steps that wait for its verdict."""
        self.setting.part_store.report_all()
        for node in self.nodes.values():
            node.ready_again()

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
            nbytes=parts.nbytes + sum(t.store.nbytes for n in nodes for t in n.shard.tables.values()),
            sessions=sum(len(n.clients) for n in leading),
            refused=tuple((k, c) for n in leading for k, c in n.clients.refused.items() if k in n.shard.sessions),
            tables=tuple(clocks.items()), shards=shards, server=self.setting.server, session=self.setting.session,
        )  # fmt: skip
