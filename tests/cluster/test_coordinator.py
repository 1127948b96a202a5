"""The control plane under a fake clock: who is in, who waits for what, and what everybody is told."""

from __future__ import annotations

import pytest

from headwater.errors import (
    ClusterError,
    NotEnoughMemory,
    ProtocolError,
    RankTaken,
    TableConflict,
    UnknownOptimizer,
    UnknownTable,
    UsageError,
    WorkerLost,
)
from headwater.types import Async, DenseSpec, OptimizerSpec, ParameterSpec
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from tests.cluster.fake_peers import HEART, READER, SERVER, WORKER, FakePeers, spec

# ---- joining -------------------------------------------------------------------------------------


def test_servers_get_numbers_and_shards_in_the_order_they_join() -> None:
    script = FakePeers(3)
    for number in range(3):
        welcome, view = script.take(SERVER + number)
        assert isinstance(welcome, m.Welcome)
        assert (welcome.server, welcome.shards) == (number, 3)
        assert isinstance(view, m.View)
        assert view.primary is not None
        assert (view.shard, view.primary.server, view.primary.address) == (number, number, f"tcp://127.0.0.1:{number}")


def test_workers_wait_for_the_servers_and_a_server_more_is_a_spare() -> None:
    script = FakePeers(2, joined=False)
    script.join(0, world=1)
    script.ask(SERVER, m.Join("server", 1))
    assert script.take(WORKER) == []
    script.ask(SERVER + 1, m.Join("server", 2))
    assert script.last(WORKER, m.Joined).world == 1
    script.ask(SERVER + 2, m.Join("server", 3))
    assert script.last(SERVER + 2, m.Welcome).server == 2
    assert script.coordinator.status().servers[2].primaries == ()


def test_a_worker_that_gave_up_waiting_is_not_let_in() -> None:
    script = FakePeers(1, joined=False)
    script.join(0)
    script.hang_up(WORKER)
    script.ask(SERVER, m.Join("server", 1))
    assert script.coordinator.membership.ranks() == ()


def test_ranks_are_given_in_order_and_taken_once() -> None:
    script = FakePeers(1)
    for peer in (1, 2):
        script.ask(peer, m.Join("worker", peer, pid=70 + peer))
    assert [script.last(peer, m.Joined).rank for peer in (1, 2)] == [0, 1]
    script.ask(3, m.Join("worker", 3, rank=1))
    error = script.error(3)
    assert isinstance(error, RankTaken)
    assert "rank 1 is held by process 72" in str(error)
    script.hang_up(1)
    script.ask(3, m.Join("worker", 3))
    assert script.last(3, m.Joined).rank == 0


@pytest.mark.parametrize(
    ("join", "says"),
    [
        (m.Join("worker", 1, rank=2, world=2), "rank 2 is not in 0..1"),
        (m.Join("worker", 1, rank=-1, world=2), "rank -1 is not in"),
        (m.Join("worker", 1, rank=1, world=3), "says world size 3, the ones before said 2"),
        (m.Join("worker", 1, world=0), "between 1 and"),
        (m.Join("boss", 1), "role 'boss'"),
    ],
)
def test_a_join_that_does_not_fit_is_refused(join: m.Join, says: str) -> None:
    script = FakePeers(1)
    script.join(0, world=2)
    script.ask(9, join)
    error = script.error(9)
    assert isinstance(error, UsageError)
    assert says in str(error)
    assert list(script.coordinator.membership.workers) == [0]


def test_one_connection_joins_once() -> None:
    script = FakePeers(1)
    script.join(0)
    script.take(WORKER)
    for join in (m.Join("worker", 1), m.Join("reader", 1), m.Join("server", 1)):
        script.ask(WORKER, join)
        assert "joined already" in str(script.error(WORKER))
    assert len(script.coordinator.membership.workers) == 1


def test_a_dead_server_lets_nobody_in() -> None:
    script = FakePeers(2)
    script.hang_up(SERVER + 1)
    script.join(0)
    assert "server 1 is dead" in str(script.error(WORKER))
    assert [s.state for s in script.coordinator.status().servers] == ["alive", "dead"]


# ---- membership ----------------------------------------------------------------------------------


def test_every_change_is_announced_with_a_new_epoch() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    first = script.last(SERVER, m.Members)
    assert (first.ranks, first.lost) == ((0, 1), 0)
    script.ask(WORKER + 1, m.Leave())
    left = script.last(SERVER, m.Members)
    assert (left.ranks, left.lost) == ((0,), 0), "a worker that leaves is not waited for, and nobody is lost"
    assert left.epoch > first.epoch
    script.hang_up(WORKER + 1)
    assert script.take(SERVER) == [], "the end of a connection after leaving is no death"


