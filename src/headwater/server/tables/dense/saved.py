"""A dense table in a snapshot: its memory as it was at one moment, and back onto any number of shards."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from headwater.errors import TableConflict
from headwater.layout.saved import VALUE
from headwater.server.snapshots.files import Piece
from headwater.server.snapshots.format import COUNT
from headwater.server.snapshots.restore import Snapshot
from headwater.server.tables.dense.shard import DenseShard
from headwater.types import ITEMSIZE, DenseSpec, Segment
from headwater.versions.copying import Allocate, Cut, Loose
from headwater.wire import optimizers
from headwater.wire.tensors import DTYPES


class DenseCut:
    """One table's memory as it is at ``begin``."""

    def __init__(self, table: int, dense: DenseShard, allocate: Allocate) -> None:
        self.table = table
        self._dense = dense
        self._allocate = allocate
        self._regions = dense.regions()
        self.copy = Cut(self._regions, allocate)
        self._counts: list[int] = []
        self._slots: list[tuple[int, str]] = []

    def begin(self, *, thread: bool = True) -> None:
        if self._dense.regions().keys() != self._regions.keys():  # new hyperparameters have brought a slot
            self.copy.drop()
            self._regions = self._dense.regions()
            self.copy = Cut(self._regions, self._allocate)
        self._counts, slots = self._dense.read_block(0, self._dense.size)
        # What is in no region: the tensors of torch's own optimizers, each with the bytes that it changes with.
        own = [slot for slot in slots if slot[0] >= 0]
        self._slots = [(offset, name) for offset, name, _, _ in own]
        self.copy.begin(list(self._loose([offset for offset, *_ in own], [slot[3] for slot in own])), thread=thread)

    def _loose(self, offsets: list[int], tensors: list[torch.Tensor]) -> Iterator[Loose]:
        starts = [segment.offset for segment in self._held()]
        places = sorted(set(offsets))
        following = dict(zip(places, [*places[1:], self._dense.size], strict=True)) if places else {}
        for offset, tensor in zip(offsets, tensors, strict=True):
            segment = self._held()[bisect_right(starts, offset) - 1]
            yield Loose(offset, min(segment.end, following[offset]), tensor)

    def _held(self) -> list[Segment]:
        return [segment for segment in self._dense.segments if segment.nbytes]

    def pieces(self) -> Iterator[Piece]:
        """What the cut holds. Call it when the cut is done."""
        copies = self.copy.copies
        for segment, count in zip(self._held(), self._counts, strict=True):
            dtype = DTYPES[self._dense.spec.parameters[segment.parameter].dtype]
            for slot, memory in copies.items():
                if slot == VALUE or count:
                    part = memory[segment.offset : segment.end].view(dtype)
                    yield Piece(self.table, segment.parameter, slot, segment.start, part)
            if count:
                number = torch.tensor(count, dtype=torch.int64, device="cpu")
                yield Piece(self.table, segment.parameter, COUNT, segment.start, number, whole=True)
        yield from self._loose_pieces()

    def _loose_pieces(self) -> Iterator[Piece]:
        held = self._held()
        starts = [segment.offset for segment in held]
        matrix = optimizers.info(self._dense.spec.optimizer.name).whole_tensor
        for (offset, name), tensor in zip(self._slots, self.copy.loose, strict=True):
            segment = held[bisect_right(starts, offset) - 1]
            parameter = self._dense.spec.parameters[segment.parameter]
            start = segment.start + (offset - segment.offset) // ITEMSIZE[parameter.dtype]
            each = tuple(tensor.shape) == parameter.shape if matrix else tensor.dim() == 1
            if each:
                yield Piece(self.table, segment.parameter, name, start, tensor.reshape(-1))
            else:
                yield Piece(self.table, segment.parameter, name, start, tensor, whole=True)


def load(snapshot: Snapshot, dense: DenseShard, threads: int | None = None) -> None:
    """Values, optimizer state and hyperparameters of one shard of a table, which was just made.

    Raises ``UnknownTable``, ``TableConflict`` (nothing was read) or ``SnapshotCorrupt`` (the shard is of no use then).
    """
    entry = snapshot.table(dense.spec.name)
    _check_same(snapshot, entry.dense, dense.spec)
    if entry.mark.groups is not None:
        dense.set_groups(entry.mark.groups)
    held = [segment for segment in dense.segments if segment.nbytes]
    regions = dense.regions()
    parts = [(segment, slot, memory) for slot, memory in regions.items() for segment in held]

    def read(part: tuple[Segment, str, torch.Tensor]) -> None:
        segment, slot, memory = part
        dtype = DTYPES[entry.dense.parameters[segment.parameter].dtype]
        out = memory[segment.offset : segment.end].view(dtype)
        snapshot.read_into(entry.spec.name, segment.parameter, slot, segment.start, out)

    with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), "headwater-restore") as pool:
        for _ in pool.map(read, parts):
            pass
    counts = [snapshot.whole(entry.spec.name, s.parameter, COUNT, s.start, s.stop) for s in held]
    if any(count is not None for count in counts):
        dense.write_block(0, dense.size, [0 if count is None else int(count) for count in counts], [])
    for segment in held:
        _load_own(snapshot, dense, segment, {COUNT, *regions})


def _load_own(snapshot: Snapshot, dense: DenseShard, segment: Segment, known: set[str]) -> None:
    """What torch's own optimizers keep of a segment."""
    name = dense.spec.name
    for slot in snapshot.slots(name, segment.parameter):
        if slot in known:
            continue
        tensor = snapshot.whole(name, segment.parameter, slot, segment.start, segment.stop)
        if tensor is None:
            tensor = snapshot.read(name, segment.parameter, slot, segment.start, segment.stop)
        dense.write_slot(segment.parameter, slot, segment.start, tensor)


def _check_same(snapshot: Snapshot, was: DenseSpec, now: DenseSpec) -> None:
    old = [(p.name, p.shape, p.dtype) for p in was.parameters]
    new = [(p.name, p.shape, p.dtype) for p in now.parameters]
    if old != new or was.optimizer.name != now.optimizer.name:
        raise TableConflict(
            f"table {now.name!r} has other parameters or another optimizer than in {snapshot.folder}; nothing was read"
        )
