"""The coordinator's part in a snapshot: what is asked of whom, and what becomes of it when something happens."""

from __future__ import annotations

import pytest

from headwater.cluster.snapshots import (
    PATIENCE,
    TRIES,
    Answer,
    Moment,
    Publish,
    Published,
    Send,
    Snapshots,
    Start,
    Started,
)
from headwater.errors import ClusterError, DeadlineExceeded, UsageError
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec
from headwater.wire import messages as m
from headwater.wire.outgoing import Asker

SPEC = DenseSpec("t", (ParameterSpec("w", (4,)),), OptimizerSpec("SGD", ({},)))
ANN, BOB = Asker(7, 1), Asker(8, 2)


def done(shard: int, snapshot: int = 5, error: str = "") -> m.CutDone:
    return m.CutDone(snapshot, shard, f"shard-{shard}", 100, "ab", error=error)


def ready(shard: int, snapshot: int = 5) -> m.CutDone:
    return m.CutDone(snapshot, shard, prepared=True)


def cutting(now: float = 0.0, every: float = 0.0) -> Snapshots:
    """One that ANN asked for, on its way over two shards."""
    found = Snapshots(True, every)
    found.ask(ANN, now)
    assert found.tick(now, served=True) == [Start()]
    sends = found.started(Started(5, "/s/5"), 2)
    assert sends == [Send(shard, m.Cut(5, shard, "/s/5", (), prepare=True)) for shard in range(2)]
    assert found.part(ready(1), now) == []
    assert found.part(ready(1), now) == []  # said twice
    assert found.part(ready(0), now) == [Moment()]
    sends = found.cut([(1, 9)], {1: SPEC})
    assert sends == [Send(shard, m.Cut(5, shard, "/s/5", ((1, 9),))) for shard in range(2)]
    return found


def begun(found: Snapshots, number: int, shards: int = 1) -> None:
    """One that has a folder is on its way."""
    assert len(found.started(Started(number, f"/s/{number}"), shards)) == shards
    for shard in range(shards):
        found.part(ready(shard, number), 0.0)
    assert len(found.cut([], {1: SPEC})) == shards


def given_up(number: int = 5) -> list[Send]:
    return [Send(shard, m.Cut(number, shard, "", ())) for shard in range(2)]


def test_a_snapshot_from_wish_to_answer() -> None:
    found = cutting(now=10.0)
    assert found.part(done(1), 11.0) == []
    assert found.part(done(1), 11.0) == []  # said twice
    assert found.part(done(0, snapshot=4), 11.0) == []  # of one that was given up
    assert found.part(done(0), 12.0) == [Publish(5, (done(0), done(1)), {1: SPEC})]
    assert found.published(Published("/s/5"), 13.0) == [Answer(ANN, m.SnapshotTaken("/s/5", 200, 3.0))]
    assert found.step == "idle"
    assert found.tick(1000.0, served=True) == []


def test_without_a_folder_there_is_none() -> None:
    with pytest.raises(UsageError, match="--snapshots DIR"):
        Snapshots(False).ask(ANN, 0.0)
    assert Snapshots(False, every=1.0).tick(5.0, served=True) == []


def test_the_period() -> None:
    found = Snapshots(True, every=10.0, now=0.0)
    assert found.tick(9.9, served=True) == []
    assert found.tick(10.0, served=False) == []
    assert found.tick(11.0, served=True) == [Start()]
    assert found.tick(11.0, served=True) == []
    begun(found, 1)
    found.part(done(0, snapshot=1), 12.0)
    assert found.published(Published("/s/1"), 13.0) == []  # nobody asked
    assert found.tick(22.9, served=True) == []
    assert found.tick(23.0, served=True) == [Start()]


def test_who_asks_after_the_moment_gets_another_one() -> None:
    found = cutting()
    found.ask(BOB, 1.0)
    found.part(done(0), 2.0)
    found.part(done(1), 2.0)
    assert found.published(Published("/s/5"), 3.0) == [Answer(ANN, m.SnapshotTaken("/s/5", 200, 3.0))]
    assert found.tick(3.0, served=True) == [Start()]
    begun(found, 6)
    found.part(done(0, snapshot=6), 4.0)
    assert found.published(Published("/s/6"), 5.0) == [Answer(BOB, m.SnapshotTaken("/s/6", 100, 2.0))]


def test_who_asks_before_the_moment_shares_it() -> None:
    found = Snapshots(True)
    found.ask(ANN, 0.0)
    found.ask(BOB, 0.0)
    found.tick(0.0, served=True)
    found.gone(BOB.peer)
    assert found.failed(ClusterError("no room"), 1.0) == [Answer(ANN, found_error(found))]


def found_error(found: Snapshots) -> ClusterError:
    """The error that was kept, as something that equals the one in the answer."""

    class Same(ClusterError):
        def __eq__(self, other: object) -> bool:
            return str(other) == found.error

        __hash__ = ClusterError.__hash__

    return Same(found.error)


def test_another_primary_begins_it_anew() -> None:
    found = cutting()
    found.part(done(0), 1.0)
    assert found.moved(0, 1.0) == []
    assert found.step == "cutting"  # its part was there already
    assert found.moved(1, 1.0) == given_up()
    assert found.part(done(1), 1.0) == []  # too late
    assert found.tick(1.05, served=True) == []
    assert found.tick(2.0, served=False) == []
    assert found.tick(2.0, served=True) == [Start()]
    found.started(Started(6, "/s/6"), 2)
    found.part(ready(0, 6), 2.0)
    assert found.moved(0, 2.0) == given_up(6)  # it has forgotten that it was ready


def test_it_is_tried_a_few_times() -> None:
    found = cutting()
    now = 0.0
    for _ in range(TRIES - 1):
        assert found.part(done(0, error="no room", snapshot=found.number), now) == given_up(found.number)
        now += 100.0
        assert found.tick(now, served=True) == [Start()]
        begun(found, found.number + 1, 2)
    *_, answer = found.part(done(0, error="no room", snapshot=found.number), now)
    assert isinstance(answer, Answer)
    assert "no room" in str(answer.reply)
    assert "no room" in found.error


def test_it_does_not_wait_for_ever() -> None:
    found = cutting()
    found.part(done(0), 1.0)
    assert found.tick(PATIENCE - 1, served=True) == []
    *forget, answer = found.tick(PATIENCE, served=True)
    assert forget == given_up()
    assert isinstance(answer, Answer)
    assert isinstance(answer.reply, DeadlineExceeded)
    assert "no part from shards [1]" in str(answer.reply)
    found.ask(BOB, 2000.0)
    (answer,) = found.tick(2000.0 + PATIENCE, served=False)
    assert isinstance(answer, Answer)
    assert "no primary" in str(answer.reply)
