"""Figures from a timeline, and what is printed of them."""

from __future__ import annotations

import json

from rich.console import Console

from headwater_bench.chaos.ledger import Ledger, PushEntry, Verdict
from headwater_bench.chaos.reference import Comparison
from headwater_bench.chaos.report import contributing, draw, make, recovery, to_json
from headwater_bench.chaos.runner import Struck, Timeline
from headwater_bench.chaos.schedule import Fault

KILL = Fault("kill", "s0", 0.0, 0.3)


def _ledger(rank: int, pushes: list[tuple[float, float | None]]) -> Ledger:
    ledger = Ledger(rank)
    for k, (sent, acked) in enumerate(pushes, start=1):
        ledger.of("ledger")[k] = PushEntry(sent, acked, k)
    return ledger


def test_recovery_counts_pushes_that_left_after_the_fault() -> None:
    """One that was under way when the fault struck may have been acknowledged by the dead."""
    ledgers = [_ledger(0, [(9.9, 10.1), (10.1, 10.7)]), _ledger(1, [(10.05, 10.9)])]
    found = recovery([Struck(KILL, 10.0)], ledgers)
    assert found.kinds["kill server"].count == 1
    assert found.p50 == found.p99 == 0.7


def test_a_worker_that_was_struck_does_not_count() -> None:
    ledgers = [_ledger(0, [(10.1, 10.2)]), _ledger(1, [(10.1, 10.9)])]
    assert recovery([Struck(Fault("stop", "w0", 0.0, 1.0), 10.0)], ledgers).p50 == 0.9


def test_without_an_acknowledgement_there_is_no_time() -> None:
    assert recovery([Struck(KILL, 10.0)], [_ledger(0, [(9.0, 9.1)])]).kinds == {}


def test_the_object_has_the_keys_that_are_promised() -> None:
    timeline = Timeline(lines=[(0.5, "kill s0")], struck=[Struck(KILL, 10.0)], quiet=(0.0, 10.0), loud=(10.0, 20.0))
    ledger = _ledger(0, [(float(i), i + 0.5) for i in range(20)])
    report = make("async", 1, 20.0, timeline, [ledger], Verdict(0, 0, ()), Comparison(0, 0))
    found = json.loads(to_json(report))
    assert found["faults"] == {"kill server": 1}
    assert found["acknowledged"] == 20
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert {"p50", "p99"} <= set(found["recovery"])
    assert found["throughput"] == {"fault_free": 1.0, "under_faults": 1.0, "ratio": 1.0}
    assert report.ok


def test_a_broken_promise_is_not_ok() -> None:
    timeline = Timeline()
    assert not make("async", 1, 1.0, timeline, [], Verdict(1, 0, ()), Comparison(0, 0)).ok
    assert not make("async", 1, 1.0, timeline, [], Verdict(0, 1, ()), Comparison(0, 0)).ok
    assert not make("bulk", 1, 1.0, timeline, [], Verdict(0, 0, ()), Comparison(5, 4, "step 5")).ok
    assert not make("async", 1, 1.0, Timeline(failures=["stuck"]), [], Verdict(0, 0, ()), Comparison(0, 0)).ok
    ledger = Ledger(0, violations=["rank 0: went back"])
    assert not make("async", 1, 1.0, timeline, [ledger], Verdict(0, 0, ()), Comparison(0, 0)).ok


def test_the_table_shows_every_fault() -> None:
    timeline = Timeline(lines=[(0.5, "kill s0"), (0.6, "FAILED: x")], struck=[Struck(KILL, 10.0)], failures=["x"])
    report = make("bulk", 1, 20.0, timeline, [_ledger(0, [(10.1, 10.2)])], Verdict(0, 0, ()), Comparison(3, 3))
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(draw(report, timeline))
    text = console.export_text()
    console.file.close()
    for word in ("kill server", "kill s0", "lost", "doubled", "3 of 3", "failed: x"):
        assert word in text


def test_the_share_of_running_workers_that_contribute() -> None:
    ledgers = [_ledger(0, [(1.0, 1.5), (2.0, 2.5), (3.0, 3.5)]), _ledger(1, [(1.0, 1.5)])]
    assert contributing([], ledgers) == round((1.0 + 0.5 + 0.5) / 3, 4)
    killed = Struck(Fault("kill", "w1", 0.0, 1.0), 2.0)  # for step 2, not for step 3
    assert contributing([killed], ledgers) == round((1.0 + 1.0 + 0.5) / 3, 4)
    assert contributing([], []) == 0.0
