"""Tags, retention, leases, news and deaths: what becomes of versions once they are there."""

from __future__ import annotations

import msgspec
import pytest

from headwater.errors import (
    ClusterError,
    UnknownVersion,
    UsageError,
    VersionExpired,
)
from headwater.versions import entries, leases
from headwater.versions.leases import LEASE
from headwater.versions.lifecycle import HEAL
from headwater.wire import messages as m
from headwater.wire import versions as v
from tests.versions.fake_coordinator import READER, SIZE, FakeCoordinator, W, again


@pytest.fixture
def world() -> FakeCoordinator:
    return FakeCoordinator()


# ---- names, tags -----------------------------------------------------------------------------------------


def test_latest_is_the_newest_ready_one_and_cannot_be_moved(world: FakeCoordinator) -> None:
    world.make("v1")
    world.publish("v2")
    assert world.means("latest") == 1
    with pytest.raises(UsageError, match="always the newest version"):
        world.tag("latest", "v1")
    with pytest.raises(UsageError, match="always the newest version"):
        world.tag("latest", "")


def test_a_tag_moves_back_and_goes(world: FakeCoordinator) -> None:
    for name in ("v1", "v2"):
        world.make(name)
    world.tag("prod", "v2")
    world.tag("prod", "v1")
    world.tag("stage", "prod")  # by another tag
    assert world.means("prod") == world.means("stage") == 1
    world.tag("prod", "")
    with pytest.raises(UnknownVersion, match="versions: v1, v2; tags: latest, stage"):
        world.means("prod")
    with pytest.raises(UnknownVersion, match="no tag 'prod'"):
        world.tag("prod", "")
    assert world.take(W)[-1] == m.Done()


def test_a_tag_and_a_version_have_not_one_name(world: FakeCoordinator) -> None:
    world.make("v1")
    with pytest.raises(UsageError, match="'v1' is a version of 'm'"):
        world.tag("v1", "v1")
    with pytest.raises(UnknownVersion):
        world.tag("prod", "v1", model="other")
    assert not world.catalogue.tags


def test_tags_of_a_model_are_bounded(world: FakeCoordinator) -> None:
    world.make("v1")
    with pytest.raises(UsageError, match="has 64 tags"):
        again(lambda i: world.tag(f"t{i}", "v1"))
    world.tag("t3", "v1")  # one that is there moves
    with pytest.raises(UsageError, match="more than 64 tags"):
        world.publish("v2", tags=("another",))


def test_a_tag_that_came_with_versions_means_the_later_one_whichever_is_ready_first(world: FakeCoordinator) -> None:
    world.publish("v1", tags=("prod",))
    world.publish("v2", tags=("prod",))
    for number in (2, 1):
        for shard in (0, 1):
            world.said(number, shard)
    assert world.means("prod") == 2


def test_errors_say_what_there_is(world: FakeCoordinator) -> None:
    with pytest.raises(UnknownVersion, match="no version of 'm' is published; nothing is published yet"):
        world.means("v1")
    for i in range(40):
        world.make(f"v{i}", keep=100)
        world.make("only", model=f"model-{i}")
    for i in range(40):
        world.tag(f"tag-{i}", "v1")
    with pytest.raises(UnknownVersion) as caught:
        world.means("nope")
    assert "'m' has no version or tag 'nope'; versions: v32" in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(UnknownVersion, match="there are versions of 'm', 'model-0'") as caught:
        world.catalogue.resolve("none", "latest")
    assert len(str(caught.value)) < 400


# ---- retention -------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_what_tags_and_leases_hold(world: FakeCoordinator) -> None:
    world.make("v1", keep=2)
    world.tag("prod", "v1")
    world.make("v2", keep=2)
    world.lease("v2")
    for i in range(3, 7):
        world.make(f"v{i}", keep=2)
    assert world.names == ["v1", "v2", "v5", "v6"]
    assert world.dropped == [3, 4]
    world.leases.release(50, 2)
    world.tag("prod", "v6")
    assert world.names == ["v5", "v6"]
    assert set(world.state) == {"versions", "tags/m", "version/5", "version/6"}


def test_the_newest_ones_wish_counts(world: FakeCoordinator) -> None:
    for i in range(5):
        world.make(f"v{i}", keep=5)
    world.make("v5", keep=1)
    assert world.names == ["v5"]


