"""A table's two flat memories at a client: gradients that leave, values that arrive."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from headwater import interrupts
from headwater.cluster.placement import BLOCK, PAGE, Layout
from headwater.errors import DeadlineExceeded
from headwater.transports import memory
from headwater.types import TableSpec
from headwater.wire.tensors import view

PATIENCE = 10.0  # seconds: a server writes a block in milliseconds


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]


def plain(size: int) -> torch.Tensor:
    """``size`` zero bytes, on a page boundary."""
    raw = torch.zeros(size + PAGE, dtype=torch.uint8)
    shift = -raw.data_ptr() % PAGE
    return raw[shift : shift + size]


def views(flat: torch.Tensor, spec: TableSpec, layout: Layout) -> dict[str, torch.Tensor]:
    """Every parameter as a tensor over ``flat``. ``.data``: each has its own version counter."""
    return {p.name: view(flat, at, p).data for p, at in zip(spec.parameters, layout.offsets, strict=True)}


class Gradients:
    """The memory that gradients leave from: a memfd where a server of this host reads it, else plain."""

    def __init__(self, size: int, share: bool) -> None:
        self.fd = memory.create("gradients", size) if share else -1
        if share:
            self._region = memory.Region([memory.Piece(self.fd, 0, size)])
            self.flat = torch.frombuffer(self._region.buffer, dtype=torch.uint8)[:size]
        else:
            self.flat = plain(size)
        self.bytes = _bytes(self.flat)

    def __del__(self) -> None:
        if self.fd >= 0:
            memory.close_all((self.fd,))


class Mapped:
    """One shard's values, mapped read-only, with the versions of its blocks."""

    def __init__(self, fds: Sequence[int], size: int) -> None:
        count = -(-size // BLOCK)
        marks = -(-count * 8 // PAGE) * PAGE
        memory.verify(fds[0], size)
        memory.verify(fds[1], marks)
        self.fd = fds[0]
        self._values = memory.Region([memory.Piece(fds[0], 0, size)], writable=False)
        self._versions = memory.Region([memory.Piece(fds[1], 0, marks)], writable=False)
        self.values = torch.frombuffer(self._values.buffer, dtype=torch.uint8)[:size]
        self._counts = self._versions.view[: count * 8].cast("Q")
        memory.close_all((fds[1],))

    def copy(self, start: int, stop: int, target: torch.Tensor) -> None:
        """Copy local bytes ``start:stop``, never torn within a block (a sequence lock; needs total store order)."""
        at = start
        while at < stop:
            block = at // BLOCK
            end = min(stop, (block + 1) * BLOCK)
            self._copy_block(block, at, end, target[at - start : end - start])
            at = end

    def _copy_block(self, block: int, start: int, stop: int, target: torch.Tensor) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            before = self._counts[block]
            if before % 2 == 0:
                target.copy_(self.values[start:stop])
                if self._counts[block] == before:
                    return
            os.sched_yield()
            interrupts.check()
        raise DeadlineExceeded("a block of values never came to rest: its server stopped in the middle of a write")

    def close(self) -> None:
        memory.close_all((self.fd,))
