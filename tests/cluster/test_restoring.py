"""A cluster that begins with a snapshot: its tables first, then its clients; and what a coordinator asks of shards."""

from __future__ import annotations

import msgspec

from headwater.cluster.coordinator import Coordinator, Rules
from headwater.cluster.dataplan import DataPlans
from headwater.cluster.effects import FolderMade, MakeFolder, ManifestWritten, WriteManifest
from headwater.cluster.recovery import Restored, RestoredTable
from headwater.errors import ClusterError, SnapshotCorrupt
from headwater.types import Async
from headwater.wire import messages as m
from tests.cluster.fake_peers import SERVER, WORKER, FakePeers, spec

BEGIN = Restored("/s/7", (RestoredTable(3, spec("a", init="values"), 12),), DataPlans().snapshot())


def restored(state: dict[str, bytes] | None = None, **rules: object) -> FakePeers:
    """Two servers are to begin with a table of a snapshot; none has joined yet."""
    script = FakePeers(2, joined=False)
    made = Rules(2, **rules)  # type: ignore[arg-type]
    script.coordinator = Coordinator(made, script.clock(), state, BEGIN)
    script.carry_out(script.coordinator.start())
    return script


def test_clients_wait_until_the_tables_are_there() -> None:
    script = restored()
    script.join(0)
    script.start(0)
    script.start(1)
    for server in (SERVER, SERVER + 1):
        create = script.last(server, m.Create)
        assert (create.table, create.spec.name, create.restore) == (3, "a", "/s/7")
    script.answer(SERVER, 3, m.Created(3, 0))
    assert script.take(WORKER) == []
    script.answer(SERVER + 1, 3, m.Created(3, 0))
    assert script.last(WORKER, m.Joined).rank == 0
    script.ask(WORKER, m.Declare(spec("a", init="values")))
    declared = script.last(WORKER, m.Declared)
    assert (declared.table, declared.assign) == (3, False)  # nobody assigns its values anew
    script.ask(WORKER, m.Declare(spec("b")))
    assert script.last(SERVER, m.Create).restore == ""


def test_who_comes_to_a_cluster_that_could_not_begin_is_told() -> None:
    script = restored()
    script.join(0)
    script.start(0)
    script.start(1)
    script.answer(SERVER + 1, 3, SnapshotCorrupt("/s/7/shard-00001: ends at byte 5"))
    assert "could not begin with its snapshot /s/7" in str(script.error(WORKER))
    script.join(1)
    assert "ends at byte 5" in str(script.error(WORKER + 1))


def test_a_new_primary_is_told_of_the_snapshot_too() -> None:
    script = restored(replicas=2)
    script.start(0)
    script.start(1)
    script.take(SERVER + 1)
    script.pass_time(3.0, alive=(SERVER + 1,))  # server 0 is silent
    creates = [x for x in script.take(SERVER + 1) if isinstance(x, m.Create)]
    assert creates
    assert all(create.restore == "/s/7" for create in creates)


def test_a_coordinator_that_comes_back_has_begun_already() -> None:
    script = restored()
    script.start(0)
    script.start(1)
    again = restored(script.state)
    (table,) = again.coordinator.tables.by_number.values()
    assert (table.number, table.restore, table.base, table.state) == (3, "/s/7", 12, "creating")


def test_the_clock_of_a_cut() -> None:
    """A bulk table on several shards is cut after the last step that was decided; the others now."""
    script = restored(snapshots=True)
    script.start(0)
    script.start(1)
    script.create(3)
    script.join(0)
    for number, other in ((4, spec("async", sync=Async())), (5, spec("b"))):
        script.ask(WORKER, m.Declare(other))
        script.create(number)
    for shard in (0, 1):
        script.tell(SERVER + shard, m.Ready(5, shard, 1, 1, (0.0,), False))
    coordinator, now = script.coordinator, script.clock()
    script.ask(WORKER, m.TakeSnapshot())
    assert script.jobs == [MakeFolder()]
    script.carry_out(coordinator.finished(FolderMade(1, "/s/1"), now))
    assert script.last(SERVER, m.Cut).prepare
    for shard in (0, 1):
        script.tell(SERVER + shard, m.CutDone(1, shard, prepared=True))
    cut = script.last(SERVER + 1, m.Cut)
    assert (cut.snapshot, cut.folder, cut.clocks) == (1, "/s/1", ((3, 12), (5, 1)))
    for shard in (0, 1):
        script.tell(SERVER + shard, m.CutDone(1, shard, "f", 10, "ab"))
    *_, job = script.jobs
    assert isinstance(job, WriteManifest)
    assert sorted(job.tables) == [3, 4, 5]
    assert msgspec.msgpack.decode(job.plan) == {}
    script.carry_out(coordinator.finished(ManifestWritten("/s/1"), now))
    assert script.last(WORKER, m.SnapshotTaken).nbytes == 20


def test_who_may_not_have_one() -> None:
    script = restored()
    script.start(0)
    script.start(1)
    script.create(3)
    script.ask(WORKER, m.TakeSnapshot())
    assert "join first" in str(script.error(WORKER))
    script.join(0)
    script.ask(WORKER, m.TakeSnapshot())
    assert "--snapshots DIR" in str(script.error(WORKER))
    empty = FakePeers(1, snapshots=True)
    empty.join(0)
    empty.ask(WORKER, m.TakeSnapshot())
    assert isinstance(error := empty.error(WORKER), ClusterError)
    assert "no table yet" in str(error)


def test_what_was_trained_after_the_moment_of_a_snapshot_is_not_done_in_it() -> None:
    script = FakePeers(2, snapshots=True)
    script.join(0)
    script.ask(WORKER, m.Declare(spec()))
    script.create()

    def step(clock: int) -> None:
        for shard in (0, 1):
            script.tell(SERVER + shard, m.Ready(1, shard, clock, 1, (0.0,), False))

    def finish(chunk: int, clock: int) -> None:
        script.ask(WORKER, m.PlanNext("data", 9, 1, 0, 3, False, chunk + 1, ((chunk - 1, clock),) if chunk else ()))
        assert script.last(WORKER, m.PlanChunk).chunk == chunk

    step(1)
    finish(0, 0)
    finish(1, 1)  # chunk 0 was finished in step 1
    script.ask(WORKER, m.TakeSnapshot())
    script.carry_out(script.coordinator.finished(FolderMade(1, "/s/1"), script.clock()))
    for shard in (0, 1):
        script.tell(SERVER + shard, m.CutDone(1, shard, prepared=True))
    step(2)
    finish(2, 2)  # chunk 1 in step 2, which the snapshot does not hold
    for shard in (0, 1):
        script.tell(SERVER + shard, m.CutDone(1, shard, "f", 10, "ab", clocks=((1, 1),)))
    *_, job = script.jobs
    assert isinstance(job, WriteManifest)
    plans = DataPlans()
    plans.restore(job.plan)
    again = [plans.ask(5, m.PlanNext("data", 9, 1, 0, 3, False, turn)).chunk for turn in (1, 2)]
    assert again == [1, 2]
