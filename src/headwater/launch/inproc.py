"""A cluster in this process: coordinator and servers called directly, no sockets, no threads of their own.

A client's frame runs through everything it causes before the call returns, under one lock; threads may be workers.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

from headwater.cluster.coordinator import Coordinator
from headwater.errors import DeadlineExceeded, HeadwaterError, LinkBroken
from headwater.server import COORDINATOR
from headwater.server.node import Node
from headwater.transports import inproc
from headwater.transports.stream import Handler, Link
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind, Outgoing

_TO_COORDINATOR = -1


class InprocHub:
    """One cluster of ``servers`` shards."""

    def __init__(self, servers: int) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._coordinator = Coordinator(servers, time.monotonic())
        self._nodes: list[Node] = []
        self._links: dict[int, InprocLink] = {}
        self._peers = itertools.count(1)
        self._server_peer: dict[int, int] = {}  # coordinator's peer number -> shard
        self._queue: deque[tuple[int, Outgoing]] = deque()  # (who says it: shard or -1, what)
        for shard in range(servers):
            self._join(shard, servers)

    def _join(self, shard: int, servers: int) -> None:
        peer = next(self._peers)
        self._server_peer[peer] = shard
        self._nodes.append(Node(shard, servers, 1))
        join = m.Join("server", shard, address=f"inproc://{shard}")
        self._coordinator.receive(peer, Frame(Kind.REQUEST, seq=1, body=m.pack(join)), time.monotonic())

    def connect(self, target: int, handler: Handler) -> Link:
        with self.lock:
            link = InprocLink(self, target, next(self._peers), handler)
            self._links[link.peer] = link
            return link

    def deliver(self, link: InprocLink, frame: Frame) -> None:
        """A client's frame, and everything that follows from it."""
        with self.lock:
            if link.target == _TO_COORDINATOR:
                self._say(_TO_COORDINATOR, self._coordinator.receive(link.peer, frame, time.monotonic()))
            else:
                node = self._nodes[link.target]
                if frame.payload is not None:
                    node.landing(link.peer, frame)[:] = frame.payload
                self._say(link.target, node.receive(link.peer, frame))
            self._settle()

    def disconnect(self, link: InprocLink) -> None:
        with self.lock:
            if self._links.pop(link.peer, None) is None:
                return
            if link.target == _TO_COORDINATOR:
                self._say(_TO_COORDINATOR, self._coordinator.disconnected(link.peer, time.monotonic()))
            else:
                self._say(link.target, self._nodes[link.target].closed(link.peer))
            self._settle()

    def _say(self, speaker: int, outgoing: list[Outgoing]) -> None:
        self._queue.extend((speaker, out) for out in outgoing)

    def _settle(self) -> None:
        while self._queue:
            speaker, out = self._queue.popleft()
            if speaker == _TO_COORDINATOR and out.peer in self._server_peer:
                shard = self._server_peer[out.peer]
                self._say(shard, self._nodes[shard].coordinator(out.frame))
            elif speaker != _TO_COORDINATOR and out.peer == COORDINATOR:
                peer = next(p for p, shard in self._server_peer.items() if shard == speaker)
                self._say(_TO_COORDINATOR, self._coordinator.receive(peer, out.frame, time.monotonic()))
            else:
                link = self._links.get(out.peer)
                if link is not None:
                    link.arrive(out.frame, out.close)
        self.changed.notify_all()

    def beat(self) -> None:
        """Heartbeats of the servers, when someone asks how they are."""
        for peer, shard in self._server_peer.items():
            body = m.pack(self._nodes[shard].heartbeat())
            self._coordinator.receive(peer, Frame(Kind.NOTICE, body=body), time.monotonic())


class InprocLink:
    """One client's connection to the coordinator or to a shard."""

    shared = False

    def __init__(self, hub: InprocHub, target: int, peer: int, handler: Handler) -> None:
        self.target = target
        self.peer = peer
        self._hub = hub
        self._handler = handler
        self._error: HeadwaterError | None = None

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        if self._error is not None:
            raise self._error
        with self._hub.lock:
            if self.target == _TO_COORDINATOR:
                self._hub.beat()
            self._hub.deliver(self, frame)

    def arrive(self, frame: Frame, close: bool) -> None:
        """Called under the hub's lock; the payload is copied at once, so that it can never be torn."""
        try:
            if frame.payload is not None:
                target = self._handler.landing(frame)
                target[:] = frame.payload
            self._handler.receive(frame, ())
        except HeadwaterError as error:
            self._error = error
        if close and self._error is None:
            self._error = LinkBroken("the server closed the connection")

    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        with self._hub.changed:
            while not done():
                if self._error is not None:
                    raise self._error
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded("the others did not come in time; what was pushed may still be applied")
                self._hub.changed.wait(left)

    def prefetch(self, done: Callable[[], bool]) -> None:
        """Nothing to do: what arrives has arrived."""

    def close(self) -> None:
        if self._error is None:
            self._error = LinkBroken("this client has closed the connection")
        with contextlib.suppress(HeadwaterError):
            self._hub.disconnect(self)


_hubs: dict[str, InprocHub] = {}
_making = threading.Lock()


def open_hub(name: str, servers: int) -> InprocHub:
    """The cluster of this name; an empty name makes a new one each time."""
    with _making:
        if not name:
            return InprocHub(servers)
        return _hubs.setdefault(name, InprocHub(servers))


inproc.provide(open_hub)
