"""Stale and asynchronous reading: the bound holds on every schedule, and nobody waits for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server import events as e
from headwater.server.sync import Clocks
from headwater.types import Async, Stale
from headwater.wire.frames import Flag
from tests.server.stage import TABLE, Stage, spec

SEEDS = st.integers(0, 2**32).map(random.Random)


class Race:
    """Workers that read, compute and push in any order; each waits for its own answers only."""

    def __init__(self, stage: Stage, workers: int) -> None:
        self.stage = stage
        self.state = dict.fromkeys(range(workers), "idle")  # idle, reading, computing, pushing

    def act(self, rank: int) -> None:
        if self.state[rank] == "idle":
            self.state[rank] = "reading"
            self.stage.pull(rank)
        elif self.state[rank] == "computing":
            self.state[rank] = "pushing"
            self.stage.push(rank)

    def hear(self) -> list[e.Send]:
        """Deliver what the shard answered; returns the reads that were granted."""
        for ack in self.stage.take(e.Ack):
            self.state[ack.session - 10] = "idle"
        sends = self.stage.take(e.Send)
        for send in sends:
            self.state[send.session - 10] = "computing"
        return sends

    def able(self) -> list[int]:
        return [rank for rank, state in self.state.items() if state in ("idle", "computing")]


@given(st.integers(0, 3), st.integers(2, 4), SEEDS)
@settings(max_examples=40)
def test_nobody_reads_more_than_the_bound_ahead_on_any_schedule(
    bound: int, workers: int, chance: random.Random
) -> None:
    stage = Stage(spec(Stale(bound), numel=8), ranks=tuple(range(workers)))
    race = Race(stage, workers)
    clocks = stage.shards[0].tables[TABLE].clocks.clock
    for _ in range(80):
        able = race.able()
        assert able, f"everybody waits: {race.state} at {clocks}"
        race.act(chance.choice(able))
        for send in race.hear():
            assert clocks[send.session - 10] - min(clocks.values()) <= bound
            assert send.staleness <= bound + 1


@given(st.integers(0, 4), st.integers(2, 4), SEEDS)
@settings(max_examples=40)
def test_the_cap_holds_for_all_who_compute_and_nobody_waits_for_ever(
    cap: int, workers: int, chance: random.Random
) -> None:
    """A step that waited itself may be up to world - 1 staler, as ``Clocks.may_apply`` says."""
    stage = Stage(spec(Async(cap), numel=8), ranks=tuple(range(workers)))
    race = Race(stage, workers)
    clocks = stage.shards[0].tables[TABLE].clocks
    for _ in range(80):
        able = race.able()
        assert able, f"everybody waits: {race.state}"
        race.act(chance.choice(able))
        acks = [i for _, i in stage.heard if isinstance(i, e.Ack)]
        assert all(ack.staleness <= cap + workers - 1 for ack in acks)
        race.hear()
        computing = [rank for rank, state in race.state.items() if state == "computing"]
        assert all(clocks.applied - clocks.read[rank] <= cap for rank in computing)


def test_a_reader_in_front_waits_and_goes_on_when_the_slowest_has_pushed() -> None:
    stage = Stage(spec(Stale(1), numel=8))
    stage.push(0)
    assert stage.pull(0), "one ahead is within the bound"
    stage.push(0)
    assert not [i for i in stage.pull(0) if isinstance(i, e.Send)]
    out = stage.push(1)
    assert [i.session for i in out if isinstance(i, e.Send)] == [10]


def test_a_worker_cannot_read_further_ahead_by_stating_an_older_clock() -> None:
    stage = Stage(spec(Stale(0), numel=8))
    stage.push(0)
    assert not stage.pull(0, clock=0)


def test_a_push_that_wants_values_waits_with_them_and_not_with_its_acknowledgement() -> None:
    stage = Stage(spec(Stale(0), numel=8))
    out = stage.push(0, flags=Flag.END | Flag.WANT)
    assert [type(i) for i in out] == [e.Ack]
    assert e.Send in [type(i) for i in stage.push(1)]


def test_the_death_of_the_slowest_lets_the_others_go_on() -> None:
    stage = Stage(spec(Stale(0), numel=8))
    stage.push(0)
    assert not stage.pull(0)
    stage.close(1)
    stage.members((0,), lost="worker 1 died")
    assert len(stage.take(e.Send)) == 1


def test_a_newcomer_starts_at_the_slowest_clock() -> None:
    clocks = Clocks(Stale(1))
    clocks.members((0, 1))
    for clock in (1, 2, 3):
        clocks.pushed(0, clock)
    clocks.pushed(1, 1)
    clocks.members((0, 1, 2))
    assert clocks.clock == {0: 3, 1: 1, 2: 1}


def test_a_reader_without_a_rank_is_never_held_up() -> None:
    clocks = Clocks(Stale(0))
    clocks.members((0, 1))
    assert clocks.may_read(-1, 1000)


def test_a_step_waits_for_the_worker_that_computes_and_goes_on_when_it_reads_again() -> None:
    stage = Stage(spec(Async(1), numel=8))
    stage.pull(1)
    stage.push(0)
    assert len(stage.take(e.Ack)) == 1
    stage.push(0)
    assert stage.take(e.Ack) == [], "worker 1 would be two steps behind"
    stage.pull(1)
    assert [ack.session for ack in stage.take(e.Ack)] == [10], "it has read the first step now"


def test_a_step_that_waited_is_applied_before_the_one_it_waited_for() -> None:
    stage = Stage(spec(Async(0), numel=8))
    stage.pull(1)
    stage.push(0)
    stage.push(1)
    assert [ack.session for ack in stage.take(e.Ack)] == [10, 11]


def test_a_held_step_is_answered_before_a_read_of_its_worker() -> None:
    stage = Stage(spec(Async(0), numel=8))
    stage.pull(1)
    stage.push(0)
    assert not stage.pull(0), "a worker reads its own writes"
    stage.close(1)
    stage.members((0,), lost="worker 1 died")
    kinds = [type(i) for _, i in stage.heard if isinstance(i, e.Ack | e.Send) and i.session == 10]
    assert kinds == [e.Ack, e.Send]


def test_the_measured_staleness_is_the_steps_of_others_since_the_read() -> None:
    stage = Stage(spec(Async(), numel=8), ranks=(0, 1, 2))
    stage.pull(0)
    stage.push(1)
    stage.push(2)
    stage.push(0)
    assert [ack.staleness for ack in stage.take(e.Ack)][-1] == 2


@pytest.mark.parametrize("sync", [Stale(0), Async(0), Async()])
def test_a_session_that_ended_leaves_nothing_that_waits(sync: Stale | Async) -> None:
    stage = Stage(spec(sync, numel=8))
    stage.pull(1)
    stage.push(0)
    stage.pull(0)
    stage.close(0)
    stage.members((1,), lost="worker 0 died")
    table = stage.shards[0].tables[TABLE]
    assert not table.waiting
    assert not table.held
    assert not table.staged


@pytest.mark.parametrize("sync", [Stale(0), Async(0)])
def test_who_waits_for_others_is_not_waited_for_until_it_is_back(sync: Stale | Async) -> None:
    stage = Stage(spec(sync, numel=8))

    def goes_on(rank: int) -> bool:
        """Whether a step and a read are both granted."""
        stage.push(rank)
        stage.pull(rank)
        return bool(stage.take(e.Send)) and bool(stage.take(e.Ack))

    def pause(paused: bool) -> list[e.Done]:
        stage.event(0, e.PauseTable(11, 5, TABLE, paused))
        return stage.take(e.Done)

    stage.pull(1)
    stage.take(e.Send)
    assert not goes_on(0)
    assert pause(True) == [e.Done(11, 5)]
    assert stage.take(e.Send), "what waited goes on at once"
    assert goes_on(0)
    assert pause(False) == [e.Done(11, 5)]
    stage.take(e.Ack)
    assert not goes_on(0)
    stage.members((0, 1), lost="another")
    assert not goes_on(0), "it is still there"
    stage.members((0,), lost="worker 1 is lost")
    stage.take(e.Send), stage.take(e.Ack)
    assert goes_on(0)


def test_who_comes_back_after_it_was_lost_is_waited_for() -> None:
    clocks = Clocks(Stale(0))
    clocks.members((0, 1))
    clocks.pause(1, 11)
    clocks.pause(7, 17)  # nobody knows it
    assert clocks.paused == {1: 11}
    clocks.members((0,))
    clocks.members((0, 1))
    assert not clocks.may_read(0, 1)


def test_another_process_of_the_same_rank_is_waited_for() -> None:
    stage = Stage(spec(Stale(0), numel=8))
    stage.event(0, e.PauseTable(11, 5, TABLE, True))
    stage.sessions[1] = 99
    stage.members((0, 1), lost="worker 1 is lost")  # the shard hears only that it is there again
    stage.push(0)
    stage.pull(0)
    assert stage.take(e.Send) == []
