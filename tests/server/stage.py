"""Shards without a server around them: events in, instructions kept, invariants checked after every event."""

from __future__ import annotations

from typing import TypeVar

import torch

from headwater.cluster.tables import decide
from headwater.layout.dense import layout
from headwater.server import events as e
from headwater.server.shard import Shard
from headwater.server.table import Table
from headwater.server.tables.base import Ranges
from headwater.server.tables.dense.store import DenseStore
from headwater.types import Bulk, DenseSpec, Hyper, OptimizerSpec, ParameterSpec, Sync
from headwater.wire.frames import Flag
from headwater.wire.messages import Commit, Members, Ready, StepBody

TABLE = 1
I = TypeVar("I", e.Ack, e.Send, e.SendMean, e.Fail, e.Done, Ready)  # noqa: E741


def spec(sync: Sync | None = None, numel: int = 40_000, max_grad_norm: float | None = None) -> DenseSpec:
    """One parameter, SGD with learning rate 1: the values are minus the sum of what was applied."""
    return DenseSpec(
        "t",
        (ParameterSpec("w", (numel,)),),
        OptimizerSpec("SGD", ({"lr": 1.0},)),
        sync if sync is not None else Bulk(),
        max_grad_norm,
    )


class Memory:
    """Plain memory for the tables of one shard of ``shards``. ``alone``: no other shard has a say in its steps."""

    def __init__(self, shard: int, shards: int, alone: bool = False) -> None:
        self.shard, self.shards, self.alone = shard, shards, alone
        self.values: dict[int, torch.Tensor] = {}

    def size(self, spec: DenseSpec) -> int:
        return layout(spec, self.shards).sizes[self.shard]

    def create(self, number: int, spec: DenseSpec) -> Table:
        values = self.values[number] = torch.zeros(self.size(spec), dtype=torch.uint8)
        store = DenseStore(spec, layout(spec, self.shards).segments[self.shard], values)
        return Table(number, store, alone=self.alone)

    def discard(self, number: int) -> None:
        self.values.pop(number, None)

    def lend(self, table: int, size: int, lsn: int, accepted: int) -> torch.Tensor | None:
        return None

    def before_write(self, table: int, ranges: Ranges) -> None:
        """No answer refers to the values."""


