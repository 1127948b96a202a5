"""A table's two flat memories at a client: gradients that leave, values that arrive."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from headwater import interrupts
from headwater.cluster.placement import BLOCK, PAGE, Layout
from headwater.errors import DeadlineExceeded
from headwater.transports import forks, memory
from headwater.types import ParameterSpec, TableSpec
from headwater.wire.tensors import DTYPES

log = logging.getLogger("headwater")
PATIENCE = 10.0  # seconds: a server writes a block in milliseconds


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]


def plain(size: int) -> torch.Tensor:
    """``size`` zero bytes, on a page boundary."""
    raw = torch.zeros(size + PAGE, dtype=torch.uint8, device="cpu")
    shift = -raw.data_ptr() % PAGE
    return raw[shift : shift + size]


def views(flat: torch.Tensor, spec: TableSpec, layout: Layout) -> dict[str, torch.Tensor]:
    """Every parameter as a tensor over ``flat``, with a storage and a version counter of its own.

    What looks at storages (safetensors, ``torch.save``) would take tensors that share one for one tensor.
    """
    raw = flat.numpy()
    return {p.name: _over(raw, at, p) for p, at in zip(spec.parameters, layout.offsets, strict=True)}


def _over(raw: Any, at: int, p: ParameterSpec) -> torch.Tensor:
    dtype = DTYPES[p.dtype]
    if not p.numel:
        return torch.empty(p.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(raw, dtype=dtype, count=p.numel, offset=at).view(p.shape).data


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
        forks.watch(self)

    def abandon(self) -> None:
        """In a forked child: what it writes here is not what its parent pushes."""
        if self.fd >= 0:
            self._region.replace(0, memory.Piece(self.fd, 0, self.flat.numel()), self.flat.numel())

    def __del__(self) -> None:
        if self.fd >= 0:
            memory.close_all((self.fd,))


class Values:
    """The memory of a table's values: what a script holds, copy-on-write over what the servers hold.

    ``flat`` is for the script: what it writes there stays in its own copies of pages, which the kernel tells apart.
    Behind it is ``truth``: the servers' own memory (``pieces`` of it), or without ``pieces`` a memfd of this process
    where arriving values land.
    """

    def __init__(self, size: int, pieces: Sequence[memory.Piece] | None) -> None:
        self.size = size
        self._fd = memory.create("values", size) if pieces is None else -1
        own = pieces is None
        pieces = [memory.Piece(self._fd, 0, size)] if pieces is None else pieces
        self._private = memory.Region(pieces, private=True)
        self._truth = memory.Region(pieces, writable=own)
        self.flat = torch.frombuffer(self._private.buffer, dtype=torch.uint8)[:size]
        self.truth = torch.frombuffer(self._truth.buffer, dtype=torch.uint8)[:size]
        forks.keep(self)

    @property
    def landing(self) -> memoryview:
        """Where arriving values are written, if they are not the servers' own memory."""
        return self._truth.view

    def written(self) -> list[tuple[int, int]]:
        """Byte ranges, of whole pages, in which the script has written since they were dropped last."""
        return self._private.written()

    def abandon(self) -> None:
        """In a forked child: it sees what there is now, whatever arrives for its parent later."""
        if self.size > memory.available_memory():
            log.warning("no room for a copy of %d bytes of parameters: a forked child sees them change", self.size)
            return
        pages = self.flat.numpy()[::PAGE]
        pages[:] = pages.copy()  # the kernel copies a page that is written

    def drop(self) -> None:
        """Throw away what the script wrote: it sees the truth again."""
        for start, stop in self.written():
            self._private.drop(start, stop)

    def replace(self, start: int, piece: memory.Piece | None, size: int) -> None:
        """Other memory at the same addresses; ``None``: of this process. What the script wrote there stays."""
        stop = start + size
        kept = [(max(a, start), min(b, stop)) for a, b in self.written() if a < stop and b > start]
        saved = [self.flat[a:b].clone() for a, b in kept]
        own = piece is None
        if piece is None:
            if self._fd < 0:
                self._fd = memory.create("values", self.size)
            piece = memory.Piece(self._fd, start, size)
        self._private.replace(start, piece, size)
        self._truth.replace(start, piece, size, private=False, writable=own)
        for (a, b), bytes_ in zip(kept, saved, strict=True):
            self.flat[a:b] = bytes_

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            memory.close_all((self._fd,))


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
