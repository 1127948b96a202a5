"""Views under a fake clock: who may lead a shard, who becomes a copy, and what a restart keeps."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.cluster.fleet import Fleet, members_of
from headwater.errors import ClusterError, UsageError
from headwater.wire import messages as m

SEEDS = st.integers(0, 2**32).map(random.Random)


def servers(found: tuple[m.Endpoint, ...]) -> tuple[int, ...]:
    return tuple(x.server for x in found)


class Land:
    """A fleet, and the servers around it. Server n is peer 100 + n and session n + 1."""

    def __init__(self, expected: int = 3, shards: int = 1, replicas: int = 2, joined: int | None = None) -> None:
        self.fleet = Fleet(expected, shards, replicas, silence=1.0)
        self.now = 10.0
        for _ in range(expected if joined is None else joined):
            self.join()

    def join(self) -> int:
        number = self.fleet.next_number
        found = self.fleet.join(100 + number, self.words(number), self.now)
        self.fleet.begin()
        self.fleet.plan()
        return found.number

    def words(self, number: int, **changes: object) -> m.Join:
        return m.Join("server", number + 1, address=f"tcp://h:{number}", **changes)  # type: ignore[arg-type]

    def resume(self, number: int, session: int | None = None) -> None:
        session = number + 1 if session is None else session
        join = m.Join("server", session, address=f"tcp://h:{number}", resume=True, server=number)
        self.fleet.join(200 + number, join, self.now)
        self.fleet.plan()

    def die(self, *numbers: int) -> None:
        """The processes end: their connections break, and nobody listens at their addresses any more."""
        for number in numbers:
            peer = self.fleet.servers[number].peer
            if peer is not None:
                self.fleet.disconnected(peer)
            self.fleet.refused(number)
        self.fleet.plan()

    def view(self, shard: int = 0) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Primary, backups, learners."""
        view = self.fleet.views[shard]
        assert view.primary is not None
        return view.primary.server, servers(view.backups), servers(view.learners)

    def epoch(self, shard: int = 0) -> int:
        return self.fleet.views[shard].epoch

    def synced(self, server: int, shard: int = 0, epoch: int | None = None, sender: int | None = None) -> None:
        view = self.fleet.views[shard]
        assert view.primary is not None
        message = m.Synced(shard, view.epoch if epoch is None else epoch, server, 5)
        self.fleet.synced(message, view.primary.server if sender is None else sender)
        self.fleet.plan()

    def suspect(self, server: int, shard: int = 0, sender: int | None = None) -> None:
        view = self.fleet.views[shard]
        assert view.primary is not None
        message = m.Suspect(shard, view.epoch, server, "silent")
        self.fleet.suspect(message, view.primary.server if sender is None else sender)
        self.fleet.plan()

    def settle(self) -> None:
        """Every learner that lives gets everything, as long as there are any."""
        for _ in range(50):
            learning = [(v.shard, x.server) for v in self.fleet.views.values() for x in v.learners]
            for shard, server in learning:
                if server in members_of(self.fleet.views[shard]):
                    self.synced(server, shard)
            self.fleet.plan()
            if not learning and not any(v.learners for v in self.fleet.views.values()):
                return
        raise AssertionError(f"it never comes to rest: {self.fleet.views}")


# ---- the first views ---------------------------------------------------------------------------------


def test_there_are_no_views_before_enough_servers_are_there() -> None:
    land = Land(3, shards=3, joined=2)
    assert land.fleet.views == {}
    land.join()
    assert [land.view(shard) for shard in range(3)] == [(0, (1,), ()), (1, (2,), ()), (2, (0,), ())]
    assert {land.epoch(shard) for shard in range(3)} == {1}


@pytest.mark.parametrize(("expected", "shards", "replicas"), [(0, 1, 1), (1, 0, 1), (2, 1, 3), (2, 1, 0)])
def test_a_shape_that_cannot_be_is_refused(expected: int, shards: int, replicas: int) -> None:
    with pytest.raises(UsageError):
        Fleet(expected, shards, replicas)


# ---- deaths ------------------------------------------------------------------------------------------


def test_a_backup_takes_over_and_another_server_learns() -> None:
    land = Land(3)
    land.die(0)
    assert land.view() == (1, (), (2,))
    assert land.epoch() > 1
    land.synced(2)
    assert land.view() == (1, (2,), ())