def test_a_death_begins_an_epoch_that_says_who_and_why() -> None:
    script = FakePeers(2)
    script.join(0, 1, 2, world=3)
    script.hang_up(WORKER + 1)
    for server in (SERVER, SERVER + 1):
        members = script.last(server, m.Members)
        assert members.lost == members.epoch
        assert members.ranks == (0, 2)
        assert "worker 1 (process 4001) died" in members.reason


def test_all_ranks_of_the_world_are_waited_for_before_they_have_joined() -> None:
    script = FakePeers(1)
    script.join(1, world=3)
    assert script.last(SERVER, m.Members).ranks == (0, 1, 2)


def test_the_first_worker_after_the_last_may_state_another_world() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.ask(WORKER, m.Leave())
    script.ask(WORKER + 1, m.Leave())
    script.ask(9, m.Join("worker", 9, rank=2, world=3))
    assert script.last(9, m.Joined).world == 3


def test_a_rank_may_come_back() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.hang_up(WORKER + 1)
    assert script.last(SERVER, m.Members).ranks == (0,)
    script.ask(9, m.Join("worker", 9, rank=1, world=2))
    assert script.last(SERVER, m.Members).ranks == (0, 1)


def test_a_silent_worker_is_taken_out_and_one_that_beats_is_not() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.take(SERVER)
    script.pass_time(9, alive=(SERVER, WORKER))
    assert script.take(SERVER) == []
    script.pass_time(3, alive=(SERVER, WORKER))
    members = script.last(SERVER, m.Members)
    assert members.ranks == (0,)
    assert "worker 1 (process 4001) was silent for 10 s" in members.reason


def test_a_silent_server_counts_as_dead() -> None:
    script = FakePeers(2)
    script.pass_time(25, alive=(SERVER,))
    assert [s.state for s in script.coordinator.status().servers] == ["alive", "dead"]


def test_readers_are_neither_waited_for_nor_announced() -> None:
    script = FakePeers(1)
    script.join(0, world=1)
    script.take(SERVER)
    script.ask(READER, m.Join("reader", 7))
    assert script.last(READER, m.Joined).rank == -1
    script.hang_up(READER)
    assert script.take(SERVER) == []


def test_a_silent_reader_is_told_and_may_join_again() -> None:
    """Else it would ask for ever over a connection at which nobody knows it."""
    script = FakePeers(1)
    script.ask(READER, m.Join("reader", 7))
    script.take(READER)
    script.pass_time(11, alive=(SERVER,))
    (error,) = script.take(READER)
    assert "was silent for 10 s" in str(error)
    script.hang_up(READER)
    script.ask(READER + 1, m.Join("reader", 7, resume=True))
    assert script.last(READER + 1, m.Joined).rank == -1


# ---- barriers ------------------------------------------------------------------------------------


def test_a_barrier_opens_when_all_have_come() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.take(WORKER)
    script.ask(WORKER, m.Barrier("a", 1))
    script.ask(WORKER + 1, m.Barrier("b", 1))
    assert script.take(WORKER) == []
    script.ask(WORKER + 1, m.Barrier("a", 1))
    assert script.take(WORKER) == [m.Done()]
    script.ask(WORKER, m.Barrier("b", 1))
    assert script.last(WORKER + 1, m.Done)


def test_a_barrier_opens_when_the_last_one_missing_leaves() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.ask(WORKER, m.Barrier("", 1))
    script.ask(WORKER + 1, m.Leave())
    assert script.last(WORKER, m.Done)


def test_at_a_barrier_each_hears_what_all_have_to_say() -> None:
    script = FakePeers(1)
    script.join(0, 1, 2, world=3)
    script.ask(WORKER + 2, m.Barrier("a", 1, b"two"))
    script.ask(WORKER, m.Barrier("a", 1, b"zero"))
    script.ask(WORKER + 1, m.Barrier("a", 1))
    met = m.Met(((0, b"zero"), (1, b""), (2, b"two")))
    assert all(script.last(WORKER + rank, m.Met) == met for rank in range(3))
    script.take(WORKER)
    script.ask(WORKER, m.Barrier("a", 1, b"zero"))  # the answer was lost
    assert script.take(WORKER) == [met]
    script.ask(WORKER, m.Barrier("a", 2, bytes(m.MAX_VALUE + 1)))
    assert "of at most 65536" in str(script.error(WORKER))


