"""Who is at the other end of a connection: a client, a follower, the primary, a reader, the coordinator.

``Server`` knows it by a connection's first frame, or because this server has dialed, and asks never again. Clients,
followers and the primary are a shard's (``node.py``), the coordinator is in ``control.py``; those of versions are here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from headwater.errors import ProtocolError
from headwater.wire.frames import Frame

if TYPE_CHECKING:
    from headwater.server.effects import Effects
    from headwater.versions.backfill import Backfills
    from headwater.versions.part_store import PartStore


class Peer(Protocol):
    """One connection. What follows from a frame goes into the server's ``Effects``.

    Raises ``ProtocolError`` for what makes no sense here: the connection ends then. ``fds`` are closed by the caller.
    """

    def landing(self, frame: Frame) -> memoryview:
        """Where the payload behind this header goes. Raises before anything is allocated by its word."""

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        """A frame has come, whole."""

    def closed(self) -> None:
        """The connection has ended."""


class ReaderPeer:
    """A reader, a relay or another server that fetches parts of versions."""

    def __init__(self, number: int, part_store: PartStore) -> None:
        self._number = number
        self._part_store = part_store

    def landing(self, frame: Frame) -> memoryview:
        raise ProtocolError(f"{frame.kind.name} with a payload from a reader of versions")

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        self._part_store.receive(self._number, frame)

    def closed(self) -> None:
        self._part_store.closed(self._number)


class HolderPeer:
    """Another server, from which this one fetches a part of a version."""

    def __init__(self, number: int, backfills: Backfills, effects: Effects) -> None:
        self._number = number
        self._backfills = backfills
        self._effects = effects

    def landing(self, frame: Frame) -> memoryview:
        if self._number not in self._backfills:  # given up, and about to be closed
            raise ProtocolError(f"{frame.kind.name} of bytes of a version that nobody asked for")
        return self._backfills.landing(self._number, frame)

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        if self._number in self._backfills:
            self._effects.instructions += self._backfills.receive(self._number, frame)

    def closed(self) -> None:
        if self._number in self._backfills:
            self._backfills.closed(self._number)


class Backfilling:
    """Asks for the connections of ``Backfills``."""

    def __init__(self, backfills: Backfills, effects: Effects) -> None:
        self._backfills = backfills
        self._effects = effects

    def dialed(self, key: int, peer: int | None) -> Peer | None:
        self._effects.instructions += self._backfills.dialed(key, peer)
        return None if peer is None else HolderPeer(peer, self._backfills, self._effects)
