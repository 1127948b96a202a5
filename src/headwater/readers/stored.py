"""A version in this process: its parts as memory, mapped side by side table by table, block by block on demand."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from headwater.layout.dense import Layout, layout, only
from headwater.transports import memory
from headwater.transports.buffers import Buffer
from headwater.types import DenseSpec, ParameterSpec, TableSpec, VersionInfo

Key = tuple[int, int, int]
"""(number, shard, table)"""


class Mine(NamedTuple):
    """A part in memory of this process. ``loan``: while it is there, the memory is not used again."""

    buffer: Buffer
    loan: memoryview

    @property
    def fd(self) -> int:
        return self.buffer.fd


class Theirs(NamedTuple):
    """A part in the memory of the process that holds it. ``unmapped``: called when nothing of it is mapped here.

    ``look``: its bytes, mapped for a copy.
    """

    fd: int
    unmapped: Callable[[], None]
    look: Callable[[], Any]


Place = Mine | Theirs


class _Hold:
    """What a mapping needs while it is there: descriptors, and loans of the memory behind them."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places

    def end(self) -> None:
        """The mapping is gone."""
        for place in self._places:
            if isinstance(place, Theirs):
                memory.close_all((place.fd,))
                place.unmapped()


class Mapped:
    """One table of a version, at one range of addresses; a block is mapped when a tensor in it is asked for.

    So a lease costs the same for every size. Stray writes stay in this process (copy-on-write).
    """

    def __init__(self, layout: Layout, places: Mapping[int, Place]) -> None:
        self.layout = layout
        self._places = places
        self._region = memory.Region((), private=True, reserve=layout.size)
        self._done = bytearray(len(layout.blocks))
        self._guard = threading.Lock()
        weakref.finalize(self._region.buffer, _Hold(list(places.values())).end).atexit = False

    @property
    def buffer(self) -> Any:
        """The memory. Only what was ``ensure``\\ d may be read."""
        return self._region.buffer

    def touch(self) -> None:
        """Map all of it, and find its pages."""
        self.ensure(0, self.layout.size)
        for block in self.layout.blocks:
            self._region.touch(block.start, block.start + block.size)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, Any, int, int]]:
        """Bytes ``start:stop`` of the table's address space, to be copied: which, out of what, where from, how many.

        What they are copied out of has them as they were published, and is read only while this mapping is there.
        """
        for index in _overlapping(self.layout, start, stop):
            block = self.layout.blocks[index]
            lo, hi = max(start, block.start), min(stop, block.start + block.size)
            place = self._places[block.shard]
            source = place.buffer.array if isinstance(place, Mine) else place.look()
            yield lo - start, source, block.local + lo - block.start, hi - lo

    def ensure(self, start: int, stop: int) -> None:
        """Map the blocks that bytes ``start:stop`` of the table's address space lie in."""
        with self._guard:
            for index in _overlapping(self.layout, start, stop):
                if not self._done[index]:
                    block = self.layout.blocks[index]
                    piece = memory.Piece(self._places[block.shard].fd, block.local, block.size)
                    self._region.replace(block.start, piece, block.size)
                    self._done[index] = 1


def _overlapping(layout: Layout, start: int, stop: int) -> range:
    """The indices of blocks (they are in the order of their starts) that overlap ``start:stop``."""
    blocks = layout.blocks
    lo, hi = 0, len(blocks)
    while lo < hi:
        middle = (lo + hi) // 2
        if blocks[middle].start + blocks[middle].size <= start:
            lo = middle + 1
        else:
            hi = middle
    end = lo
    while end < len(blocks) and blocks[end].start < stop:
        end += 1
    return range(lo, end)


class TensorMap(NamedTuple):
    """Where a table's tensors are: what all of its versions share. ``tensors``: offset and kind by name."""

    spec: DenseSpec
    shards: int
    layout: Layout
    tensors: Mapping[str, tuple[int, ParameterSpec]]


def plan(spec: TableSpec, shards: int) -> TensorMap:
    """The plan of a table over so many shards. Raises ``UsageError`` for one whose tensors are not dense."""
    dense = only(spec)
    found = layout(dense, shards)
    places = zip(found.offsets, dense.parameters, strict=True)
    return TensorMap(dense, shards, found, {parameter.name: (at, parameter) for at, parameter in places})


class StoredTable(NamedTuple):
    """A table of a version."""

    plan: TensorMap
    mapped: Mapped


class Stored:
    """A version that is here, whole. It stays as long as something refers to it or to a tensor of it.

    ``buffers``: its parts that lie in memory of this process, to apply the next delta to.
    """

    def __init__(
        self, info: VersionInfo, tables: Sequence[StoredTable], buffers: Mapping[tuple[int, int], Buffer]
    ) -> None:
        self.info = info
        self.tables = tuple(tables)
        self.buffers = dict(buffers)


class Base:
    """A version that is kept, unmapped, to apply the next delta to."""

    def __init__(self, stored: Stored) -> None:
        self.info = stored.info
        self.buffers = stored.buffers.copy()
        self._loans = {key: buffer.lend() for key, buffer in self.buffers.items()}

    def yielded(self, key: tuple[int, int]) -> Buffer | None:
        """A part's memory, with the bytes in it, for the next version: if nobody else looks at it any more."""
        buffer = self.buffers.get(key)
        if buffer is None or not buffer.reclaim():
            return None
        del self.buffers[key], self._loans[key]
        return buffer
