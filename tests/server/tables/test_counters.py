"""A kind of table that no other file knows is pushed, replicated, put into snapshots and versions, and restored."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.server import COORDINATOR
from headwater.server.node import Setting
from headwater.server.replication.records import Update
from headwater.server.server import Server
from headwater.server.snapshots import manifest
from headwater.server.snapshots.format import Written
from headwater.server.snapshots.opened import newest
from headwater.server.tables.base import TableStore
from headwater.types import Async, Bulk, Stale, Sync
from headwater.versions.part_store import Key
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind
from headwater.wire.outgoing import Outgoing
from tests.kinds.counters.layout import CounterSpec, Counts, pack, shard_of, unpack
from tests.kinds.counters.server import CounterStore
from tests.server.ring import MEMBERS, Ring, Worker

TABLE = 1


def push(worker: Worker, counts: Counts, *, deliver: bool = True) -> None:
    """A step of this worker's."""
    worker.clock += 1
    worker.seq += 1
    payload = pack(counts)
    frame = Frame(Kind.PUSH, Flag.END, table=TABLE, seq=worker.seq, clock=worker.clock, members=MEMBERS)
    frame.stop, frame.payload = len(payload), memoryview(payload)
    worker.again([frame], deliver)


def pull(worker: Worker) -> Counts:
    """All that the shard has."""
    worker.ring.send(worker._peer, Frame(Kind.PULL, table=TABLE, epoch=worker.ring.epoch, clock=worker.clock))
    worker.ring.run()
    (answer,) = worker.take(Kind.DATA)
    assert answer.flags & Flag.END
    return unpack(bytes(answer.payload or b""))


def held(ring: Ring, server: int) -> Counts:
    store: TableStore = ring.node(server).shard.tables[TABLE].store  # what the protocol says, it has
    assert isinstance(store, CounterStore)
    return store.counts


def pair(sync: Sync | None = None, ranks: tuple[int, ...] = (0,)) -> tuple[Ring, list[Worker]]:
    """Server 0 leads, server 1 is its backup; workers are connected."""
    ring = Ring(2)
    ring.adopt(0, backups=[1])
    ring.begin(CounterSpec("words", sync or Async()), ranks=ranks)
    workers = [Worker(ring, rank) for rank in ranks]
    for worker in workers:
        worker.open(0)
    return ring, workers


@pytest.mark.parametrize("sync", [Async(), Async(2), Stale(1), Bulk()])
def test_what_is_pushed_is_added_on_every_copy_and_comes_back(sync: Sync) -> None:
    ring, (worker,) = pair(sync)
    push(worker, {b"a": 2, b"a key of its own length": 5})
    push(worker, {b"a": -7, b"": 1})
    assert worker.acks() == [1, 2]
    assert pull(worker) == held(ring, 0) == held(ring, 1) == {b"a": -5, b"a key of its own length": 5, b"": 1}
    assert ring.digest(0) == ring.digest(1)


def test_a_step_of_two_workers_is_one_record_of_another_length() -> None:
    ring, workers = pair(Bulk("sum"), ranks=(0, 1))
    push(workers[0], {b"both": 1, b"left": 10})
    assert held(ring, 0) == {}
    push(workers[1], {b"both": 2, b"right": 20})
    assert held(ring, 0) == held(ring, 1) == {b"both": 3, b"left": 10, b"right": 20}
    assert ring.digest(0) == ring.digest(1)


def test_a_duplicate_counts_once_and_a_backup_goes_on_with_it() -> None:
    ring, (worker,) = pair()
    push(worker, {b"a": 1})
    worker.clock, worker.seq = 0, 0
    push(worker, {b"a": 1})
    assert worker.acks() == [1, 1]
    ring.kill(0)
    ring.adopt(1)
    assert worker.open(1, base=2).seq == 1
    push(worker, {b"a": 5})
    assert pull(worker) == {b"a": 6}


def test_a_newcomer_gets_the_counters_while_pushes_go_on() -> None:
    ring = Ring(2)
    ring.adopt(0)
    ring.begin(CounterSpec("words"))
    worker = Worker(ring)
    worker.open(0)
    push(worker, {b"%d" % i: i for i in range(100)})
    ring.muted = {(1, 0)}
    ring.adopt(0, learners=[1])
    ring.muted = set()
    rounds = 0
    while not ring.heard(m.Synced):
        rounds += 1
        push(worker, {b"%d" % i: 1 for i in range(200)}, deliver=False)
        for _ in range(4):
            ring.step()
    ring.run()
    assert rounds > 1, "all chunks came before the pushes, so they tested nothing"
    ring.adopt(0, backups=[1])
    push(worker, {b"last": 1})
    assert held(ring, 1) == {b"%d" % i: rounds + (i if i < 100 else 0) for i in range(200)} | {b"last": 1}
    assert ring.digest(0) == ring.digest(1)


