"""A coordinator, servers and clients in one process: real frames through real receivers, no sockets, no threads.

Everything that is said is on ``tape``, so that a test can say it again, damaged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch

from headwater.cluster.coordinator import Coordinator, Rules
from headwater.errors import HeadwaterError
from headwater.server import COORDINATOR
from headwater.server.hosts import CoordinatorHost
from headwater.server.node import Setting
from headwater.server.server import Server
from headwater.transports.loop import Host
from headwater.transports.receiver import Receiver
from headwater.types import Async, Bulk, DenseSpec, OptimizerSpec, ParameterSpec, Stale, Sync
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind, encode
from headwater.wire.outgoing import Dial, Instruction, Outgoing

SHARDS = 4
SIZE = 4096  # bytes of each table on each shard
BULK, PLAIN, STALE, MINE_PLAIN, MINE_BULK = 1, 2, 3, 4, 5  # tables; the last two are the good client's
MINE = (MINE_PLAIN, MINE_BULK)
GOOD = 0x5EED_0000_1234_5678  # the good client's session
ROOM = 1 << 20  # bytes that each server may take for one more table


def spec(name: str, sync: Sync, optimizer: str = "SGD") -> DenseSpec:
    """A table with 4 KiB on each shard."""
    parameters = tuple(ParameterSpec(f"w{i}", (SIZE // 4,)) for i in range(SHARDS))
    return DenseSpec(name, parameters, OptimizerSpec(optimizer, ({"lr": 1.0},)), sync)


TABLES = {
    BULK: spec("bulk", Bulk()),
    PLAIN: spec("plain", Async(), "Adam"),
    STALE: spec("stale", Stale(1)),
    MINE_PLAIN: spec("my plain", Async()),
    MINE_BULK: spec("my bulk", Bulk()),
}


class Said(NamedTuple):
    """One frame on the tape."""

    speaker: str
    hearer: str
    frame: Frame
    payload: bytes


class Pipe:
    """What a receiver needs of a channel."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.fds: list[int] = []

    def recv_into(self, target: memoryview) -> int:
        count = min(len(target), len(self.data))
        if not count:
            raise BlockingIOError
        target[:count] = self.data[:count]
        del self.data[:count]
        return count


class End:
    """One end of a connection: what arrives here goes to ``host`` as ``peer``'s."""

    def __init__(self, name: str, host: Host, peer: int) -> None:
        self.name, self.host, self.peer = name, host, peer
        self.pipe = Pipe()
        self.receiver = Receiver(self.pipe, lambda frame: host.landing(peer, frame))  # type: ignore[arg-type]
        self.other: End
        self.alive = True