class Stage:
    """``shards`` shards of one table, each primary in epoch 1, without followers.

    Worker r is session 10 + r and has opened and attached everywhere.
    """

    def __init__(
        self, table: DenseSpec | None = None, shards: int = 1, ranks: tuple[int, ...] = (0, 1), *, alone: bool = False
    ) -> None:
        self.spec = table or spec()
        parts = layout(self.spec, shards).participants
        memories = [Memory(number, shards, alone) for number in parts]
        self.shards = [Shard(number, memory) for number, memory in zip(parts, memories, strict=True)]
        self.heard: list[tuple[int, e.Instruction]] = []
        self.seq: dict[tuple[int, int], int] = {}
        self.clock = dict.fromkeys(ranks, 0)
        self.epoch = 0
        self.sessions = {rank: 10 + rank for rank in ranks}
        for number, shard in enumerate(self.shards):
            shard.lead(1, (), blocked=False)
            self.event(number, e.Create(TABLE, self.spec))
        self.values = [memory.values[TABLE] for memory in memories]
        self.members(ranks)
        for rank in ranks:
            self.open(rank)

    # ---- events ------------------------------------------------------------------------------

    def event(self, number: int, event: e.Event) -> list[e.Instruction]:
        out = self.shards[number].handle(event)
        self.shards[number].validate()
        self.heard += [(number, instruction) for instruction in out]
        return out

    def open(self, rank: int, session: int | None = None) -> None:
        session = 10 + rank if session is None else session
        if rank >= 0:
            self.sessions[rank] = session
        for number in range(len(self.shards)):
            self.event(number, e.Opened(session, rank, self.epoch))
            self.event(number, e.Attached(session, TABLE, None))

    def close(self, rank: int, *numbers: int) -> None:
        """The worker's connections end; its session goes on until the members say otherwise."""
        for number in numbers or range(len(self.shards)):
            self.event(number, e.Closed(10 + rank))

    def members(self, ranks: tuple[int, ...], lost: str = "") -> None:
        """The coordinator announces who is there; ``lost`` says who died."""
        message = self.news(ranks, lost)
        for number in range(len(self.shards)):
            self.event(number, message)

    def news(self, ranks: tuple[int, ...], lost: str = "") -> Members:
        """The next announcement, for a test that lets the shards hear it one by one."""
        self.epoch += 1
        sessions = tuple(self.sessions[rank] for rank in ranks if rank in self.sessions)
        return Members(self.epoch, ranks, self.epoch if lost else 0, lost, sessions)

    def push(
        self,
        rank: int,
        value: float = 1.0,
        number: int | None = None,
        *,
        flags: int = Flag.END,
        seq: int | None = None,
        clock: int | None = None,
        span: tuple[int, int] | None = None,
        members: int | None = None,
        session: int | None = None,
        epoch: int = 1,
        groups: tuple[dict[str, Hyper], ...] | None = None,
    ) -> list[e.Instruction]:
        """A gradient of ``value`` everywhere, to one shard or to all; a step of the worker's if ``flags`` says END."""
        clock = self.clock[rank] + 1 if clock is None else clock
        if number is None:
            found = []
            for n in range(len(self.shards)):
                found += self.push(rank, value, n, flags=flags, clock=clock, members=members, groups=groups)
            return found
        session = 10 + rank if session is None else session
        start, stop = span or (0, self.values[number].numel())
        key = (session, number)
        seq = self.seq.get(key, 0) + 1 if seq is None else seq
        self.seq[key] = max(self.seq.get(key, 0), seq)
        if flags & Flag.END:
            self.clock[rank] = max(self.clock[rank], clock)
        shard = self.shards[number]
        gradient: torch.Tensor | None
        if session in shard.sessions and TABLE in shard.tables:
            gradient = shard.staging(session, TABLE)
            for segment in shard.tables[TABLE].store.segments:
                if start <= segment.offset and segment.end <= stop:
                    gradient[segment.offset : segment.end].view(torch.float32).fill_(value)
        else:
            gradient = None
        return self.event(
            number,
            e.Push(
                session, seq, epoch, self.epoch if members is None else members, TABLE, clock, start, stop - start,
                flags, gradient, 0, StepBody(groups) if groups else None,
            ),
        )  # fmt: skip

    def pull(self, rank: int, number: int = 0, clock: int | None = None) -> list[e.Instruction]:
        size = self.values[number].numel()
        asked = self.clock.get(rank, 0) if clock is None else clock
        return self.event(number, e.Pull(10 + rank, 0, TABLE, asked, 0, size))

    # ---- the coordinator -----------------------------------------------------------------------

    def decide(self) -> Commit | None:
        """COMMIT to all shards if all are READY under the present membership."""
        answers = {ready.shard: ready for ready in self.take(Ready) if ready.members == self.epoch}
        if len(answers) < len(self.shards):
            return None
        commit = decide(self.spec, list(answers.values()))
        for number in range(len(self.shards)):
            self.event(number, commit)
        return commit

    # ---- what came of it -------------------------------------------------------------------------

    def take(self, kind: type[I]) -> list[I]:
        """The instructions of this kind since they were last taken."""
        found = [instruction for _, instruction in self.heard if isinstance(instruction, kind)]
        self.heard = [(number, instruction) for number, instruction in self.heard if not isinstance(instruction, kind)]
        return found

    def value(self, number: int = 0) -> float:
        """The value that all elements of a shard have."""
        segments = layout(self.spec, len(self.shards)).segments[self.shards[number].number]
        parts = [self.values[number][s.offset : s.end].view(torch.float32) for s in segments]
        low, high = torch.cat(parts).aminmax()
        assert low == high, f"shard {number} is torn: {low} to {high}"
        return float(low.item())
