"""Memory for parts of versions. It is used again: writing fresh memory takes several times as long.

Bytes that a reader may still look at are never overwritten. A room is free again when nothing refers to it in this
process (``lend``) and every reader that was given its descriptor has said that it maps nothing of it any more. A reader
that is gone without a word may live on somewhere: then the room's memory goes back to the kernel, which keeps the
reader's pages as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headwater.errors import NotEnoughMemory
from headwater.transports.memory import Sealed

SPARE = 2
"""Free rooms of one size that are kept."""

Bytes = npt.NDArray[np.uint8]


class Room:
    """``size`` bytes. ``readers``: connections over which its descriptor went; ``fd`` is -1 where nothing is shared."""

    def __init__(self, size: int, share: bool, beside: int = 0) -> None:
        self.size = size
        self.readers: set[int] = set()
        self.spoilt = False  # a reader went without a word
        self._lent = 0
        self._retired = False
        self._guard = threading.RLock()  # a finalizer may run in the thread that holds it
        self._free: Callable[[Room], None] | None = None
        self._sealed = Sealed("version", size, beside) if share else None
        self._memory = self._sealed.region.buffer if self._sealed is not None else (ctypes.c_ubyte * max(1, size))()
        self.array: Bytes = np.frombuffer(memoryview(self._memory).cast("B"), dtype=np.uint8)[:size]

    @property
    def fd(self) -> int:
        return -1 if self._sealed is None else self._sealed.fd

    def lend(self) -> memoryview:
        """Its bytes; while the view or a slice of it is there, the room is not used for anything else."""
        loan = (ctypes.c_ubyte * self.size).from_buffer(self._memory)
        with self._guard:
            self._lent += 1
        weakref.finalize(loan, self._returned)
        return memoryview(loan).cast("B").toreadonly()

    def _returned(self) -> None:
        with self._guard:
            self._lent -= 1
        self._settle()

    def forget(self, reader: int, *, clean: bool) -> None:
        """A reader has said that it maps nothing any more, or has gone without saying so."""
        if reader in self.readers:
            self.readers.discard(reader)
            self.spoilt = self.spoilt or not clean
            self._settle()

    def retire(self, free: Callable[[Room], None]) -> None:
        """Nobody wants the bytes; ``free`` is called as soon as they may be overwritten."""
        with self._guard:
            self._retired, self._free = True, free
        self._settle()

    def regain(self) -> bool:
        """Take it back for other bytes, if the caller's loan is the only look at it; whether that is so."""
        with self._guard:
            if self._lent != 1 or self.readers or self.spoilt:
                return False
            self._retired, self._free = False, None
            return True

    def _settle(self) -> None:
        with self._guard:
            if not self._retired or self._lent or self.readers:
                return
            free, self._free, self._retired = self._free, None, False
        if free is not None and not self.spoilt:
            free(self)
        elif free is not None:
            self.close()

    def close(self) -> None:
        """Give the memory back to the kernel, which frees it with the last mapping."""
        if self._sealed is not None:
            self._sealed.close()


class Rooms:
    """The rooms of one process. Thread-safe. ``share``: other processes of this host can map them."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._free: dict[int, list[Room]] = {}
        self._unwanted: set[int] = set()  # sizes of which none is kept
        self._fresh: weakref.WeakSet[Room] = weakref.WeakSet()  # whose pages are still to come
        self._closed = False
        self._guard = threading.RLock()  # a finalizer may run in the thread that holds it

    def take(self, size: int) -> Room:
        """A room of any content. Raises ``NotEnoughMemory``."""
        with self._guard:
            self._unwanted.discard(size)
            free = self._free.get(size)
            if free:
                return free.pop()
            room = Room(size, self._share, sum(each.size for each in self._fresh))
            self._fresh.add(room)
            return room

    def written(self, room: Room) -> None:
        """All of a room has been written to: its memory is no longer only promised, and rooms like it are wanted."""
        with self._guard:
            self._fresh.discard(room)
            self._unwanted.discard(room.size)

    def prepare(self, size: int) -> None:
        """Have a room of this size ready, its pages written to; not if there is one, or no memory for it."""
        with self._guard:
            if self._closed or size in self._unwanted or self._free.get(size):
                return
        with contextlib.suppress(NotEnoughMemory):
            room = Room(size, self._share)
            room.array.fill(0)
            self.give(room)

    def give(self, room: Room) -> None:
        """Nobody wants what is in it. It is used again as soon as nobody can see it."""
        with self._guard:
            self._fresh.discard(room)
        room.retire(self._back)

    def _back(self, room: Room) -> None:
        with self._guard:
            free = self._free.setdefault(room.size, [])
            if len(free) < SPARE and not self._closed and room.size not in self._unwanted:
                free.append(room)
                return
        room.close()

    def unwanted(self, size: int) -> None:
        """There are no bytes of this size any more: free rooms of it are not kept, until one is taken again."""
        with self._guard:
            self._unwanted.add(size)
            free = self._free.pop(size, [])
        for room in free:
            room.close()

    def close(self) -> None:
        """Let go of what is free."""
        with self._guard:
            self._closed = True
            free, self._free = [room for rooms in self._free.values() for room in rooms], {}
        for room in free:
            room.close()
