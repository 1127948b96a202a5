"""Memory for parts of versions. It is used again: writing fresh memory takes several times as long.

Bytes that a reader may still look at are never overwritten. A buffer is free again when nothing refers to it in this
process (``lend``) and every reader that was given its descriptor has said that it maps nothing of it any more. A reader
that is gone without a word may live on somewhere: then the buffer's memory goes back to the kernel, which keeps the
reader's pages as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headwater.errors import NotEnoughMemory
from headwater.transports.memory import Sealed

SPARE = 2
"""Free buffers of one size that are kept."""

STEP = 1 << 20
"""Bytes of fresh memory that are found at a time, before it is looked whether the buffer has been taken meanwhile."""

NICE = 10
"""Of the thread that finds them."""

Bytes = npt.NDArray[np.uint8]


class Buffer:
    """``size`` bytes. ``readers``: connections over which its descriptor went; ``fd`` is -1 where nothing is shared."""

    def __init__(self, size: int, share: bool, beside: int = 0) -> None:
        self.size = size
        self.readers: set[int] = set()
        self.tainted = False  # a reader went without a word
        self._lent = 0
        self._retired = False
        self._guard = threading.RLock()  # a finalizer may run in the thread that holds it
        self._free: Callable[[Buffer], None] | None = None
        self._sealed = Sealed("version", size, beside) if share else None
        self._memory = self._sealed.region.buffer if self._sealed is not None else (ctypes.c_ubyte * max(1, size))()
        self.array: Bytes = np.frombuffer(memoryview(self._memory).cast("B"), dtype=np.uint8)[:size]

    @property
    def fd(self) -> int:
        return -1 if self._sealed is None else self._sealed.fd

    def lend(self) -> memoryview:
        """Its bytes; while the view or a slice of it is there, the buffer is not used for anything else."""
        loan = (ctypes.c_ubyte * self.size).from_buffer(self._memory)
        with self._guard:
            self._lent += 1
        weakref.finalize(loan, self._returned)
        return memoryview(loan).cast("B").toreadonly()

    def _returned(self) -> None:
        with self._guard:
            self._lent -= 1
        self._release()

    def forget(self, reader: int, *, clean: bool) -> None:
        """A reader has said that it maps nothing any more, or has gone without saying so."""
        if reader in self.readers:
            self.readers.discard(reader)
            self.tainted = self.tainted or not clean
            self._release()

    def retire(self, free: Callable[[Buffer], None]) -> None:
        """Nobody wants the bytes; ``free`` is called as soon as they may be overwritten."""
        with self._guard:
            self._retired, self._free = True, free
        self._release()

    def reclaim(self) -> bool:
        """Take it back for other bytes, if the caller's loan is the only look at it; whether that is so."""
        with self._guard:
            if self._lent != 1 or self.readers or self.tainted:
                return False
            self._retired, self._free = False, None
            return True

    def _release(self) -> None:
        with self._guard:
            if not self._retired or self._lent or self.readers:
                return
            free, self._free, self._retired = self._free, None, False
        if free is not None and not self.tainted:
            free(self)
        elif free is not None:
            self.close()

    def populate(self, start: int, stop: int) -> bool:
        """Have the pages of these bytes, which stay as they are; whether that can be."""
        return self._sealed is None or self._sealed.region.populate(start, stop)

    def close(self) -> None:
        """Give the memory back to the kernel, which frees it with the last mapping."""
        if self._sealed is not None:
            self._sealed.close()


