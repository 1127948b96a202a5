"""Versions, tags and leases: publishing, finding, holding, letting go; what dies and comes back; what is refused."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from headwater.cluster import entries, versions
from headwater.cluster.snapshots import Asker
from headwater.cluster.versions import ABANDONED, HEAL, LEASE, UNFINISHED, Known, Versions
from headwater.errors import (
    ClusterError,
    HeadwaterError,
    ProtocolError,
    UnknownTable,
    UnknownVersion,
    UsageError,
    VersionExists,
    VersionExpired,
)
from headwater.wire import messages as m
from headwater.wire import versions as v
from tests.cluster.script import spec

W, READER = 1, 9  # peers
SIZE = 4096


class World:
    """A ``Versions`` of two shards with table 1 (bulk, on both) and 2 (asynchronous, on shard 1); its desk is here.

    Server n leads shard n. What each peer hears, what is saved, ordered and dropped is kept.
    """

    def __init__(self, state: dict[str, bytes] | None = None) -> None:
        self.now = 1000.0
        self.clock: int | None = 0
        self.heard: dict[int, list[Any]] = defaultdict(list)
        self.state = dict(state or {})
        self.cuts: list[v.CutVersion] = []
        self.holds: list[tuple[int, v.Hold]] = []
        self.dropped: list[int] = []
        self.up = {0, 1, 2, 3}
        self.views: dict[int, tuple[int, ...]] = {0: (0,), 1: (1,)}
        self.versions = Versions(self, 2, lambda: self.now)
        self.versions.restore(self.state)
        self._seq = 0

    # ---- the desk ----------------------------------------------------------------------------------

    def reply(self, asker: Asker, message: m.Reply) -> None:
        self.heard[asker.peer].append(message)

    def fail(self, asker: Asker, error: HeadwaterError) -> None:
        self.heard[asker.peer].append(error)

    def save(self, key: str, value: bytes | None) -> None:
        if value is None:
            self.state.pop(key, None)
        else:
            self.state[key] = value

    def tell(self, shard: int, message: v.CutVersion) -> None:
        assert message.shard == shard
        self.cuts.append(message)

    def drop(self, numbers: tuple[int, ...]) -> None:
        self.dropped += numbers

    def table(self, number: int) -> Known:
        if number not in (1, 2):
            raise UnknownTable(f"table {number}")
        return Known(spec(f"t{number}"), (0, 1) if number == 1 else (1,), self.clock if number == 1 else None)

    def holder(self, server: int) -> v.Holder | None:
        return v.Holder(f"tcp://127.0.0.1:{server}", "", "") if server in self.up else None

    def copies(self, shard: int) -> tuple[int, ...]:
        return self.views[shard]

    def order(self, server: int, message: v.Hold) -> None:
        self.holds.append((server, message))

    # ---- what happens ------------------------------------------------------------------------------

    def asker(self, peer: int = W) -> Asker:
        self._seq += 1
        return Asker(peer, self._seq)

    def publish(self, name: str, peer: int = W, model: str = "m", **changes: Any) -> v.Publish:
        ask = v.Publish(model, name, **{"tables": (1,), **changes})
        self.versions.publish(self.asker(peer), ask)
        return ask

    def said(self, number: int, server: int, shard: int | None = None, *, begun: bool = False, **more: Any) -> None:
        """A server's word: it holds its part, of as many bytes as its tables have, or has only ``begun``."""
        shard = server if shard is None else shard
        tables = [t for t in self.versions.entries[number].ask.tables if shard in self.table(t).shards]
        parts = () if begun else tuple(v.PartDigest(t, SIZE, 100 * number + shard) for t in tables)
        clocks = tuple((t, self.clock or 0) for t in tables)
        self.versions.part(v.PartDone(number, shard, server, **{"parts": parts, "clocks": clocks, **more}))

    def make(self, name: str, **changes: Any) -> int:
        """A version that is ready; its number."""
        self.publish(name, **changes)
        number = max(self.versions.entries)
        for shard in self.versions.entries[number].shards:
            self.said(number, shard)
        return number

    def take(self, peer: int) -> list[Any]:
        return self.heard.pop(peer, [])

    def lease(self, name: str, session: int = 50, **more: Any) -> v.Leased:
        self.versions.lease(self.asker(READER), session, v.Lease("m", name, **more))
        leased = self.take(READER)[-1]
        assert isinstance(leased, v.Leased)
        return leased

    def tag(self, tag: str, name: str, model: str = "m") -> None:
        self.versions.set_tag(self.asker(), v.SetTag(model, tag, name))

    def watch(self, name: str, after: int = 0, peer: int = READER) -> None:
        self.versions.watch(self.asker(peer), v.Watch("m", name, after))

    def means(self, name: str) -> int:
        return self.versions.resolve("m", name).number

    @property
    def names(self) -> list[str]:
        return [entry.info.name for _, entry in sorted(self.versions.entries.items())]

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1)
            self.versions.tick(self.now)

    def restart(self) -> World:
        """Another coordinator with the same state."""
        return World(self.state)


