"""The coordinator's part in a snapshot: what is asked of whom, and what becomes of it when something happens."""

from __future__ import annotations

import msgspec
import pytest

from headwater.cluster.dataplan import DataPlans
from headwater.cluster.effects import DeleteFolder, FolderMade, Job, MakeFolder, ManifestWritten, WriteManifest
from headwater.cluster.fleet import Fleet
from headwater.cluster.membership import Membership
from headwater.cluster.outbox import Outbox
from headwater.cluster.snapshots import PATIENCE, TRIES, Snapshots
from headwater.cluster.tables import DeclaredTable, Tables
from headwater.errors import ClusterError, DeadlineExceeded, HeadwaterError, UsageError
from headwater.types import Async, Bulk, DenseSpec, OptimizerSpec, ParameterSpec, Sync
from headwater.wire import messages as m
from headwater.wire.frames import Kind
from headwater.wire.outgoing import Asker, Outgoing

SPEC = DenseSpec("t", (ParameterSpec("w", (4,)),), OptimizerSpec("SGD", ({},)), Bulk())
ANN, BOB = Asker(7, 1), Asker(8, 2)

Answer = tuple[Asker, m.Reply | HeadwaterError]
Said = Job | m.Notice | Answer


class World(Snapshots):
    """Snapshots of a cluster of ``shards`` shards, each on a server of its own, with one table at step 9."""

    def __init__(self, *, here: bool = True, every: float = 0.0, shards: int = 2, sync: Sync = SPEC.sync) -> None:
        fleet = Fleet(shards, shards, 1)
        for number in range(shards):
            fleet.join(100 + number, m.Join("server", number), 0.0)
        fleet.begin()
        outbox = self.outbox = Outbox(fleet)
        spec = msgspec.structs.replace(SPEC, sync=sync)
        tables = Tables(outbox, fleet, Membership())
        tables.by_number[1] = DeclaredTable(1, spec, tuple(range(shards)), set(), "ready", base=9)
        self.plans = DataPlans()
        super().__init__(outbox, tables, self.plans, here, every)

    def said(self) -> list[Said]:
        """Jobs, and what shards and askers hear, since this was last asked."""
        effects = self.outbox.take()
        assert effects.durable == {}
        found: list[Said] = list(effects.jobs)
        for out in effects.send:
            assert isinstance(out, Outgoing)
            asker, body = Asker(out.peer, out.frame.seq), out.frame.body
            if out.frame.kind == Kind.NOTICE:
                cut = m.unpack_notice(body)
                assert isinstance(cut, m.Cut)
                assert (out.peer, out.frame.shard) == (100 + cut.shard, cut.shard)
                found.append(cut)
            elif out.frame.kind == Kind.REPLY:
                found.append((asker, m.unpack_reply(body)))
            else:
                found.append((asker, m.read_error(body)))
        return found

    def after_tick(self, now: float, served: bool = True) -> list[Said]:
        self.tick(now, served)
        return self.said()

    def after_part(self, done: m.CutDone, now: float) -> list[Said]:
        self.part(done, now)
        return self.said()

    def after_move(self, shard: int, now: float) -> list[Said]:
        self.moved(shard, now)
        return self.said()

    def after_job(self, outcome: FolderMade | ManifestWritten | HeadwaterError, now: float) -> list[Said]:
        self.finished(outcome, now)
        return self.said()

    def answered(self) -> HeadwaterError:
        """Its last word so far is an error for ANN."""
        *_, answer = self.said()
        assert isinstance(answer, tuple)
        assert answer[0] == ANN
        assert isinstance(answer[1], HeadwaterError)
        return answer[1]


def done(shard: int, snapshot: int = 5, error: str = "") -> m.CutDone:
    return m.CutDone(snapshot, shard, f"shard-{shard}", 100, "ab", error=error)


def ready(shard: int, snapshot: int = 5) -> m.CutDone:
    return m.CutDone(snapshot, shard, prepared=True)


def cutting(now: float = 0.0, every: float = 0.0) -> World:
    """One that ANN asked for, on its way over two shards."""
    found = World(every=every)
    found.ask(ANN, now)
    assert found.after_tick(now) == [MakeFolder()]
    sent = found.after_job(FolderMade(5, "/s/5"), now)
    assert sent == [m.Cut(5, shard, "/s/5", (), prepare=True) for shard in range(2)]
    assert found.after_part(ready(1), now) == []
    assert found.after_part(ready(1), now) == []  # said twice
    assert found.after_part(ready(0), now) == [m.Cut(5, shard, "/s/5", ((1, 9),)) for shard in range(2)]
    return found


def begun(found: World, number: int, shards: int = 2) -> None:
    """One that has a folder is on its way."""
    assert len(found.after_job(FolderMade(number, f"/s/{number}"), 0.0)) == shards
    sent = [found.after_part(ready(shard, number), 0.0) for shard in range(shards)]
    assert [len(each) for each in sent] == [*[0] * (shards - 1), shards]


def given_up(number: int = 5) -> list[Said]:
    return [DeleteFolder(number), *(m.Cut(number, shard, "", ()) for shard in range(2))]