class BufferPool:
    """The buffers of one process. Thread-safe. ``share``: other processes of this host can map them."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._free: dict[int, list[Buffer]] = {}
        self._wanted: dict[int, int] = {}  # by size: free buffers that are to be there
        self._unwanted: set[int] = set()  # sizes of which none is kept
        self._fresh: weakref.WeakSet[Buffer] = weakref.WeakSet()  # whose pages are still to come
        self._coming: Buffer | None = None  # whose pages come now, from a thread
        self._thread: threading.Thread | None = None
        self._closed = False
        self._guard = threading.RLock()  # a finalizer may run in the thread that holds it

    def take(self, size: int) -> Buffer:
        """A buffer of any content. Raises ``NotEnoughMemory``."""
        with self._guard:
            self._unwanted.discard(size)
            self._wanted[size] = max(0, self._wanted.get(size, 0) - 1)
            free = self._free.get(size)
            if free:
                return free.pop()
            buffer = self._coming
            if buffer is not None and buffer.size == size:  # the pages that it has not yet come with the first write
                self._coming = None
            else:
                buffer = Buffer(size, self._share, self._promised)
            self._fresh.add(buffer)
            return buffer

    @property
    def _promised(self) -> int:
        coming = 0 if self._coming is None else self._coming.size
        return coming + sum(each.size for each in self._fresh)

    def written(self, buffer: Buffer) -> None:
        """All of a buffer has been written to: its memory is there, and buffers of its size are wanted."""
        with self._guard:
            self._fresh.discard(buffer)
            self._unwanted.discard(buffer.size)

    # ---- memory for what comes next --------------------------------------------------------------

    def prepare(self, size: int, count: int = 1) -> None:
        """Let a thread see to it, in small steps, that the next ``count`` buffers of this size have their pages.

        Where there is no memory for them there are none.
        """
        with self._guard:
            if self._closed or size in self._unwanted:
                return
            self._wanted[size] = count
            if self._thread is None and self._lacking() is not None:
                self._thread = threading.Thread(target=self._make_ready, name="headwater-pages", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the pages come when they are written to
                    self._thread = None

    def _lacking(self) -> int | None:
        wanted = self._wanted.items()
        return next((size for size, count in wanted if len(self._free.get(size, ())) < count), None)

    def _make_ready(self) -> None:
        with contextlib.suppress(OSError):  # a trainer on the same cores comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (buffer := self._begin()) is not None:
            for start in range(0, buffer.size, STEP):
                if self._coming is not buffer or not buffer.populate(start, min(start + STEP, buffer.size)):
                    break
            with self._guard:
                if self._coming is buffer:  # else it was taken, or nobody wants one any more
                    self._coming = None
                    self.give(buffer)

    def _begin(self) -> Buffer | None:
        """The next buffer to make ready, or None: then the thread ends."""
        with self._guard:
            size = None if self._closed else self._lacking()
            if size is not None:
                with contextlib.suppress(NotEnoughMemory, MemoryError, OSError):  # then there are none
                    self._coming = Buffer(size, self._share, self._promised)
                    return self._coming
                del self._wanted[size]
            self._thread = None
            return None

    # ---- what is not used any more ---------------------------------------------------------------

    def give(self, buffer: Buffer) -> None:
        """Nobody wants what is in it. It is used again as soon as nobody can see it."""
        with self._guard:
            self._fresh.discard(buffer)
        buffer.retire(self._back)

    def _back(self, buffer: Buffer) -> None:
        with self._guard:
            free = self._free.setdefault(buffer.size, [])
            most = max(SPARE, self._wanted.get(buffer.size, 0))
            if len(free) < most and not self._closed and buffer.size not in self._unwanted:
                free.append(buffer)
                return
        buffer.close()

    def unwanted(self, size: int) -> None:
        """There are no bytes of this size any more: free buffers of it are not kept, until one is taken again."""
        with self._guard:
            self._unwanted.add(size)
            self._wanted.pop(size, None)
            if self._coming is not None and self._coming.size == size:
                self._coming = None
            free = self._free.pop(size, [])
        for buffer in free:
            buffer.close()

    def close(self) -> None:
        """Let go of what is free."""
        with self._guard:
            self._closed = True
            self._coming = None
            free, self._free = [buffer for buffers in self._free.values() for buffer in buffers], {}
        for buffer in free:
            buffer.close()