def test_a_learner_is_never_promoted() -> None:
    land = Land(3)
    land.die(1)
    assert land.view() == (0, (), (2,))
    before = land.epoch()
    land.die(0)
    assert land.view() == (0, (), (2,)), "server 2 has not got everything: the shard waits for server 0"
    assert land.epoch() == before
    land.resume(0)
    land.synced(2)
    assert land.view() == (0, (2,), ())


def test_a_backup_that_is_dead_too_is_passed_over() -> None:
    land = Land(3, replicas=3)
    land.die(0, 1)
    assert land.view() == (2, (), ())


def test_a_broken_connection_alone_is_no_death() -> None:
    land = Land(2)
    land.fleet.disconnected(100)
    land.fleet.plan()
    assert land.view() == (0, (1,), ())
    land.resume(0)
    assert land.fleet.refused(0) is None, "it is back: who could not reach it was wrong"
    assert land.view() == (0, (1,), ())
    assert land.epoch() == 1


def test_a_silent_server_is_dead_after_a_second_and_its_heartbeat_brings_it_back() -> None:
    land = Land(2)
    land.fleet.heard(1, m.Heartbeat(session=1 + 1), land.now + 0.9)
    assert [s.number for s in land.fleet.tick(land.now + 1.0)] == []
    assert [s.number for s in land.fleet.tick(land.now + 1.1)] == [0]
    land.fleet.plan()
    assert land.view() == (1, (), ())
    land.fleet.heard(0, m.Heartbeat(session=0 + 1), land.now + 1.2)
    land.fleet.plan()
    assert land.view() == (1, (), (0,)), "views that went on without it stay: it learns what it has missed"


# ---- what primaries say ------------------------------------------------------------------------------


def test_synced_of_another_epoch_or_from_another_server_is_passed_over() -> None:
    land = Land(3)
    land.die(1)
    land.synced(2, epoch=land.epoch() - 1)
    land.synced(2, sender=2)
    land.synced(2, shard=0, epoch=land.epoch() + 1)
    assert land.view() == (0, (), (2,))
    land.synced(2)
    assert land.view() == (0, (2,), ())
    before = land.epoch()
    land.synced(2)
    assert land.epoch() == before, "said twice"


def test_a_suspected_backup_leaves_and_comes_back_as_a_learner() -> None:
    land = Land(2)
    land.suspect(1, sender=7)
    assert land.view() == (0, (1,), ()), "only the primary, or the backup itself, may say this"
    land.suspect(1)
    assert land.view() == (0, (), (1,)), "the only other server: it must get everything again"
    assert land.epoch() == 3, "not in one step: a backup that was left behind is not in sync"


def test_another_server_is_taken_instead_of_a_suspected_one_if_there_is_one() -> None:
    land = Land(3, shards=1)
    land.suspect(1)
    assert land.view()[0] == 0
    assert land.view()[1] == ()
    assert len(land.view()[2]) == 1


# ---- drain and balance -------------------------------------------------------------------------------


def test_a_drained_server_gives_everything_away_in_order_and_is_empty() -> None:
    land = Land(3, shards=3)
    land.fleet.drain(0)
    land.fleet.plan()
    assert not land.fleet.empty(0)
    assert all(land.view(shard)[0] != 0 or land.view(shard)[2] for shard in range(3)), "first a copy, then it goes"
    land.settle()
    assert land.fleet.empty(0)
    assert all(len(land.view(shard)[1]) == 1 for shard in range(3)), "and all is redundant"


def test_the_last_server_and_one_that_is_not_there_cannot_be_drained() -> None:
    land = Land(2)
    with pytest.raises(ClusterError, match="server 7 is not there"):
        land.fleet.drain(7)
    land.fleet.drain(0)
    with pytest.raises(ClusterError, match="is the only one"):
        land.fleet.drain(1)


def test_a_new_server_gets_its_share_of_copies_and_of_primaries() -> None:
    land = Land(2, shards=4)
    assert land.join() == 2
    land.settle()
    loads = [sum(server in members_of(v) for v in land.fleet.views.values()) for server in range(3)]
    primaries = [sum(land.view(shard)[0] == server for shard in range(4)) for server in range(3)]
    assert max(loads) - min(loads) <= 1
    assert max(primaries) - min(primaries) <= 1
    before = [land.epoch(shard) for shard in range(4)]
    for _ in range(20):
        land.fleet.plan()
    assert [land.epoch(shard) for shard in range(4)] == before, "what is in balance stays as it is"