def test_a_barrier_is_given_up_when_somebody_dies() -> None:
    script = FakePeers(1)
    script.join(0, 1, 2, world=3)
    script.ask(WORKER, m.Barrier("", 1))
    script.hang_up(WORKER + 2)
    error = script.error(WORKER)
    assert isinstance(error, WorkerLost)
    assert "2 workers remain" in str(error)
    script.take(WORKER)
    script.ask(WORKER, m.Barrier("", 2))
    script.ask(WORKER + 1, m.Barrier("", 2))
    assert script.last(WORKER, m.Done)


def test_a_reader_has_no_place_in_a_barrier() -> None:
    script = FakePeers(1)
    script.ask(READER, m.Join("reader", 7))
    script.ask(READER, m.Barrier("", 1))
    assert "only a worker" in str(script.error(READER))


# ---- tables --------------------------------------------------------------------------------------


def test_a_table_is_declared_to_all_once_every_shard_has_it() -> None:
    script = FakePeers(2)
    script.join(0, 1, world=2)
    for rank in (0, 1):
        script.take(WORKER + rank)
        script.ask(WORKER + rank, m.Declare(spec()))
    assert script.last(SERVER, m.Create) == script.last(SERVER + 1, m.Create) == m.Create(1, spec())
    script.answer(SERVER, 1, m.Created(1, 10))
    assert script.take(WORKER) == []
    script.answer(SERVER + 1, 1, m.Created(1, 10))
    for rank in (0, 1):
        declared = script.last(WORKER + rank, m.Declared)
        assert (declared.table, declared.assign, declared.spec) == (1, False, spec())


def test_the_lowest_rank_assigns_the_values_whoever_comes_first() -> None:
    script = FakePeers(1)
    script.join(0, 1, 2, world=3)
    for rank in (2, 1):
        script.ask(WORKER + rank, m.Declare(spec(init="values")))
    script.create()
    for rank in (2, 1):
        assert not any(isinstance(heard, m.Declared) for heard in script.take(WORKER + rank))
    script.ask(WORKER, m.Declare(spec(init="values")))
    assert script.last(WORKER, m.Declared).assign
    script.ask(WORKER + 1, m.Initialised(1))
    assert "another worker assigns" in str(script.error(WORKER + 1))
    script.ask(WORKER, m.Initialised(1))
    for rank in (1, 2):
        assert not script.last(WORKER + rank, m.Declared).assign


def test_the_lowest_rank_leaves_before_it_asked() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.ask(WORKER + 1, m.Declare(spec(init="values")))
    script.create()
    script.take(WORKER + 1)
    script.hang_up(WORKER)
    assert script.last(WORKER + 1, m.Declared).assign


def test_when_the_initialiser_dies_the_next_one_takes_over() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    for rank in (0, 1):
        script.ask(WORKER + rank, m.Declare(spec(init="values")))
    script.create()
    assert script.last(WORKER, m.Declared).assign
    script.hang_up(WORKER)
    assert script.last(WORKER + 1, m.Declared).assign


def test_also_if_the_next_one_comes_only_later() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.ask(WORKER, m.Declare(spec(init="values")))
    script.create()
    script.hang_up(WORKER)
    script.take(WORKER + 1)
    script.ask(WORKER + 1, m.Declare(spec(init="values")))
    assert script.last(WORKER + 1, m.Declared).assign


def test_the_initialiser_may_ask_again() -> None:
    script = FakePeers(1)
    script.join(0)
    for _ in range(2):
        script.ask(WORKER, m.Declare(spec(init="values")))
        script.create()
        assert script.last(WORKER, m.Declared).assign


def test_a_reader_never_assigns_but_gets_the_values_of_a_worker() -> None:
    script = FakePeers(1)
    script.ask(READER, m.Join("reader", 7))
    script.take(READER)
    script.ask(READER, m.Declare(spec(init="values")))
    script.create()
    assert script.take(READER) == []
    script.join(0)
    script.ask(WORKER, m.Declare(spec(init="values")))
    assert script.last(WORKER, m.Declared).assign
    script.ask(WORKER, m.Initialised(1))
    assert not script.last(READER, m.Declared).assign


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (spec(parameters=(ParameterSpec("w", (3,)),)), "'shape': (200000,)"),
        (spec(parameters=(ParameterSpec("w", (1,)), ParameterSpec("v", (1,)))), "1 parameters instead of 2"),
        (spec(optimizer=OptimizerSpec("SGD", ({"lr": 0.2},))), "'lr': 0.1"),
        (spec(optimizer=OptimizerSpec("Adam", ({},))), "instead of OptimizerSpec(name='Adam'"),
        (spec(sync=Async()), "sync Bulk(reduce='mean') instead of Async"),
        (spec(max_grad_norm=2.0), "max_grad_norm None instead of 2.0"),
        (spec(nonfinite="skip"), "nonfinite 'error' instead of 'skip'"),
        (spec(seed=9), "seed 0 instead of 9"),
    ],
)
def test_a_table_declared_otherwise_is_a_conflict_that_names_the_difference(other: DenseSpec, says: str) -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.ask(WORKER, m.Declare(spec()))
    script.create()
    script.ask(WORKER + 1, m.Declare(other))
    error = script.error(WORKER + 1)
    assert isinstance(error, TableConflict)
    assert says in str(error)
    assert "nothing was changed" in str(error)