def test_models_do_not_count_for_each_other(world: FakeCoordinator) -> None:
    for model in ("a", "b", "c"):
        world.make("v", model=model, keep=1)
    assert len(world.names) == 3


def test_old_ones_go_but_never_the_newest(world: FakeCoordinator) -> None:
    world.make("v1", age=60.0)
    world.pass_time(40)
    world.make("v2", age=60.0)
    world.pass_time(19)
    assert world.names == ["v1", "v2"]
    world.pass_time(3)
    assert world.names == ["v2"]
    world.pass_time(1000)
    assert world.names == ["v2"]


def test_retiring_is_refused_while_somebody_holds_it(world: FakeCoordinator) -> None:
    for name in ("v1", "v2"):
        world.make(name)
    world.tag("prod", "v1")
    with pytest.raises(UsageError, match="held by tag 'prod'; it was not retired"):
        world.lifecycle.retire(world.asker(), v.Retire("m", "v1"))
    world.tag("prod", "")
    world.lease("v1")
    with pytest.raises(UsageError, match="held by 1 leases"):
        world.lifecycle.retire(world.asker(), v.Retire("m", "v1"))
    world.leases.release(50, 1)
    world.take(W)
    world.lifecycle.retire(world.asker(), v.Retire("m", "v1"))
    assert world.take(W) == [m.Done()]
    assert (world.names, world.dropped) == (["v2"], [1])
    with pytest.raises(UnknownVersion):
        world.lifecycle.retire(world.asker(), v.Retire("m", "v1"))


# ---- leases ----------------------------------------------------------------------------------------------


def test_a_lease_says_where_the_bytes_are_and_only_the_specs_that_are_not_known(world: FakeCoordinator) -> None:
    world.make("v1", tables=(1, 2))
    leased = world.lease("latest")
    assert (leased.shards, leased.tables, [t for t, _ in leased.specs]) == (2, (1, 2), [1, 2])
    assert [(p.shard, p.table, p.size, p.digest) for p in leased.parts] == [
        (0, 1, SIZE, 100), (1, 1, SIZE, 101), (1, 2, SIZE, 101)
    ]  # fmt: skip
    assert leased.parts[0].holders == (v.Holder("tcp://127.0.0.1:0", "", ""),)
    known = tuple((t, v.fingerprint(s)) for t, s in leased.specs)
    assert world.lease("latest", known=known).specs == ()
    assert [t for t, _ in world.lease("latest", known=((1, 5), known[1])).specs] == [1]  # of another cluster


def test_leases_are_counted_and_one_too_few_is_no_fault(world: FakeCoordinator) -> None:
    world.make("v1", keep=1)
    for _ in range(2):
        world.lease("v1")
    world.make("v2", keep=1)
    world.leases.release(51, 1)  # somebody else's
    world.leases.release(50, 99)
    world.leases.release(50, 1)
    assert world.names == ["v1", "v2"]
    world.leases.release(50, 1)
    world.leases.release(50, 1)
    assert world.names == ["v2"]


@pytest.mark.parametrize("back", [True, False])
def test_a_reader_that_dies_keeps_its_leases_for_ten_seconds(world: FakeCoordinator, back: bool) -> None:
    world.make("v1", keep=1)
    world.lease("v1")
    world.make("v2", keep=1)
    world.leases.left(50, world.now, clean=False)
    world.pass_time(LEASE - 1)
    assert world.names == ["v1", "v2"]
    if back:
        world.leases.joined(50)
    world.pass_time(2)
    assert world.names == (["v1", "v2"] if back else ["v2"])


def test_a_reader_that_leaves_ends_its_leases_at_once(world: FakeCoordinator) -> None:
    world.make("v1", keep=1)
    world.lease("v1")
    world.lease("v1", session=51)
    world.make("v2", keep=1)
    world.leases.left(50, world.now, clean=True)
    assert world.names == ["v1", "v2"]
    world.leases.left(51, world.now, clean=True)
    assert world.names == ["v2"]


def test_a_lease_that_is_asked_for_twice_is_one(world: FakeCoordinator) -> None:
    """The answer was lost, and the question came again over another connection."""
    world.make("v1", keep=1)
    world.lease("v1", turn=1)
    world.make("v2", keep=1)
    assert world.lease("v1", turn=1).info.number == 1  # and it is not let go of in between
    assert world.names == ["v1", "v2"]
    assert world.lease("latest", turn=1).info.number == 2  # it means another one now
    assert world.names == ["v2"]
    world.leases.release(50, 2, turn=1)
    world.leases.release(50, 2, turn=1)
    assert not world.catalogue.entries[2].leases