# ---- restarts ----------------------------------------------------------------------------------------


def again(land: Land, grace: float = 3.0) -> Land:
    """The same fleet after a restart of the coordinator."""
    new = Land(land.fleet.expected, land.fleet.shards, land.fleet.replicas, joined=0)
    joins = {number: member.join for number, member in land.fleet.servers.items()}
    new.fleet.restore(list(land.fleet.views.values()), joins, land.now, grace)
    new.fleet.numbers_from(land.fleet.next_number)
    new.now = land.now
    return new


def test_a_restart_keeps_the_views_and_never_uses_a_number_again() -> None:
    land = Land(3, shards=3)
    land.die(2)
    views = dict(land.fleet.views)
    new = again(land)
    assert new.fleet.views == views
    assert new.fleet.tick(land.now + 2.9) == [], "nobody is declared dead before it could come back"
    assert new.join() == 3
    third = again(new)
    assert third.join() == 4


def test_after_a_restart_a_server_comes_back_under_its_number_and_a_stranger_does_not() -> None:
    land = Land(2)
    new = again(land)
    assert sorted(new.fleet.missing()) == [0]
    with pytest.raises(ClusterError, match="server 0 is another process"):
        new.resume(0, session=99)
    with pytest.raises(ClusterError, match="not known here"):
        new.resume(5)
    new.resume(0)
    assert new.fleet.missing() == []
    assert new.view() == (0, (1,), ())


def test_after_the_grace_of_a_restart_the_silent_are_dead() -> None:
    new = again(Land(2))
    new.resume(1)
    new.fleet.heard(1, m.Heartbeat(session=1 + 1), new.now + 3.5)
    assert [s.number for s in new.fleet.tick(new.now + 3.6)] == [0]
    new.fleet.plan()
    assert new.view() == (1, (), ())


# ---- any schedule ------------------------------------------------------------------------------------


def check(old: m.View, new: m.View) -> None:
    """What any change of a view must keep."""
    assert new.epoch == old.epoch + 1
    assert old.primary is not None
    assert new.primary is not None
    insync = {old.primary.server, *servers(old.backups)}
    assert new.primary.server in insync, "somebody leads who may lack what was acknowledged"
    assert set(servers(new.backups)) <= insync | set(servers(old.learners))
    members = [new.primary.server, *servers(new.backups), *servers(new.learners)]
    assert len(members) == len(set(members)), "a server is in a view once"


def disturb(land: Land, chance: random.Random) -> None:
    """Something happens to somebody."""
    fleet = land.fleet
    shard, server = chance.randrange(fleet.shards), chance.choice(sorted(fleet.servers))
    learners = servers(fleet.views[shard].learners)
    match chance.choice(("join", "die", "die", "resume", "resume", "synced", "synced", "old", "suspect", "drain")):
        case "join":
            number = fleet.next_number
            assert land.join() == number
        case "die":
            land.die(server)
        case "resume":
            land.resume(server)
        case "synced" if learners:
            land.synced(chance.choice(learners), shard)
        case "old" if learners:
            land.synced(chance.choice(learners), shard, epoch=land.epoch(shard) - 1)
        case "suspect":
            land.suspect(server, shard)
        case "drain":
            with contextlib.suppress(ClusterError):
                fleet.drain(server)
    fleet.plan()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), SEEDS)
@settings(max_examples=80, deadline=None)
def test_on_any_schedule_only_those_in_sync_lead_and_epochs_grow(
    expected: int, shards: int, replicas: int, chance: random.Random
) -> None:
    """``plan`` may change a view several times in a turn; each of the changes keeps the rules."""
    land = Land(expected, shards, min(replicas, expected))
    change = land.fleet._change

    def watched(view: m.View, **what: object) -> m.View:
        new = change(view, **what)
        check(view, new)
        return new

    land.fleet._change = watched  # type: ignore[method-assign]
    for _ in range(60):
        before = dict(land.fleet.views)
        disturb(land, chance)
        for shard, old in before.items():
            assert land.fleet.views[shard] == old or land.epoch(shard) > old.epoch


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_when_all_is_quiet_every_shard_has_its_copies(chance: random.Random) -> None:
    land = Land(3, 3, 2)
    for _ in range(30):
        disturb(land, chance)
    for server in sorted(land.fleet.servers):
        land.resume(server)
        land.fleet.servers[server].draining = False
    land.settle()
    assert all(len(land.view(shard)[1]) == 1 for shard in range(3))