def again(act: Callable[[int], object], times: int = 2 * entries.ASKERS) -> None:
    """Do it more often than is allowed."""
    for i in range(times):
        act(i)


@pytest.fixture
def world() -> World:
    return World()


# ---- publishing --------------------------------------------------------------------------------------


def test_a_version_is_begun_by_all_then_held_by_all_then_ready(world: World) -> None:
    world.publish("v1", metadata={"loss": "2.5"}, time=7.0)
    assert [(c.number, c.shard, c.tables, c.late) for c in world.cuts] == [(1, 0, (1,), False), (1, 1, (1,), False)]
    world.said(1, 0)
    assert world.take(W) == []
    world.versions.await_ready(world.asker(2), 1)
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


def test_it_waits_for_its_step_and_is_cut_before_the_next(world: World) -> None:
    world.publish("v1", clocks=((1, 3),))
    world.publish("v2", clocks=((1, 4),))
    assert not world.cuts
    for world.clock in (2, 3):
        world.versions.advance()
    assert [c.number for c in world.cuts] == [1, 1]
    world.clock = 4
    world.versions.advance()
    assert [c.number for c in world.cuts] == [1, 1, 2, 2]


def test_a_table_on_one_shard_waits_there(world: World) -> None:
    world.publish("v1", tables=(2,), clocks=((2, 7),))
    assert [(c.shard, c.clocks) for c in world.cuts] == [(1, ((2, 7),))]


def test_the_step_of_a_version_is_the_state_that_was_cut(world: World) -> None:
    world.clock = 8
    assert world.versions.entries[world.make("v1", clocks=((1, 8),))].info.step == 8


def test_shards_that_begin_at_different_steps_make_no_version(world: World) -> None:
    world.publish("v1")
    world.said(1, 0, clocks=((1, 4),))
    world.said(1, 1, clocks=((1, 5),))
    (error,) = world.take(W)
    assert isinstance(error, ClusterError)
    assert "a step of table 't1' was committed while" in str(error)
    assert "Publish again" in str(error)
    assert world.dropped == [1]
    with pytest.raises(UnknownVersion, match="given up"):
        world.versions.await_ready(world.asker(), 1)


def test_parents_and_numbers_are_of_the_cluster_and_names_of_the_model(world: World) -> None:
    world.make("a")
    world.make("a", model="other")
    third = world.make("b")
    assert third == 3
    assert world.versions.entries[3].info.parent == 1
    assert world.versions.resolve("other", "latest").number == 2


def test_asked_again_it_is_the_same_version(world: World) -> None:
    """Over a new connection, or by another worker at the same step; under no bulk table too."""
    ask = world.publish("v1", tables=(2,), time=5.0)
    world.versions.publish(world.asker(2), ask)
    world.said(1, 1, begun=True)
    assert world.take(W) == world.take(2) == [v.Publishing(1)]
    world.versions.publish(world.asker(3), ask)
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
def test_another_version_of_the_same_name_is_refused(world: World, again: dict[str, Any]) -> None:
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
def test_a_wish_that_cannot_be_is_refused_and_leaves_nothing(world: World, wrong: Any, error: type[Exception]) -> None:
    world.make("old")
    before = dict(world.state)
    with pytest.raises(error):
        world.publish("new", **wrong)
    assert world.names == ["old"]
    assert world.state == before
    world.versions.advance()  # nothing of it waits


