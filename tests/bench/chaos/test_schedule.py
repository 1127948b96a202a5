"""Faults are drawn from the seed alone, and never beyond what is promised."""

from __future__ import annotations

import itertools

import pytest

from headwater_bench.chaos.schedule import Fault, draw


def test_a_seed_draws_the_same_faults() -> None:
    assert draw(7, 200) == draw(7, 200)
    assert draw(7, 200) != draw(8, 200)
    assert len(draw(7, 200)) == 200


def test_every_kind_comes() -> None:
    kinds = {fault.kind for fault in draw(1, 400)}
    assert {"kill", "stop", "isolate", "cut-in", "cut-out", "half-open", "reset", "delay"} <= kinds
    assert {"flip", "truncate", "disk-full", "second-coordinator", "replay"} <= kinds
    assert {"kill server", "kill worker", "kill coordinator"} <= {fault.name for fault in draw(1, 400)}


def test_without_workers_none_is_struck() -> None:
    assert {fault.role for fault in draw(3, 300, workers=0)} == {"server", "coordinator"}


@pytest.mark.parametrize("seed", range(20))
def test_during_a_recovery_no_other_server_is_struck(seed: int) -> None:
    """The promise is for one fault per shard at a time."""
    faults = draw(seed, 300)
    for before, fault in itertools.pairwise(faults):
        if fault.early and fault.role == "server":
            assert (before.kind, fault.kind, fault.target) == ("kill", "kill", before.target)


def test_a_fault_says_what_it_does() -> None:
    assert str(Fault("stop", "s1", 0.1, 2.0)) == "stop s1 for 2.00 s"
    assert str(Fault("reset", "w0", 0.1, 0.0, early=True)) == "reset w0 during recovery"
    assert Fault("kill", "s1", 0.0, 0.1).risky
    assert not Fault("kill", "coordinator", 0.0, 0.1).risky
