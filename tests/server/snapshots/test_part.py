"""A shard's primary takes part in a snapshot between two records, and a new table begins with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headwater.errors import SnapshotCorrupt
from headwater.server import events as e
from headwater.server.shard import Shard
from headwater.server.snapshots import manifest
from headwater.server.snapshots.format import Written
from headwater.server.snapshots.part import SnapshotPart, fill
from headwater.server.snapshots.restore import Snapshot
from headwater.server.table import Table
from headwater.types import Async, Bulk
from headwater.wire import messages as m
from tests.server.stage import TABLE, Memory, Stage, spec


def part_of(stage: Stage, number: int = 0) -> SnapshotPart:
    """As a node wires it."""
    shard = stage.shards[number]
    part = SnapshotPart(shard, threads=False)
    shard.applied.append(part.due)
    shard.replica._memory.before_write = part.before_write  # type: ignore[method-assign]
    return part


def cut(folder: Path, clock: int | None = None, number: int = 1) -> m.Cut:
    return m.Cut(number, 0, str(folder), () if clock is None else ((TABLE, clock),))


def finished(part: SnapshotPart) -> m.CutDone:
    for _ in range(100):
        part.advance(1)
        done = part.result()
        if done is not None:
            return done
    raise AssertionError("it does not end")


def published(root: Path, stage: Stage, done: m.CutDone) -> Snapshot:
    assert not done.error
    written = Written(done.file, done.nbytes, done.sha256)
    manifest.publish(root, done.snapshot, [written], {TABLE: stage.spec}, 1)
    return Snapshot(manifest.folder_of(root, done.snapshot))


def test_what_is_applied_afterwards_is_not_in_it(tmp_path: Path) -> None:
    stage = Stage(spec(Async()), ranks=(0, 1))
    part = part_of(stage)
    number, folder = manifest.start(tmp_path)
    assert number == 1
    stage.push(0, 3.0)
    part.cut(cut(folder))
    lsn = stage.shards[0].lsn
    stage.push(1, 100.0)
    done = finished(part)
    assert (done.snapshot, done.shard, done.lsn, done.clocks) == (1, 0, lsn, ())
    assert done.pause > 0
    assert part.result() is None
    with published(tmp_path, stage, done) as snapshot:
        assert set(snapshot.read("t", 0, "value", 0, 40_000).tolist()) == {-3.0}
        mark = snapshot.table("t").mark
        assert (mark.applied, mark.clock, mark.clocks) == (1, 1, ((0, 1), (1, 0)))
        first, second = snapshot.sessions(0)
        assert (first.session, first.rank, first.done) == (10, 0, ((TABLE, 1),))
        assert (second.session, second.rank) == (11, 1)
        assert (TABLE, 1) not in second.done
    assert stage.value() == -103.0


def test_the_moment_is_when_all_that_was_proposed_is_applied(tmp_path: Path) -> None:
    """A push that waits for a follower when the cut comes is in it; one that comes after the cut is not."""
    stage = Stage(spec(Async()), ranks=(0,))
    shard, part = stage.shards[0], part_of(stage)
    _, folder = manifest.start(tmp_path)
    shard.followed(1, shard.lsn)
    stage.push(0, 3.0)
    part.cut(cut(folder))
    stage.push(0, 3.0)
    part.advance()
    assert part.result() is None
    assert stage.value() == 0.0
    shard.accepted(1, shard.log.last)
    assert stage.value() == -6.0
    done = finished(part)
    assert done.lsn == shard.lsn - 1
    with published(tmp_path, stage, done) as snapshot:
        assert set(snapshot.read("t", 0, "value", 0, 40_000).tolist()) == {-3.0}


def test_a_bulk_table_is_cut_after_the_step_that_the_coordinator_names(tmp_path: Path) -> None:
    stage = Stage(spec(Bulk()), ranks=(0,))
    part = part_of(stage)
    _, folder = manifest.start(tmp_path)
    stage.push(0, 3.0)
    stage.decide()
    stage.push(0, 5.0)  # prepared, and not decided
    part.cut(cut(folder, clock=1))
    stage.decide()
    done = finished(part)
    assert done.clocks == ((TABLE, 1),)
    with published(tmp_path, stage, done) as snapshot:
        assert set(snapshot.read("t", 0, "value", 0, 40_000).tolist()) == {-3.0}
        assert snapshot.table("t").mark.clock == 1


def test_a_table_at_another_clock_says_so(tmp_path: Path) -> None:
    stage = Stage(spec(Bulk()), ranks=(0,))
    part = part_of(stage)
    part.cut(cut(tmp_path, clock=4))
    done = finished(part)
    assert "table 't' is at clock 0 on shard 0, not at 4" in done.error
    assert part.result() is None
    stage.push(0, 3.0)  # and it goes on
    stage.decide()
    assert stage.value() == -3.0


def test_a_new_cut_ends_the_one_before(tmp_path: Path) -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    part = part_of(stage)
    part.cut(cut(tmp_path, number=1))
    part.cut(cut(tmp_path, number=2))
    assert finished(part).snapshot == 2
    part.cut(cut(tmp_path, number=3))
    part.drop()
    part.advance(100)
    assert part.result() is None


def test_one_that_is_prepared_waits_for_its_moment(tmp_path: Path) -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    part = part_of(stage)
    _, folder = manifest.start(tmp_path)
    part.cut(m.Cut(1, 0, str(folder), (), prepare=True))
    assert part.result() == m.CutDone(1, 0, prepared=True)
    assert part.result() is None
    stage.push(0, 3.0)
    part.advance(100)
    assert part.result() is None
    part.cut(cut(folder))
    stage.push(0, 3.0)
    with published(tmp_path, stage, finished(part)) as snapshot:
        assert set(snapshot.read("t", 0, "value", 0, 40_000).tolist()) == {-3.0}
    part.cut(m.Cut(2, 0, str(folder), (), prepare=True))
    part.cut(m.Cut(2, 0, "", ()))
    assert part.result() is None
    assert part._capture is None


@pytest.mark.parametrize("sync", [Bulk(), Async()])
def test_a_table_that_begins_with_it(sync: Bulk | Async, tmp_path: Path) -> None:
    stage = Stage(spec(sync), ranks=(0,))
    part = part_of(stage)
    _, folder = manifest.start(tmp_path)
    for _ in range(3):
        stage.push(0, 2.0)
        stage.decide() if isinstance(sync, Bulk) else None
    part.cut(cut(folder))
    published(tmp_path, stage, finished(part)).close()

    class Loads(Memory):
        def load(self, table: Table, folder: str) -> None:
            with Snapshot(Path(folder)) as snapshot:
                fill(table, snapshot)

    new = Shard(0, Loads(0, 1))
    new.lead(1, (), blocked=False)
    (created,) = new.handle(e.Create(TABLE, stage.spec, str(folder)))
    assert isinstance(created, e.Created)
    table = new.tables[TABLE]
    assert set(table.store.values[: 4 * 40_000].view(torch.float32).tolist()) == {-6.0}
    assert table.clocks.applied == 3
    assert table.gathering.clock == (3 if isinstance(sync, Bulk) else 0)
    (refused,) = new.handle(e.Create(TABLE + 1, spec(), str(tmp_path / "none")))
    assert isinstance(refused, e.Refused)
    assert isinstance(refused.error, SnapshotCorrupt)
    assert TABLE + 1 not in new.tables
