"""Whether a process that ended is started again, with the times passed in."""

from __future__ import annotations

from headwater.launch.revival import FRESH, TRIES, Revival


def test_one_that_was_at_work_is_started_again_at_once_however_often() -> None:
    place = Revival()
    assert [place.ended(FRESH, now) for now in (10.0, 20.0, 30.0, 40.0)] == [10.0, 20.0, 30.0, 40.0]
    assert place.restarts == 4


def test_one_that_ends_right_after_its_start_is_given_up_in_the_end() -> None:
    place = Revival()
    due = [place.ended(0.0, 10.0) for _ in range(TRIES)]
    assert due[-1] is None
    assert due[:-1] == sorted(set(due[:-1]))  # type: ignore[type-var]
    assert due[0] is not None
    assert due[0] > 10.0


def test_only_ends_in_a_row_count() -> None:
    place = Revival()
    for _ in range(5):
        assert place.ended(0.0, 0.0) is not None
        assert place.ended(0.0, 0.0) is not None
        assert place.ended(60.0, 0.0) == 0.0


def test_a_number_of_restarts_is_kept_to() -> None:
    place = Revival(2)
    assert [place.ended(60.0, now) for now in (1.0, 2.0, 3.0)] == [1.0, 2.0, None]