@pytest.mark.parametrize("name", ["", " a", "a ", "a\n", "\x00", "a" * 201, "latest", "prod", "soon"])
def test_names_that_a_version_cannot_have(world: World, name: str) -> None:
    world.make("v1", tags=("prod",))
    world.publish("v2", tags=("soon",))  # on its way
    with pytest.raises(UsageError):
        world.publish(name)


def test_versions_on_their_way_are_bounded(world: World) -> None:
    for i in range(UNFINISHED):
        world.publish(f"v{i}")
    with pytest.raises(ClusterError, match="16 versions are on their way already; nothing was published"):
        world.publish("more")


def test_what_nobody_waits_for_any_more_is_given_up(world: World) -> None:
    """Else sixteen wishes of a client that is gone for steps that never come would end all publication."""
    for i in range(UNFINISHED):
        world.publish(f"v{i}", clocks=((1, 1 << 40),))
    world.pass_time(2 * ABANDONED)
    assert len(world.names) == UNFINISHED  # it still waits
    world.versions.gone(W)
    world.pass_time(1)
    assert not world.names
    world.make("v")


def test_a_version_whose_publisher_does_not_wait_may_take_its_time(world: World) -> None:
    world.publish("v1")
    for shard in (0, 1):
        world.said(1, shard, begun=True)
    world.versions.gone(W)
    world.pass_time(3 * ABANDONED)
    for shard in (0, 1):
        world.said(1, shard)
    assert world.means("latest") == 1


def test_those_who_wait_for_one_version_are_bounded(world: World) -> None:
    ask = world.publish("v1", time=1.0)
    with pytest.raises(ClusterError, match="wait for this version already"):
        again(lambda i: world.versions.await_ready(world.asker(2), 1))
    with pytest.raises(ClusterError, match="wait for this version already"):
        again(lambda i: world.versions.publish(world.asker(2), ask))


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
def test_what_a_server_cannot_mean_changes_nothing(world: World, wrong: dict[str, Any]) -> None:
    world.publish("v1", tables=(1, 2))
    with pytest.raises(ProtocolError, match="says of version number 1 what cannot be"):
        world.said(1, 1, **wrong)
    world.said(1, 0)
    world.said(1, 1)
    assert world.means("latest") == 1


def test_a_word_about_a_version_that_is_not_there_ends_it_there(world: World) -> None:
    world.versions.part(v.PartDone(77, 0, 0))
    world.make("v1")
    world.versions.part(v.PartDone(1, 9, 0))  # of a shard that has no part in it
    assert world.dropped == [77, 1]
    assert world.means("v1") == 1


def test_nobody_begins_before_it_is_told_to(world: World) -> None:
    world.publish("v1", clocks=((1, 5),))
    with pytest.raises(ProtocolError, match="before it was told to"):
        world.said(1, 0)


def test_a_primary_that_cannot_ends_it_and_a_backup_that_cannot_does_not(world: World) -> None:
    world.publish("v1")
    world.versions.part(v.PartDone(1, 0, 3, error="no memory"), leads=False)
    assert world.names == ["v1"]
    world.versions.part(v.PartDone(1, 0, 0, error="no memory"), leads=True)
    (error,) = world.take(W)
    assert "version 'v1' was not published: no memory" in str(error)
    assert not world.names


def test_a_primary_that_fails_late_does_not_end_what_another_holds(world: World) -> None:
    world.publish("v1")
    world.said(1, 3, shard=0)
    world.versions.part(v.PartDone(1, 0, 0, error="no memory"))
    world.said(1, 1)
    assert world.means("v1") == 1


def test_replicas_that_differ_make_no_version(world: World) -> None:
    world.publish("v1")
    world.said(1, 0)
    world.said(1, 3, shard=0, parts=(v.PartDigest(1, SIZE, 666),))
    (error,) = world.take(W)
    assert "two replicas of shard 0 differ" in str(error)


def test_a_replica_that_comes_with_other_bytes_does_not_end_a_version_that_is_read(world: World) -> None:
    world.make("v1")
    world.lease("v1")
    with pytest.raises(ProtocolError, match="readers are not sent to it"):
        world.said(1, 3, shard=0, parts=(v.PartDigest(1, SIZE, 666),))
    assert [len(part.holders) for part in world.lease("v1").parts] == [1, 1]


