"""The two hosts that a loop can serve: a coordinator, and a server with its connection to one."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from headwater.cluster.coordinator import Coordinator
from headwater.errors import Halt, HeadwaterError, LinkBroken, ProtocolError
from headwater.server import COORDINATOR
from headwater.transports.memory import close_all
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind, encode
from headwater.wire.outgoing import Dial, Instruction, Outgoing

if TYPE_CHECKING:  # a coordinator holds no tensors and does not load torch
    from headwater.cluster.store import Store
    from headwater.server.server import Server
    from headwater.server.snapshots.keeper import Keeper

log = logging.getLogger("headwater")

PATIENCE = 300.0  # seconds that a server waits for a coordinator that is to come back
AGAIN = 0.2  # seconds between two attempts
ANSWER = 5.0  # seconds that a coordinator has to answer a server that comes back
STUCK = 60.0  # seconds in which the loop must turn once, or its server counts as dead


class CoordinatorHost:
    """Serves a ``Coordinator``. No payload ever comes here. What must be durable is, before anything is sent.

    ``keeper`` does the file work of snapshots, if there is a folder for them.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        store: Store | None = None,
        clock: Callable[[], float] = time.monotonic,
        keeper: Keeper | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._store = store
        self._clock = clock
        self._keeper = keeper
        self._said = ""
        self._durable([])

    def landing(self, peer: int, frame: Frame) -> memoryview:
        raise ProtocolError(f"{frame.kind.name} with a payload: tensors do not pass through the coordinator")

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        close_all(fds)
        return self._durable(self._coordinator.receive(peer, frame, self._clock()))

    def closed(self, peer: int) -> list[Instruction]:
        return self._durable(self._coordinator.disconnected(peer, self._clock()))

    def tick(self, now: float) -> list[Instruction]:
        out = self._durable(self._coordinator.tick(now))
        while self._keeper is not None and (outcome := self._keeper.poll()) is not None:
            out += self._durable(self._coordinator.kept(outcome, now))
        failed = self._coordinator.snapshots.error
        if failed != self._said:
            self._said = failed
            if failed:
                log.warning("no snapshot was written: %s", failed)
        return out

    def work(self) -> list[Instruction]:
        return []

    def woken(self) -> list[Instruction]:
        return []

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        out = self._durable(self._coordinator.dialed(key, peer is not None, self._clock()))
        return out if peer is None else [*out, Outgoing(peer, Frame(Kind.NOTICE), close=True)]

    def _durable(self, out: list[Instruction]) -> list[Instruction]:
        changes = self._coordinator.changes()
        if changes and self._store is not None:
            try:
                self._store.put(changes)
            except HeadwaterError as error:  # memory is ahead of the disk now
                raise Halt(str(error)) from error
        for job in self._coordinator.jobs():
            if self._keeper is not None:
                self._keeper.do(job)
        return list(out)


class ServerHost:
    """Serves a ``Server``; peer 0 is the coordinator. ``stop`` is called when the server has to end."""

    def __init__(
        self,
        server: Server,
        join: m.Join,
        welcome: m.Welcome,
        coordinator: str,
        stop: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._join = join
        self._welcome = welcome
        self._coordinator = coordinator
        self._stop = stop
        self._away: float | None = None  # since when the coordinator is
        self._again = 0.0
        self._dialing = False
        self._clock = clock
        self.drained = False
        self.failure: HeadwaterError | None = None  # why this server must end
        self.turned = clock()
        self.beat = b""

    def landing(self, peer: int, frame: Frame) -> memoryview:
        if peer == COORDINATOR:
            raise ProtocolError("the coordinator sends no payloads")
        return self._server.landing(peer, frame)

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        if peer == COORDINATOR and frame.kind == Kind.REPLY:
            return self._back(m.unpack_reply(frame.body))
        if peer == COORDINATOR and frame.kind == Kind.REQUEST and frame.body == self._drain:
            self.drained = True
            self._stop()
            return []
        if peer == COORDINATOR and frame.kind == Kind.ERROR and self._away is not None:
            self.failure = m.read_error(frame.body)
            self._stop()
            return []
        return self._server.receive(peer, frame, fds)

    def closed(self, peer: int) -> list[Instruction]:
        if peer != COORDINATOR:
            return self._server.closed(peer)
        if not self._welcome.durable:
            self.failure = LinkBroken("the coordinator is gone; this server ends, its tables end with it")
            self._stop()
            return []
        self._dialing = False
        self._away = self._away if self._away is not None else self._clock()
        self._again = self._clock() + AGAIN
        return []

    def tick(self, now: float) -> list[Instruction]:
        self.turned = now
        self.beat = encode(Frame(Kind.NOTICE, body=m.pack(self._server.heartbeat())))
        out = self._server.tick(now)
        if self._away is not None and now - self._away > PATIENCE:
            self.failure = LinkBroken(f"the coordinator did not come back within {PATIENCE:.0f} s; this server ends")
            self._stop()
        elif self._away is not None and now >= self._again:
            if self._dialing:  # it took the connection and has not answered since
                out.append(Outgoing(COORDINATOR, Frame(Kind.NOTICE), close=True))
            self._dialing, self._again = True, now + ANSWER
            out.append(Dial(COORDINATOR, self._coordinator, "", ""))
        return out

    def work(self) -> list[Instruction]:
        return self._server.work()

    def woken(self) -> list[Instruction]:
        return self._server.woken()

    def sync(self) -> list[Instruction]:
        """Once per turn of the loop."""
        return self._server.sync()

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        if key != COORDINATOR:
            return self._server.dialed(key, peer)
        if peer is None:
            self._dialing = False
            self._again = self._clock() + AGAIN
            return []
        self._again = self._clock() + ANSWER
        join = m.Join(
            "server", self._join.session, self._join.host, self._join.pid, address=self._join.address,
            local=self._join.local, resume=True, server=self._server.setting.server, hosted=self._server.hosted(),
            replayed=self._server.replayed,
        )  # fmt: skip
        return [Outgoing(COORDINATOR, Frame(Kind.REQUEST, seq=1, body=m.pack(join)))]

    @property
    def _drain(self) -> bytes:
        return m.pack(m.Drain(self._server.setting.server))

    def _back(self, reply: m.Reply) -> list[Instruction]:
        """The coordinator knows this server again."""
        if not isinstance(reply, m.Welcome) or reply.server != self._server.setting.server:
            raise ProtocolError(f"the coordinator answered {reply} to a server that came back")
        self._away, self._dialing = None, False
        return self._server.ready_again()


class Heart(threading.Thread):
    """Heartbeats on a connection of their own: neither bulk traffic nor a long step delays them."""

    def __init__(self, host: ServerHost, connect: Callable[[], socket.socket], period: float) -> None:
        super().__init__(name="headwater-heart", daemon=True)
        self._host = host
        self._connect = connect
        self._period = period

    def run(self) -> None:
        sock: socket.socket | None = None
        while True:
            time.sleep(self._period)
            if time.monotonic() - self._host.turned > STUCK:
                continue
            try:
                sock = sock or self._connect()
                if self._host.beat:
                    sock.sendall(self._host.beat)
            except (HeadwaterError, OSError):
                with contextlib.suppress(OSError, AttributeError):
                    sock.close()  # type: ignore[union-attr]
                sock = None
