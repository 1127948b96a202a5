"""The ladder of signals, with the time passed in."""

from __future__ import annotations

from signal import SIGINT, SIGKILL, SIGTERM

from headwater.launch import escalation


def test_ctrl_c_leaves_time_to_finish_then_gets_firmer() -> None:
    ending = escalation.interrupt(now=100.0, patience=20.0, grace=5.0)
    assert ending.next(100.0) == SIGINT
    assert ending.due == 120.0
    assert ending.next(119.9) is None
    assert ending.next(120.0) == SIGTERM
    assert ending.next(125.0) == SIGKILL
    assert ending.next(125.0) is None


def test_a_second_request_does_not_wait() -> None:
    ending = escalation.interrupt(now=0.0, patience=20.0, grace=5.0)
    assert ending.next(0.0) == SIGINT
    ending.hurry(1.0)
    assert ending.next(1.0) == SIGTERM
    assert ending.due == 2.0  # and not after the grace
    ending.hurry(1.5)
    assert ending.next(1.5) == SIGKILL


def test_sigterm_leaves_time_to_finish_and_a_second_one_does_not() -> None:
    ending = escalation.finish(now=0.0, patience=20.0)
    assert [ending.next(0.0), ending.due] == [SIGTERM, 20.0]
    ending.hurry(1.0)
    assert ending.next(1.0) == SIGKILL
    assert not ending.over(5.0)


def test_waiting_for_a_process_that_even_sigkill_does_not_end_has_a_deadline() -> None:
    ending = escalation.terminate(now=0.0, grace=5.0)
    assert [ending.next(0.0), ending.next(5.0)] == [SIGTERM, SIGKILL]
    assert not ending.over(5.0)
    assert ending.over(ending.due)