def test_another_primary_is_told_what_the_one_before_may_not_have_heard(world: World) -> None:
    world.publish("v1")
    world.said(1, 1)
    world.cuts.clear()
    world.versions.moved(0)
    assert [(c.shard, c.late) for c in world.cuts] == [(0, False)]  # it may begin: the others' moments are compared
    world.said(1, 0, begun=True)
    world.versions.moved(0)
    assert [(c.shard, c.late) for c in world.cuts] == [(0, False), (0, True)]
    world.said(1, 3, shard=0)
    world.versions.moved(0)
    assert len(world.cuts) == 2  # it is ready
    assert world.means("v1") == 1


# ---- names, tags -----------------------------------------------------------------------------------------


def test_latest_is_the_newest_ready_one_and_cannot_be_moved(world: World) -> None:
    world.make("v1")
    world.publish("v2")
    assert world.means("latest") == 1
    with pytest.raises(UsageError, match="always the newest version"):
        world.tag("latest", "v1")
    with pytest.raises(UsageError, match="always the newest version"):
        world.tag("latest", "")


def test_a_tag_moves_back_and_goes(world: World) -> None:
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


def test_a_tag_and_a_version_have_not_one_name(world: World) -> None:
    world.make("v1")
    with pytest.raises(UsageError, match="'v1' is a version of 'm'"):
        world.tag("v1", "v1")
    with pytest.raises(UnknownVersion):
        world.tag("prod", "v1", model="other")
    assert not world.versions.tags


def test_tags_of_a_model_are_bounded(world: World) -> None:
    world.make("v1")
    with pytest.raises(UsageError, match="has 64 tags"):
        again(lambda i: world.tag(f"t{i}", "v1"))
    world.tag("t3", "v1")  # one that is there moves
    with pytest.raises(UsageError, match="more than 64 tags"):
        world.publish("v2", tags=("another",))


def test_a_tag_that_came_with_versions_means_the_later_one_whichever_is_ready_first(world: World) -> None:
    world.publish("v1", tags=("prod",))
    world.publish("v2", tags=("prod",))
    for number in (2, 1):
        for shard in (0, 1):
            world.said(number, shard)
    assert world.means("prod") == 2


def test_errors_say_what_there_is(world: World) -> None:
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
        world.versions.resolve("none", "latest")
    assert len(str(caught.value)) < 400


# ---- retention -------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_what_tags_and_leases_hold(world: World) -> None:
    world.make("v1", keep=2)
    world.tag("prod", "v1")
    world.make("v2", keep=2)
    world.lease("v2")
    for i in range(3, 7):
        world.make(f"v{i}", keep=2)
    assert world.names == ["v1", "v2", "v5", "v6"]
    assert world.dropped == [3, 4]
    world.versions.release(50, 2)
    world.tag("prod", "v6")
    assert world.names == ["v5", "v6"]
    assert set(world.state) == {"versions", "tags/m", "version/5", "version/6"}


def test_the_newest_ones_wish_counts(world: World) -> None:
    for i in range(5):
        world.make(f"v{i}", keep=5)
    world.make("v5", keep=1)
    assert world.names == ["v5"]


def test_models_do_not_count_for_each_other(world: World) -> None:
    for model in ("a", "b", "c"):
        world.make("v", model=model, keep=1)
    assert len(world.names) == 3


def test_old_ones_go_but_never_the_newest(world: World) -> None:
    world.make("v1", age=60.0)
    world.pass_time(40)
    world.make("v2", age=60.0)
    world.pass_time(19)
    assert world.names == ["v1", "v2"]
    world.pass_time(3)
    assert world.names == ["v2"]
    world.pass_time(1000)
    assert world.names == ["v2"]


def test_retiring_is_refused_while_somebody_holds_it(world: World) -> None:
    for name in ("v1", "v2"):
        world.make(name)
    world.tag("prod", "v1")
    with pytest.raises(UsageError, match="held by tag 'prod'; it was not retired"):
        world.versions.retire(world.asker(), v.Retire("m", "v1"))
    world.tag("prod", "")
    world.lease("v1")
    with pytest.raises(UsageError, match="held by 1 leases"):
        world.versions.retire(world.asker(), v.Retire("m", "v1"))
    world.versions.release(50, 1)
    world.take(W)
    world.versions.retire(world.asker(), v.Retire("m", "v1"))
    assert world.take(W) == [m.Done()]
    assert (world.names, world.dropped) == (["v2"], [1])
    with pytest.raises(UnknownVersion):
        world.versions.retire(world.asker(), v.Retire("m", "v1"))


