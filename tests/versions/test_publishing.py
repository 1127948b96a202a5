"""Versions, tags and leases: publishing, finding, holding, letting go; what dies and comes back; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headwater.errors import (
    ClusterError,
    ProtocolError,
    UnknownTable,
    UnknownVersion,
    UsageError,
    VersionExists,
)
from headwater.versions.lifecycle import ABANDONED, UNFINISHED
from headwater.wire import versions as v
from tests.versions.fake_coordinator import SIZE, FakeCoordinator, W, again


@pytest.fixture
def world() -> FakeCoordinator:
    return FakeCoordinator()


# ---- publishing --------------------------------------------------------------------------------------


def test_a_version_is_begun_by_all_then_held_by_all_then_ready(world: FakeCoordinator) -> None:
    world.publish("v1", metadata={"loss": "2.5"}, time=7.0)
    assert [(c.number, c.shard, c.tables, c.late) for c in world.cuts] == [(1, 0, (1,), False), (1, 1, (1,), False)]
    world.said(1, 0)
    assert world.take(W) == []
    world.lifecycle.await_ready(world.asker(2), 1)
    world.said(1, 1, begun=True)
    assert world.take(W) == [v.Publishing(1)]
    with pytest.raises(UnknownVersion, match="being published; wait"):
        world.means("v1")
    world.said(1, 1, pause=0.25)
    (found,) = world.take(2)
    assert found.pause == 0.25
    info = found.info
    assert (info.model, info.number, info.name, info.parent, info.nbytes) == ("m", 1, "v1", 0, 2 * SIZE)
    assert (info.metadata, info.time, info.tables) == ({"loss": "2.5"}, 7.0, ("t1",))
    assert len(info.digest) == 16


def test_it_waits_for_its_step_and_is_cut_before_the_next(world: FakeCoordinator) -> None:
    world.publish("v1", clocks=((1, 3),))
    world.publish("v2", clocks=((1, 4),))
    assert not world.cuts
    for world.clock in (2, 3):
        world.lifecycle.advance()
    assert [c.number for c in world.cuts] == [1, 1]
    world.clock = 4
    world.lifecycle.advance()
    assert [c.number for c in world.cuts] == [1, 1, 2, 2]


def test_a_table_on_one_shard_waits_there(world: FakeCoordinator) -> None:
    world.publish("v1", tables=(2,), clocks=((2, 7),))
    assert [(c.shard, c.clocks) for c in world.cuts] == [(1, ((2, 7),))]


def test_the_step_of_a_version_is_the_state_that_was_cut(world: FakeCoordinator) -> None:
    world.clock = 8
    assert world.catalogue.entries[world.make("v1", clocks=((1, 8),))].info.step == 8


def test_shards_that_begin_at_different_steps_make_no_version(world: FakeCoordinator) -> None:
    world.publish("v1")
    world.said(1, 0, clocks=((1, 4),))
    world.said(1, 1, clocks=((1, 5),))
    (error,) = world.take(W)
    assert isinstance(error, ClusterError)
    assert "a step of table 't1' was committed while" in str(error)
    assert "Publish again" in str(error)
    assert world.dropped == [1]
    with pytest.raises(UnknownVersion, match="given up"):
        world.lifecycle.await_ready(world.asker(), 1)


def test_parents_and_numbers_are_of_the_cluster_and_names_of_the_model(world: FakeCoordinator) -> None:
    world.make("a")
    world.make("a", model="other")
    third = world.make("b")
    assert third == 3
    assert world.catalogue.entries[3].info.parent == 1
    assert world.catalogue.resolve("other", "latest").number == 2


def test_asked_again_it_is_the_same_version(world: FakeCoordinator) -> None:
    """Over a new connection, or by another worker at the same step; under no bulk table too."""
    ask = world.publish("v1", tables=(2,), time=5.0)
    world.lifecycle.publish(world.asker(2), ask)
    world.said(1, 1, begun=True)
    assert world.take(W) == world.take(2) == [v.Publishing(1)]
    world.lifecycle.publish(world.asker(3), ask)
    assert world.take(3) == [v.Publishing(1)]
    world.clock = 1
    world.publish("v2", clocks=((1, 1),), time=1.0)
    world.publish("v2", peer=2, clocks=((1, 1),), time=2.0, metadata={"by": "another worker"})
    world.said(2, 0)
    world.said(2, 1)
    assert world.take(W) == world.take(2) == [v.Publishing(2)]


@pytest.mark.parametrize(
    "again", [{}, {"tables": (2,)}, {"clocks": ((1, 0),)}, {"tables": (1, 2), "clocks": ((1, 5),)}, {"time": 1.0}]
)
def test_another_version_of_the_same_name_is_refused(world: FakeCoordinator, again: dict[str, Any]) -> None:
    world.clock = 5
    world.publish("v1", clocks=((1, 5),))
    with pytest.raises(VersionExists, match=r"has a version 'v1' already \(number 1\); nothing was published"):
        world.publish("v1", **again)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"tables": ()}, UsageError),
        ({"tables": (1, 1)}, UsageError),
        ({"tables": (7,)}, UnknownTable),
        ({"tables": (-(1 << 63),)}, UnknownTable),
        ({"clocks": ((7, 1),)}, ProtocolError),
        ({"clocks": ((2, 1),)}, ProtocolError),  # a table, but none of the version's
        ({"clocks": ((1, -1),)}, ProtocolError),
        ({"clocks": ((1, (1 << 64) - 1),)}, ProtocolError),
        ({"clocks": ((1, 1), (1, 2))}, ProtocolError),
        ({"time": math.nan}, ProtocolError),
        ({"time": math.inf}, ProtocolError),
        ({"keep": 0}, UsageError),
        ({"keep": -1}, UsageError),
        ({"keep": (1 << 64) - 1}, UsageError),
        ({"age": 0.0}, UsageError),
        ({"age": -1.0}, UsageError),
        ({"age": math.nan}, UsageError),
        ({"metadata": {"k": "x" * (64 << 10)}}, UsageError),
        ({"model": ""}, UsageError),
        ({"model": "m" * 201}, UsageError),
        ({"tags": ("latest",)}, UsageError),
        ({"tags": ("new",)}, UsageError),  # its own name
        ({"tags": ("",)}, UsageError),
        ({"tags": ("old",)}, UsageError),  # a version
        ({"tags": tuple(f"t{i}" for i in range(65))}, UsageError),
    ],
)
def test_a_wish_that_cannot_be_is_refused_and_leaves_nothing(
    world: FakeCoordinator, wrong: Any, error: type[Exception]
) -> None:
    world.make("old")
    before = dict(world.state)
    with pytest.raises(error):
        world.publish("new", **wrong)
    assert world.names == ["old"]
    assert world.state == before
    world.lifecycle.advance()  # nothing of it waits


@pytest.mark.parametrize("name", ["", " a", "a ", "a\n", "\x00", "a" * 201, "latest", "prod", "soon"])
def test_names_that_a_version_cannot_have(world: FakeCoordinator, name: str) -> None:
    world.make("v1", tags=("prod",))
    world.publish("v2", tags=("soon",))  # on its way
    with pytest.raises(UsageError):
        world.publish(name)


def test_versions_on_their_way_are_bounded(world: FakeCoordinator) -> None:
    for i in range(UNFINISHED):
        world.publish(f"v{i}")
    with pytest.raises(ClusterError, match="16 versions are on their way already; nothing was published"):
        world.publish("more")


def test_what_nobody_waits_for_any_more_is_given_up(world: FakeCoordinator) -> None:
    """Else sixteen wishes of a client that is gone for steps that never come would end all publication."""
    for i in range(UNFINISHED):
        world.publish(f"v{i}", clocks=((1, 1 << 40),))
    world.pass_time(2 * ABANDONED)
    assert len(world.names) == UNFINISHED  # it still waits
    world.gone(W)
    world.pass_time(1)
    assert not world.names
    world.make("v")


def test_a_version_whose_publisher_does_not_wait_may_take_its_time(world: FakeCoordinator) -> None:
    world.publish("v1")
    for shard in (0, 1):
        world.said(1, shard, begun=True)
    world.gone(W)
    world.pass_time(3 * ABANDONED)
    for shard in (0, 1):
        world.said(1, shard)
    assert world.means("latest") == 1


def test_those_who_wait_for_one_version_are_bounded(world: FakeCoordinator) -> None:
    ask = world.publish("v1", time=1.0)
    with pytest.raises(ClusterError, match="wait for this version already"):
        again(lambda i: world.lifecycle.await_ready(world.asker(2), 1))
    with pytest.raises(ClusterError, match="wait for this version already"):
        again(lambda i: world.lifecycle.publish(world.asker(2), ask))


# ---- what servers say ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"parts": (v.PartDigest(1, SIZE, -1),)},
        {"parts": (v.PartDigest(1, -1, 5),)},
        {"parts": (v.PartDigest(7, SIZE, 5),)},
        {"parts": (v.PartDigest(1, SIZE, 5), v.PartDigest(1, SIZE, 5))},
        {"parts": (v.PartDigest(2, SIZE, 5),)},  # one of its tables is missing
        {"clocks": ((7, 1),)},
        {"clocks": ((1, -1),)},
        {"clocks": ((1, (1 << 64) - 1),)},
        {"pause": math.nan},
        {"pause": math.inf},
        {"pause": -1.0},
    ],
)
def test_what_a_server_cannot_mean_changes_nothing(world: FakeCoordinator, wrong: dict[str, Any]) -> None:
    world.publish("v1", tables=(1, 2))
    with pytest.raises(ProtocolError, match="says of version number 1 what cannot be"):
        world.said(1, 1, **wrong)
    world.said(1, 0)
    world.said(1, 1)
    assert world.means("latest") == 1


def test_a_word_about_a_version_that_is_not_there_ends_it_there(world: FakeCoordinator) -> None:
    world.lifecycle.part(v.PartDone(77, 0, 0))
    world.make("v1")
    world.lifecycle.part(v.PartDone(1, 9, 0))  # of a shard that has no part in it
    assert world.dropped == [77, 1]
    assert world.means("v1") == 1


def test_nobody_begins_before_it_is_told_to(world: FakeCoordinator) -> None:
    world.publish("v1", clocks=((1, 5),))
    with pytest.raises(ProtocolError, match="before it was told to"):
        world.said(1, 0)


def test_a_primary_that_cannot_ends_it_and_a_backup_that_cannot_does_not(world: FakeCoordinator) -> None:
    world.publish("v1")
    world.lifecycle.part(v.PartDone(1, 0, 3, error="no memory"), leads=False)
    assert world.names == ["v1"]
    world.lifecycle.part(v.PartDone(1, 0, 0, error="no memory"), leads=True)
    (error,) = world.take(W)
    assert "version 'v1' was not published: no memory" in str(error)
    assert not world.names


def test_a_primary_that_fails_late_does_not_end_what_another_holds(world: FakeCoordinator) -> None:
    world.publish("v1")
    world.said(1, 3, shard=0)
    world.lifecycle.part(v.PartDone(1, 0, 0, error="no memory"))
    world.said(1, 1)
    assert world.means("v1") == 1


def test_replicas_that_differ_make_no_version(world: FakeCoordinator) -> None:
    world.publish("v1")
    world.said(1, 0)
    world.said(1, 3, shard=0, parts=(v.PartDigest(1, SIZE, 666),))
    (error,) = world.take(W)
    assert "two replicas of shard 0 differ" in str(error)


def test_a_replica_that_comes_with_other_bytes_does_not_end_a_version_that_is_read(world: FakeCoordinator) -> None:
    world.make("v1")
    world.lease("v1")
    with pytest.raises(ProtocolError, match="readers are not sent to it"):
        world.said(1, 3, shard=0, parts=(v.PartDigest(1, SIZE, 666),))
    assert [len(part.holders) for part in world.lease("v1").parts] == [1, 1]


def test_a_backup_that_ran_ahead_of_its_primary_counts_when_the_primary_says_the_same(world: FakeCoordinator) -> None:
    """Its record may be one that is lost with the primary: then another one's cut is the version."""
    world.publish("v1")
    world.said(1, 1)
    world.said(1, 3, shard=0, leads=False)
    assert world.take(W) == []
    assert not world.catalogue.entries[1].begun.get(0)
    world.lifecycle.moved(0)  # the new primary does not know of it
    assert [(c.shard, c.late) for c in world.cuts[2:]] == [(0, False)]
    world.said(1, 0)
    assert world.catalogue.entries[1].holders[0] == {0, 3}
    assert [len(part.holders) for part in world.lease("v1").parts] == [2, 1]


def test_a_backup_that_ran_into_what_never_was_is_no_holder(world: FakeCoordinator) -> None:
    world.publish("v1")
    world.said(1, 1)
    world.said(1, 3, shard=0, leads=False, parts=(v.PartDigest(1, SIZE, 666),))
    world.said(1, 0)
    assert world.means("v1") == 1
    assert world.catalogue.entries[1].holders[0] == {0}


def test_another_primary_is_told_what_the_one_before_may_not_have_heard(world: FakeCoordinator) -> None:
    world.publish("v1")
    world.said(1, 1)
    world.cuts.clear()
    world.lifecycle.moved(0)
    assert [(c.shard, c.late) for c in world.cuts] == [(0, False)]  # it may begin: the others' moments are compared
    world.said(1, 0, begun=True)
    world.lifecycle.moved(0)
    assert [(c.shard, c.late) for c in world.cuts] == [(0, False), (0, True)]
    world.said(1, 3, shard=0)
    world.lifecycle.moved(0)
    assert len(world.cuts) == 2  # it is ready
    assert world.means("v1") == 1
