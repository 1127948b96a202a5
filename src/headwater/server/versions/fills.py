"""Parts of versions that a server fetches from another: it has become a copy of their shard after they were made.

One connection per shard's part of a version, table after table. A state machine as the rest of a server: frames and
dials in and out.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from headwater.errors import HeadwaterError, ProtocolError
from headwater.server.versions.shelf import Key, Shelf
from headwater.transports.rooms import Room
from headwater.wire import messages as m
from headwater.wire import sums
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind
from headwater.wire.outgoing import Dial, Instruction, Outgoing

log = logging.getLogger("headwater")


@dataclass(slots=True)
class _Fill:
    """``left``: parts that are still to come, the first on its way into ``room``. ``got``: those that are here."""

    order: v.Hold
    left: list[v.PartDigest]
    peer: int | None = None
    room: Room | None = None
    checking: bool = False
    expected: sums.Sums | None = None
    got: list[tuple[Key, Room, sums.Sums]] = field(default_factory=list)


class Fills:
    """``keys`` numbers dials. Without ``wake`` (no threads) what has come is checked at once."""

    def __init__(self, shelf: Shelf, keys: count[int], wake: Callable[[], None] | None) -> None:
        self._shelf = shelf
        self._keys = keys
        self._wake = wake
        self._by_key: dict[int, _Fill] = {}
        self._by_peer: dict[int, _Fill] = {}
        self._checked: queue.SimpleQueue[tuple[_Fill, bool]] = queue.SimpleQueue()

    def __contains__(self, peer: int) -> bool:
        return peer in self._by_peer

    def dials(self, key: int) -> bool:
        """Whether the dial of this number is for a fill."""
        return key in self._by_key

    def begin(self, order: v.Hold) -> list[Instruction]:
        """The coordinator wants this server to hold a shard's part of a version too."""
        if self._shelf.knows(order.number, order.shard, order.parts):
            self._shelf.say(order.number, order.shard)
            return []
        same = (order.number, order.shard)
        under_way = [*self._by_key.values(), *self._by_peer.values()]
        before = next((fill for fill in under_way if (fill.order.number, fill.order.shard) == same), None)
        out: list[Instruction] = []
        if before is not None and before.peer is not None and before.order.holder != order.holder:
            out, before = self._end(before), None  # that holder is gone, perhaps without a word
        if before is not None or not order.parts:
            return out
        key = next(self._keys)
        self._by_key[key] = _Fill(order, list(order.parts))
        return [*out, Dial(key, order.holder.address, order.holder.local, order.holder.host)]

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        """What became of a dial. In vain: the coordinator will ask again."""
        fill = self._by_key.pop(key)
        if peer is None:
            return []
        fill.peer, self._by_peer[peer] = peer, fill
        return [self._ask(fill)]

    def _ask(self, fill: _Fill) -> Outgoing:
        assert fill.peer is not None
        fetch = v.Fetch(fill.order.number, fill.order.shard, fill.left[0].table)
        return Outgoing(fill.peer, Frame(Kind.REQUEST, seq=1, body=m.pack(fetch)))

    def landing(self, peer: int, frame: Frame) -> memoryview:
        """Where the bytes go. Raises ``ProtocolError``."""
        room = self._by_peer[peer].room
        if frame.kind != Kind.PIECE or room is None or frame.start + frame.length > room.size:
            raise ProtocolError(f"{frame.kind.name} of bytes of a version that nobody asked for")
        return room.array.data[frame.start : frame.start + frame.length]

    def receive(self, peer: int, frame: Frame) -> list[Instruction]:
        """A frame of the holder. Raises ``ProtocolError``."""
        fill = self._by_peer[peer]
        if fill.checking or (frame.kind == Kind.REPLY and fill.room is not None):
            raise ProtocolError(f"{frame.kind.name} from a holder of a version, which has nothing more to say")
        if frame.kind == Kind.PIECE:
            return self._arrived(fill) if frame.flags & Flag.END else []
        if frame.kind != Kind.REPLY:  # it has not the part any more
            return self._end(fill)
        part = m.unpack_reply(frame.body)
        wanted = fill.left[0]
        whole = isinstance(part, v.Part) and part.encoding == "whole" and part.size == part.nbytes == wanted.size
        if not isinstance(part, v.Part) or not whole or sums.digest(sums.unpack(part.sums)) != wanted.digest:
            raise ProtocolError("a holder of a version sent another part than the one that was asked for")
        try:
            fill.room, fill.expected = self._shelf.rooms.take(wanted.size), sums.unpack(part.sums)
        except HeadwaterError as error:
            log.warning("version number %d of shard %d: %s", fill.order.number, fill.order.shard, error)
            return self._end(fill)
        return []

    def _arrived(self, fill: _Fill) -> list[Instruction]:
        """Check the bytes, on a thread: a shard's clients do not wait for that."""
        fill.checking = True
        if self._wake is None:
            self._check(fill)
            return self.woken()
        threading.Thread(target=self._check, args=(fill,), name="headwater-check", daemon=True).start()
        return []

    def _check(self, fill: _Fill) -> None:
        assert fill.room is not None
        assert fill.expected is not None
        found = sums.damaged(fill.room.array, fill.expected, range(len(fill.expected)))
        self._checked.put((fill, not found))
        if self._wake is not None:
            self._wake()

    def woken(self) -> list[Instruction]:
        """Parts that have been checked."""
        out: list[Instruction] = []
        while not self._checked.empty():
            fill, good = self._checked.get()
            if fill.peer not in self._by_peer:  # given up meanwhile
                continue
            out += self._next(fill) if good else self._end(fill)
        return out

    def _next(self, fill: _Fill) -> list[Instruction]:
        assert fill.room is not None
        assert fill.expected is not None
        part, fill.checking = fill.left.pop(0), False
        fill.got.append((Key(fill.order.number, fill.order.shard, part.table), fill.room, fill.expected))
        fill.room = fill.expected = None
        if fill.left:
            return [self._ask(fill)]
        got, fill.got = fill.got, []
        self._shelf.take_in(fill.order.number, fill.order.shard, got, fill.order.specs)
        return self._end(fill)

    def drop(self, numbers: Sequence[int]) -> list[Instruction]:
        """Nobody wants these versions any more."""
        return [x for fill in list(self._by_peer.values()) if fill.order.number in numbers for x in self._end(fill)]

    def closed(self, peer: int) -> None:
        """The holder is gone; the coordinator will name another."""
        self._forget(self._by_peer[peer])

    def _end(self, fill: _Fill) -> list[Instruction]:
        self._forget(fill)
        return [] if fill.peer is None else [Outgoing(fill.peer, Frame(Kind.NOTICE), close=True)]

    def _forget(self, fill: _Fill) -> None:
        if fill.peer is not None:
            self._by_peer.pop(fill.peer, None)
        if fill.room is not None:
            fill.room.spoilt = True  # more of it may be on its way, or being checked
            self._shelf.rooms.give(fill.room)
        for _, room, _ in fill.got:
            self._shelf.rooms.give(room)
