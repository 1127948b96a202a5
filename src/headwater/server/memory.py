"""The memory that the tables of one shard live in: what they may take, how it is shared, who refers to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from headwater.errors import NotEnoughMemory
from headwater.layout import kinds
from headwater.layout.dense import BLOCK, PAGE, Block, layout, only
from headwater.server.replication import records as r
from headwater.server.replication.lending import Lending
from headwater.server.replication.state import view
from headwater.server.snapshots.part import fill
from headwater.server.snapshots.restore import Snapshot
from headwater.server.table import Table
from headwater.server.tables.dense import state_bytes
from headwater.transports import memory
from headwater.types import DenseSpec, TableSpec

if TYPE_CHECKING:
    from headwater.server.node import Setting


class Kept(NamedTuple):
    """The values of one table here, and the descriptors to share them."""

    spec: DenseSpec
    blocks: tuple[Block, ...]
    values: torch.Tensor
    view: memoryview
    versions: memoryview | None
    fds: tuple[int, ...]
    limit: int  # bytes of the largest block: no payload is longer


class TableMemory:
    """The ``replica.Memory`` of one shard: see there.

    ``kept``: by table. ``copiers``: called with (table, ranges) before values change; who copies or sends values behind
    a step's back puts itself here. ``after_block``: called with (table, start, stop) while a step goes on, when these
    bytes of every gradient have been read for the last time.
    """

    def __init__(self, shard: int, setting: Setting) -> None:
        self.kept: dict[int, Kept] = {}
        self.lending = Lending(setting.share)
        self.copiers: list[Callable[[int, r.Ranges], None]] = []
        self.after_block: Callable[[int, int, int], None] | None = None
        self.past = False  # a log is read back: the moments of its versions have been
        self._shard = shard
        self._setting = setting

    def blocks(self, table: int) -> tuple[Block, ...]:
        """How a table's memory here is cut."""
        return self.kept[table].blocks

    def check_room(self, spec: TableSpec) -> None:
        """Raises ``NotEnoughMemory``, or what ``check_table`` does."""
        dense = only(spec)
        kinds.check_table(spec)
        needed = state_bytes(dense, layout(dense, self._setting.shards).segments[self._shard])
        free = self._setting.available()
        if needed > free:
            raise NotEnoughMemory(
                f"table {spec.name!r} takes {needed / 2**20:.0f} MiB on shard {self._shard} "
                f"(values, optimizer state, one gradient), {free / 2**20:.0f} MiB are free; it was not created"
            )

    def size(self, spec: TableSpec) -> int:
        kinds.check_table(spec)
        return kinds.place(spec, self._setting.shards).sizes[self._shard]

    def create(self, number: int, spec: TableSpec) -> Table:
        self.check_room(spec)
        dense = only(spec)
        plan = layout(dense, self._setting.shards)
        segments, size = plan.segments[self._shard], plan.sizes[self._shard]
        kept = self.kept[number] = self._allocate(dense, plan.blocks_of(self._shard), size)
        alone = len(plan.participants) == 1
        table = Table(number, dense, segments, kept.values, alone=alone, versions=kept.versions)
        after_block = self.after_block
        if after_block is not None:
            table.dense.after_block = lambda start, stop: after_block(number, start, stop)
        return table

    def discard(self, number: int) -> None:
        self.lending.drop(number)
        kept = self.kept.pop(number, None)
        if kept is not None:
            memory.close_all(kept.fds)

    def load(self, table: Table, folder: str) -> None:
        with Snapshot(Path(folder)) as snapshot:
            fill(table, snapshot)

    def lend(self, table: int, size: int, lsn: int, accepted: int) -> torch.Tensor | None:
        buffer = self.lending.buffer_for(table, size, lsn, accepted)
        return None if buffer is None else buffer.tensor

    def before_write(self, table: int, ranges: r.Ranges) -> None:
        for copier in self.copiers:
            copier(table, ranges)

    def publish(self, version: int, tables: list[Table]) -> None:
        if not self.past:
            self._setting.part_store.begin(version, self._shard, [table.source() for table in tables])

    def close(self) -> None:
        """Give all of it back."""
        for number in list(self.kept):
            self.discard(number)
        self.lending.drop()

    def _allocate(self, spec: DenseSpec, blocks: tuple[Block, ...], size: int) -> Kept:
        limit = max((block.size for block in blocks), default=0)
        if not self._setting.share:
            values = torch.zeros(size, dtype=torch.uint8, device="cpu")
            return Kept(spec, blocks, values, view(values), None, (), limit)
        count = -(-size // BLOCK)
        fd = memory.create(spec.name[:64], size)
        marks = memory.create(f"{spec.name[:64]}.versions", -(-count * 8 // PAGE) * PAGE)
        region = memory.Region([memory.Piece(fd, 0, size)])
        versions = memory.Region([memory.Piece(marks, 0, -(-count * 8 // PAGE) * PAGE)])
        values = torch.frombuffer(region.buffer, dtype=torch.uint8)[:size]
        return Kept(spec, blocks, values, region.view, versions.view[: count * 8].cast("Q"), (fd, marks), limit)
