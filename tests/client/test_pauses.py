"""A worker that waits for others pauses: their bulk steps do without it, and it resumes where they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from headwater.client import Client, Dense
from headwater.errors import DeadlineExceeded, HeadwaterError
from headwater.types import Async, Bulk, Stale, Sync
from tests.client.conftest import Connect

SHAPE = (300_000,)  # lies on both servers


def _pair(connect: Connect, name: str, sync: Sync) -> tuple[list[Client], list[Dense]]:
    clients = [connect(rank=rank, world=2) for rank in (0, 1)]
    made = [c.dense(name, SHAPE, optimizer=torch.optim.SGD, lr=1.0, sync=sync) for c in clients]
    return clients, made


def _together(*acts: Callable[[], None]) -> None:
    """Each in a thread of its own, until all have ended; raises what one of them raised."""
    with ThreadPoolExecutor(len(acts)) as pool:
        for act in [pool.submit(act) for act in acts]:
            act.result()


def _value(w: Dense) -> float:
    (value,) = set(w.pull().tolist())
    return float(value)


def test_steps_go_on_without_a_worker_that_is_paused(connect: Connect, name: str) -> None:
    (_, second), (a, b) = _pair(connect, name, Bulk())
    one = torch.ones(SHAPE)
    for ticket in [a.push(one), b.push(3 * one)]:
        ticket.wait()
    assert _value(b) == -2  # the mean of two
    with second.paused():
        for _ in range(3):
            a.push(one).wait()
    assert b.table.clock == a.table.clock == 4
    assert _value(b) == -5  # three steps of one worker alone
    for ticket in [a.push(one), b.push(3 * one)]:
        ticket.wait()
    assert _value(a) == _value(b) == -7


def test_a_step_under_way_is_finished_before_the_pause(connect: Connect, name: str) -> None:
    (_, second), (a, b) = _pair(connect, name, Bulk())
    one = torch.ones(SHAPE)
    ticket = b.push(one)
    a.push(one)
    with second.paused():
        assert ticket.done()
        a.push(one).wait()
    assert _value(b) == -2


def test_a_pause_is_harmless_under_other_policies(connect: Connect, name: str) -> None:
    (first, second), (a, b) = _pair(connect, name, Async())
    one = torch.ones(SHAPE)
    with first.paused(), second.paused():
        a.push(one).wait()
    b.push(one).wait()
    assert _value(b) == -2


PACED = [Stale(0), Stale(1), Async(0), Async(1)]


@pytest.mark.parametrize("sync", PACED)
def test_nobody_waits_for_a_worker_that_waits(connect: Connect, name: str, sync: Sync) -> None:
    (_, second), (a, b) = _pair(connect, name, sync)
    one = torch.ones(SHAPE)
    for ticket in [a.push(one), b.push(one)]:
        ticket.wait()
    _value(b)  # it has read, and would compute on that
    with second.paused():
        for _ in range(4):
            a.push(one).wait()
            _value(a)
    assert b.values.unique().tolist() == [-2]
    assert b.table.clock == 1
    for ticket in [b.push(one), a.push(one)]:
        ticket.wait()
    assert _value(b) == -8


def test_bulk_steps_are_of_all_workers_after_a_barrier_whatever_other_tables_do(connect: Connect, name: str) -> None:
    clients, made = _pair(connect, name, Bulk())
    others = [c.dense(f"{name}-other", SHAPE, lr=1.0, sync=Stale(0)) for c in clients]

    def work(rank: int) -> None:
        for turn in range(20):
            clients[rank].barrier(f"{turn}")
            made[rank].push(torch.full(SHAPE, 1.0 + 2 * rank)).wait()
            others[rank].push(torch.ones(SHAPE)).wait()
            _value(others[rank])

    _together(lambda: work(0), lambda: work(1))
    assert [w.table.clock for w in made] == [20, 20]
    assert _value(made[0]) == _value(others[0]) == -40


def test_nobody_leaves_a_barrier_before_all_are_waited_for_again(
    connect: Connect, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, made = _pair(connect, name, Stale(0))
    resume, left = made[1].table.resume, threading.Event()
    early: list[bool] = []

    def slow(deadline: float) -> None:
        early.append(left.wait(0.2))
        resume(deadline)

    def first() -> None:
        clients[0].barrier()
        left.set()

    monkeypatch.setattr(made[1].table, "resume", slow)
    _together(first, clients[1].barrier)
    assert early == [False]


def test_a_barrier_that_is_given_up_ends_in_time_and_leaves_nobody_paused(connect: Connect, name: str) -> None:
    (first, _), (a, b) = _pair(connect, name, Stale(0))
    with pytest.raises(DeadlineExceeded):
        first.barrier("alone", timeout=0.1)
    b.push(torch.ones(SHAPE)).wait()
    with pytest.raises(DeadlineExceeded):
        b.pull(timeout=0.1)  # it waits for the first again
    a.push(torch.ones(SHAPE)).wait()


@pytest.mark.parametrize("sync", [Stale(0), Stale(2), Async(0), Async(1), Async()])
def test_who_is_first_at_a_barrier_holds_nobody_up(connect: Connect, name: str, sync: Sync) -> None:
    clients, made = _pair(connect, name, sync)
    one = torch.ones(SHAPE)
    for w in made:  # both have read
        w.pull()

    def work(rank: int, steps: int) -> None:
        for turn in range(3):
            for _ in range(steps):
                made[rank].push(one).wait()
                made[rank].pull()
            clients[rank].barrier(f"{turn}")
        done.append(rank)

    done: list[int] = []
    _together(lambda: work(0, 1), lambda: work(1, 5))
    assert sorted(done) == [0, 1]
    with clients[1].paused():
        assert _value(made[0]) == -18


def test_a_pause_ends_with_what_ended_it(connect: Connect, name: str) -> None:
    (_, second), (a, b) = _pair(connect, name, Bulk())
    with pytest.raises(HeadwaterError, match="enough"), second.paused():
        raise HeadwaterError("enough")
    one = torch.ones(SHAPE)
    for ticket in [a.push(one), b.push(one)]:
        ticket.wait()
    assert _value(a) == -1