class Inbox:
    """A client's end: it keeps what it is told."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def landing(self, peer: int, frame: Frame) -> memoryview:
        return memoryview(bytearray(frame.payload_length))

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        self.frames.append(frame)
        return []

    def closed(self, peer: int) -> list[Instruction]:
        return []

    def tick(self, now: float) -> list[Instruction]:
        return []

    def work(self) -> list[Instruction]:
        return []

    def woken(self) -> list[Instruction]:
        return []

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        return []

    def take(self) -> list[Frame]:
        found, self.frames = self.frames, []
        return found


class Town:
    """``servers`` of them with two copies of each of four shards; shard k begins on server k % 2."""

    def __init__(self, *, share: bool = False) -> None:
        rules = Rules(2, SHARDS, replicas=2, silence=1e9, worker_silence=1e9)
        self.coordinator = Coordinator(rules)
        self.control = CoordinatorHost(self.coordinator, clock=lambda: self.now)
        self.servers: dict[int, Server] = {}
        self.tape: list[Said] = []
        self.taping = True
        self.now = 0.0
        self.elsewhere: list[Instruction] | None = None  # for connections that are not the town's
        self.share = share
        self.guarded: End | None = None  # of what is refused here, nothing may be applied
        self._ends: dict[tuple[int, int], End] = {}
        self._queue: deque[tuple[End, bytes, bool]] = deque()
        self._dials: deque[tuple[Host, Dial]] = deque()
        self._peer = 1 << 40
        for number in range(2):
            self.start(number)

    # ---- who is there ------------------------------------------------------------------------------

    def start(self, number: int) -> Server:
        """A server joins."""
        session = 1 << 40 | number
        server = Server(
            Setting(number, SHARDS, share=self.share, available=lambda: ROOM, threads=False, session=session)
        )
        self.servers[number] = server
        there, here = self.connect(f"server {number}", server, "coordinator", self.control, COORDINATOR)
        assert here.other is there
        join = m.Join("server", session, address=f"{number}")
        self.say(there, Frame(Kind.REQUEST, seq=1, body=m.pack(join)))
        self.run()
        return server

    def stop(self, number: int) -> None:
        """A server dies."""
        server = self.servers.pop(number)
        for end in [e for e in self._ends.values() if e.host is server]:
            self.close(end.other)
        self.run()

    def connect(
        self, name: str, host: Host, name2: str, host2: Host, peer: int | None = None
    ) -> tuple[End, End]:  # fmt: skip
        """The two ends of a new connection."""
        self._peer += 2
        first = End(name, host, self._peer if peer is None else peer)
        second = End(name2, host2, self._peer + 1)
        first.other, second.other = second, first
        for end in (first, second):
            self._ends[id(end.host), end.peer] = end
        return first, second

    def visit(self, host: Host, name: str = "server") -> tuple[End, Inbox]:
        """A client's connection: where its bytes arrive, and what it is told."""
        inbox = Inbox()
        _, end = self.connect("client", inbox, name, host)
        return end, inbox

    def primary(self, shard: int) -> Server:
        view = self.coordinator.fleet.views[shard]
        assert view.primary is not None
        return self.servers[view.primary.server]

    # ---- bytes -------------------------------------------------------------------------------------

    def say(self, end: End, frame: Frame, payload: bytes = b"") -> None:
        """Something for the other end."""
        frame.payload_length = frame.payload_length or len(payload)
        if self.taping:
            self.tape.append(Said(end.name, end.other.name, frame, payload))
        self._queue.append((end.other, encode(frame) + payload, False))

    def feed(self, end: End, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Bytes arrive, as ``Loop`` takes them; what follows is carried out by ``run``."""
        end.pipe.data += data
        try:
            while end.alive and end.pipe.data:
                for frame, _ in end.receiver.read():
                    self._frame(end, frame, fds)
                    if not end.alive:
                        return
        except BlockingIOError:
            pass
        except HeadwaterError:
            self.close(end)

    def _frame(self, end: End, frame: Frame, fds: tuple[int, ...]) -> None:
        if end.peer == COORDINATOR and frame.kind == Kind.REPLY:
            return  # it is welcome
        before = self.lsns() if end is self.guarded else []
        try:
            out = end.host.receive(end.peer, frame, fds)
        except HeadwaterError:
            assert end is not self.guarded or self.lsns() == before, "something of a frame that was refused was applied"
            raise
        if end is self.guarded and any(isinstance(x, Outgoing) and x.peer == end.peer and x.close for x in out):
            assert self.lsns() == before, "something of a frame that was refused was applied"
        self.carry(end.host, out)
        self.carry(end.host, end.host.work())

    def carry(self, host: Host, instructions: Iterable[Instruction]) -> None:
        """What the loop does with a host's instructions."""
        for x in instructions:
            if isinstance(x, Dial):
                self._dials.append((host, x))
                continue
            end = self._ends.get((id(host), x.peer))
            if end is None:
                if self.elsewhere is not None:
                    self.elsewhere.append(x)
                continue
            payload = b"" if x.frame.payload is None else bytes(x.frame.payload)
            if self.taping:
                self.tape.append(Said(end.name, end.other.name, x.frame, payload))
            self._queue.append((end.other, encode(x.frame) + payload, x.close))
            if x.close:
                self._forget(end)

    def close(self, end: End) -> None:
        """A connection ends, at both ends."""
        for side in (end, end.other):
            if side.alive:
                self._forget(side)

    def _forget(self, end: End) -> None:
        end.alive = False
        if self._ends.pop((id(end.host), end.peer), None) is not None:
            end.receiver.close()
            self.carry(end.host, end.host.closed(end.peer))

    def run(self) -> None:
        """Until nobody has anything to say."""
        while self._queue or self._dials:
            if self._queue:
                end, data, close = self._queue.popleft()
                if end.alive:
                    self.feed(end, data)
                if close:
                    self.close(end)
                continue
            self._dial(*self._dials.popleft())

    def _dial(self, host: Host, dial: Dial) -> None:
        target = self.servers.get(int(dial.address)) if dial.address.isdigit() else None
        if target is None or (isinstance(host, Server) and host not in self.servers.values()):
            self.carry(host, host.dialed(dial.key, None))
            return
        name = f"server {host.setting.server}" if isinstance(host, Server) else "coordinator"
        mine, _ = self.connect(name, host, f"server {target.setting.server}", target)
        self.carry(host, host.dialed(dial.key, mine.peer))

    def tick(self, seconds: float = 0.2) -> None:
        """Time passes for everyone."""
        self.now += seconds
        hosts: list[Host] = [self.control, *self.servers.values()]
        for host in hosts:
            self.carry(host, host.tick(self.now))
        self.run()

    def digests(self) -> dict[tuple[int, int], str]:
        """By (server, shard)."""
        return {
            (n, k): node.shard.replica.digest()
            for n, server in self.servers.items()
            for k, node in server.nodes.items()
        }

    def lsns(self) -> list[int]:
        return [node.shard.log.last for server in self.servers.values() for node in server.nodes.values()]


class Live:
    """Server 0 of a town, for a real loop: it talks to strangers over sockets, and to the town as ever."""

    def __init__(self, town: Town) -> None:
        self.town, self.server = town, town.servers[0]

    def _carry(self, instructions: Iterable[Instruction]) -> list[Instruction]:
        found = self.town.elsewhere = []
        self.town.carry(self.server, instructions)
        self.town.run()
        return found

    def landing(self, peer: int, frame: Frame) -> memoryview:
        return self.server.landing(peer, frame)

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        return self._carry(self.server.receive(peer, frame, fds))

    def closed(self, peer: int) -> list[Instruction]:
        return self._carry(self.server.closed(peer))

    def tick(self, now: float) -> list[Instruction]:
        return self._carry(self.server.tick(now))

    def work(self) -> list[Instruction]:
        return self._carry(self.server.work())

    def woken(self) -> list[Instruction]:
        return self._carry(self.server.woken())

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        return self._carry(self.server.dialed(key, peer))


class Good:
    """A worker that knows the rules. What it asks is answered, with the right values, whatever others do."""

    def __init__(self, town: Town) -> None:
        self.town = town
        self.control, self.news = town.visit(town.control, "coordinator")
        joined = self._ask(self.control, self.news, m.Join("worker", GOOD, rank=0, world=1))
        assert isinstance(joined, m.Joined)
        for number, table in TABLES.items():
            declared = self._ask(self.control, self.news, m.Declare(table))
            assert isinstance(declared, m.Declared)
            assert declared.table == number
        self.shards: list[tuple[End, Inbox]] = []
        self.seq: dict[tuple[int, int], int] = {}
        self.clock = 0
        self.open()

    def _ask(self, end: End, inbox: Inbox, request: m.Request) -> m.Reply:
        self.town.say(end.other, Frame(Kind.REQUEST, seq=1 << 62, body=m.pack(request)))
        self.town.run()
        answer = next(f for f in inbox.take() if f.kind in (Kind.REPLY, Kind.ERROR))
        if answer.kind == Kind.ERROR:
            raise m.read_error(answer.body)
        return m.unpack_reply(answer.body)

    def open(self) -> None:
        """Connections to the primaries."""
        members = self.town.coordinator.membership.epoch
        self.shards = [self.town.visit(self.town.primary(k), f"server {k % 2}") for k in range(SHARDS)]
        for shard, (end, inbox) in enumerate(self.shards):
            self._ask(end, inbox, m.Open(GOOD, 0, shard, members))
            for table in MINE:
                attached = self._ask(end, inbox, m.Attach(table, False))
                assert isinstance(attached, m.Attached)
                self.seq[shard, table] = attached.seq

    @property
    def alive(self) -> bool:
        return self.control.alive and all(end.alive for end, _ in self.shards)

    def status(self) -> m.ClusterStatus:
        """What the coordinator says."""
        found = self._ask(self.control, self.news, m.Status())
        assert isinstance(found, m.ClusterStatus)
        return found

    def works(self) -> None:
        """One step of both tables on all shards: every value goes down by one."""
        self.clock += 1
        before = [self.pull(shard, MINE_PLAIN) for shard in range(SHARDS)]
        for table in MINE:
            for shard in range(SHARDS):
                self._push(shard, table)
        self.town.run()
        for shard, (_, inbox) in enumerate(self.shards):
            acks = {f.table for f in inbox.take() if f.kind == Kind.ACK and f.seq == self.seq[shard, f.table]}
            assert acks == set(MINE), f"shard {shard} has acknowledged {acks}"
            assert self.pull(shard, MINE_PLAIN).equal(before[shard] - 1)
            assert self.pull(shard, MINE_BULK).eq(-self.clock).all()

    def _push(self, shard: int, table: int) -> None:
        end, _ = self.shards[shard]
        self.seq[shard, table] += 1
        epoch, members = self.town.coordinator.fleet.views[shard].epoch, self.town.coordinator.membership.epoch
        payload = torch.ones(SIZE // 4).numpy().tobytes()
        frame = Frame(
            Kind.PUSH, Flag.END, shard, table, GOOD, epoch, self.seq[shard, table], 0, self.clock, 0, SIZE, members
        )
        self.town.say(end.other, frame, payload)

    def pull(self, shard: int, table: int) -> torch.Tensor:
        """The values of a table on a shard."""
        end, inbox = self.shards[shard]
        inbox.take()
        self.town.say(end.other, Frame(Kind.PULL, 0, shard, table, GOOD, seq=9, clock=self.clock, stop=SIZE))
        self.town.run()
        (data,) = [f for f in inbox.take() if f.kind == Kind.DATA]
        assert data.payload is not None
        return torch.frombuffer(data.payload, dtype=torch.float32)
