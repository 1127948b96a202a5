"""The two hosts that a loop can serve: a coordinator, and a server with its connection to one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from headwater.cluster.coordinator import Coordinator
from headwater.errors import LinkBroken, ProtocolError
from headwater.server import COORDINATOR
from headwater.transports.memory import close_all
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind, Outgoing

if TYPE_CHECKING:  # a coordinator holds no tensors and does not load torch
    from headwater.server.node import Node

log = logging.getLogger("headwater")


class CoordinatorHost:
    """Serves a ``Coordinator``. No payload ever comes here."""

    def __init__(self, coordinator: Coordinator, clock: Callable[[], float] = time.monotonic) -> None:
        self._coordinator = coordinator
        self._clock = clock

    def landing(self, peer: int, frame: Frame) -> memoryview:
        raise ProtocolError(f"{frame.kind.name} with a payload: tensors do not pass through the coordinator")

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Outgoing]:
        close_all(fds)
        return self._coordinator.receive(peer, frame, self._clock())

    def closed(self, peer: int) -> list[Outgoing]:
        return self._coordinator.disconnected(peer, self._clock())

    def tick(self, now: float) -> list[Outgoing]:
        return self._coordinator.tick(now)


class ServerHost:
    """Serves a ``Node``; peer 0 is the coordinator. ``stop`` is called when the coordinator is gone."""

    def __init__(self, node: Node, heartbeat: float, stop: Callable[[], None]) -> None:
        self._node = node
        self._heartbeat = heartbeat
        self._stop = stop
        self._next = 0.0

    def landing(self, peer: int, frame: Frame) -> memoryview:
        if peer == COORDINATOR:
            raise ProtocolError("the coordinator sends no payloads")
        return self._node.landing(peer, frame)

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Outgoing]:
        if peer == COORDINATOR:
            return self._node.coordinator(frame)
        return self._node.receive(peer, frame, fds)

    def closed(self, peer: int) -> list[Outgoing]:
        if peer == COORDINATOR:
            log.error("%s", LinkBroken("the coordinator is gone; this server ends, its tables end with it"))
            self._stop()
            return []
        return self._node.closed(peer)

    def tick(self, now: float) -> list[Outgoing]:
        if now < self._next:
            return []
        self._next = now + self._heartbeat
        return [Outgoing(COORDINATOR, Frame(Kind.NOTICE, body=m.pack(self._node.heartbeat())))]
