"""The memory that the tables of one shard live in: what they may take, and who refers to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headwater.errors import NotEnoughMemory
from headwater.layout.kinds import place
from headwater.server.replication.lending import Lending
from headwater.server.snapshots.part import fill
from headwater.server.snapshots.restore import Snapshot
from headwater.server.table import Table
from headwater.server.tables import kinds
from headwater.server.tables.base import Ranges
from headwater.types import TableSpec

if TYPE_CHECKING:
    from headwater.server.node import Setting


def _nobody(table: int, start: int, stop: int) -> None:
    """No client shares gradients."""


class TableMemory:
    """The ``replica.Memory`` of one shard: see there.

    ``copiers``: called with (table, ranges) before values change; who copies or sends values behind a step's back puts
    itself here. ``consumed``: called with (table, start, stop) while a step goes on, when these bytes of every gradient
    have been read for the last time.
    """

    def __init__(self, shard: int, setting: Setting) -> None:
        self.lending = Lending(setting.share)
        self.copiers: list[Callable[[int, Ranges], None]] = []
        self.consumed: Callable[[int, int, int], None] = _nobody
        self.past = False  # a log is read back: the moments of its versions have been
        self._tables: dict[int, Table] = {}
        self._shard = shard
        self._setting = setting

    def check_room(self, spec: TableSpec) -> None:
        """Raises ``NotEnoughMemory``, or what makes the table impossible."""
        needed, free = kinds.room(spec, self._setting.shards, self._shard), self._setting.available()
        if needed > free:
            raise NotEnoughMemory(
                f"table {spec.name!r} takes {needed / 2**20:.0f} MiB on shard {self._shard} "
                f"(values, optimizer state, one gradient), {free / 2**20:.0f} MiB are free; it was not created"
            )

    def size(self, spec: TableSpec) -> int:
        return kinds.size(spec, self._setting.shards, self._shard)

    def create(self, number: int, spec: TableSpec) -> Table:
        self.check_room(spec)
        shards = self._setting.shards
        consumed = partial(self.consumed, number)
        store = kinds.make(spec, shards, self._shard, share=self._setting.share, consumed=consumed)
        alone = len(place(spec, shards).participants) == 1
        table = self._tables[number] = Table(number, store, alone=alone)
        return table

    def discard(self, number: int) -> None:
        self.lending.drop(number)
        table = self._tables.pop(number, None)
        if table is not None:
            table.store.close()

    def load(self, table: Table, folder: str) -> None:
        with Snapshot(Path(folder)) as snapshot:
            fill(table, snapshot)

    def lend(self, table: int, size: int, lsn: int, accepted: int) -> torch.Tensor | None:
        buffer = self.lending.buffer_for(table, size, lsn, accepted)
        return None if buffer is None else buffer.tensor

    def before_write(self, table: int, ranges: Ranges) -> None:
        for copier in self.copiers:
            copier(table, ranges)

    def publish(self, version: int, tables: list[Table]) -> None:
        if not self.past:
            self._setting.part_store.begin(version, self._shard, [table.source() for table in tables])

    def close(self) -> None:
        """Give all of it back."""
        for number in list(self._tables):
            self.discard(number)
        self.lending.drop()
