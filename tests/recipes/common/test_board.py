from __future__ import annotations

import math

import pytest

from headwater_recipes.common.board import Board
from headwater_recipes.common.reports import (
    Doing,
    Finished,
    Glanced,
    Saved,
    Started,
    Stepped,
    Validated,
    hear,
    say,
)
from headwater_recipes.lm.task import LanguageModel


def _step(rank: int, step: int, loss: float, staleness: int = 0) -> Stepped:
    return Stepped(rank, step, loss, 1e-3, 1000.0, 2e6, 3e6, staleness, 1.5, float(step), step / 100)


def test_a_row_waits_for_every_rank_and_adds_them_up() -> None:
    board = Board(LanguageModel, 2)
    assert board.hear(_step(0, 10, 4.0)) is None
    row = board.hear(_step(1, 10, 5.0, staleness=2))
    assert row is not None
    assert (row["loss"], row["tokens_per_second"], row["staleness"]) == (4.5, 2000.0, 2)
    assert row["pushed_bytes_per_second"] == 4e6
    assert board.last == row
    assert board.seconds_left == pytest.approx(90.0)


def test_a_rank_may_be_ahead() -> None:
    board = Board(LanguageModel, 2)
    assert board.hear(_step(1, 10, 5.0)) is None
    assert board.hear(_step(1, 20, 4.0)) is None
    assert board.hear(_step(0, 10, 3.0)) is not None
    assert board.hear(_step(0, 20, 3.0)) is not None
    assert [row["step"] for row in board.rows] == [10, 20]


def _glance(rank: int, step: int, loss: float) -> Glanced:
    return Glanced(rank, step, loss, 1e-3, 1000.0, 2e6, 3e6, 0, 1.5, float(step), step / 100)


def test_a_glance_is_no_row_but_says_how_it_stands() -> None:
    board = Board(LanguageModel, 2)
    assert board.hear(_glance(0, 1, 8.0)) is None
    assert not board.now  # of one rank only
    assert board.hear(_glance(1, 1, 9.0)) is None
    assert (board.rows, board.last) == ([], None)
    found = board.now
    assert found
    assert (found["step"], found["loss"], found["tokens_per_second"]) == (1, 8.5, 2000.0)
    assert board.seconds_left == pytest.approx(99.0)
    for rank in range(2):
        board.hear(_step(rank, 10, 4.0))
    assert board.now == board.last == board.rows[-1]
    board.hear(_glance(0, 13, 3.0))
    board.hear(_glance(1, 13, 3.0))
    found = board.now
    assert found
    assert found["step"] == 13
    assert len(board.rows) == 1


def test_what_is_done_beside_training_is_over_with_the_next_step() -> None:
    board = Board(LanguageModel, 1)
    for report in (Started(0, 0, 10, "float32"), _glance(0, 1, 8.0), _step(0, 10, 4.0)):
        board.hear(Doing(0, "loading the model"))
        assert board.doing == "loading the model"
        board.hear(report)
        assert board.doing == ""


def test_shares_of_a_validation_are_weighed_by_their_size() -> None:
    board = Board(LanguageModel, 2)
    assert board.hear(Validated(0, 20, 1.0, {"nats": 30.0, "tokens": 10, "nbytes": 40}, final=True)) is None
    row = board.hear(Validated(1, 20, 1.0, {"nats": 10.0, "tokens": 10, "nbytes": 20}, final=True))
    assert row is not None
    assert row["loss"] == 2.0
    assert row["bits_per_byte"] == pytest.approx(40 / 60 / math.log(2))
    assert board.final == {"nats": 40.0, "tokens": 20, "nbytes": 60}
    assert board.validated == row


def test_what_was_saved_and_who_has_finished() -> None:
    board = Board(LanguageModel, 1)
    board.hear(Saved(40))
    board.hear(Finished(0, 40, 3.0, "stopped"))
    assert board.saved == 40
    assert board.finished[0].reason == "stopped"


def test_reports_travel_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(_step(1, 10, 2.5))
    (line,) = capsys.readouterr().out.splitlines()
    assert hear(line) == _step(1, 10, 2.5)
    assert hear("a library's own words") is None
    assert hear(line[:20]) is None


def test_nobody_waits_for_a_rank_that_died_until_it_is_there_again() -> None:
    board = Board(LanguageModel, 2)
    for rank in (0, 1):
        board.hear(Started(rank, 0, 5, "float32"))
    board.hear(_step(0, 10, 4.0))
    board.hear(_step(0, 20, 3.0))
    assert [row["step"] for row in board.lost(1)] == [10, 20]
    assert board.hear(_step(0, 30, 2.0)) == board.rows[-1]
    assert board.hear(_step(0, 40, 2.0)) is not None
    board.hear(Started(1, 43, 5, "float32"))
    assert board.hear(_step(0, 50, 2.0)) is None
    row = board.hear(_step(1, 50, 1.0))
    assert row is not None
    assert (row["loss"], [each["step"] for each in board.rows]) == (1.5, [10, 20, 30, 40, 50])


def test_a_rank_that_died_before_it_began_is_waited_for_when_it_has() -> None:
    board = Board(LanguageModel, 2)
    board.hear(Started(0, 0, 5, "float32"))
    assert board.lost(1) == []
    board.hear(Started(1, 3, 5, "float32"))
    assert board.hear(_step(0, 10, 4.0)) is None
    row = board.hear(_step(1, 10, 2.0))
    assert row is not None
    assert row["loss"] == 3.0


def test_all_held_out_data_are_judged_though_a_rank_died() -> None:
    board = Board(LanguageModel, 2)
    sums = {"nats": 4.0, "tokens": 2, "nbytes": 4}
    board.hear(Validated(0, 20, 1.0, sums, False))
    assert board.lost(1) == []  # a part of the data says nothing that could be compared
    assert board.hear(Validated(0, 60, 1.0, sums, True)) is None
    assert board.final is None
    row = board.hear(Validated(1, 60, 2.0, sums, True))
    assert row is not None
    assert (row["kind"], row["step"], board.final) == ("final", 60, {name: 2 * value for name, value in sums.items()})
    assert board.hear(Validated(1, 60, 2.0, sums, True)) is None  # once more, by who took its place
