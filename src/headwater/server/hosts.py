"""The host of a coordinator: what must be durable is, before anything is sent. A server is a host itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from headwater.cluster.coordinator import Coordinator
from headwater.errors import Halt, HeadwaterError, ProtocolError
from headwater.transports.memory import close_all
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Instruction, Outgoing

if TYPE_CHECKING:  # a coordinator holds no tensors and does not load torch
    from headwater.cluster.store import Store
    from headwater.server.snapshots.keeper import Keeper

log = logging.getLogger("headwater")


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
