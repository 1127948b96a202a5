"""The second part of ``bench recovery``: 8 tiny workers under ``Bulk`` while servers and workers are killed in turn.

Windows without and with one fault at their beginning take turns in one run; one with a fault ends when all copies and
all workers are back, so it holds the whole cost of the fault, in seconds of training. 125 faults an hour are one in
28.8 s: there the same cost is spread over 28.8 s. The launcher starts again whoever dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from headwater.errors import DeadlineExceeded
from headwater.launch import Launcher, Process, Rules, Shape
from headwater.transports.address import parse
from headwater_bench.cluster import launcher
from headwater_bench.options import Options
from headwater_bench.report import Figure, figure
from headwater_bench.rig.monitor import Monitor
from headwater_bench.tiny import Acks

WORKERS = 8
SERVERS = 3
FAULTS = 12
WINDOW = 3.0
STEP = 0.05  # seconds of each worker's own time in a step
AN_HOUR = 125
PATIENCE = 90.0
OLD = 3.0  # seconds that a process has lived before it may be killed: a young one counts as one that cannot start


class Span(NamedTuple):
    begin: float
    end: float

    def holds(self, moment: float) -> bool:
        return self.begin <= moment < self.end

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Life(NamedTuple):
    """Of a worker's process."""

    begin: float
    end: float


class Observed(NamedTuple):
    """Quiet and loud windows in pairs; every acknowledged step (when, which) of every worker; their lives."""

    quiet: list[Span]
    loud: list[Span]
    acks: list[tuple[float, int]]
    lives: list[Life]


def measure(options: Options) -> list[Figure]:
    """The figures; ``rounds`` is the number of faults."""
    faults = options.rounds_or(FAULTS)
    options.note(f"recovery: {WORKERS} tiny workers, {faults} faults")
    rules = Rules(elastic=True, restart_workers=1000)
    with (
        tempfile.TemporaryDirectory() as scratch,
        launcher(Shape(SERVERS, replicas=2), rules=rules, on_note=_quiet) as cluster,
    ):
        observed = GoodputRun(cluster, Path(scratch)).run(faults)
    return goodput_figures(observed)


def _quiet(text: str) -> None:
    """What the launcher says of each death is known here."""