def test_a_table_that_a_server_refuses_is_dropped_everywhere_and_its_name_is_free() -> None:
    script = FakePeers(2)
    script.join(0, 1, world=2)
    for rank in (0, 1):
        script.ask(WORKER + rank, m.Declare(spec()))
    script.answer(SERVER, 1, m.Created(1, 10))
    script.answer(SERVER + 1, 1, NotEnoughMemory("table 't' takes 9 MiB, 1 are free"))
    for rank in (0, 1):
        error = script.error(WORKER + rank)
        assert isinstance(error, NotEnoughMemory)
        assert "takes 9 MiB" in str(error)
    assert script.last(SERVER, m.Drop) == script.last(SERVER + 1, m.Drop) == m.Drop(1)
    assert script.coordinator.status().tables == ()
    script.ask(WORKER, m.Declare(spec(seed=1)))
    script.create(2)
    assert script.last(WORKER, m.Declared).table == 2


def test_a_server_that_dies_while_it_creates_does_not_leave_the_asker_waiting() -> None:
    script = FakePeers(2)
    script.join(0)
    script.ask(WORKER, m.Declare(spec()))
    script.answer(SERVER, 1, m.Created(1, 10))
    script.hang_up(SERVER + 1)
    assert "server 1 died while it created 't'" in str(script.error(WORKER))
    script.ask(WORKER, m.Declare(spec()))
    assert "server 1 is dead" in str(script.error(WORKER))


def test_a_worker_cannot_answer_for_a_server() -> None:
    script = FakePeers(1)
    script.join(0)
    script.take(WORKER)
    script.ask(WORKER, m.Declare(spec()))
    script.answer(WORKER, 1, NotEnoughMemory("no"))
    assert isinstance(script.error(WORKER), ProtocolError)
    script.answer(WORKER, 1, m.Created(1, 0))
    assert isinstance(script.error(WORKER), ProtocolError)
    script.create()
    assert script.last(WORKER, m.Declared)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (spec(parameters=()), UsageError),
        (spec(parameters=(ParameterSpec("w", (2, -1)),)), UsageError),
        (spec(parameters=(ParameterSpec("w", (1 << 50, 1 << 50)),)), NotEnoughMemory),
        (spec(parameters=(ParameterSpec("w", (2,), "quux"),), optimizer=OptimizerSpec("Assign", ({},))), UsageError),
        (spec(optimizer=OptimizerSpec("Nope", ({},))), UnknownOptimizer),
    ],
)
def test_a_table_that_cannot_be_is_refused_here_too(bad: DenseSpec, error: type[Exception]) -> None:
    script = FakePeers(1)
    script.join(0)
    script.ask(WORKER, m.Declare(bad))
    assert isinstance(script.error(WORKER), error)
    assert not any(isinstance(heard, m.Create) for heard in script.take(SERVER))


def test_strangers_cannot_declare_even_before_the_servers_are_there() -> None:
    script = FakePeers(1, joined=False)
    script.ask(9, m.Declare(spec()))
    assert isinstance(script.error(9), ClusterError)


def test_an_unknown_table_cannot_be_initialised() -> None:
    script = FakePeers(1)
    script.join(0)
    script.ask(WORKER, m.Initialised(77))
    assert isinstance(script.error(WORKER), UnknownTable)


# ---- commits -------------------------------------------------------------------------------------


def ready(script: FakePeers, shard: int, clock: int = 1, **changes: object) -> None:
    members = changes.pop("members", script.coordinator.membership.epoch)
    squares = changes.pop("squares", ())
    skip = changes.pop("skip", False)
    table = changes.pop("table", 1)
    peer = changes.pop("peer", SERVER + shard)
    message = m.Ready(table, shard, clock, members, squares, skip)  # type: ignore[arg-type]
    script.tell(peer, message)  # type: ignore[arg-type]


