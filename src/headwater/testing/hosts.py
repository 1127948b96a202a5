"""The real coordinator and server in simulated processes: what `transports/loop.py` does with sockets, without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from random import Random
from typing import Protocol

from headwater.cluster.coordinator import Coordinator, Rules
from headwater.cluster.store.memory import MemoryStore
from headwater.errors import HeadwaterError, ProtocolError
from headwater.server import COORDINATOR
from headwater.server.control import Control
from headwater.server.hosts import CoordinatorHost
from headwater.server.node import Setting
from headwater.server.server import Server
from headwater.testing.network import End, Network
from headwater.testing.processes import Process
from headwater.testing.times import Meter
from headwater.testing.versions import SimPartStore
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial, Instruction, Outgoing

TICK = 0.1  # seconds between ticks of a loop, as the real one
COPY = 0.02  # seconds that the copy of a part of a version takes, at most
ADDRESS = "sim://coordinator"


class Ears(Protocol):
    """Who hears what hosts say."""

    def says(self, process: Process, frame: Frame) -> None:
        """A frame is about to leave. The process may be dead after this."""

    def said(self, process: Process, frame: Frame) -> None:
        """It has left."""


class SimHost:
    """Connections by number, and instructions carried out. ``ears`` hear every frame that leaves."""

    def __init__(self, network: Network, process: Process, ears: Ears) -> None:
        self.network = network
        self.process = process
        self._ears = ears
        self._ends: dict[int, End] = {}
        self._numbers: dict[int, int] = {}  # number of an end -> peer
        self._next = 1

    def dead(self) -> bool:
        return not self.process.alive

    def adopt(self, end: End, peer: int | None = None) -> int:
        """Serve a connection from now on."""
        if peer is None:
            peer, self._next = self._next, self._next + 1
        self._ends[peer], self._numbers[end.number] = end, peer
        end.receiver = self
        return peer

    def arrived(self, end: End, frame: Frame) -> None:
        peer = self._numbers.get(end.number)
        if peer is None:
            return
        try:
            if frame.payload is not None:
                self.landing(peer, frame)[:] = frame.payload
            out = self.receive(peer, frame)
        except HeadwaterError as error:
            refusal = Frame(Kind.ERROR, body=m.error_body(error))
            out = [Outgoing(peer, refusal, close=True)] if isinstance(error, ProtocolError) else []
        self.carry_out(out)

    def hung_up(self, end: End) -> None:
        peer = self._numbers.pop(end.number, None)
        self.network.close(end)
        if peer is not None and self._ends.get(peer) is end:
            del self._ends[peer]
            self.carry_out(self.closed(peer))

    def carry_out(self, instructions: Iterable[Instruction]) -> None:
        for x in instructions:
            if self.dead():
                return
            if isinstance(x, Dial):
                self.network.connect(self.process, x.address, partial(self.dialed, x.key))
                continue
            end = self._ends.get(x.peer)
            if end is None:
                continue
            self._ears.says(self.process, x.frame)
            if self.dead():
                return
            self.network.send(end, x.frame)
            self._ears.said(self.process, x.frame)
            if x.close:
                self.hung_up(end)

    # ---- what the hosts differ in ------------------------------------------------------------------

    def landing(self, peer: int, frame: Frame) -> memoryview:
        raise ProtocolError("no payload comes here")

    def receive(self, peer: int, frame: Frame) -> Iterable[Instruction]:
        raise NotImplementedError

    def closed(self, peer: int) -> Iterable[Instruction]:
        raise NotImplementedError

    def dialed(self, key: int, end: End | None) -> None:
        raise NotImplementedError


class Crash(BaseException):
    """The process dies here; nothing in it catches this."""


class SimStore(MemoryStore):
    """The coordinator's durable memory. ``crash``: die before or after the next write."""

    def __init__(self) -> None:
        super().__init__()
        self.crash = ""

    def put(self, changes: Mapping[str, bytes | None]) -> None:
        crash, self.crash = self.crash, ""
        if crash == "before":
            raise Crash
        super().put(changes)
        if crash == "after":
            raise Crash


class SimCoordinator(SimHost):
    """A coordinator process. ``die`` kills it, from within a write."""

    def __init__(
        self, network: Network, process: Process, ears: Ears, rules: Rules, store: SimStore, die: Callable[[], None]
    ) -> None:
        super().__init__(network, process, ears)
        self._die = die
        self.coordinator = Coordinator(rules, process.clock(), store.items())
        self._host: CoordinatorHost | None = None
        network.listen(ADDRESS, process, self.adopt)  # type: ignore[arg-type]
        try:
            self._host = CoordinatorHost(self.coordinator, store, process.clock)
        except Crash:
            die()
            return
        process.every(TICK, self._tick)

    def receive(self, peer: int, frame: Frame) -> Iterable[Instruction]:
        return self._alive(lambda host: host.receive(peer, frame, ()))

    def closed(self, peer: int) -> Iterable[Instruction]:
        return self._alive(lambda host: host.closed(peer))

    def dialed(self, key: int, end: End | None) -> None:
        peer = None if end is None else self.adopt(end)
        self.carry_out(self._alive(lambda host: host.dialed(key, peer)))

    def _tick(self) -> None:
        self.carry_out(self._alive(lambda host: host.tick(self.process.clock())))

    def _alive(self, act: Callable[[CoordinatorHost], list[Instruction]]) -> list[Instruction]:
        if self._host is None:
            return []
        try:
            return act(self._host)
        except Crash:
            self._die()
            return []


