"""What every commit runs: 2,000 seeds of the whole cluster under faults; and that the battery itself is sound."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from headwater.testing import battery
from headwater.testing.faults import FaultPlan, draw
from headwater.testing.oracles import Ledger, Violation
from headwater.testing.scenario import MODES, scenario

SEEDS = 2000
PARTS = 5  # tests, so that each has its own two minutes on a busy machine
EVENTS = 500  # per run, at least


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Servers that are told to go say so: that is not what is looked for here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(PARTS))
def test_two_thousand_seeds(part: int) -> None:
    each = SEEDS // PARTS
    tally = battery.spread(part * each, (part + 1) * each, jobs=2)
    assert tally.runs == each
    assert not tally.violations, f"{tally}\nmore: python -m headwater.testing.battery --seed {tally.violations[0][0]}"
    assert tally.events >= each * EVENTS
    assert tally.acknowledged >= 20 * each
    assert tally.excused < 0.02 * each
    assert tally.published >= 0.5 * each  # in every fifth run
    assert tally.reads >= each
    assert set(tally.faults) >= {"kill", "vanish", "stop", "isolate", "deaf", "mute", "cut", "before_put", "after_put"}
    assert tally.faults["kill"] + tally.faults["vanish"] >= 300


@pytest.mark.parametrize("seed", [7002, 20361])
def test_seeds_that_found_a_bug_once(seed: int) -> None:
    """A membership told again voided a promised step; a verdict that only a backup knew was forgotten."""
    assert battery.play(scenario(seed, "bulk")).violation is None


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_is_the_same_run_every_time(mode: str) -> None:
    one = scenario(11, mode)
    first, second = battery.play(one, trace=True), battery.play(one, trace=True)
    assert first.history == second.history
    assert first.violation is None
    assert first.acknowledged > 0


def test_a_run_without_faults_knows_of_every_push() -> None:
    one = replace(scenario(4, "bulk"), plan=FaultPlan())
    outcome = battery.play(one)
    assert outcome.violation is None
    assert not outcome.failures
    assert outcome.unknown == 0


def test_a_failing_run_is_shortened_to_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an oracle that fails whenever server 0 was killed, that kill is all that remains."""
    runs = (scenario(seed) for seed in range(100))
    plan = next(one for one in runs if any(f.kind == "kill" and f.target == "s0" for f in one.plan.faults))

    def play(one: battery.Scenario, *, trace: bool = False) -> battery.Outcome:
        outcome = battery.Outcome(one.seed)
        if any(f.kind == "kill" and f.target == "s0" for f in one.plan.faults):
            outcome.violation = Violation("made up", "server 0 was killed")
        return outcome

    monkeypatch.setattr(battery, "play", play)
    small = battery.shorten(plan, "made up")
    assert [(f.kind, f.target) for f in small.plan.faults] == [("kill", "s0")], small
    assert (small.workers, small.shards, small.reader, small.skew) == (1, 1, False, False)
    assert f"--seed {plan.seed}" in battery.explain(plan, play(plan))


def test_the_command_line_plays_a_seed_again() -> None:
    command = [
        sys.executable,
        "-m",
        "headwater.testing.battery",
        "--seed",
        "3",
        "--keep",
        "none",
        "--shape",
        "workers=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 workers" in done.stdout
    assert "steps acknowledged" in done.stdout


def test_a_plan_is_drawn_from_its_seed() -> None:
    plans = [draw(Random(seed), 3, 2, 20.0, 4.0) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert 40 < len(plans[0].faults) < 160
    assert all(0 < fault.at < 20.0 for fault in plans[0].faults)


def test_the_ledger_tells_lost_from_doubled() -> None:
    ledger = Ledger(3)
    for applied in (True, None, True):
        ledger.end(ledger.begin(), applied=applied)
    marks = [1.0, 0.0, 1.0]
    for second in (0.0, 1.0):
        marks[1] = second
        ledger.check(marks, "p0")  # type: ignore[arg-type]
    with pytest.raises(Violation, match="lost"):
        ledger.check([0.0, 1.0, 1.0], "p0")  # type: ignore[arg-type]
    with pytest.raises(Violation, match="doubled"):
        ledger.check([1.0, 1.0, 2.0], "p0")  # type: ignore[arg-type]
