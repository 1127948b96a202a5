"""The coordinator, at the other end of connection 0, as a server's process sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from headwater.errors import HeadwaterError, LinkBroken, ProtocolError
from headwater.server import COORDINATOR
from headwater.transports.channel import Channel, send_all
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind, encode
from headwater.wire.outgoing import Dial

if TYPE_CHECKING:
    from headwater.server.peers import Peer
    from headwater.server.server import Server

PATIENCE = 300.0  # seconds that a server waits for a coordinator that is to come back
AGAIN = 0.2  # seconds between two attempts
ANSWER = 5.0  # seconds that a coordinator has to answer a server that comes back
STUCK = 60.0  # seconds in which the loop must turn once, or its server counts as dead


class Orders:
    """A coordinator that is simply there: what it says is done."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def landing(self, frame: Frame) -> memoryview:
        raise ProtocolError("the coordinator sends no payloads")

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        self._server.obey(frame)

    def closed(self) -> None:
        """Somebody else looks after it."""

    def tick(self, now: float) -> None:
        """Time has passed."""


class Control(Orders):
    """A coordinator that may go and come back. ``stop`` is called when the server has to end."""

    def __init__(
        self,
        server: Server,
        join: m.Join,
        welcome: m.Welcome,
        address: str,
        stop: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(server)
        self._join = join
        self._welcome = welcome
        self._address = address
        self._stop = stop
        self._away: float | None = None  # since when the coordinator is
        self._again = 0.0
        self._dialing = False
        self._clock = clock
        self._drain = m.pack(m.Drain(server.setting.server))
        self.drained = False
        self.failure: HeadwaterError | None = None  # why this server must end
        self.turned = clock()
        self.beat = b""

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        if frame.kind == Kind.REPLY:
            self._back(m.unpack_reply(frame.body))
        elif frame.kind == Kind.REQUEST and frame.body == self._drain:
            self.drained = True
            self._stop()
        elif frame.kind == Kind.ERROR and self._away is not None:
            self.failure = m.read_error(frame.body)
            self._stop()
        else:
            self._server.obey(frame)

    def closed(self) -> None:
        if not self._welcome.durable:
            self.failure = LinkBroken("the coordinator is gone; this server ends, its tables end with it")
            self._stop()
            return
        self._dialing = False
        self._away = self._away if self._away is not None else self._clock()
        self._again = self._clock() + AGAIN

    def tick(self, now: float) -> None:
        self.turned = now
        self.beat = encode(Frame(Kind.NOTICE, body=m.pack(self._server.heartbeat())))
        effects = self._server.effects
        if self._away is not None and now - self._away > PATIENCE:
            self.failure = LinkBroken(f"the coordinator did not come back within {PATIENCE:.0f} s; this server ends")
            self._stop()
        elif self._away is not None and now >= self._again:
            if self._dialing:  # it took the connection and has not answered since
                effects.bye(COORDINATOR)
            self._dialing, self._again = True, now + ANSWER
            effects.dial(self, Dial(COORDINATOR, self._address, "", ""))

    def dialed(self, key: int, peer: int | None) -> Peer | None:
        if peer is None:
            self._dialing = False
            self._again = self._clock() + AGAIN
            return None
        self._again = self._clock() + ANSWER
        server = self._server
        join = m.Join(
            "server", self._join.session, self._join.host, self._join.pid, address=self._join.address,
            local=self._join.local, resume=True, server=server.setting.server, hosted=server.hosted(),
            replayed=server.replayed,
        )  # fmt: skip
        server.effects.tell(COORDINATOR, Frame(Kind.REQUEST, seq=1, body=m.pack(join)))
        return self

    def _back(self, reply: m.Reply) -> None:
        """The coordinator knows this server again."""
        if not isinstance(reply, m.Welcome) or reply.server != self._server.setting.server:
            raise ProtocolError(f"the coordinator answered {reply} to a server that came back")
        self._away, self._dialing = None, False
        self._server.ready_again()


class Heart(threading.Thread):
    """Heartbeats on a connection of their own: neither bulk traffic nor a long step delays them."""

    def __init__(self, control: Control, connect: Callable[[], Channel], period: float) -> None:
        super().__init__(name="headwater-heart", daemon=True)
        self._control = control
        self._connect = connect
        self._period = period

    def run(self) -> None:
        channel: Channel | None = None
        while True:
            time.sleep(self._period)
            if time.monotonic() - self._control.turned > STUCK:
                continue
            try:
                channel = channel or self._connect()
                if self._control.beat:
                    send_all(channel, self._control.beat)
            except (HeadwaterError, OSError):
                if channel is not None:
                    channel.close()
                channel = None
