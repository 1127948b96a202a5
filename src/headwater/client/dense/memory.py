"""A table's two flat memories at a client: gradients that leave, values that arrive."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from headwater import interrupts
from headwater.errors import DeadlineExceeded, ShapeMismatch
from headwater.layout.dense import BLOCK, PAGE, Layout
from headwater.transports import forks, memory
from headwater.types import DenseSpec, ParameterSpec
from headwater.wire.tensors import DTYPES

log = logging.getLogger("headwater")
_GAP = 8192  # bytes of padding, always zero, between neighbours in a table: a page and a cache line at most
PATIENCE = 10.0  # seconds: a server writes a block in milliseconds


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]


def plain(size: int) -> torch.Tensor:
    """``size`` zero bytes, on a page boundary."""
    raw = torch.zeros(size + PAGE, dtype=torch.uint8, device="cpu")
    shift = -raw.data_ptr() % PAGE
    return raw[shift : shift + size]


def views(flat: torch.Tensor, spec: DenseSpec, layout: Layout) -> dict[str, torch.Tensor]:
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


def as_bytes(value: torch.Tensor) -> memoryview:
    """Its elements in order: the tensor's own memory if that is dense, else a copy."""
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy()).cast("B")  # type: ignore[arg-type]


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Values may be equal where bits are not (-0.0), and differ where they are (NaN)."""
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(a, b)


def check_tensor(p: ParameterSpec, value: torch.Tensor) -> None:
    """Raises ``ShapeMismatch`` naming what differs."""
    strided = value.is_cpu and value.layout is torch.strided
    if value.shape != p.shape or value.dtype is not DTYPES[p.dtype] or not strided:
        raise ShapeMismatch(
            f"{p.name!r} is {p.dtype} of shape {p.shape}, strided, on the cpu; this tensor is {value.dtype} of shape "
            f"{tuple(value.shape)}, {str(value.layout).removeprefix('torch.')}, on {value.device}; nothing was sent"
        )


class Gradients:
    """The memory that gradients leave from: a memfd where a server of this host reads it, else plain."""

    def __init__(self, spec: DenseSpec, layout: Layout, share: bool) -> None:
        size = layout.size
        self.fd = memory.create("gradients", size) if share else -1
        if share:
            self._region = memory.Region([memory.Piece(self.fd, 0, size)])
            self.flat = torch.frombuffer(self._region.buffer, dtype=torch.uint8)[:size]
        else:
            self.flat = plain(size)
        self.bytes = _bytes(self.flat)
        self.tensors = views(self.flat, spec, layout)
        self._places = sorted(zip(layout.offsets, spec.parameters, strict=True), key=lambda place: place[0])
        self._runs: dict[tuple[str, ...], list[torch.Tensor]] = {}
        forks.watch(self)

    def runs(self, names: Sequence[str]) -> list[torch.Tensor]:
        """The memory of these gradients in as few flat tensors as it lies in; padding and small neighbours too."""
        key = tuple(names)
        if key not in self._runs:
            wanted = set(names)
            self._runs[key] = self._joined([place for place in self._places if place[1].name in wanted])
        return self._runs[key]

    def _joined(self, places: Sequence[tuple[int, ParameterSpec]]) -> list[torch.Tensor]:
        runs: list[tuple[int, int, torch.dtype]] = []
        for at, p in places:
            dtype, last = DTYPES[p.dtype], runs[-1] if runs else None
            if not p.nbytes:
                continue
            if last is not None and last[2] is dtype and 0 <= at - last[1] < _GAP:
                runs[-1] = (last[0], at + p.nbytes, dtype)
            else:
                runs.append((at, at + p.nbytes, dtype))
        return [self.flat[start:stop].view(dtype) for start, stop, dtype in runs]

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
    where arriving values land. ``tensors`` and ``arrived`` are the parameters in the one and in the other.
    """

    def __init__(self, spec: DenseSpec, layout: Layout, pieces: Sequence[memory.Piece] | None) -> None:
        self.size = size = layout.size
        self._fd = memory.create("values", size) if pieces is None else -1
        own = pieces is None
        pieces = [memory.Piece(self._fd, 0, size)] if pieces is None else pieces
        self._private = memory.Region(pieces, private=True)
        self._truth = memory.Region(pieces, writable=own)
        self.flat = torch.frombuffer(self._private.buffer, dtype=torch.uint8)[:size]
        self.truth = torch.frombuffer(self._truth.buffer, dtype=torch.uint8)[:size]
        self.tensors, self.arrived = (views(flat, spec, layout) for flat in (self.flat, self.truth))
        self._places = list(zip(layout.offsets, spec.parameters, strict=True))
        forks.keep(self)

    @property
    def landing(self) -> memoryview:
        """Where arriving values are written, if they are not the servers' own memory."""
        return self._truth.view

    def changed(self) -> list[str]:
        """The parameters that the script wrote and that differ from what arrived, to the bit.

        What was written and is the same is dropped: a page that stays this process's own stands still for ever.
        """
        pages = self.written()
        if not pages:
            return []
        touched = [p.name for at, p in self._places if any(a < at + p.nbytes and at < b for a, b in pages)]
        found = [name for name in touched if not _same_bits(self.tensors[name], self.arrived[name])]
        if not found:
            self.drop()
        return found

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
