"""A live loop in a thread, and hand-made clients of it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from headwater.cluster.coordinator import Coordinator, Rules
from headwater.server import COORDINATOR
from headwater.server.hosts import CoordinatorHost
from headwater.server.node import Node, Setting
from headwater.server.server import Server
from headwater.transports.address import Address
from headwater.transports.channel import channel_of, send_all
from headwater.transports.loop import Host, Loop, Ranges
from headwater.transports.memory import close_all
from headwater.transports.receiver import Receiver
from headwater.transports.schemes import listen
from headwater.types import DenseSpec
from headwater.wire import auth
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind, encode
from headwater.wire.outgoing import Instruction, Outgoing
from tests.patience import PATIENCE

TOKEN = b"a token for tests"
T = TypeVar("T", bound=msgspec.Struct)


class NodeHost:
    """A server that is the primary of shard 0 of 1; what it says to the coordinator is kept in ``said``.

    Its membership epoch is 1, with one worker, of rank 0.
    """

    def __init__(self) -> None:
        self.detach: Callable[[int, int, Ranges], None] = lambda shard, table, ranges: None
        detach = lambda shard, table, ranges: self.detach(shard, table, ranges)  # noqa: E731
        self.server = Server(Setting(0, 1, share=True, detach=detach))
        self.said: list[Frame] = []
        self.server.adopt(m.View(0, 1, m.Endpoint(0, "", "", "")))
        self._told(Frame(Kind.NOTICE, body=m.pack(m.Members(1, (0,), 0))))

    @property
    def node(self) -> Node:
        return self.server.nodes[0]

    def _told(self, frame: Frame) -> list[Instruction]:
        return self._keep(self.server.receive(COORDINATOR, frame))

    def _keep(self, instructions: list[Instruction]) -> list[Instruction]:
        self.said += [out.frame for out in instructions if isinstance(out, Outgoing) and out.peer == COORDINATOR]
        return [out for out in instructions if out.peer != COORDINATOR]  # type: ignore[union-attr]

    def landing(self, peer: int, frame: Frame) -> memoryview:
        return self.server.landing(peer, frame)

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        return self._keep(self.server.receive(peer, frame, fds))

    def closed(self, peer: int) -> list[Instruction]:
        return self._keep(self.server.closed(peer))

    def tick(self, now: float) -> list[Instruction]:
        return self._keep(self.server.tick(now))

    def work(self) -> list[Instruction]:
        return self._keep(self.server.work())

    def woken(self) -> list[Instruction]:
        return self._keep(self.server.woken())

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        return self._keep(self.server.dialed(key, peer))

    def create(self, number: int, spec: DenseSpec) -> m.Created:
        """A table."""
        self._told(Frame(Kind.REQUEST, seq=number, body=m.pack(m.Create(number, spec))))
        created = m.unpack_reply(self.said.pop().body)
        assert isinstance(created, m.Created)
        return created


@contextlib.contextmanager
def serve(host: Host, token: bytes | None = TOKEN, unix: str = "") -> Iterator[Address]:
    """The address of a loop that serves ``host`` in a thread of its own; a crash of the loop fails the test."""
    loop = Loop(host, token)
    if isinstance(host, NodeHost):
        host.detach = loop.detach
    listener = listen(Address("local", unix) if unix else Address("tcp", "127.0.0.1", 0), token)
    loop.serve(listener)
    crash: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except BaseException as error:  # noqa: BLE001 - it is raised again in the test's own thread
            crash.append(error)

    thread = threading.Thread(target=run, name="loop")
    thread.start()
    try:
        yield listener.address
    finally:
        loop.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        if crash:
            raise crash[0]


def coordinator() -> CoordinatorHost:
    """A control plane with one server, which has joined and never answers."""
    made = Coordinator(Rules(1, silence=1e9, worker_silence=1e9))
    made.receive(1 << 40, Frame(Kind.REQUEST, seq=1, body=m.pack(m.Join("server", 1))), 0.0)
    return CoordinatorHost(made)


class Wire:
    """A client made of bytes. Every wait ends after 10 s."""

    def __init__(self, address: Address) -> None:
        family = socket.AF_UNIX if address.scheme == "local" else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.connect("\0" + address.host if address.scheme == "local" else (address.host, address.port))
        self.channel = channel_of(self.sock)
        self.channel.settimeout(PATIENCE)
        self._receiver = Receiver(self.channel, lambda frame: memoryview(bytearray(frame.payload_length)))
        self._frames: list[Frame] = []

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._receiver.close()
        self.channel.close()

    def send(self, frame: Frame, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        frame.payload_length = frame.payload_length or len(payload)
        data = encode(frame) + payload
        sent = self.channel.send([data], fds, wait=True)
        send_all(self.channel, data[sent:])

    def read(self) -> Frame:
        """The next frame. ``LinkBroken`` at the end of the stream."""
        while not self._frames:
            for frame, fds in self._receiver.read():
                close_all(fds)
                self._frames.append(frame)
        return self._frames.pop(0)

    def ends(self) -> list[Frame]:
        """What still comes until the other side closes the connection."""
        found = []
        with contextlib.suppress(ConnectionError):
            while True:
                found.append(self.read())
        return found

    def greet(self, token: bytes = TOKEN) -> Frame:
        """The handshake; returns its last frame, WELCOME or ERROR."""
        mine = auth.nonce()
        self.send(Frame(Kind.HELLO, body=m.pack(m.Hello(mine, "test"))))
        challenge = m.unpack(self.read().body, m.Challenge)
        self.send(Frame(Kind.PROOF, body=m.pack(m.Proof(auth.proof(token, "client", mine, challenge.nonce)))))
        return self.read()

    def ask(self, request: m.Request, fds: tuple[int, ...] = ()) -> m.Reply:
        """Raises what an ERROR frame says."""
        self.send(Frame(Kind.REQUEST, seq=1 << 62, body=m.pack(request)), fds=fds)
        frame = self.read()
        if frame.kind == Kind.ERROR:
            raise m.read_error(frame.body)
        return m.unpack_reply(frame.body)
