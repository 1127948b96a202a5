"""A coordinator that is killed and started again, workers that lose their connection, and shards that move."""

from __future__ import annotations

from headwater.errors import ClusterError, WorkerLost
from headwater.wire import messages as m
from tests.cluster.fake_peers import HEART, SERVER, WORKER, FakePeers, spec


class Kept(FakePeers):
    """A script whose coordinator's state is kept as a store keeps it."""

    def __init__(self, servers: int = 2, **rules: object) -> None:
        super().__init__(servers, durable=True, **rules)

    def crash(self) -> None:
        self.restart(self.state)

    def back(self, *servers: int, hosted: tuple[m.Hosted, ...] = ()) -> None:
        """Servers resume; server n is peer 100 + n again."""
        for number in servers:
            join = m.Join(
                "server", number, address=f"tcp://127.0.0.1:{number}", resume=True, server=number, hosted=hosted
            )
            self.ask(SERVER + number, join)
            self.beat(SERVER + number)
        self.clock.advance(0.1)
        self.carry_out(self.coordinator.tick(self.clock()))

    def return_of(self, *ranks: int) -> None:
        for rank in ranks:
            self.ask(WORKER + rank, m.Join("worker", rank, "host", 4000 + rank, rank, None, resume=True))


# ---- finding a shard ---------------------------------------------------------------------------------


def find(script: FakePeers, shard: int = 0) -> m.ShardView:
    script.take(WORKER)
    script.ask(WORKER, m.Find(shard))
    return script.last(WORKER, m.ShardView)


def test_who_asks_for_a_shard_is_told_its_primary_and_epoch() -> None:
    script = FakePeers(2, replicas=2)
    script.join(0)
    before = find(script)
    assert (before.epoch, before.address) == (1, "tcp://127.0.0.1:0")
    script.hang_up(SERVER)
    after = find(script)
    assert after.epoch > 1
    assert after.address == "tcp://127.0.0.1:1"


def test_a_server_whose_connection_alone_broke_goes_on() -> None:
    script = FakePeers(2, replicas=2)
    script.join(0)
    script.hang_up(SERVER, listens=True)
    assert find(script).epoch == 1
    script.pass_time(2, alive=(SERVER + 1, WORKER))  # its heartbeats fail, too
    assert find(script).address == "tcp://127.0.0.1:1"


def test_a_shard_without_a_server_is_named() -> None:
    script = FakePeers(2)
    script.join(0)
    script.hang_up(SERVER + 1)
    script.take(WORKER)
    script.ask(WORKER, m.Find(1))
    assert "server 1 is dead and shard 1 has no other copy" in str(script.error(WORKER))
    assert find(script, 0).shard == 0


def test_a_drain_is_answered_when_nothing_is_left() -> None:
    script = FakePeers(2)
    script.start(2)
    script.join(0)
    script.take(WORKER)
    script.ask(WORKER, m.Drain(0))
    assert script.take(WORKER) == []
    view = script.coordinator.fleet.views[0]
    assert [x.server for x in view.learners] == [2]
    script.tell(SERVER, m.Synced(0, view.epoch, 2, 5))
    script.pass_time(1, alive=(SERVER, SERVER + 1, SERVER + 2, WORKER))
    assert m.Done() in script.take(WORKER)
    assert find(script).address == "tcp://127.0.0.1:2"


def test_a_new_primary_hears_what_the_old_one_may_have_missed() -> None:
    script = FakePeers(2, replicas=2)
    script.join(0)
    script.ask(WORKER, m.Declare(spec()))
    script.take(SERVER + 1)
    script.hang_up(SERVER)
    heard = script.take(SERVER + 1)
    kinds = [type(x) for x in heard]
    assert kinds.index(m.View) < kinds.index(m.Create) < kinds.index(m.Members)


# ---- workers whose connection breaks -----------------------------------------------------------------


def test_with_grace_a_worker_may_come_back_over_another_connection() -> None:
    script = FakePeers(1, grace=2.0)
    script.join(0, 1, world=2)
    script.take(SERVER)
    script.hang_up(WORKER + 1)
    script.pass_time(1, alive=(SERVER, WORKER))
    assert script.take(SERVER) == []
    script.ask(9, m.Join("worker", 1, "host", 4001, 1, resume=True))
    assert script.last(9, m.Joined).rank == 1
    script.pass_time(3, alive=(SERVER, WORKER, 9))
    assert script.take(SERVER) == []


def test_after_the_grace_it_is_given_up_and_told_so_when_it_comes() -> None:
    script = FakePeers(1, grace=2.0)
    script.join(0, 1, world=2)
    script.hang_up(WORKER + 1)
    script.take(SERVER)
    script.pass_time(3, alive=(SERVER, WORKER))
    members = script.last(SERVER, m.Members)
    assert members.ranks == (0,)
    assert members.lost == members.epoch
    script.ask(9, m.Join("worker", 1, "host", 4001, 1, resume=True))
    error = script.error(9)
    assert isinstance(error, ClusterError)
    assert "was given up while it was away" in str(error)


