"""A cluster in this process: coordinator and servers called directly, no sockets, no threads of their own.

A client's frame runs through everything it causes before the call returns, under one lock; threads may be workers.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from headwater import interrupts
from headwater.cluster.coordinator import Coordinator, Rules
from headwater.errors import DeadlineExceeded, HeadwaterError, LinkBroken
from headwater.server import COORDINATOR
from headwater.server.node import Setting
from headwater.server.server import Server
from headwater.transports import forks, inproc
from headwater.transports.stream import Handler, Link
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial, Instruction, Outgoing

_TO_COORDINATOR = -1


class InprocHub:
    """One cluster of ``servers`` servers with one shard each."""

    def __init__(self, servers: int) -> None:
        self.lock = threading.RLock()
        self._waiting: list[threading.Lock] = []  # one for each thread that waits for a change, locked until then
        self._coordinator = Coordinator(Rules(servers), time.monotonic())
        self._servers: list[Server] = []
        self._links: dict[int, InprocLink] = {}
        self._peers = itertools.count(1)
        self._server_peer: dict[int, int] = {}  # coordinator's peer number -> server
        self._queue: deque[tuple[int, Instruction]] = deque()  # (who says it: server or -1, what)
        for number in range(servers):
            peer = next(self._peers)
            self._server_peer[peer] = number
            self._servers.append(Server(Setting(number, servers, session=number)))
            join = m.Join("server", number, address=f"inproc://{number}")
            frame = Frame(Kind.REQUEST, seq=1, body=m.pack(join))
            self._tell_coordinator(peer, frame)
        with self.lock:
            self._settle()

    @interrupts.deferred
    def connect(self, target: int, handler: Handler) -> Link:
        """``target``: a shard, which is on the server of the same number, or -1 for the coordinator."""
        with self.lock:
            link = InprocLink(self, target, next(self._peers), handler)
            self._links[link.peer] = link
            return link

    def deliver(self, link: InprocLink, frame: Frame) -> None:
        """A client's frame, and everything that follows from it."""
        with self.lock, _as_in_a_process_of_its_own():
            if link.target == _TO_COORDINATOR:
                self._tell_coordinator(link.peer, frame)
            else:
                server = self._servers[link.target]
                if frame.payload is not None:
                    frame.payload_length = len(frame.payload)
                    server.landing(link.peer, frame)[:] = frame.payload
                self._say(link.target, server.receive(link.peer, frame))
            self._settle()

    def disconnect(self, link: InprocLink) -> None:
        with self.lock:
            if self._links.pop(link.peer, None) is None:
                return
            if link.target == _TO_COORDINATOR:
                self._say(_TO_COORDINATOR, self._coordinator.disconnected(link.peer, time.monotonic()).send)
            else:
                self._say(link.target, self._servers[link.target].closed(link.peer))
            self._settle()

    def _tell_coordinator(self, peer: int, frame: Frame) -> None:
        """Of its effects only ``send`` matters: this cluster ends with its process and has no folder for snapshots."""
        self._say(_TO_COORDINATOR, self._coordinator.receive(peer, frame, time.monotonic()).send)

    def _say(self, speaker: int, instructions: Sequence[Instruction]) -> None:
        self._queue.extend((speaker, out) for out in instructions)

    def _settle(self) -> None:
        while self._queue:
            speaker, out = self._queue.popleft()
            if isinstance(out, Dial):
                raise HeadwaterError("an in-process cluster has one copy of each shard; nobody follows")
            if speaker == _TO_COORDINATOR and out.peer in self._server_peer:
                self._to_server(self._server_peer[out.peer], out)
            elif speaker != _TO_COORDINATOR and out.peer == COORDINATOR:
                peer = next(p for p, server in self._server_peer.items() if server == speaker)
                self._tell_coordinator(peer, out.frame)
            else:
                link = self._links.get(out.peer)
                if link is not None:
                    link.arrive(out.frame, out.close)
        waiting, self._waiting = self._waiting, []
        for turnstile in waiting:
            turnstile.release()

    def next_change(self) -> threading.Lock:
        """Under the lock: a lock that whoever acquires it gets at the next change. It may be left alone as well."""
        turnstile = threading.Lock()
        turnstile.acquire()
        self._waiting.append(turnstile)
        return turnstile

    def _to_server(self, server: int, out: Outgoing) -> None:
        if out.frame.kind != Kind.REPLY:  # its welcome tells a server nothing new here
            self._say(server, self._servers[server].receive(COORDINATOR, out.frame))

    def beat(self) -> None:
        """Heartbeats of the servers, when someone asks how they are."""
        for peer, server in self._server_peer.items():
            body = m.pack(self._servers[server].heartbeat())
            self._tell_coordinator(peer, Frame(Kind.NOTICE, body=body))


class InprocLink:
    """One client's connection to the coordinator or to a shard."""

    shared = False

    def __init__(self, hub: InprocHub, target: int, peer: int, handler: Handler) -> None:
        self.target = target
        self.peer = peer
        self._hub = hub
        self._handler = handler
        self._error: HeadwaterError | None = None
        self._abandoned = False
        forks.watch(self)

    @property
    def error(self) -> HeadwaterError | None:
        """What broke the link, if anything has."""
        return self._error

    @interrupts.deferred
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
                frame.payload_length = len(frame.payload)
                target = self._handler.landing(frame)
                target[:] = frame.payload
            self._handler.receive(frame, ())
        except HeadwaterError as error:
            self._error = error
        if close and self._error is None:
            self._error = LinkBroken("the server closed the connection")

    @interrupts.deferred
    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        if self._abandoned and not done():
            raise forks.refusal()
        while not self._abandoned:
            with self._hub.lock:
                if done():
                    return
                if self._error is not None:
                    raise self._error
                change = self._hub.next_change()
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded("the others did not come in time; what was pushed may still be applied")
            interrupts.interruptible(change.acquire, timeout=min(left, threading.TIMEOUT_MAX))

    def prefetch(self, done: Callable[[], bool]) -> None:
        """Nothing to do: what arrives has arrived."""

    def abandon(self) -> None:
        """In a forked child, where the hub is a copy that a thread may have left in the middle of something."""
        self._error, self._abandoned = forks.refusal(), True

    @interrupts.deferred
    def close(self) -> None:
        if self._abandoned:
            return
        if self._error is None:
            self._error = LinkBroken("this client has closed the connection")
        with contextlib.suppress(HeadwaterError):
            self._hub.disconnect(self)


def _as_in_a_process_of_its_own() -> contextlib.AbstractContextManager[object]:
    """Torch as a server finds it, whatever the script has set: a default device, autocast, inference mode."""
    modes = torch._C._len_torch_function_stack()  # noqa: SLF001 - torch has no other name
    if not modes and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu"):
        return contextlib.nullcontext()
    plain = contextlib.ExitStack()
    plain.enter_context(torch._C.DisableTorchFunction())  # noqa: SLF001
    plain.enter_context(torch.inference_mode(False))
    plain.enter_context(torch.autocast("cpu", enabled=False))
    return plain


_hubs: dict[str, InprocHub] = {}
_making = threading.Lock()


@interrupts.deferred
def open_hub(name: str, servers: int) -> InprocHub:
    """The cluster of this name; an empty name makes a new one each time."""
    with _making:
        if not name:
            return InprocHub(servers)
        return _hubs.setdefault(name, InprocHub(servers))


inproc.provide(open_hub)