def test_a_snapshot_from_wish_to_answer() -> None:
    found = cutting(now=10.0)
    assert found.after_part(done(1), 11.0) == []
    assert found.after_part(done(1), 11.0) == []  # said twice
    assert found.after_part(done(0, snapshot=4), 11.0) == []  # of one that was given up
    made = WriteManifest(5, (done(0), done(1)), {1: SPEC}, found.plans.snapshot())
    assert found.after_part(done(0), 12.0) == [made]
    assert found.after_job(ManifestWritten("/s/5"), 13.0) == [(ANN, m.SnapshotTaken("/s/5", 200, 3.0))]
    assert found.step == "idle"
    assert found.after_tick(1000.0) == []


def test_without_a_folder_there_is_none() -> None:
    with pytest.raises(UsageError, match="--snapshots DIR"):
        World(here=False).ask(ANN, 0.0)
    assert World(here=False, every=1.0).after_tick(5.0) == []


def test_the_period() -> None:
    found = World(every=10.0, shards=1)
    assert found.after_tick(9.9) == []
    assert found.after_tick(10.0, served=False) == []
    assert found.after_tick(11.0) == [MakeFolder()]
    assert found.after_tick(11.0) == []
    begun(found, 1, shards=1)
    assert len(found.after_part(done(0, snapshot=1), 12.0)) == 1
    assert found.after_job(ManifestWritten("/s/1"), 13.0) == []  # nobody asked
    assert found.after_tick(22.9) == []
    assert found.after_tick(23.0) == [MakeFolder()]


def test_who_asks_after_the_moment_gets_another_one() -> None:
    found = cutting()
    found.ask(BOB, 1.0)
    found.part(done(0), 2.0)
    assert len(found.after_part(done(1), 2.0)) == 1
    assert found.after_job(ManifestWritten("/s/5"), 3.0) == [(ANN, m.SnapshotTaken("/s/5", 200, 3.0))]
    assert found.after_tick(3.0) == [MakeFolder()]
    begun(found, 6)
    found.part(done(0, snapshot=6), 4.0)
    assert len(found.after_part(done(1, snapshot=6), 4.0)) == 1
    assert found.after_job(ManifestWritten("/s/6"), 5.0) == [(BOB, m.SnapshotTaken("/s/6", 200, 2.0))]


def test_who_asks_before_the_moment_shares_it() -> None:
    found = World()
    found.ask(ANN, 0.0)
    found.ask(BOB, 0.0)
    assert found.after_tick(0.0) == [MakeFolder()]
    found.disconnected(BOB.peer)
    found.finished(ClusterError("no room"), 1.0)
    assert str(found.answered()) == found.error == "no room"


def test_another_primary_begins_it_anew() -> None:
    found = cutting()
    found.part(done(0), 1.0)
    assert found.after_move(0, 1.0) == []
    assert found.step == "cutting"  # its part was there already
    assert found.after_move(1, 1.0) == given_up()
    assert found.after_part(done(1), 1.0) == []  # too late
    assert found.after_tick(1.05) == []
    assert found.after_tick(2.0, served=False) == []
    assert found.after_tick(2.0) == [MakeFolder()]
    assert len(found.after_job(FolderMade(6, "/s/6"), 2.0)) == 2
    assert found.after_part(ready(0, 6), 2.0) == []
    assert found.after_move(0, 2.0) == given_up(6)  # it has forgotten that it was ready


def test_it_is_tried_a_few_times() -> None:
    found = cutting()
    now = 0.0
    for _ in range(TRIES - 1):
        assert found.after_part(done(0, error="no room", snapshot=found.number), now) == given_up(found.number)
        now += 100.0
        assert found.after_tick(now) == [MakeFolder()]
        begun(found, found.number + 1)
    found.part(done(0, error="no room", snapshot=found.number), now)
    assert "no room" in str(found.answered())
    assert "no room" in found.error


def test_it_does_not_wait_for_ever() -> None:
    found = cutting()
    found.part(done(0), 1.0)
    assert found.after_tick(PATIENCE - 1) == []
    found.tick(PATIENCE, served=True)
    *forget, answer = found.said()
    assert forget == given_up()
    assert isinstance(answer, tuple)
    assert isinstance(answer[1], DeadlineExceeded)
    assert "no part from shards [1]" in str(answer[1])
    found.ask(ANN, 2000.0)
    found.tick(2000.0 + PATIENCE, served=False)
    assert "no primary" in str(found.answered())


def test_with_a_table_that_steps_alone_data_plans_are_those_of_the_moment() -> None:
    found = World(sync=Async())
    found.ask(ANN, 0.0)
    assert found.after_tick(0.0) == [MakeFolder()]
    begun(found, 5)
    before = found.plans.snapshot()
    found.plans.ask(1, m.PlanNext("data", 9, 1, 0, 3, False, 1))
    assert found.plans.snapshot() != before
    found.part(done(0), 1.0)
    *_, made = found.after_part(done(1), 1.0)
    assert isinstance(made, WriteManifest)
    assert made.plan == before
