"""Counters at a worker: see ``layout.py``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from headwater.client import kinds
from headwater.client.part import TablePart
from headwater.client.session import Session
from headwater.client.shards import Shards
from headwater.client.table import Table
from headwater.client.tickets import StepResult, Ticket
from headwater.errors import UsageError
from headwater.types import TableSpec
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind
from tests.kinds.counters.layout import CounterSpec, Counts, pack, shard_of, unpack


class CounterPart(TablePart):
    """The keys of one shard. What is pulled lands in ``landed``."""

    def __init__(self, session: Session, table: int) -> None:
        super().__init__(session, table)
        self.landed: Counts = {}
        self._buffer = bytearray()
        self._awaited: Frame | None = None  # the pull whose answer has not come

    def push_counts(self, counts: Mapping[bytes, int], clock: int, members: int) -> None:
        payload = pack(counts)
        frame = Frame(Kind.PUSH, table=self.table, clock=clock, stop=len(payload), members=members)
        frame.payload = memoryview(payload)
        self.send_numbered([frame])

    def end(self, clock: int, members: int) -> None:
        self.send_numbered([Frame(Kind.PUSH, Flag.END, table=self.table, clock=clock, members=members)])

    def pull(self, clock: int, keys: Collection[bytes] | None) -> None:
        """``keys``: of which; None: all."""
        self._awaited = Frame(Kind.PULL, table=self.table, lsn=self.lsn, clock=clock)
        if keys is not None:
            self._awaited.payload = memoryview(pack(dict.fromkeys(keys, 0)))
        self.session.send(self._awaited)

    def send_again(self, done: int) -> None:
        super().send_again(done)
        if self._awaited is not None:
            self.session.send(self._awaited)

    def landing(self, frame: Frame) -> memoryview:
        self._buffer = bytearray(frame.payload_length)
        return memoryview(self._buffer)

    def arrived(self, frame: Frame) -> None:
        self.landed, self._awaited = unpack(bytes(self._buffer)), None
        self._buffer = bytearray()

    def nothing_comes(self) -> None:
        self._awaited = None

    def here(self) -> bool:
        return self._awaited is None


class CounterTable(Table):
    """``counts``: as of the last pull."""

    spec: CounterSpec
    _parts: list[CounterPart]

    def __init__(self, shards: Shards, declared: m.Declared) -> None:
        super().__init__(shards, declared)
        self.counts: Counts = {}
        self._parts = [CounterPart(session, self.number) for session in shards.sessions.values()]
        self._join(self._members)

    @classmethod
    def check(cls, spec: TableSpec, values: Mapping[str, Any]) -> None:
        if values:
            raise UsageError("counters begin at 0")

    def load(self, values: Mapping[str, Any], assign: bool) -> None:
        self.pull().wait()

    def push(self, counts: Mapping[bytes, int]) -> None:
        """A part of a step; ``step`` ends it."""
        for part, mine in self._by_part(counts):
            if mine:
                part.push_counts({key: counts[key] for key in mine}, self.clock + 1, self._members)

    def step(self) -> Ticket:
        for part in self._parts:
            part.end(self.clock + 1, self._members)
        return self._step_ended()

    def pull(self, keys: Collection[bytes] | None = None) -> Ticket:
        """The counters of these keys, or all that there are."""
        asked = [(part, None) for part in self._parts] if keys is None else self._by_part(keys)
        for part, mine in asked:
            part.landed = {}
            if mine is None or mine:
                part.pull(self.clock, mine)
        return Ticket(lambda: all(part.here() for part in self._parts), self._pulled)

    def wait(self) -> None:
        self.settle()

    def _by_part(self, keys: Collection[bytes]) -> list[tuple[CounterPart, list[bytes]]]:
        shards = len(self._parts)
        return [(part, [k for k in keys if shard_of(k, shards) == i]) for i, part in enumerate(self._parts)]

    def _pulled(self, timeout: float | None) -> StepResult:
        self._pump(CounterPart.here, timeout)
        self._raise_failed()
        self.counts = {key: n for part in self._parts for key, n in part.landed.items()}
        return StepResult(self.clock, True, None, 0, 0)

    def _attached(self, session: Session, attached: m.Attached, fds: tuple[int, ...]) -> None:
        assert not fds

    def _renew(self) -> None:
        self.pull().wait()


kinds.register(CounterSpec, CounterTable)
