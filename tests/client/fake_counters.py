"""A toy kind of table at a client: counters under names of any length. New files, and one line of registration."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from headwater.client import kinds
from headwater.client.part import TablePart
from headwater.client.session import Session
from headwater.client.shards import Shards
from headwater.client.table import Table
from headwater.client.tickets import StepResult, Ticket
from headwater.errors import UsageError
from headwater.layout.kinds import Geometry
from headwater.layout.kinds import register as register_geometry
from headwater.types import Async, OptimizerSpec, Sync, TableSpec, table_kind
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind

_HEAD = struct.Struct("<HI")  # a name's length, an amount


@table_kind
class CounterSpec(TableSpec, msgspec.Struct, frozen=True, tag_field="kind", tag="client-counters"):
    """Counters by name; each lies on the shard that its name falls on."""

    name: str
    sync: Sync = Async()
    optimizer: OptimizerSpec = OptimizerSpec("SGD", ({},))
    max_grad_norm: float | None = None
    nonfinite: str = "allow"


class CounterPart(TablePart):
    """Amounts by name on one shard. What is pulled lands in ``landed``."""

    def __init__(self, session: Session, table: int) -> None:
        super().__init__(session, table)
        self.landed = b""
        self._buffer = bytearray()
        self.awaited = False

    def push_counts(self, counts: Mapping[str, int], clock: int, members: int) -> None:
        payload = memoryview(packed(counts))
        self.send_numbered([Frame(Kind.PUSH, table=self.table, clock=clock, members=members, payload=payload)])

    def end(self, clock: int, members: int) -> None:
        self.send_numbered([Frame(Kind.PUSH, Flag.END, table=self.table, clock=clock, members=members)])

    def pull(self, clock: int) -> None:
        self.awaited = True
        self.session.send(Frame(Kind.PULL, table=self.table, lsn=self.lsn, clock=clock))

    def landing(self, frame: Frame) -> memoryview:
        self._buffer = bytearray(frame.payload_length)
        return memoryview(self._buffer)

    def arrived(self, frame: Frame) -> None:
        self.landed, self.awaited = bytes(self._buffer), False

    def here(self) -> bool:
        return not self.awaited


class CounterTable(Table):
    """``counts``: as of the last pull."""

    spec: CounterSpec
    _parts: list[CounterPart]

    def __init__(self, shards: Shards, declared: m.Declared) -> None:
        super().__init__(shards, declared)
        self.counts: Counter[str] = Counter()
        self._parts = [CounterPart(session, self.number) for session in shards.sessions.values()]
        self._join(self._members)

    @classmethod
    def check(cls, spec: TableSpec, values: Mapping[str, Any]) -> None:
        if values:
            raise UsageError("counters begin at 0")

    def load(self, values: Mapping[str, Any], assign: bool) -> None:
        self.pull().wait()

    def push(self, counts: Mapping[str, int]) -> None:
        for i, part in enumerate(self._parts):
            mine = {name: n for name, n in counts.items() if len(name) % len(self._parts) == i}
            if mine:
                part.push_counts(mine, self.clock + 1, self._members)

    def step(self) -> Ticket:
        for part in self._parts:
            part.end(self.clock + 1, self._members)
        return self._step_ended()

    def pull(self) -> Ticket:
        for part in self._parts:
            part.pull(self.clock)
        return Ticket(lambda: all(part.here() for part in self._parts), self._pulled)

    def _pulled(self, timeout: float | None) -> StepResult:
        self._pump(CounterPart.here, timeout)
        self._raise_failed()
        self.counts = sum((unpacked(part.landed) for part in self._parts), Counter())
        return StepResult(self.clock, True, None, 0, 0)

    def wait(self) -> None:
        self.settle()

    def _attached(self, session: Session, attached: m.Attached, fds: tuple[int, ...]) -> None:
        assert not fds

    def _renew(self) -> None:
        self.pull().wait()


class _Everywhere:
    """All shards hold a part, of no bytes at first."""

    def __init__(self, shards: int) -> None:
        self.participants = tuple(range(shards))
        self.sizes = (0,) * shards


register_geometry(
    CounterSpec, Geometry(lambda spec: None, lambda spec, shards: _Everywhere(shards), lambda *of_a_part: ())
)
kinds.register(CounterSpec, CounterTable)


def packed(counts: Mapping[str, int]) -> bytes:
    """As a push and an answer carry them."""
    return b"".join(_HEAD.pack(len(name), n) + name.encode() for name, n in sorted(counts.items()))


def unpacked(data: bytes) -> Counter[str]:
    """What ``packed`` was given."""
    found: Counter[str] = Counter()
    while data:
        length, n = _HEAD.unpack_from(data)
        found[data[_HEAD.size : _HEAD.size + length].decode()] += n
        data = data[_HEAD.size + length :]
    return found