def test_what_a_reader_says_that_it_holds_is_what_it_leases(world: FakeCoordinator) -> None:
    world.make("v1", keep=1)
    for turn in (1, 2, 3):
        world.lease("v1", turn=turn)
    world.make("v2", keep=1)
    world.leases.holding(50, v.Holding(((1, 1),), 2))  # 2: its release was lost; 3: its answer is on the way
    assert world.catalogue.entries[1].leases[50] == 2
    world.leases.holding(50, v.Holding(((1, 1), (3, 1)), 3))
    assert world.catalogue.entries[1].leases[50] == 2
    world.leases.holding(50, v.Holding((), 3))
    assert world.names == ["v2"]
    world.leases.holding(50, v.Holding(((1, 1), (4, 2), (5, -7)), 1 << 62))  # one that is gone stays so
    assert world.catalogue.entries[2].leases == {50: 1}


def test_leases_of_a_reader_are_bounded(world: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASES", 5)
    world.make("v1")
    with pytest.raises(ClusterError, match="5 leases, no more"):
        again(lambda i: world.lease("v1", 50, turn=i + 1))
    with pytest.raises(ClusterError, match="5 leases, no more"):
        again(lambda i: world.lease("v1", 51))
    world.leases.holding(52, v.Holding(tuple((turn, 1) for turn in range(1, 100)), 100))
    assert set(world.catalogue.entries[1].leases.values()) == {5}


# ---- news ------------------------------------------------------------------------------------------------


def test_watching_a_name_or_tag_now_and_later(world: FakeCoordinator) -> None:
    world.make("v1")
    world.watch("latest")
    assert [f.info.number for f in world.take(READER)] == [1]
    world.watch("latest", after=1)
    world.watch("prod")
    world.watch("v3")
    assert world.take(READER) == []
    world.make("v2")
    assert [f.info.name for f in world.take(READER)] == ["v2"]
    world.tag("prod", "v1")
    assert [f.info.name for f in world.take(READER)] == ["v1"]
    world.make("v3")
    assert [f.info.name for f in world.take(READER)] == ["v3"]
    world.make("v4")
    assert world.take(READER) == []  # each was answered once


def test_who_knows_another_version_of_that_number_is_answered_at_once(world: FakeCoordinator) -> None:
    world.make("v1")
    digest = world.catalogue.entries[1].info.digest
    assert digest
    for known, answered in ((digest, 0), ("", 0), ("another cluster's", 1)):
        world.leases.watch(world.asker(READER), v.Watch("m", "latest", 1, known))
        assert len(world.take(READER)) == answered
    world.make("v2")
    assert [f.info.name for f in world.take(READER)] == ["v2", "v2"]


def test_threads_of_one_reader_wait_for_the_same_and_those_that_gave_up_do_not_pile_up(world: FakeCoordinator) -> None:
    for _ in range(50):
        world.watch("latest")
    for _ in range(2):
        world.watch("latest", peer=8)
    assert sum(map(len, world.leases._watching.values())) == leases.WAITERS + 2
    world.make("v1")
    assert len(world.take(READER)) == leases.WAITERS
    assert len(world.take(8)) == 2
    world.make("v2")
    assert world.take(READER) == world.take(8) == []


def test_who_is_gone_is_not_told_and_leaves_nothing(world: FakeCoordinator) -> None:
    world.watch("latest")
    world.leases.show(world.asker(READER), v.ListVersions("", 1))
    world.publish("v1", peer=READER)
    world.lifecycle.await_ready(world.asker(READER), 1)
    world.gone(READER)
    for shard in (0, 1):
        world.said(1, shard)
    assert world.take(READER) == []
    assert not world.leases._watching
    assert not world.leases._listing


def test_what_one_connection_watches_is_bounded(world: FakeCoordinator) -> None:
    for i in range(3 * entries.ASKERS):
        world.watch("latest", after=i + 1000)
        world.watch(f"tag-{i}")
    assert len(world.leases._watching) == entries.ASKERS
    for name in ("", "x" * 201, "\n"):
        with pytest.raises(UsageError):
            world.watch(name)
    with pytest.raises(UsageError):
        world.leases.watch(world.asker(READER), v.Watch("m" * 1000, "latest"))


def test_a_list_is_told_when_there_is_another(world: FakeCoordinator) -> None:
    world.leases.show(world.asker(READER), v.ListVersions("m"))
    known = world.take(READER)[-1].revision
    world.leases.show(world.asker(READER), v.ListVersions("m", known))
    assert world.take(READER) == []
    world.make("v1")
    (listed,) = world.take(READER)
    assert [(s.info.name, s.state, s.tags, s.leases, s.copies) for s in listed.versions] == [
        ("v1", "ready", ("latest",), 0, 1)
    ]


# ---- deaths ----------------------------------------------------------------------------------------------


def test_a_version_is_lost_with_its_last_holder_and_found_with_it(world: FakeCoordinator) -> None:
    world.make("v1")
    world.make("v2")
    world.said(2, 3, shard=0)  # a second copy
    world.watch("latest", after=2)
    world.up.discard(0)
    world.lifecycle.buried(0)
    assert world.means("latest") == 2
    with pytest.raises(VersionExpired, match="no server that is there holds all of version 'v1'"):
        world.lease("v1")
    assert [s.state for s in world.leases.status("m")] == ["lost", "ready"]
    assert not world.dropped
    world.up.discard(3)
    world.lifecycle.buried(3)
    with pytest.raises(VersionExpired):
        world.lease("latest")
    world.said(1, 0)
    assert world.take(READER)[-1].info.number == 1  # who had number 2 is told what can be had now
    world.up |= {0, 3}
    world.said(2, 0)
    assert world.means("latest") == 2
    world.lease("v1")


def test_a_version_is_back_with_a_holder_that_was_only_slow(world: FakeCoordinator) -> None:
    world.make("v1")
    world.up.discard(0)
    world.lifecycle.buried(0)
    with pytest.raises(VersionExpired):
        world.lease("v1")
    world.tick()
    assert [s.state for s in world.leases.status("m")] == ["lost"]
    world.up.add(0)
    world.tick()
    world.lease("v1")


def test_servers_that_became_copies_are_told_to_hold_it(world: FakeCoordinator) -> None:
    world.make("v1")
    world.views[0] = (0, 2)
    world.lifecycle.moved(0)
    world.pass_time(2 * HEAL)
    server, hold = world.holds[-1]
    assert (server, hold.number, hold.shard) == (2, 1, 0)
    assert hold.parts == (v.PartDigest(1, SIZE, 100),)
    assert world.lifecycle.only(0)
    world.lifecycle.part(v.PartDone(1, 0, 2, hold.parts))
    assert not world.lifecycle.only(0)
    asked = len(world.holds)
    world.pass_time(2 * HEAL)
    assert len(world.holds) == asked


def test_a_coordinator_that_comes_back_knows_what_was_ready(world: FakeCoordinator) -> None:
    world.make("v1", metadata={"a": "b"}, tags=("prod",))
    world.make("v2", keep=1)
    world.publish("v3")  # on its way: given up
    back = world.restart()
    assert back.names == ["v1", "v2"]
    with pytest.raises(VersionExpired):
        back.lease("latest")
    for number in (1, 2):
        for server in (0, 1):
            back.said(number, server)
    assert back.lease("prod").info == world.catalogue.entries[1].info
    assert back.means("latest") == 2
    back.leases.holding(60, v.Holding(((4, 2),), 4))  # its readers say what they hold
    back.make("v4", keep=1)
    assert back.names == ["v1", "v2", "v4"]


def test_numbers_are_never_used_again(world: FakeCoordinator) -> None:
    """Whatever became of their versions: servers may hold parts under them."""
    used: set[int] = set()
    for life in range(4):
        for i in range(90):  # more than are reserved at a time, and none becomes ready
            world.publish(f"{life}-{i}")
            number = max(world.catalogue.entries)
            assert number not in used
            used.add(number)
            world.lifecycle.part(v.PartDone(number, 0, 0, error="full"))
        world = world.restart()


def test_a_state_of_odd_bytes_is_not_taken(world: FakeCoordinator) -> None:
    world.make("v1")
    with pytest.raises(msgspec.MsgspecError):
        FakeCoordinator(world.state | {"version/1": b"\xc0"})
