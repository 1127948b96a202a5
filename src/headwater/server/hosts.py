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
    from headwater.cluster.effects import Effects
    from headwater.cluster.store.base import Store
    from headwater.server.snapshots.keeper import Keeper

log = logging.getLogger("headwater")


class CoordinatorHost:
    """Serves a ``Coordinator`` and carries out its ``Effects``. No payload ever comes here.

    ``store`` keeps what must be durable, ``keeper`` works on the files of snapshots: a cluster without a state folder
    or a folder for snapshots has no such.
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
        self._carry_out(coordinator.start())  # nothing is sent: nobody is connected

    def landing(self, peer: int, frame: Frame) -> memoryview:
        raise ProtocolError(f"{frame.kind.name} with a payload: tensors do not pass through the coordinator")

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        close_all(fds)
        return self._carry_out(self._coordinator.receive(peer, frame, self._clock()))

    def closed(self, peer: int) -> list[Instruction]:
        return self._carry_out(self._coordinator.disconnected(peer, self._clock()))

    def tick(self, now: float) -> list[Instruction]:
        out = self._carry_out(self._coordinator.tick(now))
        while self._keeper is not None and (outcome := self._keeper.poll()) is not None:
            out += self._carry_out(self._coordinator.finished(outcome, now))
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
        out = self._carry_out(self._coordinator.dialed(key, peer is not None, self._clock()))
        return out if peer is None else [*out, Outgoing(peer, Frame(Kind.NOTICE), close=True)]

    def _carry_out(self, effects: Effects) -> list[Instruction]:
        """In the order of its fields; the loop sends what this returns."""
        if effects.durable and self._store is not None:
            try:
                self._store.put(effects.durable)
            except HeadwaterError as error:
                raise Halt(str(error)) from error
        if self._keeper is not None:
            for job in effects.jobs:
                self._keeper.do(job)
        return list(effects.send)
