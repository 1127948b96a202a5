"""A part of a version in the making: a copy of a table's values as they are at one moment, and its checksums."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch

from headwater.transports.buffers import Buffer
from headwater.versions.copying import Cut
from headwater.wire.sums import Sums, block_sum
from headwater.wire.versions import SUM_BLOCK

NICE = 10
"""Of the copying threads. A block takes 0.1 ms, so whoever waits for one that is under way waits little for that."""


class PartCut(Cut):
    """``landed`` is called, from the copying thread, when the copy and its ``sums`` are there or have failed.

    A block is summed right after it is copied, while it is in the cache: so a publication is one pass over the memory.
    What the owner of the memory copies is summed by the thread: the owner has to go on.
    """

    def __init__(self, values: torch.Tensor, buffer: Buffer, landed: Callable[[], None]) -> None:
        super().__init__({"value": values}, lambda size: torch.from_numpy(buffer.array), SUM_BLOCK)
        self.sums: Sums = np.zeros(self._blocks, dtype=np.uint64)
        self.summed = False
        self._part = buffer.array
        self._have = bytearray(self._blocks)
        self._landed = landed

    def start(self) -> None:
        """Let the thread copy what ``begin(thread=False)`` has promised; not if nobody wants it any more."""
        try:
            if not self._dropped:
                self.prepare()
        except RuntimeError as error:  # no thread can be started
            self._error = error

    def finish(self) -> None:
        """Copy and sum all of it here and now; for an owner without threads."""
        self.begin(thread=False)
        self.advance(self._blocks)
        self._sum_rest()

    @property
    def failed(self) -> BaseException | None:
        """What the copying thread failed of."""
        return self._error

    def _copy(self, unit: int) -> None:
        super()._copy(unit)
        if threading.current_thread() is self._thread:
            self._sum(unit)

    def _sum(self, block: int) -> None:
        self.sums[block] = block_sum(self._part, block)
        self._have[block] = 1

    def _sum_rest(self) -> None:
        for block in range(self._blocks):
            if not self._have[block]:
                self._sum(block)
        self.summed = True

    def _run(self) -> None:
        with suppress(OSError):  # a trainer on the same cores comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        super()._run()
        try:
            with self._turn:  # the owner may be copying the last of it, or nobody may want it any more
                self._turn.wait_for(lambda: self._left <= 0 or self._error is not None)
            if self._error is None and not self._dropped:
                self._sum_rest()
        except BaseException as error:  # noqa: BLE001 - whoever waits is told
            self._error = error
        self._landed()
