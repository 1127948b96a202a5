"""Holders' memory for copies out of it, which stays mapped from version to version.

A holder uses the memory of old versions again. Its pages are the same then, and finding them anew for each version
takes longer than copying them does: 60 ms for 500 MB, beside 40.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from headwater.transports import memory

KEPT = 6
"""Memories of each part: as many as take turns where three versions are kept. A holder cannot free them meanwhile."""


class Windows:
    """What one connection's holder has shown, mapped for reading. Thread-safe."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], dict[tuple[int, int], memory.Region]] = {}
        self._guard = threading.Lock()

    def look(self, part: tuple[int, int], fd: int, size: int) -> Any:
        """The memory behind ``fd``, which holds a version of ``part`` (shard, table). Raises ``NotEnoughMemory``.

        Read it only while the version is leased: afterwards it is another one's, at any moment.
        """
        stat = os.fstat(fd)
        with self._guard:
            mine = self._found.setdefault(part, {})
            region = mine.pop((stat.st_dev, stat.st_ino), None)
            if region is None:
                region = memory.Region([memory.Piece(fd, 0, size)], writable=False)
            mine[stat.st_dev, stat.st_ino] = region  # the last one is the latest
            while len(mine) > KEPT:
                del mine[next(iter(mine))]
            return region.buffer

    def close(self) -> None:
        """Unmap all of it, as soon as nobody copies from it."""
        with self._guard:
            self._found.clear()
