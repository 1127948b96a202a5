from __future__ import annotations

import io

from rich.console import Console

from headwater_recipes.common import display
from headwater_recipes.common.board import Board
from headwater_recipes.common.reports import Published, Started, Stepped, Validated


def _board() -> Board:
    board = Board(2)
    for rank in range(2):
        board.hear(Started(rank, 0, 1_000_000, "float32"))
        for step in (10, 20):
            board.hear(Stepped(rank, step, 8.0 / step, 1e-3, 500.0, 1e6, 2e6, 1, None, float(step), step / 40))
        board.hear(Validated(rank, 20, 20.0, 100.0, 50, 60, False))
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
    shown = display.make(Console(file=out))
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
    shown = display.make(Console(file=out, force_terminal=True, width=120))
    shown.update(Board(2), None)
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


def test_sizes_and_times() -> None:
    assert [display.size(n) for n in (0, 999, 1500, 12.34e6, 250e6)] == ["0 B", "999 B", "1.5 kB", "12.3 MB", "250 MB"]
    assert [display.clock(s) for s in (None, 0, 65.4, 3600)] == ["–", "0:00", "1:05", "60:00"]