def test_a_barrier_that_is_over_is_over_for_who_asks_again() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    for rank in (0, 1):
        script.ask(WORKER + rank, m.Barrier("b", 1))
    script.take(WORKER)
    script.ask(WORKER, m.Barrier("b", 1))  # the answer was lost
    assert script.take(WORKER) == [m.Done()]
    script.ask(WORKER, m.Barrier("b", 2))
    assert script.take(WORKER) == []
    script.hang_up(WORKER + 1)
    assert isinstance(script.error(WORKER), WorkerLost)


# ---- restarts ----------------------------------------------------------------------------------------


def test_members_tables_and_views_survive() -> None:
    script = Kept(2, replicas=2)
    script.join(0, 1, world=2)
    script.ask(WORKER, m.Declare(spec()))
    script.create()
    before = script.coordinator.status()
    epoch = script.coordinator.membership.epoch
    script.crash()
    script.back(0, 1)
    script.return_of(0, 1)
    assert [script.last(WORKER + rank, m.Joined).rank for rank in (0, 1)] == [0, 1]
    after = script.coordinator.status()
    assert after.tables == before.tables
    assert [(s.shard, s.epoch, s.primary, s.backups) for s in after.shards] == [
        (s.shard, s.epoch, s.primary, s.backups) for s in before.shards
    ]
    assert script.coordinator.membership.epoch == epoch, "nobody was lost"
    script.ask(WORKER + 1, m.Declare(spec()))
    assert script.last(WORKER + 1, m.Declared).table == 1


def test_a_worker_that_does_not_come_back_is_lost() -> None:
    script = Kept(1)
    script.join(0, 1, world=2)
    script.crash()
    script.back(0)
    script.return_of(0)
    script.take(SERVER)
    script.pass_time(6, alive=(SERVER, WORKER))
    members = script.last(SERVER, m.Members)
    assert (members.ranks, members.lost) == ((0,), members.epoch)


def test_what_one_shard_has_committed_before_the_crash_all_commit() -> None:
    script = Kept(2)
    script.join(0)
    script.ask(WORKER, m.Declare(spec()))
    script.create()
    verdict = m.Commit(1, 1, script.coordinator.membership.epoch, False)
    script.crash()
    script.back(0, hosted=(m.Hosted(0, 1, "primary", 9, (verdict,)),))
    script.back(1, hosted=(m.Hosted(1, 1, "primary", 8),))
    assert script.last(SERVER + 1, m.Commit) == verdict
    script.tell(SERVER + 1, m.Ready(1, 1, 1, verdict.members, (), False))
    assert script.last(SERVER + 1, m.Commit) == verdict, "and who says READY late is told the same"


def test_nobody_takes_over_before_the_servers_could_come_back() -> None:
    script = Kept(2, replicas=2)
    script.crash()
    script.back(1)
    script.clock.advance(1.5)
    script.tell(HEART + 1, m.Heartbeat(server=1, session=1))
    script.carry_out(script.coordinator.tick(script.clock()))
    assert [s.primary for s in script.coordinator.status().shards] == [0, 1]
    script.back(0)
    assert [s.primary for s in script.coordinator.status().shards] == [0, 1]
    assert [s.epoch for s in script.coordinator.status().shards] == [1, 1]


def test_a_server_that_was_replaced_while_it_was_away_learns_its_view() -> None:
    script = Kept(2, replicas=2)
    script.hang_up(SERVER)
    script.take(SERVER)
    script.back(0, hosted=(m.Hosted(0, 1, "primary", 9), m.Hosted(1, 1, "backup", 9)))
    views = [x for x in script.take(SERVER) if isinstance(x, m.View)]
    assert {v.shard for v in views} == {0, 1}
    assert all(v.epoch > 1 and v.primary is not None and v.primary.server == 1 for v in views)


def test_what_only_a_backup_can_say_was_committed_counts_after_a_crash_too() -> None:
    script = Kept(2, replicas=2)
    script.join(0)
    script.ask(WORKER, m.Declare(spec()))
    script.create()
    verdict = m.Commit(1, 1, script.coordinator.membership.epoch, False)
    script.crash()
    script.back(1, hosted=(m.Hosted(0, 1, "backup", 9, (verdict,)), m.Hosted(1, 1, "primary", 8)))
    told = [x for x in script.take(SERVER + 1) if not isinstance(x, m.View | m.Welcome)]
    assert told == [], "nobody decides before all have said what they know"
    script.pass_time(3, alive=(SERVER + 1,))  # server 0, the primary of shard 0, does not come back
    assert verdict in script.take(SERVER + 1)
