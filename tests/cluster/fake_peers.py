"""A coordinator without sockets: peers say things, and what each of them hears is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from headwater.cluster.coordinator import Coordinator, Rules
from headwater.cluster.effects import Effects, Job
from headwater.errors import HeadwaterError
from headwater.testing import FakeClock
from headwater.types import Bulk, DenseSpec, Init, OptimizerSpec, ParameterSpec
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial

T = TypeVar("T", bound=msgspec.Struct)
Heard = m.Reply | m.Notice | m.Request | HeadwaterError

SERVER, WORKER, READER, HEART = 100, 200, 300, 400


def spec(name: str = "t", init: str = "zeros", **changes: object) -> DenseSpec:
    """Large enough to lie on several shards."""
    parameter = ParameterSpec("w", (200_000,), init=Init(init))  # type: ignore[arg-type]
    made = DenseSpec(name, (parameter,), OptimizerSpec("SGD", ({"lr": 0.1},)), Bulk())
    return msgspec.structs.replace(made, **changes)


class FakePeers:
    """``servers`` of them have joined as peers 100, 101, …; worker r is peer 200 + r, reader r is peer 300 + r.

    A server's heartbeats come over a connection of their own: peer 400, 401, ….
    """

    def __init__(self, servers: int = 2, joined: bool = True, **rules: object) -> None:
        self.clock = FakeClock(1000.0)
        self.coordinator = Coordinator(Rules(servers, **rules), self.clock())  # type: ignore[arg-type]
        self.durable: dict[str, bytes | None] = {}  # all that had to be, by key
        self.jobs: list[Job] = []
        self.heard: dict[int, list[Heard]] = {}
        self.dials: list[Dial] = []
        self._seq = 0
        self.carry_out(self.coordinator.start())
        for shard in range(servers if joined else 0):
            self.start(shard)

    def start(self, number: int) -> None:
        """The process of server ``number`` joins."""
        self.ask(SERVER + number, m.Join("server", number, address=f"tcp://127.0.0.1:{number}"))

    def ask(self, peer: int, message: m.Request) -> None:
        self._seq += 1
        self._send(peer, Frame(Kind.REQUEST, seq=self._seq, body=m.pack(message)))

    def tell(self, peer: int, message: m.Notice) -> None:
        self._send(peer, Frame(Kind.NOTICE, body=m.pack(message)))

    def answer(self, peer: int, number: int, message: m.Reply | HeadwaterError, shard: int | None = None) -> None:
        """A server's answer to the creation of table ``number`` on ``shard`` (default: that of its own number)."""
        shard = max(0, peer - SERVER) % self.coordinator.shards if shard is None else shard
        if isinstance(message, HeadwaterError):
            self._send(peer, Frame(Kind.ERROR, shard=shard, seq=number, body=m.error_body(message)))
        else:
            self._send(peer, Frame(Kind.REPLY, shard=shard, seq=number, body=m.pack(message)))

    def _send(self, peer: int, frame: Frame) -> None:
        self.carry_out(self.coordinator.receive(peer, frame, self.clock()))

    def hang_up(self, peer: int, *, listens: bool = False) -> None:
        """A connection ends. Where it was a server's, the coordinator looks whether anybody ``listens`` there still."""
        self.carry_out(self.coordinator.disconnected(peer, self.clock()))
        dials, self.dials = self.dials, []
        for dial in dials:
            self.carry_out(self.coordinator.dialed(dial.key, listens, self.clock()))

    def pass_time(self, seconds: float, alive: tuple[int, ...] = ()) -> None:
        """Half-second ticks; the peers in ``alive`` send heartbeats."""
        for _ in range(round(seconds * 2)):
            self.clock.advance(0.5)
            for peer in alive:
                self.beat(peer)
            self.carry_out(self.coordinator.tick(self.clock()))

    def beat(self, peer: int) -> None:
        """The heartbeat of a worker, a reader or (server n, as peer 100 + n) a server."""
        if SERVER <= peer < WORKER:
            self.tell(peer - SERVER + HEART, m.Heartbeat(server=peer - SERVER, session=peer - SERVER))
        else:
            self.tell(peer, m.Heartbeat())

    def restart(self, state: dict[str, bytes]) -> None:
        """The coordinator's process is another one now; everybody's connection has ended."""
        self.coordinator = Coordinator(self.coordinator.rules, self.clock(), state)
        self.heard = {}

    def carry_out(self, effects: Effects) -> None:
        """As a host does, in the order of the fields."""
        self.durable.update(effects.durable)
        self.jobs += effects.jobs
        readers: dict[Kind, Callable[[bytes], Heard]] = {
            Kind.REPLY: m.unpack_reply,
            Kind.NOTICE: m.unpack_notice,
            Kind.REQUEST: m.unpack_request,
            Kind.ERROR: m.read_error,
        }
        for out in effects.send:
            if isinstance(out, Dial):
                self.dials.append(out)
                continue
            self.heard.setdefault(out.peer, []).append(readers[out.frame.kind](out.frame.body))

    @property
    def state(self) -> dict[str, bytes]:
        """What the store has of it."""
        return {key: value for key, value in self.durable.items() if value is not None}

    def take(self, peer: int) -> list[Heard]:
        """What this peer has heard since it was last asked."""
        return self.heard.pop(peer, [])

    def last(self, peer: int, kind: type[T]) -> T:
        found = [message for message in self.take(peer) if isinstance(message, kind)]
        assert found, f"peer {peer} heard no {kind.__name__}"
        return found[-1]

    def error(self, peer: int) -> HeadwaterError:
        found = [message for message in self.take(peer) if isinstance(message, HeadwaterError)]
        assert found, f"peer {peer} heard no error"
        return found[-1]

    # ---- common openings ---------------------------------------------------------------------

    def join(self, *ranks: int, world: int | None = None) -> None:
        for rank in ranks:
            self.ask(WORKER + rank, m.Join("worker", rank, "host", 4000 + rank, rank, world))

    def create(self, number: int = 1) -> None:
        """All servers have made table ``number``."""
        for shard in range(self.coordinator.shards):
            self.answer(SERVER + shard, number, m.Created(number, 0))
