from __future__ import annotations

import io

import pytest
from rich.console import Console

from headwater_recipes.common import display
from headwater_recipes.common.board import Board
from headwater_recipes.common.reports import Doing, Glanced, Published, Started, Stepped, Validated
from headwater_recipes.common.stages import clock, stage, waiting
from headwater_recipes.finetune.answers import Asked
from headwater_recipes.finetune.report import _compared
from headwater_recipes.lm.task import LanguageModel
from headwater_recipes.text.settings import WORDING


def _board() -> Board:
    board = Board(LanguageModel, 2)
    for rank in range(2):
        board.hear(Started(rank, 0, 1_000_000, "float32"))
        for step in (10, 20):
            board.hear(Stepped(rank, step, 8.0 / step, 1e-3, 500.0, 1e6, 2e6, 1, None, float(step), step / 40))
        board.hear(Validated(rank, 20, 20.0, {"nats": 100.0, "tokens": 50, "nbytes": 60}, False))
    return board


def _server() -> object:
    class Server:
        server, state, nbytes, pid = 7, "alive", 4_000_000, 1
        primaries, backups, learners = (10, 11), (12,), (13,)
        pushed_bytes = pulled_bytes = 1000

    class Shard:
        shard, copies, wanted = 14, 1, 2

    class Worker:
        role, state = "worker", "alive"

    class Status:
        servers, workers, shards, replicas = (Server(),), (Worker(), Worker()), (Shard(),), 2

    return Status()


def test_lines_when_stdout_is_no_terminal() -> None:
    out = io.StringIO()
    shown = display.make(Console(file=out), WORDING)
    shown.update(_board(), _server())
    shown.update(_board(), _server())
    shown.close()
    text = out.getvalue()
    assert "loss 0.400" in text
    assert (
        "1,000 tokens/s  pushed 2.0 MB/s  pulled 4.0 MB/s  staleness 1  ETA 0:20  1 server and 2 workers alive" in text
    )
    assert "validation loss 2.000" in text
    assert "\x1b" not in text
    assert text.count("tokens/s") == 1


def test_a_picture_on_a_terminal_shows_every_worker_and_server() -> None:
    out = io.StringIO()
    shown = display.make(Console(file=out, force_terminal=True, width=120), WORDING)
    shown.update(Board(LanguageModel, 2), None)
    board = _board()
    board.hear(Published(20, "step-20"))
    shown.update(board, _server())
    shown.note("w1: a word from a worker")
    shown.close()
    text = out.getvalue()
    for word in (
        "starting the workers",
        "w0",
        "w1",
        "10 11",
        "12 (13)",
        "4.0 MB",
        "1 shard (14)",
        "ETA 0:20",
        "a word from",
        "published step-20",
    ):
        assert word in text


def _picture(board: Board, cluster: object, width: int) -> list[str]:
    """What stands on the screen in the end."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    shown = display.Picture(console, WORDING)
    with console.capture() as captured:
        console.print(shown._draw(board, cluster))
    shown.close()
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_the_picture_fits_the_terminal(width: int) -> None:
    board = _board()
    board.hear(Published(20, "step-20"))
    for step in range(30, 2000, 10):
        for rank in range(2):
            board.hear(Stepped(rank, step, 8.0 / step, 1e-3, 12_345.0, 310e6, 310e6, 1, None, float(step), step / 4000))
    lines = _picture(board, _server(), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    words = ["step   1990", "24,690 tokens/s", "pushed 620 MB/s", "staleness 1", "validation 2.404 bits/byte"]
    for whole in (*words, "published step-20"):
        assert any(whole in line for line in lines), whole  # not broken at the edge
    assert any(line.split()[:2] == ["w1", "1990"] for line in lines)
    assert any(line.split()[:2] == ["7", "alive"] for line in lines)
    assert "ETA 33:30" in text
    assert ("backup of" in text) == (width >= 80)
    assert "…" not in text


def test_the_picture_says_what_there_is_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("headwater_recipes.common.display.time.monotonic", lambda: now[0])
    board = Board(LanguageModel, 1)
    shown = display.Picture(Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None), WORDING)
    paper = Console(width=80)

    def said(after: float) -> str:
        now[0] += after
        with paper.capture() as captured:
            paper.print(shown._draw(board, None))
        return captured.get().splitlines()[0].strip()

    assert said(0.0) == "starting the workers: they load torch …"
    assert said(7.4) == "starting the workers: they load torch … 7 s"
    board.hear(Doing(0, "loading the model"))
    assert said(3.0) == "loading the model …"
    assert said(2.0) == "loading the model … 2 s"
    board.hear(Started(0, 0, 1, "float32"))
    assert said(1.0) == "first step …"
    board.hear(Glanced(0, 1, 8.0, 1e-3, 500.0, 1e6, 2e6, 1, None, 1.0, 0.25))
    assert said(1.0).endswith("ETA 0:03")
    board.hear(Doing(0, "saving"))
    assert said(1.0).endswith("saving …")
    shown.close()


def test_plain_lines_say_once_what_there_is_to_wait_for() -> None:
    out = io.StringIO()
    shown = display.make(Console(file=out), WORDING)
    board = Board(LanguageModel, 1)
    for report in (None, Doing(0, "loading the model"), Started(0, 0, 1, "float32")):
        if report is not None:
            board.hear(report)
        for _ in range(3):
            shown.update(board, None)
    board.hear(Glanced(0, 1, 8.0, 1e-3, 500.0, 1e6, 2e6, 1, None, 1.0, 0.25))
    shown.update(board, None)
    *waits, figures = out.getvalue().splitlines()
    assert waits == ["starting the workers: they load torch …", "loading the model …", "first step …"]
    assert figures.startswith("step      1  loss 8.000  500 tokens/s")


def test_a_terminal_that_cannot_be_drawn_over_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display.make(Console(file=io.StringIO(), force_terminal=True), WORDING), display.Lines)


def test_a_stage_is_said_before_it_begins() -> None:
    out = io.StringIO()
    with stage(Console(file=out), "loading torch"):
        assert out.getvalue() == "loading torch …\n"
    assert out.getvalue() == "loading torch …\n"


def test_on_a_terminal_a_stage_goes_when_it_is_over() -> None:
    out = io.StringIO()
    with stage(Console(file=out, force_terminal=True, width=80), "loading torch"):
        assert "loading torch …" in out.getvalue()
    assert out.getvalue().rstrip().endswith("\x1b[2K")  # the line is cleared
    assert [str(waiting("it", seconds)) for seconds in (0.4, 61.0)] == ["it …", "it … 61 s"]


def test_sizes_and_times() -> None:
    assert [display.size(n) for n in (0, 999, 1500, 12.34e6, 250e6)] == ["0 B", "999 B", "1.5 kB", "12.3 MB", "250 MB"]
    assert [clock(s) for s in (None, 0, 65.4, 3600)] == ["–", "0:00", "1:05", "60:00"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_answers_before_and_after_fit_the_terminal(width: int) -> None:
    found = [
        Asked(question="What does os.path.join do? " * 3, wanted="It joins. " * 9, prompt="p", held_out=True,
               before="word " * 40, after="other " * 40)
    ]  # fmt: skip
    console = Console(width=width)
    with console.capture() as captured:
        console.print(_compared(found, width))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    text = captured.get()
    for each in ("before", "after", "held out: It joins", "word word", "other other"):
        assert each in " ".join(text.split()), each
    assert ("before: word" in text) == (width < 80)
