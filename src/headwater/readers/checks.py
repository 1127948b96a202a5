"""Checksums of a part while it arrives: a thread sums what is there, beside the one that receives the rest."""

from __future__ import annotations

import queue
import threading

from headwater.wire import sums
from headwater.wire.versions import SUM_BLOCK

WORTH = 8 << 20
"""Bytes of a part from which a thread is worth its start."""


class Check:
    """``part`` is being written; its blocks should have the checksums ``wanted``.

    ``arrived`` and ``damaged`` are called by one thread; whoever gives the part up calls ``end``.
    """

    def __init__(self, part: sums.Bytes, wanted: sums.Sums) -> None:
        self._part = part
        self._wanted = wanted
        self._given = bytearray(len(wanted))  # blocks that the thread has, or had
        self._again: set[int] = set()  # of those, what was written once more since
        self._bad: list[int] = []
        self._jobs: queue.SimpleQueue[range | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def arrived(self, start: int, stop: int) -> None:
        """Bytes ``start:stop`` are there. Blocks that are only begun are left for the end."""
        last = len(self._wanted) if stop == len(self._part) else stop // SUM_BLOCK
        for block in range(start // SUM_BLOCK, min(-(-stop // SUM_BLOCK), len(self._wanted))):
            if self._given[block]:
                self._again.add(block)
        whole = range(-(-start // SUM_BLOCK), last)
        if not whole:
            return
        self._given[whole.start : whole.stop] = bytes([1]) * len(whole)
        self._jobs.put(whole)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="headwater-check", daemon=True)
            self._thread.start()

    def damaged(self) -> list[int]:
        """All of it should be there: the blocks that are not what they should be."""
        self.end()
        if self._thread is not None:
            self._thread.join()
        rest = [block for block in range(len(self._wanted)) if not self._given[block] or block in self._again]
        found = {block for block in self._bad if block not in self._again}
        return sorted(found | set(sums.damaged(self._part, self._wanted, rest)))

    def end(self) -> None:
        """Let the thread end, when it has done what it was given."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (blocks := self._jobs.get()) is not None:
            self._bad += sums.damaged(self._part, self._wanted, blocks)
