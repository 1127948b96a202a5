"""Which lines are shown: one traceback of a script that fails everywhere."""

from __future__ import annotations

from typing import Any, cast

import pytest

from headwater.launch.lines import HOLD, Lines
from headwater.launch.process import Process

STACK = ["Traceback (most recent call last):", '  File "train.py", line 5, in <module>', "    step()"]
FAILED = [*STACK, "RuntimeError: the data ran out"]
ELSEWHERE = [STACK[0], '  File "train.py", line 9, in <module>', "KeyError: 'x'"]
LOST = [STACK[0], '  File "train.py", line 7, in <module>', "headwater.errors.WorkerLost: worker 1 died"]
INTERRUPTED = [*STACK, "KeyboardInterrupt"]


class _Worker:
    def __init__(self, rank: int, role: str = "worker") -> None:
        self.name, self.role, self.rank = f"w{rank}", role, rank
        self.returncode: int | None = None
        self.signalled = False
        self.said: list[str] = []

    @property
    def last_words(self) -> str:
        start = max((i for i, line in enumerate(self.said) if line == STACK[0]), default=0)
        return "\n".join(self.said[start:])


class _Screen:
    """Lines, and what they let through."""

    def __init__(self, **options: Any) -> None:
        self.lines = Lines(**{"once": True, **options})
        self.workers = [_Worker(rank) for rank in range(3)]
        self.shown: list[str] = []

    def say(self, rank: int, *lines: str, now: float = 0.0, stream: Any = "stderr") -> None:
        worker = self.workers[rank]
        for line in lines:
            worker.said += [line] if stream == "stderr" else []
            self._add(rank, self.lines.take(cast(Process, worker), stream, line, now))

    def end(self, rank: int, code: int = 1, *, signalled: bool = False) -> bool:
        """Whether the last words were shown already."""
        worker = cast(Any, self.workers[rank])
        worker.returncode, worker.signalled = code, signalled
        self._add(rank, self.lines.ended(worker))
        return self.lines.seen(worker)

    def late(self, now: float) -> None:
        for worker, (_, line) in self.lines.late(now):
            self.shown.append(f"{worker.name} {line}")

    def _add(self, rank: int, found: list[Any]) -> None:
        self.shown += [f"w{rank} {line}" for _, line in found]


def test_a_traceback_that_ends_a_worker_is_left_to_the_report() -> None:
    screen = _Screen()
    screen.say(0, "before", *FAILED)
    screen.say(0, "step 3", stream="stdout")
    assert screen.end(0) is False
    assert screen.shown == ["w0 before", "w0 step 3"]


def test_who_fails_at_the_same_place_says_nothing_more() -> None:
    screen = _Screen()
    for rank in range(3):
        screen.say(rank, *FAILED[: 4 if rank < 2 else 2])
    assert screen.end(0) is False
    assert screen.end(1) is False  # the report may be about it
    assert screen.end(2, 143, signalled=True)  # stopped amid its traceback
    assert screen.shown == []
    assert screen.lines.rest("w0") == []


def test_another_reason_at_the_same_place_is_a_line() -> None:
    screen = _Screen()
    screen.say(0, *FAILED)
    screen.say(1, *STACK, "RuntimeError: of 1")
    screen.end(0)
    screen.end(1)
    assert screen.shown == ["w1 RuntimeError: of 1: at the same place as w0"]


def test_another_traceback_is_shown_whole() -> None:
    screen = _Screen()
    screen.say(0, *FAILED)
    screen.say(1, *ELSEWHERE)
    screen.end(0)
    assert screen.end(1)
    assert screen.shown == [f"w1 {line}" for line in ELSEWHERE]


def test_who_only_lost_another_does_not_hide_the_one_at_fault() -> None:
    screen = _Screen()
    screen.say(0, *LOST)
    screen.say(1, *FAILED)
    assert screen.end(0) is False
    assert screen.end(1) is False
    assert screen.shown == []


def test_a_traceback_that_the_script_survives_is_shown_soon() -> None:
    screen = _Screen()
    screen.say(0, *FAILED, now=7.0)
    assert screen.lines.due == 7.0 + HOLD
    screen.late(6.9 + HOLD)
    assert screen.shown == []
    screen.late(7.0 + HOLD)
    assert screen.shown == [f"w0 {line}" for line in FAILED]
    assert screen.lines.due == float("inf")
    screen.say(0, "goes on")
    assert screen.shown[-1] == "w0 goes on"
    assert screen.end(0)  # the report must not show it again