# ---- leases ----------------------------------------------------------------------------------------------


def test_a_lease_says_where_the_bytes_are_and_only_the_specs_that_are_not_known(world: World) -> None:
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


def test_leases_are_counted_and_one_too_few_is_no_fault(world: World) -> None:
    world.make("v1", keep=1)
    for _ in range(2):
        world.lease("v1")
    world.make("v2", keep=1)
    world.versions.release(51, 1)  # somebody else's
    world.versions.release(50, 99)
    world.versions.release(50, 1)
    assert world.names == ["v1", "v2"]
    world.versions.release(50, 1)
    world.versions.release(50, 1)
    assert world.names == ["v2"]


@pytest.mark.parametrize("back", [True, False])
def test_a_reader_that_dies_keeps_its_leases_for_ten_seconds(world: World, back: bool) -> None:
    world.make("v1", keep=1)
    world.lease("v1")
    world.make("v2", keep=1)
    world.versions.left(50, world.now, clean=False)
    world.pass_time(LEASE - 1)
    assert world.names == ["v1", "v2"]
    if back:
        world.versions.joined(50)
    world.pass_time(2)
    assert world.names == (["v1", "v2"] if back else ["v2"])


def test_a_reader_that_leaves_ends_its_leases_at_once(world: World) -> None:
    world.make("v1", keep=1)
    world.lease("v1")
    world.lease("v1", session=51)
    world.make("v2", keep=1)
    world.versions.left(50, world.now, clean=True)
    assert world.names == ["v1", "v2"]
    world.versions.left(51, world.now, clean=True)
    assert world.names == ["v2"]


def test_a_lease_that_is_asked_for_twice_is_one(world: World) -> None:
    """The answer was lost, and the question came again over another connection."""
    world.make("v1", keep=1)
    world.lease("v1", turn=1)
    world.make("v2", keep=1)
    assert world.lease("v1", turn=1).info.number == 1  # and it is not let go of in between
    assert world.names == ["v1", "v2"]
    assert world.lease("latest", turn=1).info.number == 2  # it means another one now
    assert world.names == ["v2"]
    world.versions.release(50, 2, turn=1)
    world.versions.release(50, 2, turn=1)
    assert not world.versions.entries[2].leases


def test_what_a_reader_says_that_it_holds_is_what_it_leases(world: World) -> None:
    world.make("v1", keep=1)
    for turn in (1, 2, 3):
        world.lease("v1", turn=turn)
    world.make("v2", keep=1)
    world.versions.holding(50, v.Holding(((1, 1),), 2))  # 2: its release was lost; 3: its answer is on the way
    assert world.versions.entries[1].leases[50] == 2
    world.versions.holding(50, v.Holding(((1, 1), (3, 1)), 3))
    assert world.versions.entries[1].leases[50] == 2
    world.versions.holding(50, v.Holding((), 3))
    assert world.names == ["v2"]
    world.versions.holding(50, v.Holding(((1, 1), (4, 2), (5, -7)), 1 << 62))  # one that is gone stays so
    assert world.versions.entries[2].leases == {50: 1}


def test_leases_of_a_reader_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "LEASES", 5)
    world.make("v1")
    with pytest.raises(ClusterError, match="5 leases, no more"):
        again(lambda i: world.lease("v1", 50, turn=i + 1))
    with pytest.raises(ClusterError, match="5 leases, no more"):
        again(lambda i: world.lease("v1", 51))
    world.versions.holding(52, v.Holding(tuple((turn, 1) for turn in range(1, 100)), 100))
    assert set(world.versions.entries[1].leases.values()) == {5}


# ---- news ------------------------------------------------------------------------------------------------


def test_watching_a_name_or_tag_now_and_later(world: World) -> None:
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


def test_threads_of_one_reader_wait_for_the_same_and_those_that_gave_up_do_not_pile_up(world: World) -> None:
    for _ in range(50):
        world.watch("latest")
    for _ in range(2):
        world.watch("latest", peer=8)
    assert sum(map(len, world.versions._watching.values())) == versions.WAITERS + 2
    world.make("v1")
    assert len(world.take(READER)) == versions.WAITERS
    assert len(world.take(8)) == 2
    world.make("v2")
    assert world.take(READER) == world.take(8) == []