class SimServer(SimHost):
    """A server process: joins, serves, and comes back to a coordinator that was gone. ``die`` ends it."""

    def __init__(
        self, network: Network, process: Process, ears: Ears, random: Random, patience: float, die: Callable[[], None]
    ) -> None:
        super().__init__(network, process, ears)
        self.server: Server | None = None
        self.number = -1
        self._join = m.Join("server", random.getrandbits(63), address=f"sim://{process.name}")
        self._patience = patience
        self._random = random
        self.meter: Meter | None = None  # None: what it does takes no time
        self._die = die
        self._beats: End | None = None
        network.listen(self._join.address, process, self.adopt)  # type: ignore[arg-type]
        network.connect(process, ADDRESS, self._reached)

    # ---- the beginning -----------------------------------------------------------------------------

    def _reached(self, end: End | None) -> None:
        if end is None:
            self.network.scheduler.after(0.1, self.network.connect, self.process, ADDRESS, self._reached)
            return
        self.adopt(end, COORDINATOR)
        self.network.send(end, Frame(Kind.REQUEST, seq=1, body=m.pack(self._join)))

    def _welcomed(self, frame: Frame) -> list[Instruction]:
        if frame.kind != Kind.REPLY:
            self._die()
            return []
        welcome = m.unpack_reply(frame.body)
        assert isinstance(welcome, m.Welcome)
        self.number = welcome.server
        setting = Setting(
            server=welcome.server, shards=welcome.shards, min_copies=welcome.min_copies, patience=self._patience,
            detach=self._detach, session=self._join.session,
        )  # fmt: skip
        setting.part_store = SimPartStore(welcome.server, welcome.shards, self._later)
        self.server = Server(setting)
        self.server.answer_to(Control(self.server, self._join, welcome, ADDRESS, self._die, self.process.clock))
        self.process.every(TICK, self._tick)
        self.process.every(welcome.heartbeat, self._beat)
        return []

    def _detach(self, shard: int, table: int, ranges: tuple[tuple[int, int], ...]) -> None:
        """Values are about to change: answers on their way keep what they had."""
        for end in self.process.ends:
            for frame in end.flying:
                if frame.kind == Kind.DATA and frame.table == table and frame.payload is not None:
                    frame.payload = memoryview(bytes(frame.payload))

    def _later(self, act: Callable[[], None]) -> None:
        """What a thread of the real process does meanwhile, and that it wakes the loop."""

        def done() -> None:
            act()
            if self.server is not None:
                self.carry_out(self.server.woken())

        self.network.scheduler.after(COPY * self._random.random(), self.process.call, done)

    # ---- events ------------------------------------------------------------------------------------

    def adopt(self, end: End, peer: int | None = None) -> int:
        end.late = True
        return super().adopt(end, peer)

    def landing(self, peer: int, frame: Frame) -> memoryview:
        if self.server is None:
            raise ProtocolError("no payload is expected yet")
        return self.server.landing(peer, frame)

    def receive(self, peer: int, frame: Frame) -> Iterable[Instruction]:
        if self.server is None:
            if peer != COORDINATOR:
                raise ProtocolError("this server has not joined yet")
            return self._welcomed(frame)
        if self.meter is not None:
            return self._receive_slowly(self.server, self.meter, peer, frame)
        self.carry_out(self.server.receive(peer, frame, ()))
        return self.server.work()

    def _receive_slowly(self, host: Server, meter: Meter, peer: int, frame: Frame) -> Iterable[Instruction]:
        """What comes out leaves when the work for it is done; then comes what a follower does after its answer."""
        meter.take()
        if frame.payload is not None:
            meter.copied += len(frame.payload)
        out = host.receive(peer, frame, ())
        done = self.process.work(self.network.times.handling(*meter.take()))
        self.network.scheduler.at(done, self.carry_out, out)
        later = host.work()
        self.process.work(self.network.times.handling(*meter.take()))
        return later

    def closed(self, peer: int) -> Iterable[Instruction]:
        if self.server is not None:
            return self.server.closed(peer)
        if peer == COORDINATOR:
            self._die()
        return []

    def dialed(self, key: int, end: End | None) -> None:
        assert self.server is not None
        peer = None if end is None else self.adopt(end, COORDINATOR if key == COORDINATOR else None)
        self.carry_out(self.server.dialed(key, peer))

    def _tick(self) -> None:
        assert self.server is not None
        self.carry_out(self.server.tick(self.process.clock()))

    def _beat(self) -> None:
        """As the real process's heart: over a connection of its own, made again when it breaks."""
        if self._beats is not None and self._beats.open and self.server is not None:
            self.network.send(self._beats, Frame(Kind.NOTICE, body=m.pack(self.server.heartbeat())))
        else:
            self.network.connect(self.process, ADDRESS, self._beating)

    def _beating(self, end: End | None) -> None:
        if end is not None:
            self.adopt(end)
            self._beats = end