def test_one_that_ends_well_after_a_traceback_has_it_shown() -> None:
    screen = _Screen()
    screen.say(0, *FAILED)
    assert screen.end(0, 0)
    assert screen.shown == [f"w0 {line}" for line in FAILED]


@pytest.mark.parametrize("debug", [False, True])
def test_a_ctrl_c_that_was_passed_on_needs_no_traceback(monkeypatch: pytest.MonkeyPatch, debug: bool) -> None:
    monkeypatch.setenv("HEADWATER_DEBUG", "1" if debug else "0")
    screen = _Screen()
    screen.say(0, *INTERRUPTED)
    screen.end(0, 130, signalled=True)
    screen.say(1, *INTERRUPTED)
    screen.workers[1].signalled = True
    screen.late(HOLD)
    told = [*(f"w0 {line}" for line in INTERRUPTED), "w1 the same traceback as w0"]
    assert screen.shown == (told if debug else [])


def test_what_fails_on_the_way_out_after_a_ctrl_c_is_shown() -> None:
    screen = _Screen()
    screen.say(0, *FAILED)
    assert screen.end(0, signalled=True)
    assert screen.shown == [f"w0 {line}" for line in FAILED]


def test_of_others_than_rank_0_only_the_last_words_are_shown() -> None:
    screen = _Screen(only_rank0=True)
    screen.say(0, "mine")
    screen.say(1, "theirs", *FAILED)
    screen.say(1, "theirs", stream="stdout")
    assert screen.end(1) is False  # for the report
    screen.say(0, *FAILED)
    assert screen.end(0, 143, signalled=True)
    assert screen.shown == ["w0 mine"]


def test_what_rank_0_has_shown_is_not_shown_again_of_another() -> None:
    screen = _Screen(only_rank0=True)
    screen.say(0, *FAILED)
    screen.say(1, *FAILED)
    screen.say(2, *ELSEWHERE)
    screen.late(HOLD)
    assert screen.end(1)
    assert screen.end(2) is False
    assert screen.shown == [f"w0 {line}" for line in FAILED]


def test_who_chooses_among_the_lines_of_stdout_is_given_all() -> None:
    screen = _Screen(only_rank0=True, stdout=False)
    screen.say(1, "loss 3", stream="stdout")
    screen.say(1, "careful")
    assert screen.shown == ["w1 loss 3"]


def test_the_last_words_of_one_that_nobody_reports_are_shown_in_the_end() -> None:
    screen = _Screen()
    screen.say(1, *FAILED)
    screen.end(1)
    assert screen.lines.rest("w1") == []
    assert [line for _, (_, line) in screen.lines.rest("coordinator")] == FAILED
    assert screen.lines.rest("coordinator") == []


@pytest.mark.parametrize("only_rank0", [False, True])
@pytest.mark.parametrize("reported", [1, 2])
def test_of_two_that_fail_at_once_the_one_that_is_reported_is_shown(only_rank0: bool, reported: int) -> None:
    """Both have ended before anybody was asked to: whose end counts as the first is another's choice."""
    screen = _Screen(only_rank0=only_rank0)
    for rank in (2, 1):
        screen.say(rank, *FAILED)
    assert [screen.end(rank) for rank in (2, 1)] == [False, False]  # so the report has the words of either
    assert (screen.shown, screen.lines.rest(f"w{reported}")) == ([], [])
    assert [line for _, (_, line) in screen.lines.rest("coordinator")] == FAILED  # once


def test_in_an_elastic_job_every_end_is_shown_at_once() -> None:
    for only in (False, True):
        screen = _Screen(elastic=True, only_rank0=only)
        for rank in (1, 2):
            screen.say(rank, *FAILED)
            assert screen.end(rank) is True
        assert screen.shown == [f"w{rank} {line}" for rank in (1, 2) for line in FAILED]


def test_who_takes_the_lines_himself_gets_all_of_them() -> None:
    screen = _Screen(once=False)
    screen.say(0, *FAILED)
    assert screen.end(0)
    assert screen.shown == [f"w0 {line}" for line in FAILED]


def test_a_typed_end_of_a_server_is_left_to_the_outcome() -> None:
    server = cast(Process, _Worker(0, "server"))
    lines = Lines(once=True)
    assert lines.take(server, "stderr", "headwater server: AddressInUse: port 7 is taken", 0.0) == []
    assert lines.take(server, "stderr", STACK[0], 0.0) == [("stderr", STACK[0])]
    assert lines.ended(server) == []
