"""Copies by several threads: every byte once, whatever the sizes and the number of threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from headwater.readers import copying
from headwater.readers.copying import Move, copy_all


def moves_of(sizes: list[int]) -> list[Move]:
    chance = np.random.default_rng(len(sizes))
    sources = [chance.integers(1, 256, size, dtype=np.uint8) for size in sizes]
    return [Move(np.zeros_like(source), source) for source in sources]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "sizes", [[], [0], [0, 0], [1], [100], [1, 100, 1], [100, 1, 1], [0, 50, 0], [10] * 20, list(range(40))]
)
def test_every_byte_is_copied(sizes: list[int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SHARE", 10)
    moves = moves_of(sizes)
    copy_all(moves, threads)
    assert all(np.array_equal(move.target, move.source) for move in moves)
    shares = copying._shares(moves, threads)
    assert [move for share in shares for move in share] == moves
    assert len(shares) <= max(1, min(threads, sum(sizes) // 10))


def test_shares_are_about_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SHARE", 10)
    sizes = [[len(move.target) for move in share] for share in copying._shares(moves_of([10] * 40), 4)]
    assert [sum(share) for share in sizes] == [100] * 4


def test_little_is_copied_by_the_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread for a few bytes"))
    moves = moves_of([1000, 2000])
    copy_all(moves, 8)
    assert all(np.array_equal(move.target, move.source) for move in moves)


def test_a_thread_that_does_not_start_leaves_no_other_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SHARE", 10)
    start, started = threading.Thread.start, list[threading.Thread]()

    def refuse(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        copy_all(moves_of([10] * 40), 4)
    assert not started[0].is_alive()


@pytest.mark.parametrize("wrong", [0, 39])
def test_what_a_thread_cannot_copy_is_raised(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SHARE", 10)
    moves = moves_of([10] * 40)
    moves[wrong].target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_all(moves, 4)
    assert threading.active_count() == 1 or not any(t.name == "headwater-copy" for t in threading.enumerate())
