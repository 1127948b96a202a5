"""The judge: it must see what is lost, what is doubled, and on which shard, whatever hides it."""

from __future__ import annotations

from pathlib import Path

import torch

from headwater_bench.chaos.ledger import WIDTHS, Ledger, LedgerWriter, PushEntry, Tail, cells, in_bounds, judge

SHARDS = {i: i // 2 for i in range(len(WIDTHS))}


def _ledger(rank: int, acknowledged: int, unknown: int = 0, refused: int = 0) -> Ledger:
    ledger = Ledger(rank)
    own = ledger.of("ledger")
    for k in range(1, acknowledged + 1):
        own[k] = PushEntry(float(k), k + 0.5, k)
    for k in range(acknowledged + 1, acknowledged + unknown + 1):
        own[k] = PushEntry(float(k))
    for k in range(acknowledged + unknown + 1, acknowledged + unknown + refused + 1):
        own[k] = PushEntry(float(k), refused=True)
    return ledger


def _pages(applied: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    """By page: the values after these pushes of each rank."""
    return {i: torch.stack([cells(applied.get(r, []), width) for r in range(3)]) for i, width in enumerate(WIDTHS)}


def test_what_was_acknowledged_is_there() -> None:
    verdict = judge([_ledger(0, 500), _ledger(1, 10)], _pages({0: list(range(1, 501)), 1: list(range(1, 11))}), SHARDS)
    assert (verdict.lost, verdict.doubled, verdict.words) == (0, 0, ())


def test_what_is_unknown_may_be_there_or_not() -> None:
    for last in (10, 11, 12):
        verdict = judge([_ledger(0, 10, unknown=2)], _pages({0: list(range(1, last + 1))}), SHARDS)
        assert (verdict.lost, verdict.doubled) == (0, 0)


def test_what_was_refused_may_not_be_there() -> None:
    assert judge([_ledger(0, 10, refused=1)], _pages({0: list(range(1, 12))}), SHARDS).doubled == 3


def test_a_loss_is_counted_on_each_shard() -> None:
    verdict = judge([_ledger(0, 10)], _pages({0: [k for k in range(1, 11) if k != 4]}), SHARDS)
    assert (verdict.lost, verdict.doubled) == (3, 0)
    assert "rank 0, page 0 on shard 0: 1 missing" in verdict.words[0]


def test_a_push_that_one_shard_lost() -> None:
    pages = _pages({0: list(range(1, 11))})
    for page in (2, 3):
        pages[page][0, 7 % WIDTHS[page]] -= 1
    verdict = judge([_ledger(0, 10)], pages, SHARDS)
    assert (verdict.lost, verdict.doubled) == (1, 0)


def test_a_loss_and_a_doubling_do_not_cancel() -> None:
    """Even where both fall on the same element of one page, another page of the shard tells them apart."""
    far = 3 + WIDTHS[0]
    applied = [k for k in range(1, 501) if k != 3] + [far]
    verdict = judge([_ledger(0, 500)], _pages({0: applied}), SHARDS)
    assert (verdict.lost, verdict.doubled) == (3, 3)


def test_a_push_of_one_worker_is_not_anothers() -> None:
    verdict = judge([_ledger(0, 5), _ledger(1, 5)], _pages({0: [1, 2, 3, 4, 5, 5], 1: [1, 2, 3, 4]}), SHARDS)
    assert (verdict.lost, verdict.doubled) == (3, 3)


def test_a_ledger_is_read_while_it_grows(tmp_path: Path) -> None:
    writer, tail = LedgerWriter(tmp_path / "w0"), Tail(tmp_path / "w0", 0)
    assert Tail(tmp_path / "none", 0).read() == []
    writer.write("B", text="session 1")
    writer.write("P", "ledger", 1)
    assert len(tail.read()) == 2
    assert tail.ledger.unknown("ledger") == [1]
    writer.write("A", "ledger", 1, 7)
    writer.write("P", "ledger", 2)
    writer.write("X", "ledger", 2, text="WorkerLost: another worker died")
    writer.write("P", "ledger", 3)
    writer.write("X", "ledger", 3, text="DeadlineExceeded: nobody knows")
    writer.write("H", "model", 1, 7, "abc")
    writer.write("H", "model", 2, 7, "abd")
    writer.write("V", text="page0: less than before")
    writer.write("E", text="LinkBroken: gone")
    with (tmp_path / "w0").open("ab") as file:
        file.write(b"P ledger 4")  # not whole yet
    tail.read()
    ledger = tail.ledger
    assert ledger.acknowledged("ledger") == [1]
    assert ledger.of("ledger")[1].clock == 7
    assert ledger.unknown("ledger") == [3]
    assert ledger.last("ledger") == 3
    assert ledger.begun == 1
    assert ledger.ended
    assert len(ledger.errors) == 3
    assert ledger.violations == ["rank 0 saw two states of step 7", "rank 0: page0: less than before"]
    writer.close()


def test_a_pull_must_show_what_was_acknowledged() -> None:
    ledger = _ledger(0, 10, unknown=2)
    assert not in_bounds(ledger, cells(range(1, 11), 167))
    assert not in_bounds(ledger, cells(range(1, 13), 167))
    assert "9 pushes of 10 to 12" in in_bounds(ledger, cells(range(1, 10), 167))
    assert "13 pushes" in in_bounds(ledger, cells(range(1, 14), 167))