def committed(script: FakePeers) -> list[m.Commit]:
    return [heard for heard in script.take(SERVER) if isinstance(heard, m.Commit)]


@pytest.fixture
def training() -> FakePeers:
    """Two servers, two workers, a table with a bound on the norm."""
    script = FakePeers(2)
    script.join(0, 1, world=2)
    script.ask(WORKER, m.Declare(spec(max_grad_norm=1.0)))
    script.create()
    script.take(SERVER)
    return script


def test_a_step_is_committed_when_all_shards_are_ready_and_not_before(training: FakePeers) -> None:
    ready(training, 0, squares=(9.0,))
    assert committed(training) == []
    ready(training, 1, squares=(16.0,))
    (commit,) = committed(training)
    assert training.last(SERVER + 1, m.Commit) == commit
    assert commit.norm == 5.0
    assert commit.scale == 1.0 / (5.0 + 1e-6)
    ready(training, 0, 2, squares=(0.01,))
    ready(training, 1, 2)
    (commit,) = committed(training)
    assert (commit.clock, commit.norm, commit.scale) == (2, 0.1, None)


def test_one_shard_that_says_skip_skips_the_step_on_all(training: FakePeers) -> None:
    ready(training, 0, squares=(9.0,))
    ready(training, 1, skip=True)
    (commit,) = committed(training)
    assert commit.skip
    assert commit.scale is None


def test_ready_of_an_old_membership_is_ignored(training: FakePeers) -> None:
    old = training.coordinator.membership.epoch
    ready(training, 0)
    training.hang_up(WORKER + 1)
    ready(training, 1)
    assert committed(training) == [], "what shard 0 said before the death is void"
    ready(training, 0, members=old)
    assert committed(training) == [], "and what was on its way when it happened"
    ready(training, 0)
    assert len(committed(training)) == 1


def test_ready_of_anyone_but_the_shards_own_server_is_refused(training: FakePeers) -> None:
    for forged in (
        {"shard": 1, "peer": WORKER},
        {"shard": 1, "peer": SERVER},
        {"shard": 2, "peer": SERVER + 1},
    ):
        ready(training, **forged)
    ready(training, 0)
    assert committed(training) == []
    assert isinstance(training.error(WORKER), ProtocolError)


def test_saying_ready_twice_does_not_count_for_two(training: FakePeers) -> None:
    ready(training, 0)
    ready(training, 0)
    assert committed(training) == []


# ---- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.PUSH, Kind.PULL, Kind.DATA, Kind.ASSIGN, Kind.HELLO, Kind.ACK])
def test_data_does_not_go_to_the_coordinator(kind: Kind) -> None:
    script = FakePeers(1)
    script._send(9, Frame(kind))
    assert isinstance(script.error(9), ProtocolError)


def test_the_status_tells_what_the_heartbeats_said() -> None:
    script = FakePeers(2)
    script.join(0, world=1)
    script.ask(WORKER, m.Declare(spec("emb", sync=Async())))
    script.create()
    script.tell(WORKER, m.Heartbeat(clock=5, pushed_bytes=6, pulled_bytes=7, staleness=1))
    report = m.Heartbeat(0, 3, 0, 0, 800, 1, ((1, 5),), ((0, 9, 2),), 0, 0, refused=((0, 3), (7, 9)))
    script.tell(HEART, report)
    script.tell(HEART + 1, m.Heartbeat(server=1, session=1, refused=((0, 1),)))
    script.clock.advance(3)
    script.ask(WORKER, m.Status())
    status = script.last(WORKER, m.ClusterStatus)
    (worker,), (first, second), (table,) = status.workers, status.servers, status.tables
    assert [(s.primary, s.epoch, s.lsn, s.lag, s.copies, s.wanted) for s in status.shards] == [
        (0, 1, 9, 2, 1, 1),
        (1, 1, 0, 0, 1, 1),
    ]
    assert (worker.rank, worker.clock, worker.pushed_bytes, worker.heard, worker.state) == (0, 5, 6, 3.0, "silent")
    assert worker.refused == 4  # by both servers; session 7 is another's
    assert (first.server, first.primaries, first.nbytes, first.pushed_bytes, first.uptime) == (0, (0,), 800, 3, 3.0)
    assert (table.name, table.clock, table.elements, len(table.shards)) == ("emb", 5, 200_000, 2)
    assert (second.primaries, second.backups, second.learners, second.nbytes) == ((1,), (), (), 0)