def test_who_is_gone_is_not_told_and_leaves_nothing(world: World) -> None:
    world.watch("latest")
    world.versions.show(world.asker(READER), v.ListVersions("", 1))
    world.publish("v1", peer=READER)
    world.versions.await_ready(world.asker(READER), 1)
    world.versions.gone(READER)
    for shard in (0, 1):
        world.said(1, shard)
    assert world.take(READER) == []
    assert not world.versions._watching
    assert not world.versions._listing


def test_what_one_connection_watches_is_bounded(world: World) -> None:
    for i in range(3 * entries.ASKERS):
        world.watch("latest", after=i + 1000)
        world.watch(f"tag-{i}")
    assert len(world.versions._watching) == entries.ASKERS
    for name in ("", "x" * 201, "\n"):
        with pytest.raises(UsageError):
            world.watch(name)
    with pytest.raises(UsageError):
        world.versions.watch(world.asker(READER), v.Watch("m" * 1000, "latest"))


def test_a_list_is_told_when_there_is_another(world: World) -> None:
    world.versions.show(world.asker(READER), v.ListVersions("m"))
    known = world.take(READER)[-1].revision
    world.versions.show(world.asker(READER), v.ListVersions("m", known))
    assert world.take(READER) == []
    world.make("v1")
    (listed,) = world.take(READER)
    assert [(s.info.name, s.state, s.tags, s.leases, s.copies) for s in listed.versions] == [
        ("v1", "ready", ("latest",), 0, 1)
    ]


# ---- deaths ----------------------------------------------------------------------------------------------


def test_a_version_is_lost_with_its_last_holder_and_found_with_it(world: World) -> None:
    world.make("v1")
    world.make("v2")
    world.said(2, 3, shard=0)  # a second copy
    world.watch("latest", after=2)
    world.up.discard(0)
    world.versions.buried(0)
    assert world.means("latest") == 2
    with pytest.raises(VersionExpired, match="no server that is there holds all of version 'v1'"):
        world.lease("v1")
    assert [s.state for s in world.versions.status("m")] == ["lost", "ready"]
    assert not world.dropped
    world.up.discard(3)
    world.versions.buried(3)
    with pytest.raises(VersionExpired):
        world.lease("latest")
    world.said(1, 0)
    assert world.take(READER)[-1].info.number == 1  # who had number 2 is told what can be had now
    world.up |= {0, 3}
    world.said(2, 0)
    assert world.means("latest") == 2
    world.lease("v1")


def test_servers_that_became_copies_are_told_to_hold_it(world: World) -> None:
    world.make("v1")
    world.views[0] = (0, 2)
    world.versions.moved(0)
    world.pass_time(2 * HEAL)
    server, hold = world.holds[-1]
    assert (server, hold.number, hold.shard) == (2, 1, 0)
    assert hold.parts == (v.PartDigest(1, SIZE, 100),)
    assert world.versions.only(0)
    world.versions.part(v.PartDone(1, 0, 2, hold.parts))
    assert not world.versions.only(0)
    asked = len(world.holds)
    world.pass_time(2 * HEAL)
    assert len(world.holds) == asked


def test_a_coordinator_that_comes_back_knows_what_was_ready(world: World) -> None:
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
    assert back.lease("prod").info == world.versions.entries[1].info
    assert back.means("latest") == 2
    back.versions.holding(60, v.Holding(((4, 2),), 4))  # its readers say what they hold
    back.make("v4", keep=1)
    assert back.names == ["v1", "v2", "v4"]


def test_numbers_are_never_used_again(world: World) -> None:
    """Whatever became of their versions: servers may hold parts under them."""
    used: set[int] = set()
    for life in range(4):
        for i in range(90):  # more than are reserved at a time, and none becomes ready
            world.publish(f"{life}-{i}")
            number = max(world.versions.entries)
            assert number not in used
            used.add(number)
            world.versions.part(v.PartDone(number, 0, 0, error="full"))
        world = world.restart()


def test_a_state_of_odd_bytes_is_not_taken(world: World) -> None:
    world.make("v1")
    with pytest.raises(msgspec.MsgspecError):
        World(world.state | {"version/1": b"\xc0"})
