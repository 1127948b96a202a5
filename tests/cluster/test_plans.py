"""Data plans at the coordinator: who may ask, what is durable first, and whom bulk steps do without."""

from __future__ import annotations

from headwater.cluster.coordinator import Coordinator, Rules
from headwater.cluster.membership import Membership
from headwater.errors import ClusterError, UsageError
from headwater.wire import messages as m
from tests.cluster.fake_peers import READER, SERVER, WORKER, FakePeers


def question(turn: int, *finished: tuple[int, int], n: int = 10) -> m.PlanNext:
    return m.PlanNext("data", n, 1, 0, 4, True, turn, finished)


def members(script: FakePeers) -> m.Members:
    return script.last(SERVER, m.Members)


def test_workers_share_a_plan_and_a_dead_ones_chunk_goes_on() -> None:
    script = FakePeers(1)
    script.join(0, 1)
    for rank in (0, 1):
        script.ask(WORKER + rank, question(1))
    assert [script.last(WORKER + rank, m.PlanChunk).chunk for rank in (0, 1)] == [0, 1]
    script.hang_up(WORKER + 1)
    script.pass_time(5, alive=(SERVER, WORKER))
    for turn, chunk in ((2, 1), (3, 2)):
        script.ask(WORKER, question(turn))
        assert script.last(WORKER, m.PlanChunk).chunk == chunk


def test_a_worker_that_leaves_has_finished_what_it_said() -> None:
    script = FakePeers(1)
    script.join(0, 1)
    for rank in (0, 1):
        script.ask(WORKER + rank, question(1))
    script.ask(WORKER + 1, question(2, (1, 7)))
    script.ask(WORKER + 1, m.Leave())
    script.ask(WORKER, question(2, (0, 0)))
    assert script.last(WORKER, m.PlanChunk).chunk == 2


def test_readers_and_strangers_have_no_share() -> None:
    script = FakePeers(1)
    script.join(0)
    script.ask(READER, m.Join("reader", READER))
    for peer in (READER, 999):
        script.ask(peer, question(1))
        assert isinstance(script.error(peer), ClusterError)


def test_a_refusal_goes_to_the_worker_that_asked() -> None:
    script = FakePeers(1)
    script.join(0, 1)
    script.ask(WORKER, question(1))
    script.ask(WORKER + 1, question(1, n=11))
    error = script.error(WORKER + 1)
    assert isinstance(error, UsageError)
    assert "'data' exists with n=10" in str(error)


def test_an_answer_is_durable_before_it_is_sent_and_survives_a_restart() -> None:
    script = FakePeers(1)
    script.join(0)
    before = script.state
    script.ask(WORKER, question(1))
    after = script.state
    assert after.keys() - before.keys() == {"plan/data"}
    script.durable.clear()
    script.ask(WORKER, question(1))  # again: nothing new
    assert script.durable == {}
    again = Coordinator(Rules(servers=1), state=after)
    given = again.plans.ask(0, question(1))  # the session of worker 0 here
    assert given == script.last(WORKER, m.PlanChunk)


def test_steps_do_without_a_worker_that_rests() -> None:
    script = FakePeers(1)
    script.join(0, 1)
    epoch = members(script).epoch
    script.ask(WORKER + 1, m.Pause(paused=True))
    assert script.last(WORKER + 1, m.Paused).members == epoch + 1
    said = members(script)
    assert (said.epoch, said.ranks, said.lost) == (epoch + 1, (0,), 0)
    script.ask(WORKER + 1, m.Pause(paused=True))  # asked again
    assert script.last(WORKER + 1, m.Paused).members == epoch + 1
    script.ask(WORKER + 1, m.Pause(paused=False))
    assert script.last(WORKER + 1, m.Paused).members == epoch + 2
    assert members(script).ranks == (0, 1)


def test_a_barrier_waits_for_a_worker_that_rests() -> None:
    script = FakePeers(1)
    script.join(0, 1)
    script.ask(WORKER + 1, m.Pause(paused=True))
    script.take(WORKER)
    script.ask(WORKER, m.Barrier("b", 1))
    assert script.take(WORKER) == []
    script.ask(WORKER + 1, m.Pause(paused=False))
    script.ask(WORKER + 1, m.Barrier("b", 1))
    assert script.take(WORKER) == [m.Done()]


def test_who_rests_is_remembered_and_forgotten_with_the_worker() -> None:
    membership = Membership()
    for rank in (0, 1):
        membership.admit(rank, m.Join("worker", rank, rank=rank), 0.0)
    member = membership.workers[1]
    membership.pause(member, paused=True)
    again = Membership()
    again.restore({"members": membership.dump()}, 0.0)
    assert again.needed() == (0,)
    membership.depart(member, clean=True)
    membership.admit(5, m.Join("worker", 5, rank=1), 0.0)
    assert membership.needed() == membership.ranks() == (0, 1)


def test_what_was_trained_in_a_step_that_died_with_its_worker_is_given_out_again() -> None:
    script = FakePeers(1)
    script.join(0, 1)
    script.ask(WORKER + 1, question(1))
    assert script.last(WORKER + 1, m.PlanChunk).chunk == 0
    script.ask(WORKER + 1, question(2, (0, 7)))  # finished in step 7, which nobody has committed
    assert script.last(WORKER + 1, m.PlanChunk).chunk == 1
    script.hang_up(WORKER + 1)
    given = []
    for turn in (1, 2, 3):
        script.ask(WORKER, question(turn))
        given.append(script.last(WORKER, m.PlanChunk).chunk)
    assert given == [0, 1, 2]
