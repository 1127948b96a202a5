"""Many seeds, on all cores; a failing one is shortened to what is needed for it.

python -m headwater.testing.battery --seeds 0:2000            # what every commit runs
python -m headwater.testing.battery --seed 17 --mode bulk     # one run again, with its history
python -m headwater.testing.battery --seed 17 --keep 0,3 --shape workers=1    # with less in it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from headwater.testing.cluster import Outcome, SimCluster
from headwater.testing.scenario import MODES, Scenario, scenario

LINES = 60  # of a failing history
SHAPE = ("servers", "shards", "workers", "reader", "skew", "versions")


@dataclass(slots=True)
class Tally:
    """What many runs did."""

    runs: int = 0
    events: int = 0
    virtual: float = 0.0
    seconds: float = 0.0
    acknowledged: int = 0
    excused: int = 0
    passed_over: int = 0
    published: int = 0
    reads: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[int, str, str]] = field(default_factory=list)  # (seed, mode, what)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome, mode: str) -> None:
        self.runs += 1
        self.events += outcome.events
        self.virtual += outcome.seconds
        self.acknowledged += outcome.acknowledged
        self.excused += outcome.excused
        self.passed_over += outcome.passed_over
        self.published += outcome.published
        self.reads += outcome.reads
        self.faults += outcome.faults
        self.failures += Counter(line.split(" ")[1].rstrip(":") for line in outcome.failures)
        if outcome.violation is not None:
            self.violations.append((outcome.seed, mode, str(outcome.violation)))

    def merge(self, other: Tally) -> None:
        for name in (
            "runs",
            "events",
            "virtual",
            "acknowledged",
            "excused",
            "passed_over",
            "published",
            "reads",
            "violations",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.seconds = max(self.seconds, other.seconds)
        self.faults += other.faults
        self.failures += other.failures

    def to_json(self) -> str:
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def from_json(cls, text: str) -> Tally:
        found = cls(**json.loads(text))
        found.faults, found.failures = Counter(found.faults), Counter(found.failures)
        found.violations = [(seed, mode, what) for seed, mode, what in found.violations]
        return found

    def __str__(self) -> str:
        rate = self.events / self.seconds if self.seconds else 0.0
        faults = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        lines = [
            f"{self.runs} runs, {self.events} events in {self.seconds:.1f} s ({rate:.0f} a second)",
            f"{self.virtual:.0f} virtual seconds, {self.acknowledged} steps acknowledged",
            f"{self.published} versions published and waited for, {self.reads} reads of versions",
            f"faults: {faults}; {self.passed_over} passed over; {self.excused} runs excused (two faults on one shard)",
            f"client failures: {dict(self.failures)}",
            f"violations: {len(self.violations)}",
        ]
        return "\n".join(lines + [f"  seed {seed} {mode}: {what[:300]}" for seed, mode, what in self.violations[:20]])


def play(one: Scenario, *, trace: bool = False) -> Outcome:
    """One run."""
    return SimCluster(one, trace=trace).run()


def sweep(
    seeds: Iterable[int],
    mode: str | None = None,
    stop: Callable[[Tally], bool] | None = None,
    make: Callable[[int, str | None], Scenario] = scenario,
) -> Tally:
    """Run these seeds in this process; until ``stop`` says so."""
    tally = Tally()
    begun = time.perf_counter()
    for seed in seeds:
        one = make(seed, mode)
        tally.add(play(one), one.mode)
        if stop is not None and stop(tally):
            break
    tally.seconds = time.perf_counter() - begun
    return tally


def spread(first: int, last: int, jobs: int, mode: str | None = None) -> Tally:
    """The same in ``jobs`` processes."""
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "headwater.testing.battery", "--seeds", f"{first + i}:{last}:{jobs}", "--json"]
            + (["--mode", mode] if mode else []),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(jobs)
    ]
    tally = Tally()
    for child in children:
        text, _ = child.communicate()
        if child.returncode not in (0, 1):
            raise RuntimeError(f"a part of the battery ended with {child.returncode}")
        tally.merge(Tally.from_json(text))
    return tally


def shorten(one: Scenario, oracle: str, budget: int = 200) -> Scenario:
    """The same failure with as little as possible: fewer faults, then fewer workers and less of everything else."""

    def fails(candidate: Scenario) -> bool:
        nonlocal budget
        budget -= 1
        violation = play(candidate).violation
        return violation is not None and violation.oracle == oracle

    smaller = True
    while smaller and budget > 0:
        smaller = False
        for candidate in _smaller(one):
            if budget > 0 and fails(candidate):
                one, smaller = candidate, True
                break
    return one


def _smaller(one: Scenario) -> Iterable[Scenario]:
    """Scenarios with a little less in them, those with much less first."""
    faults = one.plan.faults
    for size in (len(faults) // 2, 1):
        for start in range(0, len(faults), max(1, size)):
            if size:
                yield replace(one, plan=one.plan.without(set(range(start, start + size))))
    if one.reader:
        yield replace(one, reader=False)
    if one.versions:
        yield replace(one, versions=False)
    if one.skew:
        yield replace(one, skew=False)
    if one.workers > 1:
        yield replace(one, workers=one.workers - 1)
    if one.shards > 1:
        yield replace(one, shards=one.shards - 1)
    if one.servers > max(2, one.replicas):
        yield replace(one, servers=one.servers - 1)


def explain(one: Scenario, outcome: Outcome) -> str:
    """A failing run for a reader: what it was, what happened last, and how to run it again."""
    assert outcome.violation is not None
    small = shorten(one, outcome.violation.oracle)
    again = play(small, trace=True)
    lines = [str(outcome.violation), "", "shortened to:", str(small), "", *_telling(again.history), ""]
    lines += [f"again: python -m headwater.testing.battery --seed {one.seed} --mode {one.mode} {_options(one, small)}"]
    return "\n".join(lines)


def _telling(history: list[str]) -> list[str]:
    """What was said around the last fault, and at the end; not what clients and coordinator ask each other for ever."""
    lines = [line for line in history if "ShardView(" not in line]
    marks = [i for i, line in enumerate(lines) if " FAULT " in line or " END " in line or " start " in line]
    first = max(0, (marks[-1] if marks else 0) - LINES // 3)
    if len(lines) - first <= LINES + 6:
        return lines[-LINES - 6 :]
    return [*lines[first : first + LINES], f"  ... {len(lines) - first - LINES - 6} more ...", *lines[-6:]]


def _options(one: Scenario, small: Scenario) -> str:
    """What makes the smaller run of the larger."""
    kept = [str(i) for i, fault in enumerate(one.plan.faults) if fault in small.plan.faults]
    changed = [f"{name}={int(getattr(small, name))}" for name in SHAPE if getattr(small, name) != getattr(one, name)]
    return f"--keep {','.join(kept) or 'none'}" + (f" --shape {','.join(changed)}" if changed else "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run seeds of the simulator.")
    parser.add_argument("--seeds", help="first:last[:step]")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--keep", help="positions of the faults to keep, with --seed; 'none' for none")
    parser.add_argument("--shape", help="with --seed: name=number,… for " + ", ".join(SHAPE))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trace", type=int, default=0, help="with --seed: print this many lines of history")
    return parser.parse_args()


def main() -> int:
    """The command line; 1 if an oracle was violated."""
    args = _arguments()
    import torch

    torch.set_num_threads(1)
    if args.seed is not None:
        return _one(args)
    first, last, *step = [int(x) for x in (args.seeds or "0:2000").split(":")]
    if args.jobs > 1:
        tally = spread(first, last, args.jobs, args.mode)
    else:
        tally = sweep(range(first, last, step[0] if step else 1), args.mode)
    print(tally.to_json() if args.json else tally)
    if tally.violations and not args.json:
        seed, mode, _ = tally.violations[0]
        one = scenario(seed, mode)
        print(explain(one, play(one)))
    return 1 if tally.violations else 0


def _one(args: argparse.Namespace) -> int:
    one = scenario(args.seed, args.mode)
    if args.keep is not None:
        keep = set() if args.keep == "none" else {int(x) for x in args.keep.split(",")}
        one = replace(one, plan=one.plan.without(set(range(len(one.plan.faults))) - keep))
    if args.shape:
        pairs = (pair.split("=") for pair in args.shape.split(","))
        one = replace(one, **{name: type(getattr(one, name))(int(number)) for name, number in pairs})
    outcome = play(one, trace=bool(args.trace))
    print(one)
    print("\n".join(outcome.history[-args.trace :] if args.trace else []))
    print(
        f"{outcome.events} events, {outcome.seconds:.2f} virtual seconds, {outcome.acknowledged} steps acknowledged, "
        f"{outcome.unknown} unknown, recovery {outcome.recovery:.2f} s{', excused' * outcome.excused}"
    )
    print("\n".join(outcome.failures))
    if outcome.violation is not None:
        print(explain(one, outcome) if not args.trace else outcome.violation)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
