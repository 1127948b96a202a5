"""The virtual clock, its fibres, and processes that are stopped or die."""

from __future__ import annotations

import pytest

from headwater.testing.processes import Process
from headwater.testing.scheduler import Fibre, Scheduler, Signal, Stuck


def _never() -> bool:
    return False


def test_events_come_in_the_order_of_their_times_and_equal_ones_as_they_were_asked_for() -> None:
    scheduler = Scheduler()
    seen: list[str] = []
    for name, when in (("c", 2.0), ("a", 1.0), ("b", 1.0)):
        scheduler.at(when, seen.append, name)
    with pytest.raises(Stuck, match="nothing is left"):
        scheduler.run(_never, limit=10.0, events=100)
    assert seen == ["a", "b", "c"]
    assert scheduler.now == 2.0


def test_a_run_ends_at_its_limits() -> None:
    scheduler = Scheduler()

    def again() -> None:
        scheduler.after(1.0, again)

    again()
    with pytest.raises(Stuck, match=r"time 5\.000"):
        scheduler.run(_never, limit=5.0, events=100)
    with pytest.raises(Stuck, match="3 events"):
        scheduler.run(_never, limit=50.0, events=3)


def test_a_fibre_waits_for_a_signal_or_for_its_deadline() -> None:
    scheduler = Scheduler()
    process = Process(scheduler, "p")
    signal = Signal()
    seen: list[float] = []

    def body() -> None:
        for until in (10.0, 3.0):
            signal.wait(scheduler.current(), until)
            seen.append(scheduler.now)

    process.fibre(body)
    scheduler.at(1.0, signal.notify)
    with pytest.raises(Stuck):
        scheduler.run(_never, limit=20.0, events=100)
    assert seen == [1.0, 3.0]


def test_a_fibre_that_wakes_another_goes_on_first() -> None:
    scheduler = Scheduler()
    process = Process(scheduler, "p")
    signal = Signal()
    seen: list[str] = []

    def sleeper() -> None:
        signal.wait(scheduler.current())
        seen.append("woken")

    def waker() -> None:
        signal.notify()
        seen.append("notified")

    process.fibre(sleeper)
    process.fibre(waker)
    scheduler.run(lambda: len(seen) == 2, limit=1.0, events=100)
    assert seen == ["notified", "woken"]


def test_a_stopped_process_catches_up_and_a_dead_one_does_nothing() -> None:
    scheduler = Scheduler()
    process = Process(scheduler, "p")
    seen: list[int] = []
    process.stop()
    process.call(seen.append, 1)
    process.call(seen.append, 2)
    assert seen == []
    process.go_on()
    process.call(seen.append, 3)
    assert seen == [1, 2, 3]
    process.die()
    process.call(seen.append, 4)
    assert seen == [1, 2, 3]


def test_clocks_differ_and_deadlines_are_kept_by_the_clock_they_were_made_on() -> None:
    scheduler = Scheduler()
    process = Process(scheduler, "p", offset=1000.0, rate=2.0)
    seen: list[float] = []

    def body() -> None:
        Fibre.wait(scheduler.current(), process.moment(process.clock() + 3.0))
        seen.append(process.clock())

    process.fibre(body)
    with pytest.raises(Stuck):
        scheduler.run(_never, limit=5.0, events=10)
    assert seen == [pytest.approx(1003.0, abs=1e-4)]


def test_what_a_dead_fibre_holds_is_given_back() -> None:
    scheduler = Scheduler()
    process = Process(scheduler, "p")
    seen: list[str] = []

    def body() -> None:
        try:
            scheduler.current().wait(100.0)
        finally:
            seen.append("unwound")

    process.fibre(body)
    scheduler.run(lambda: scheduler.now > 0 or scheduler.count > 0, limit=1.0, events=5)
    process.die()
    assert seen == []
    process.unwind()
    assert seen == ["unwound"]