class GoodputRun:
    """A run with faults."""

    def __init__(self, cluster: Launcher, folder: Path) -> None:
        self._cluster = cluster
        self._seen: dict[int, Process] = {}
        self._lives: list[Life] = []
        self._acks = [Acks(folder / str(rank)) for rank in range(WORKERS)]
        command = [sys.executable, "-P", "-c", _START, str(folder), str(STEP)]
        cluster.start_workers(command, WORKERS, env={"OMP_NUM_THREADS": "1"})

    def run(self, faults: int) -> Observed:
        quiet: list[Span] = []
        loud: list[Span] = []
        with self._monitor() as monitor:
            self._back(monitor, time.monotonic())
            for number in range(faults):
                quiet.append(self._window())
                victim = self._victim(number)
                begin = time.monotonic()
                os.kill(victim.pid, signal.SIGKILL)
                self._window()
                self._back(monitor, begin)
                loud.append(Span(begin, time.monotonic()))
        acks = [ack for worker in self._acks for ack in worker.found]
        now = time.monotonic()
        alive = [Life(process.started, now) for process in self._seen.values()]
        return Observed(quiet, loud, acks, self._lives + alive)

    @contextlib.contextmanager
    def _monitor(self) -> Iterator[Monitor]:
        token = self._cluster.environment()["HEADWATER_TOKEN"].encode()
        assert self._cluster.address is not None
        with contextlib.closing(Monitor(parse(self._cluster.address), token)) as monitor:
            yield monitor

    def _window(self) -> Span:
        begin = time.monotonic()
        self._until(lambda: time.monotonic() >= begin + WINDOW, "a window has passed")
        return Span(begin, time.monotonic())

    def _victim(self, number: int) -> Process:
        """A server, then a worker, and so on."""
        group = self._cluster.workers if number % 2 else self._cluster.servers
        victim = group[number // 2 % len(group)]
        self._until(lambda: time.monotonic() > victim.started + OLD, "the victim is old enough")
        return victim

    def _back(self, monitor: Monitor, since: float) -> None:
        """Wait until every shard has all its copies and every worker was acknowledged after ``since``."""

        def back() -> bool:
            running = {server.pid for server in self._cluster.servers if server.running}
            pushing = all(acks.found and acks.found[-1][0] > since for acks in self._acks)
            return pushing and len(running) == SERVERS and monitor.redundant_since(since + WINDOW / 2, running)

        self._until(back, "all copies and workers are back")

    def _until(self, done: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + PATIENCE
        while not done():
            if not self._cluster.poll(0.05) or time.monotonic() > until:
                raise DeadlineExceeded(f"the benchmark waited until {what}: {self._cluster.outcome.message}")
            self._note_lives()
            for acks in self._acks:
                acks.read()

    def _note_lives(self) -> None:
        for process in self._cluster.workers:
            before = self._seen.get(process.rank)
            if before is not None and before is not process:
                self._lives.append(Life(before.started, before.ended))
            if process.running:
                self._seen[process.rank] = process
            elif before is process:
                del self._seen[process.rank]
                self._lives.append(Life(process.started, process.ended))


_START = (
    "import os, pathlib, sys; from headwater_bench.tiny import main; "
    "main(pathlib.Path(sys.argv[1]) / os.environ['HEADWATER_RANK'], float(sys.argv[2]))"
)


# ---- what came of it ---------------------------------------------------------------------------------


def goodput_figures(observed: Observed) -> list[Figure]:
    """Contributions (a worker's acknowledged steps) are what counts: a step with 7 of 8 workers is worth 7."""
    pairs = list(zip(observed.quiet, observed.loud, strict=True))
    costs = [b.seconds * (1 - _rate(observed.acks, b) / _rate(observed.acks, a)) for a, b in pairs]
    cost = statistics.fmean(costs)
    seconds = statistics.fmean(window.seconds for window in observed.loud)
    ratio = 1 - cost / seconds
    quiet = statistics.median(_rate(observed.acks, window) for window in observed.quiet)
    share = contributing(observed.acks, observed.lives, observed.loud)
    return [
        figure("recovery", f"{WORKERS} tiny workers, steps a second of all, no faults", quiet, "1/s", WORKERS / STEP),
        figure("recovery", "faults an hour in the windows with faults", 3600 / seconds, "1/h"),
        figure("recovery", "throughput at that rate / without", 100 * ratio, "%", 100.0),
        figure("recovery", "training lost per fault", cost, "s", 0.0),
        figure("recovery", "throughput with 125 faults an hour / without", 100 * scaled(cost), "%", 100.0),
        figure("recovery", "share of live workers in a step", 100 * share, "%", 100.0),
    ]


def scaled(cost: float, an_hour: int = AN_HOUR) -> float:
    """The share of throughput that is left if so many faults an hour cost so many seconds each."""
    return 1 - cost * an_hour / 3600


def _rate(acks: Sequence[tuple[float, int]], window: Span) -> float:
    return sum(window.holds(when) for when, _ in acks) / window.seconds


def contributing(acks: Sequence[tuple[float, int]], lives: Sequence[Life], windows: Sequence[Span]) -> float:
    """The mean over steps in the windows: contributors / processes of workers, those that still start included."""
    contributors = Counter(clock for _, clock in acks)
    first: dict[int, float] = {}
    for when, clock in acks:
        first[clock] = min(when, first.get(clock, when))
    shares = [
        min(1.0, contributors[clock] / max(1, sum(life.begin <= when < life.end for life in lives)))
        for clock, when in first.items()
        if any(window.holds(when) for window in windows)
    ]
    return statistics.fmean(shares) if shares else 0.0