def test_bytes_that_are_no_list_of_counters_are_refused() -> None:
    _, (worker,) = pair()
    worker.seq += 1
    frame = Frame(Kind.PUSH, Flag.END, table=TABLE, seq=1, clock=1, members=MEMBERS, start=4, stop=16)
    frame.payload = memoryview(bytes(12))
    worker.again([frame])
    (error,) = worker.take(Kind.ERROR)
    assert "it begins at 0" in str(m.read_error(error.body))


def test_a_version_holds_what_was_there_at_its_moment() -> None:
    ring, (worker,) = pair()
    push(worker, {b"a": 1})
    ring.tell(0, v.CutVersion(1, 0, (TABLE,)))
    ring.run()
    push(worker, {b"a": 1, b"b": 2})
    ring.tell(0, v.CutVersion(2, 0, (TABLE,)))
    ring.run()
    for server in (0, 1):
        parts = ring.servers[server].setting.part_store.parts
        found = [unpack(parts[Key(number, 0, TABLE)].buffer.array.tobytes()) for number in (1, 2)]
        assert found == [{b"a": 1}, {b"a": 2, b"b": 2}]


# ---- snapshots ---------------------------------------------------------------------------------------


class Shards:
    """A cluster of so many shards without copies, each on a server of its own; one worker."""

    def __init__(self, shards: int, restore: str = "") -> None:
        self.servers = [Server(Setting(n, shards, threads=False)) for n in range(shards)]
        self.spec = CounterSpec("words")
        for number, server in enumerate(self.servers):
            server.adopt(m.View(number, 1, m.Endpoint(number, "", "", "")))
            self._tell(number, Kind.NOTICE, m.Members(MEMBERS, (0,), 0, "", (70,)))
            (created,) = self._tell(number, Kind.REQUEST, m.Create(TABLE, self.spec, restore))
            assert created.kind == Kind.REPLY, m.read_error(created.body)
            for seq, request in enumerate((m.Open(70, 0, number, MEMBERS), m.Attach(TABLE, False))):
                server.receive(1, Frame(Kind.REQUEST, seq=seq, body=m.pack(request)))

    def _tell(self, number: int, kind: Kind, message: m.Notice | m.Request) -> list[Frame]:
        frame = Frame(kind, shard=number, seq=TABLE, body=m.pack(message))
        out = self.servers[number].receive(COORDINATOR, frame)
        return [x.frame for x in out if isinstance(x, Outgoing) and x.peer == COORDINATOR]

    def push(self, seq: int, counts: Counts) -> None:
        for number, server in enumerate(self.servers):
            payload = pack({key: n for key, n in counts.items() if shard_of(key, len(self.servers)) == number})
            frame = Frame(Kind.PUSH, Flag.END, number, TABLE, epoch=1, seq=seq, clock=seq, members=MEMBERS)
            frame.stop = frame.payload_length = len(payload)
            frame.payload = server.landing(1, frame)
            frame.payload[:] = payload
            (ack,) = server.receive(1, frame)
            assert isinstance(ack, Outgoing)
            assert ack.frame.kind == Kind.ACK

    def snapshot(self, root: Path) -> Path:
        number, folder = manifest.start(root)
        written = []
        for shard, server in enumerate(self.servers):
            part = server.nodes[shard].part
            self._tell(shard, Kind.NOTICE, m.Cut(number, shard, str(folder), ()))
            part.advance(100)
            done = part.result()
            assert done is not None
            assert not done.error
            written.append(Written(done.file, done.nbytes, done.sha256))
        manifest.publish(root, number, written, {TABLE: self.spec}, len(self.servers))
        return folder

    def counts(self) -> list[Counts]:
        stores = [server.nodes[n].shard.tables[TABLE].store for n, server in enumerate(self.servers)]
        for store in stores:
            store.validate()
        return [store.counts for store in stores if isinstance(store, CounterStore)]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_snapshot_of_two_shards_begins_a_table_on_any_number(shards: int, tmp_path: Path) -> None:
    old = Shards(2)
    old.push(1, {b"%d" % i: i for i in range(60)})
    folder = old.snapshot(tmp_path)
    old.push(2, {b"late": 1})
    newest(tmp_path).snapshot.close()  # every byte of it is sound
    new = Shards(shards, str(folder))
    found = new.counts()
    assert {key: n for counts in found for key, n in counts.items()} == {b"%d" % i: i for i in range(60)}
    assert all(found), "every shard has some"
    new.push(1, {b"7": 3})
    assert new.counts()[shard_of(b"7", shards)][b"7"] == 10


def test_a_record_says_which_bytes_of_its_payload_it_has() -> None:
    ring, (worker,) = pair()
    ring.muted = {(1, 0)}
    push(worker, {b"abc": 1})
    (record,) = ring.node(0).shard.log.pending
    assert isinstance(record.body, Update)
    assert record.body.ranges == ((0, 16),)
    assert record.gradient is not None
    assert unpack(record.gradient.numpy().tobytes()) == {b"abc": 1}
