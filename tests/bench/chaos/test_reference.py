"""One process computes what the workers said, step by step; a wrong bit or a wrong contribution is found."""

from __future__ import annotations

from headwater_bench.chaos.ledger import Ledger, PushEntry
from headwater_bench.chaos.reference import OneProcess, compare


def _run(steps: list[list[tuple[int, int]]], unknown: frozenset[tuple[int, int]] = frozenset()) -> dict[int, Ledger]:
    """Ledgers of a run with these contributions (rank, push) to each step."""
    ledgers = {rank: Ledger(rank) for rank in range(3)}
    model = OneProcess()
    for clock, parts in enumerate(steps, start=1):
        model.step(parts)
        for rank, number in parts:
            sure = (rank, number) not in unknown
            ledgers[rank].of("model")[number] = PushEntry(
                float(clock), clock + 0.5 if sure else None, clock if sure else 0
            )
            if sure:
                ledgers[rank].hashes[clock] = model.digest()
    return ledgers


def test_equal_runs_are_equal() -> None:
    ledgers = _run([[(0, 1), (1, 1), (2, 1)], [(0, 2), (1, 2), (2, 2)], [(0, 3), (2, 3)]])
    found = compare(ledgers.values())
    assert (found.steps, found.equal, found.words) == (3, 3, "")


def test_a_push_that_was_never_acknowledged_may_be_part_of_a_step() -> None:
    ledgers = _run([[(0, 1), (1, 1)], [(0, 2), (1, 2)], [(0, 3)]], frozenset({(1, 2)}))
    ledgers[1].of("model")[3] = PushEntry(9.0)  # and one that is part of none
    assert compare(ledgers.values()).equal == 3


def test_a_contribution_that_is_missing_is_found() -> None:
    ledgers = _run([[(0, 1), (1, 1)], [(0, 2), (1, 2)]])
    ledgers[2].of("model")[1] = PushEntry(2.0, 2.5, 2)  # acknowledged as part of step 2, and not in it
    found = compare(ledgers.values())
    assert found.equal == 1
    assert found.words.startswith("step 2 of")


def test_two_workers_must_see_the_same() -> None:
    ledgers = _run([[(0, 1), (1, 1)]])
    ledgers[0].hashes[1] = "0" * 32
    assert "two workers saw different values" in compare(ledgers.values()).words


def test_a_step_whose_hash_nobody_wrote_down() -> None:
    """Its worker was acknowledged and killed; what else was part of that step, only later hashes tell."""
    ledgers = _run([[(0, 1), (1, 1)], [(0, 2), (1, 2)], [(0, 3)], [(0, 4)]], frozenset({(1, 2)}))
    for clock in (2, 3):
        del ledgers[0].hashes[clock]
    found = compare(ledgers.values())
    assert (found.steps, found.equal) == (2, 2)


def test_a_step_of_which_nobody_was_told() -> None:
    ledgers = _run([[(0, 1), (1, 1)], [(0, 2), (1, 2)], [(2, 1)]], frozenset({(0, 2), (1, 2)}))
    assert compare(ledgers.values()).equal == 2
