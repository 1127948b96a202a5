"""What a primary's decisions come to: records, which get their LSN here, and instructions, in the order of both."""

from __future__ import annotations

import torch

from headwater.server import events as e
from headwater.server.replication import records as r
from headwater.server.replication.log import Log
from headwater.server.replication.records import Record
from headwater.server.replication.replica import Memory, Replica
from headwater.server.table import Table
from headwater.server.tables.base import Contribution


class Proposals:
    """One shard's. ``out``: what it says; whoever handed it an event takes it (``Shard.handle``)."""

    def __init__(self, replica: Replica, memory: Memory) -> None:
        self.replica = replica
        self.log = Log()
        self.out: list[e.Instruction] = []
        self._memory = memory

    def begin(self) -> None:
        """A log that goes on from what the replica has applied."""
        self.log = Log(self.replica.lsn)

    def propose(
        self, body: r.Body, gradient: torch.Tensor | None = None, base: int = 0, *, lasting: bool = False
    ) -> Record:
        """Give a record its LSN and send it to whoever follows; it is applied when all of them have it."""
        return self._append(Record(self.log.last + 1, body, gradient, base, lasting=lasting))

    def propose_step(self, body: r.Prepare, contributions: list[Contribution], divide: int) -> None:
        """The same of a step of all workers, which is made of their contributions while nobody follows."""
        record = Record(self.log.last + 1, body, None, 0, contributions, divide)
        if self.log.replicated:
            self.materialise(record)
        self._append(record)

    def _append(self, record: Record) -> Record:
        self.log.append(record)
        if self.log.required:
            self.out.append(e.Replicate(record))
        return record

    def lend(self, table: Table) -> torch.Tensor | None:
        """Memory for the next record's gradient that followers can map, if there is some now."""
        return self._memory.lend(table.number, table.size, self.log.last + 1, self.log.accepted_by_all)

    def materialise(self, record: Record) -> None:
        """Turn a step's contributions into one aggregate: what followers are sent, and what is applied then."""
        if record.contributions is None or not isinstance(record.body, r.Prepare):
            return
        table = self.replica.tables[record.body.table]
        aggregate = self._memory.lend(table.number, table.size, record.lsn, self.log.accepted_by_all)
        if aggregate is None:
            aggregate = torch.zeros(table.size, dtype=torch.uint8, device="cpu")
        if record.contributions:
            table.store.aggregate(record.contributions, record.divide, aggregate)
        record.gradient, record.contributions, record.divide = aggregate, None, 1
