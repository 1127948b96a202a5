"""A second kind of table at a client has what any table has: steps, answers, failovers, deaths of other workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from headwater.client.client import Client
from headwater.errors import LinkBroken, UsageError, WorkerLost
from headwater.transports.stream import Handler, Link
from headwater.types import DenseSpec, OptimizerSpec, TableSpec
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind
from tests.client.fake_links import Line, Still
from tests.kinds.counters.client import CounterTable
from tests.kinds.counters.layout import CounterSpec, Counts, pack, shard_of, unpack

SPEC = CounterSpec("hits")


class CounterShard:
    """A shard's primary, over as many connections as it takes: what it has applied, and up to which push."""

    def __init__(self) -> None:
        self.counts: Counts = {}
        self.done = 0
        self.pushes: list[tuple[int, int]] = []  # numbers and membership epochs
        self.breaks = False  # with the next frame, after it has been applied
        self.refuses: list[WorkerLost] = []


class CounterLine(Line):
    """A connection to it. Answers come when somebody pumps."""

    def __init__(self, handler: Handler, runtime: Still, answer: Callable[[m.Request], m.Reply], at: CounterShard):
        super().__init__(handler, runtime, answer)
        self._at = at
        self._due: list[Frame] = []

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        super().send(frame, fds)
        if frame.kind == Kind.PUSH:
            self._push(frame)
        elif frame.kind == Kind.PULL:
            payload = pack(self._at.counts)
            data = Frame(Kind.DATA, Flag.END, table=frame.table, payload=memoryview(payload))
            data.payload_length = len(payload)
            self._due.append(data)
        if self._at.breaks:
            self._at.breaks = False
            self.error = LinkBroken("reset")

    def _push(self, frame: Frame) -> None:
        at = self._at
        at.pushes.append((frame.seq, frame.members))
        if at.refuses:
            refusal = m.error_body(at.refuses.pop())
            self._due.append(Frame(Kind.ERROR, table=frame.table, seq=frame.seq, members=2, body=refusal))
            return
        if frame.seq > at.done:
            at.done = frame.seq
            for key, n in unpack(bytes(frame.payload or b"")).items():
                at.counts[key] = at.counts.get(key, 0) + n
        self._due.append(Frame(Kind.ACK, frame.flags & Flag.END, table=frame.table, seq=frame.seq, lsn=frame.seq))

    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        while self._due and self.error is None and not done():
            frame = self._due.pop(0)
            if frame.payload is not None:
                self._handler.landing(frame)[:] = frame.payload
            self._handler.receive(frame, ())
        super().pump(done, deadline)


class FakeCluster:
    """A coordinator, and two shards of counters."""

    def __init__(self) -> None:
        self.runtime = Still()
        self.shards = [CounterShard(), CounterShard()]
        self.declared: list[TableSpec] = []

    def dial(self, view: m.ShardView | None, handler: Handler) -> Link:
        if view is None:
            return cast("Link", Line(handler, self.runtime, self._coordinate))
        at = self.shards[view.shard]
        return cast("Link", CounterLine(handler, self.runtime, lambda request: self._serve(request, at), at))

    def _coordinate(self, request: m.Request) -> m.Reply:
        views = tuple(m.ShardView(shard, 1, f"tcp://{shard}:1", "", "") for shard in range(2))
        match request:
            case m.Join():
                return m.Joined(0, 1, 0.5, views, 1, True)
            case m.Find():
                return views[request.shard]
            case m.Declare():
                self.declared.append(request.spec)
                return m.Declared(7, request.spec, False, 1)
        return m.Done()

    def _serve(self, request: m.Request, at: CounterShard) -> m.Reply:
        if isinstance(request, m.Attach):
            return m.Attached(at.done, 0, seq=at.done)
        return m.Opened(1, 0) if isinstance(request, m.Open) else m.Done()

    def counts(self) -> Counts:
        return self.shards[0].counts | self.shards[1].counts


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def table(cluster: FakeCluster) -> CounterTable:
    made = Client(cluster.dial, timeout=60.0, runtime=cluster.runtime).table(SPEC)
    assert isinstance(made, CounterTable)
    return made


def test_what_is_pushed_is_counted_and_pulled(cluster: FakeCluster, table: CounterTable) -> None:
    table.push({b"a": 2, b"bc": 3, b"a longer name": 1})
    table.push({b"a": 1})
    result = table.step().wait()
    assert (result.clock, result.applied) == (1, True)
    assert table.counts == {}, "not pulled yet"
    table.pull().wait()
    assert table.counts == cluster.counts() == {b"a": 3, b"bc": 3, b"a longer name": 1}
    assert all(shard.counts for shard in cluster.shards)


def test_the_spec_travels_as_its_kind(cluster: FakeCluster, table: CounterTable) -> None:
    assert cluster.declared == [SPEC]


def test_over_a_broken_connection_each_push_counts_once(cluster: FakeCluster, table: CounterTable) -> None:
    table.push({b"a": 1})
    cluster.shards[shard_of(b"a", 2)].breaks = True
    table.push({b"a": 5})
    table.step().wait()
    assert cluster.counts() == {b"a": 6}
    table.push({b"a": 1})
    table.step().wait()
    assert cluster.counts() == {b"a": 7}


def test_a_step_that_a_death_undid_is_pushed_again(cluster: FakeCluster, table: CounterTable) -> None:
    shard = cluster.shards[shard_of(b"a", 2)]
    shard.refuses = [WorkerLost("worker 1 died")] * 2
    table.push({b"a": 4})
    table.step().wait()
    assert shard.pushes == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert cluster.counts() == {b"a": 4}


def test_a_kind_that_a_client_has_no_table_for_is_refused(cluster: FakeCluster) -> None:
    class Unknown(DenseSpec, frozen=True, tag_field="kind", tag="unknown"):
        pass

    client = Client(cluster.dial, timeout=60.0, runtime=cluster.runtime)
    with pytest.raises(UsageError, match="no table for a Unknown; nothing was declared"):
        client.table(Unknown("x", (), OptimizerSpec("SGD", ({},))))
    assert cluster.declared == []
