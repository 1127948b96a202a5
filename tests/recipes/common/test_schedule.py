from __future__ import annotations

from pathlib import Path

import pytest

from headwater_recipes.common.schedule import FLOOR, LEAD, Pace, Schedule, ScheduleFile, factor, of, recorded


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    assert factor(0.0, 0, 10) == pytest.approx(0.1)
    assert factor(0.0, 9, 10) == pytest.approx(1.0)
    assert factor(0.5, 500, 10) == pytest.approx((1 + FLOOR) / 2)
    assert factor(1.0, 999, 10) == pytest.approx(FLOOR)


def _race(pace: Pace, first: Schedule, seconds: list[float], elapsed: float = 0.0) -> tuple[list[float], float]:
    """Progress at each step taken, and the time at the end; ``seconds`` per step, the last one repeated."""
    schedules = [first]
    taken: list[float] = []
    for step in range(10_000):
        found = pace.decide(step, elapsed)
        if found is not None:
            schedules.append(found)
        now = next(each for each in reversed(schedules) if each.step <= step)
        if now.stop is not None and step >= now.stop:
            return taken, elapsed
        taken.append(now.at(step))
        elapsed += seconds[min(step, len(seconds) - 1)]
    raise AssertionError("it never stopped")


@pytest.mark.parametrize("seconds", [[0.1], [1.5, 1.0, 0.1], [0.1] * 200 + [0.3]])
def test_a_budget_of_time_is_kept_and_the_schedule_ends_with_it(seconds: list[float]) -> None:
    first = Schedule(0, 0.0, 0.0)
    taken, elapsed = _race(Pace(first, 60.0), first, seconds)
    assert 60.0 <= elapsed <= 60.0 + (LEAD + 1) * max(seconds)
    assert taken == sorted(taken)
    assert taken[-1] > 0.97


def test_a_number_of_steps_is_taken_exactly() -> None:
    first = Schedule(0, 0.0, 1 / 50, 50)
    taken, _ = _race(Pace(first, None), first, [0.1])
    assert len(taken) == 50
    assert taken[25] == pytest.approx(0.5)


def test_who_asks_to_stop_is_heard_once() -> None:
    first = Schedule(0, 0.0, 0.001)
    pace = Pace(first, 60.0)
    assert pace.decide(7, 1.0, asked=True) == Schedule(9, first.at(9), 0.001, 9, asked=True)
    assert pace.decide(8, 1.1, asked=True) is None
    nearly = Pace(Schedule(0, 0.0, 0.1, 10), None)
    assert nearly.decide(9, 1.0, asked=True) is None  # the end comes first


def test_the_others_read_what_rank_0_wrote(tmp_path: Path) -> None:
    first = Schedule(0, 0.0, 0.0)
    writer, reader = ScheduleFile(tmp_path, first), ScheduleFile(tmp_path, first)
    assert reader.at(5) == first
    later, stop = Schedule(12, 0.1, 0.01), Schedule(13, 0.11, 0.01, 13)
    writer.publish(later)
    writer.publish(stop)
    for each in (writer, reader):
        assert each.at(11) == first
        assert each.at(12) == later
        assert each.at(13) == stop
        assert each.at(20) == stop


def test_a_run_can_be_gone_through_once_more(tmp_path: Path) -> None:
    """Also where it went on from step 30 after it had come to 50."""
    assert recorded(tmp_path) == []
    begun, again = Schedule(0, 0.0, 0.01), Schedule(30, 0.5, 0.02)
    first = ScheduleFile(tmp_path, begun)
    first.record(begun)
    for step in range(10, 50, 10):
        first.publish(Schedule(step, step / 100, 0.001 * step))
    ScheduleFile(tmp_path, again).record(again)
    found = recorded(tmp_path)
    assert [of(found, step).per_step for step in (0, 9, 10, 29, 30, 50)] == [0.01, 0.01, 0.01, 0.02, 0.02, 0.02]
    assert of(found, 29).step == 20
    assert of(found, 50) == again
