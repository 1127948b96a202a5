"""Servers wired by direct calls: no sockets, no coordinator, one message at a time, and connections that can be cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import torch

from headwater.layout.dense import layout
from headwater.server import COORDINATOR
from headwater.server.node import Node, Setting
from headwater.server.replication.state import view
from headwater.server.server import Server
from headwater.types import Async, DenseSpec, OptimizerSpec, ParameterSpec, Sync
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind
from headwater.wire.outgoing import Dial, Instruction

MEMBERS = 1  # the membership epoch


def spec(sync: Sync | None = None, optimizer: str = "SGD", *shapes: tuple[int, ...], **changes: object) -> DenseSpec:
    """Parameters of these shapes."""
    parameters = tuple(ParameterSpec(f"p{i}", shape) for i, shape in enumerate(shapes or ((20_000,), (30, 40))))
    return DenseSpec(
        "t", parameters, OptimizerSpec(optimizer, ({"lr": 0.5},)), sync if sync is not None else Async(), **changes
    )  # type: ignore[arg-type]


class Message(NamedTuple):
    """On its way from a server, or from a worker (-1)."""

    source: int
    peer: int
    frame: Frame
    close: bool = False


class Ring:
    """``servers`` servers; shard 0 of ``shards``. What they say to a coordinator is kept in ``said``."""

    def __init__(self, servers: int = 2, shards: int = 1, min_copies: int = 1) -> None:
        self.servers = [Server(Setting(n, shards, min_copies, threads=False)) for n in range(servers)]
        self.shards = shards
        self.said: list[tuple[int, m.Notice | m.Reply]] = []
        self.muted: set[tuple[int, int]] = set()  # (from, to): what is on its way stays there
        self.down: set[int] = set()
        self.now = 0.0
        self.epoch = 0
        self._queue: deque[Message] = deque()
        self._ends: dict[tuple[int, int], tuple[int, int]] = {}
        self._workers: dict[int, Worker] = {}  # by the worker's end of its connection
        self._peers = count(1)

    def node(self, server: int) -> Node:
        return self.servers[server].nodes[0]

    def digest(self, server: int) -> tuple[int, str]:
        shard = self.node(server).shard
        return shard.lsn, shard.replica.digest()

    # ---- the coordinator ---------------------------------------------------------------------------

    def adopt(self, primary: int, backups: Sequence[int] = (), learners: Sequence[int] = ()) -> None:
        """A new view of shard 0, which everybody hears of."""
        self.epoch += 1
        ends = [m.Endpoint(n, f"s{n}", "", "") for n in range(len(self.servers))]
        new = m.View(0, self.epoch, ends[primary], tuple(ends[b] for b in backups), tuple(ends[x] for x in learners))
        for number in range(len(self.servers)):
            if number not in self.down:
                self.tell(number, new)
        self.run()

    def tell(self, server: int, message: m.Notice | m.Create) -> None:
        kind = Kind.REQUEST if isinstance(message, m.Create) else Kind.NOTICE
        frame = Frame(kind, seq=getattr(message, "table", 0), body=m.pack(message))
        self._do(server, self.servers[server].receive(COORDINATOR, frame))

    def begin(self, table: DenseSpec, ranks: tuple[int, ...] = (0,), server: int = 0) -> None:
        """Table 1, and the workers who may use it."""
        self.tell(server, m.Members(MEMBERS, ranks, 0, "", tuple(70 + rank for rank in ranks)))
        self.tell(server, m.Create(1, table))
        self.run()

    def heard(self, kind: type) -> list[m.Notice | m.Reply]:
        """What the coordinator has heard of this kind since it was last asked."""
        found = [message for _, message in self.said if isinstance(message, kind)]
        self.said = [(server, message) for server, message in self.said if not isinstance(message, kind)]
        return found

    # ---- time and failures -------------------------------------------------------------------------

    def tick(self, seconds: float) -> None:
        """Time passes, in steps of a tenth of a second."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            for number, server in enumerate(self.servers):
                if number not in self.down:
                    self._do(number, server.tick(self.now))
            self.run()

    def kill(self, server: int) -> None:
        """Its process ends; what it had sent still arrives."""
        self.down.add(server)
        self.run()
        for end in [end for end in self._ends if end[0] == server]:
            self._cut(end)
        self.run()

    def _cut(self, end: tuple[int, int]) -> None:
        """A connection ends; the other side hears of it."""
        other = self._ends.pop(end, None)
        if other is None:
            return
        self._ends.pop(other, None)
        if other[0] >= 0 and other[0] not in self.down:
            self._do(other[0], self.servers[other[0]].closed(other[1]))

    # ---- messages ----------------------------------------------------------------------------------

    def connect(self, source: int, target: int) -> int:
        """A connection from a server (or from a worker: -1) to a server; the number of the near end."""
        near, far = (source, next(self._peers)), (target, next(self._peers))
        self._ends[near], self._ends[far] = far, near
        return near[1]

    def join(self, worker: Worker, target: int) -> int:
        peer = self.connect(-1, target)
        self._workers[peer] = worker
        return peer

    def send(self, peer: int, frame: Frame) -> None:
        """A worker's frame."""
        self._queue.append(Message(-1, peer, _copied(frame)))

    def run(self) -> None:
        """Until nothing moves any more."""
        while self.step():
            pass

    def step(self) -> bool:
        """Deliver one message; whether there was one."""
        for i, message in enumerate(self._queue):
            other = self._ends.get((message.source, message.peer))
            if other is None or (message.source, other[0]) not in self.muted:
                del self._queue[i]
                self._deliver(message, other)
                return True
        return False

    def _deliver(self, message: Message, other: tuple[int, int] | None) -> None:
        if other is None:
            return
        target, peer = other
        if target < 0:
            self._workers[peer].frames.append(message.frame)
        elif target not in self.down:
            server, frame = self.servers[target], replace(message.frame, payload=None)
            if message.frame.payload is not None:
                frame.payload_length = len(message.frame.payload)
                frame.payload = server.landing(peer, frame)
                frame.payload[:] = message.frame.payload
            self._do(target, server.receive(peer, frame))
            self._do(target, server.work())
        if message.close:
            self._cut((message.source, message.peer))

    def _do(self, server: int, instructions: list[Instruction]) -> None:
        for x in instructions:
            if isinstance(x, Dial):
                target = int(x.address[1:])
                peer = None if target in self.down else self.connect(server, target)
                self._do(server, self.servers[server].dialed(x.key, peer))
            elif x.peer == COORDINATOR:
                read = m.unpack_reply if x.frame.kind == Kind.REPLY else m.unpack_notice
                assert x.frame.kind in (Kind.REPLY, Kind.NOTICE), m.read_error(x.frame.body)
                self.said.append((server, read(x.frame.body)))
            elif server not in self.down:
                self._queue.append(Message(server, x.peer, _copied(x.frame), x.close))
                if x.close:  # a loop reads nothing more from a connection that it closes
                    here = server, x.peer
                    self._queue = deque(q for q in self._queue if self._ends.get((q.source, q.peer)) != here)


