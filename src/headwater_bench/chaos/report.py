"""What a run says: a timeline, a table, or one JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwater_bench.chaos.ledger import Ledger, Verdict
from headwater_bench.chaos.reference import Comparison
from headwater_bench.chaos.runner import Struck, Timeline


class Times(msgspec.Struct, frozen=True):
    """Seconds from a fault until a push that left after it was acknowledged by every shard."""

    count: int
    p50: float
    p99: float
    most: float


class Recovery(msgspec.Struct, frozen=True):
    """Over all faults, and by kind."""

    p50: float
    p99: float
    most: float
    kinds: dict[str, Times]


class Throughput(msgspec.Struct, frozen=True):
    """Acknowledged pushes a second."""

    fault_free: float
    under_faults: float
    ratio: float


class ChaosReport(msgspec.Struct, frozen=True):
    """What ``--json`` prints. ``lost`` and ``doubled`` count pushes per shard. ``failures`` are other broken promises:
    a read that went back, a hash that differs, a wait that did not end. ``surprises`` are processes that ended by
    themselves."""

    mode: str
    seed: int
    seconds: float
    faults: dict[str, int]
    skipped: dict[str, int]
    acknowledged: int
    unknown: int
    lost: int
    doubled: int
    recovery: Recovery
    throughput: Throughput
    steps: int  # Bulk: of the model that somebody saw
    equal_steps: int  # of them, those with the bits of one process
    contributing: float  # Bulk: the mean share of running workers that contributed to a step
    failures: list[str]
    surprises: list[str]

    @property
    def ok(self) -> bool:
        return not (self.lost or self.doubled or self.failures)


def make(
    mode: str,
    seed: int,
    seconds: float,
    timeline: Timeline,
    ledgers: Sequence[Ledger],
    verdict: Verdict,
    same: Comparison,
) -> ChaosReport:
    """Everything that was measured, in one value."""
    failures = [*timeline.failures, *verdict.words, *(v for ledger in ledgers for v in ledger.violations[:5])]
    if same.equal < same.steps:
        failures.append(f"{same.equal} of {same.steps} steps equal one process: {same.words}")
    workers = [ledger for ledger in ledgers if ledger.rank >= 0]
    return ChaosReport(
        mode,
        seed,
        seconds,
        dict(Counter(struck.fault.name for struck in timeline.struck)),
        dict(timeline.skipped),
        sum(len(ledger.acknowledged(table)) for ledger in workers for table in ledger.pushes),
        sum(len(ledger.unknown(table)) for ledger in workers for table in ledger.pushes),
        verdict.lost,
        verdict.doubled,
        recovery(timeline.struck, workers),
        _throughput(timeline, workers),
        same.steps,
        same.equal,
        contributing(timeline.struck, workers) if mode == "bulk" else 0.0,
        failures,
        timeline.surprises[:20],
    )


def recovery(struck: Iterable[Struck], ledgers: Sequence[Ledger]) -> Recovery:
    """From each fault to the first acknowledgement of a push that left after it, of a worker that was not struck."""
    times: dict[str, list[float]] = {}
    pushes = {
        f"w{ledger.rank}": sorted((p.sent, p.acked) for p in ledger.of("ledger").values() if p.acked is not None)
        for ledger in ledgers
    }
    for each in struck:
        after = [
            acked - each.at
            for name, own in pushes.items()
            if name != each.fault.target
            for sent, acked in own
            if sent >= each.at
        ]
        if after:
            times.setdefault(each.fault.name, []).append(min(after))
    every = sorted(second for found in times.values() for second in found)
    total = _times(every)
    return Recovery(total.p50, total.p99, total.most, {name: _times(sorted(found)) for name, found in times.items()})


def contributing(struck: Iterable[Struck], ledgers: Sequence[Ledger]) -> float:
    """Of the workers that ran when a step was acknowledged, the share that was part of it; the mean over steps.

    A worker runs unless it was killed and not started again yet, or is stopped.
    """
    away = [
        (s.fault.target, s.at, s.at + s.fault.seconds)
        for s in struck
        if s.fault.role == "worker" and s.fault.kind in ("kill", "stop")
    ]
    steps: dict[int, tuple[float, set[str]]] = {}
    for ledger in ledgers:
        for push in ledger.of("ledger").values():
            if push.acked is not None:
                moment, names = steps.get(push.clock, (push.acked, set()))
                steps[push.clock] = min(moment, push.acked), names | {f"w{ledger.rank}"}
    shares = []
    for moment, names in steps.values():
        gone = {name for name, begin, end in away if begin <= moment < end} - names
        shares.append(len(names) / max(1, len(ledgers) - len(gone)))
    return round(sum(shares) / len(shares), 4) if shares else 0.0


def _times(found: list[float]) -> Times:
    if not found:
        return Times(0, 0.0, 0.0, 0.0)
    last = len(found) - 1
    return Times(len(found), *(round(found[round(last * share)], 4) for share in (0.5, 0.99, 1.0)))


def _throughput(timeline: Timeline, ledgers: Sequence[Ledger]) -> Throughput:
    acked = [p.acked for ledger in ledgers for p in ledger.of("ledger").values() if p.acked is not None]

    def rate(window: tuple[float, float]) -> float:
        begin, end = window
        return sum(begin <= moment < end for moment in acked) / (end - begin) if end > begin else 0.0

    quiet, loud = rate(timeline.quiet), rate(timeline.loud)
    return Throughput(round(quiet, 1), round(loud, 1), round(loud / quiet, 4) if quiet else 0.0)


def to_json(report: ChaosReport) -> str:
    return msgspec.json.encode(report).decode()


def draw(report: ChaosReport, timeline: Timeline) -> RenderableType:
    """The timeline, and the table below it."""
    lines = Text()
    for at, line in timeline.lines:
        style = "red" if line.startswith("FAILED") else "yellow" if "ended by itself" in line else ""
        lines.append(f"{at:8.2f} s  ", "dim").append(line + "\n", style)
    table = Table(title=f"chaos: {report.mode}, seed {report.seed}, {report.seconds:g} s", title_justify="left")
    for name in ("fault", "struck", "p50 s", "p99 s", "longest s"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for name, count in sorted(report.faults.items()):
        times = report.recovery.kinds.get(name)
        figures = [f"{times.p50:.3f}", f"{times.p99:.3f}", f"{times.most:.3f}"] if times else ["", "", ""]
        table.add_row(name, str(count), *figures)
    for name, count in sorted(report.skipped.items()):
        table.add_row(f"{name} (not possible)", str(count), "", "", "", style="dim")
    return Group(lines, table, _sums(report), *(Text(f"failed: {line}", "red") for line in report.failures))


def _sums(report: ChaosReport) -> Table:
    table = Table(show_header=False)
    t = report.throughput
    rows = [
        ("acknowledged pushes", f"{report.acknowledged}, and {report.unknown} of which nobody knows"),
        ("lost", str(report.lost)),
        ("doubled", str(report.doubled)),
        ("pushes a second", f"{t.under_faults:g} under faults, {t.fault_free:g} without: {t.ratio:.1%}"),
        ("ended by themselves", str(len(report.surprises))),
    ]
    if report.steps:
        rows.append(("steps with the bits of one process", f"{report.equal_steps} of {report.steps}"))
        rows.append(("running workers that contributed to a step", f"{report.contributing:.1%}"))
    for name, value in rows:
        table.add_row(name, value, style="bold red" if name in ("lost", "doubled") and value != "0" else "")
    return table
