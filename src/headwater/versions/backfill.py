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
from headwater.transports.buffers import Buffer
from headwater.versions.part_store import PartStore
from headwater.versions.parts import Key
from headwater.wire import messages as m
from headwater.wire import sums
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind
from headwater.wire.outgoing import Dial, Instruction, Outgoing

log = logging.getLogger("headwater")


@dataclass(slots=True)
class Backfill:
    """``left``: parts that are still to come, the first on its way into ``buffer``. ``got``: those that are here."""

    order: v.Hold
    left: list[v.PartDigest]
    peer: int | None = None
    buffer: Buffer | None = None
    checking: bool = False
    expected: sums.Sums | None = None
    got: list[tuple[Key, Buffer, sums.Sums]] = field(default_factory=list)


class Backfills:
    """``keys`` numbers dials. Without ``wake`` (no threads) what has come is checked at once."""

    def __init__(self, part_store: PartStore, keys: count[int], wake: Callable[[], None] | None) -> None:
        self._part_store = part_store
        self._keys = keys
        self._wake = wake
        self._by_key: dict[int, Backfill] = {}
        self._by_peer: dict[int, Backfill] = {}
        self._checked: queue.SimpleQueue[tuple[Backfill, bool]] = queue.SimpleQueue()

    def __contains__(self, peer: int) -> bool:
        return peer in self._by_peer

    def begin(self, order: v.Hold) -> list[Instruction]:
        """The coordinator wants this server to hold a shard's part of a version too."""
        if self._part_store.has_begun(order.number, order.shard, order.parts):
            self._part_store.report(order.number, order.shard)
            return []
        same = (order.number, order.shard)
        under_way = [*self._by_key.values(), *self._by_peer.values()]
        before = next(
            (backfill for backfill in under_way if (backfill.order.number, backfill.order.shard) == same), None
        )
        out: list[Instruction] = []
        if before is not None and before.peer is not None and before.order.holder != order.holder:
            out, before = self._end(before), None  # that holder is gone, perhaps without a word
        if before is not None or not order.parts:
            return out
        key = next(self._keys)
        self._by_key[key] = Backfill(order, list(order.parts))
        return [*out, Dial(key, order.holder.address, order.holder.local, order.holder.host)]

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        """What became of a dial. In vain: the coordinator will ask again."""
        backfill = self._by_key.pop(key)
        if peer is None:
            return []
        backfill.peer, self._by_peer[peer] = peer, backfill
        return [self._ask(backfill)]

    def _ask(self, backfill: Backfill) -> Outgoing:
        assert backfill.peer is not None
        fetch = v.Fetch(backfill.order.number, backfill.order.shard, backfill.left[0].table)
        return Outgoing(backfill.peer, Frame(Kind.REQUEST, seq=1, body=m.pack(fetch)))

    def landing(self, peer: int, frame: Frame) -> memoryview:
        """Where the bytes go. Raises ``ProtocolError``."""
        buffer = self._by_peer[peer].buffer
        if frame.kind != Kind.PIECE or buffer is None or frame.stop > buffer.size:
            raise ProtocolError(f"{frame.kind.name} of bytes of a version that nobody asked for")
        frame.must_be_plain()
        return buffer.array.data[frame.start : frame.stop]

    def receive(self, peer: int, frame: Frame) -> list[Instruction]:
        """A frame of the holder. Raises ``ProtocolError``."""
        backfill = self._by_peer[peer]
        if backfill.checking or (frame.kind == Kind.REPLY and backfill.buffer is not None):
            raise ProtocolError(f"{frame.kind.name} from a holder of a version, which has nothing more to say")
        if frame.kind == Kind.PIECE:
            return self._arrived(backfill) if frame.flags & Flag.END else []
        if frame.kind != Kind.REPLY:  # it has not the part any more
            return self._end(backfill)
        part = m.unpack_reply(frame.body)
        wanted = backfill.left[0]
        whole = isinstance(part, v.Part) and part.encoding == "whole" and part.size == part.nbytes == wanted.size
        if not isinstance(part, v.Part) or not whole or sums.digest(sums.unpack(part.sums)) != wanted.digest:
            raise ProtocolError("a holder of a version sent another part than the one that was asked for")
        try:
            backfill.buffer, backfill.expected = self._part_store.pool.take(wanted.size), sums.unpack(part.sums)
        except HeadwaterError as error:
            log.warning("version number %d of shard %d: %s", backfill.order.number, backfill.order.shard, error)
            return self._end(backfill)
        return []

    def _arrived(self, backfill: Backfill) -> list[Instruction]:
        """Check the bytes, on a thread: a shard's clients do not wait for that."""
        backfill.checking = True
        if self._wake is None:
            self._check(backfill)
            return self.woken()
        threading.Thread(target=self._check, args=(backfill,), name="headwater-check", daemon=True).start()
        return []

    def _check(self, backfill: Backfill) -> None:
        assert backfill.buffer is not None
        assert backfill.expected is not None
        found = sums.damaged(backfill.buffer.array, backfill.expected, range(len(backfill.expected)))
        self._checked.put((backfill, not found))
        if self._wake is not None:
            self._wake()

    def woken(self) -> list[Instruction]:
        """Parts that have been checked."""
        out: list[Instruction] = []
        while not self._checked.empty():
            backfill, good = self._checked.get()
            if backfill.peer not in self._by_peer:  # given up meanwhile
                continue
            out += self._next(backfill) if good else self._end(backfill)
        return out

    def _next(self, backfill: Backfill) -> list[Instruction]:
        assert backfill.buffer is not None
        assert backfill.expected is not None
        part, backfill.checking = backfill.left.pop(0), False
        backfill.got.append(
            (Key(backfill.order.number, backfill.order.shard, part.table), backfill.buffer, backfill.expected)
        )
        backfill.buffer = backfill.expected = None
        if backfill.left:
            return [self._ask(backfill)]
        got, backfill.got = backfill.got, []
        self._part_store.take_in(backfill.order.number, backfill.order.shard, got, backfill.order.specs)
        return self._end(backfill)

    def drop(self, numbers: Sequence[int]) -> list[Instruction]:
        """Nobody wants these versions any more."""
        return [
            x
            for backfill in list(self._by_peer.values())
            if backfill.order.number in numbers
            for x in self._end(backfill)
        ]

    def closed(self, peer: int) -> None:
        """The holder is gone; the coordinator will name another."""
        self._forget(self._by_peer[peer])

    def _end(self, backfill: Backfill) -> list[Instruction]:
        self._forget(backfill)
        return [] if backfill.peer is None else [Outgoing(backfill.peer, Frame(Kind.NOTICE), close=True)]

    def _forget(self, backfill: Backfill) -> None:
        if backfill.peer is not None:
            self._by_peer.pop(backfill.peer, None)
        if backfill.buffer is not None:
            backfill.buffer.tainted = True  # more of it may be on its way, or being checked
            self._part_store.pool.give(backfill.buffer)
        for _, buffer, _ in backfill.got:
            self._part_store.pool.give(buffer)