def _copied(frame: Frame) -> Frame:
    """As the kernel takes it: what is written into the memory afterwards does not show."""
    return replace(frame, payload=None if frame.payload is None else memoryview(bytearray(frame.payload)))


class Worker:
    """A worker of rank r, session 70 + r, that speaks the protocol by hand."""

    def __init__(self, ring: Ring, rank: int = 0) -> None:
        self.ring, self.rank = ring, rank
        self.frames: list[Frame] = []
        self.seq = self.clock = 0
        self._peer = 0

    def open(self, server: int, base: int = 1) -> m.Attached:
        """Connect to a primary, and use table 1."""
        self._peer = self.ring.join(self, server)
        for seq, request in enumerate((m.Open(70 + self.rank, self.rank, 0, MEMBERS), m.Attach(1, False, 0, base))):
            self.ring.send(self._peer, Frame(Kind.REQUEST, seq=(1 << 62) + seq, body=m.pack(request)))
            self.ring.run()
        answers = [m.unpack_reply(f.body) for f in self.take(Kind.REPLY)]
        attached = answers[-1]
        assert isinstance(attached, m.Attached), self.frames
        return attached

    def ask(self, request: m.Request) -> m.Reply:
        """Ask the primary, and hear its answer."""
        self.ring.send(self._peer, Frame(Kind.REQUEST, seq=(1 << 62) + 2, body=m.pack(request)))
        self.ring.run()
        (answer,) = self.take(Kind.REPLY)
        return m.unpack_reply(answer.body)

    def pull(self) -> None:
        """Ask for all of the table's values."""
        size = self.ring.node(self._target()).shard.tables[1].size
        self.ring.send(self._peer, Frame(Kind.PULL, table=1, epoch=self.ring.epoch, clock=self.clock, stop=size))
        self.ring.run()

    def push(self, seed: int, deliver: bool = True, wrote: bool = False) -> list[Frame]:
        """A step of random integers, a frame per block; with ``deliver`` everything that follows happens at once.

        ``wrote``: it starts from values that this worker has written.
        """
        self.clock += 1
        generator = torch.Generator().manual_seed(seed)
        node = self.ring.node(self._target())
        table = node.shard.tables[1]
        gradient = torch.zeros(table.size, dtype=torch.uint8)
        for s in layout(table.spec, self.ring.shards).segments[0]:
            floats = gradient[s.offset : s.end].view(torch.float32)
            floats.copy_(torch.randint(-9, 10, floats.shape, generator=generator).float())
        frames = self._writes(seed) if wrote else []
        for block in layout(table.spec, self.ring.shards).blocks_of(0):
            self.seq += 1
            frame = Frame(Kind.PUSH, table=1, epoch=self.ring.epoch, seq=self.seq, clock=self.clock, members=MEMBERS)
            frame.start, frame.stop = block.local, block.local + block.size
            frame.payload = view(gradient[block.local : block.local + block.size])
            frames.append(frame)
        frames[-1].flags = Flag.END | (Flag.WROTE if wrote else Flag.NONE)
        self.again(frames, deliver)
        return frames

    def _writes(self, seed: int) -> list[Frame]:
        frames = []
        for s in layout(self.ring.node(self._target()).shard.tables[1].spec, self.ring.shards).segments[0]:
            self.seq += 1
            frame = Frame(Kind.ASSIGN, Flag.WROTE, table=1, seq=self.seq, clock=self.clock, members=MEMBERS)
            frame.start, frame.stop = s.offset, s.end
            frame.payload = view(torch.full((frame.length // 4,), 100.0 + seed).view(torch.uint8))
            frames.append(frame)
        return frames

    def again(self, frames: list[Frame], deliver: bool = True) -> None:
        """These pushes over the present connection."""
        for frame in frames:
            frame.epoch = self.ring.epoch
            self.ring.send(self._peer, frame)
        if deliver:
            self.ring.run()

    def _target(self) -> int:
        return self.ring._ends[-1, self._peer][0]

    def take(self, kind: Kind) -> list[Frame]:
        """What came of this kind since it was last asked for."""
        found = [frame for frame in self.frames if frame.kind == kind]
        self.frames = [frame for frame in self.frames if frame.kind != kind]
        return found

    def acks(self) -> list[int]:
        return [frame.seq for frame in self.take(Kind.ACK)]
