"""The race itself: who is struck and when, who is started again, and until when it goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from headwater.errors import DeadlineExceeded
from headwater_bench.races.processes import KINDS, PUBLISHER, RELAY, counts, words
from headwater_bench.rig.cluster import SERVERS, Cluster, RigProcess
from headwater_bench.rig.monitor import Monitor
from headwater_bench.rig.supervisor import QUIET, Supervisor

TURN = 0.02  # seconds between two looks
BEGIN = 30.0  # seconds until everybody is at work
HEALING = 20.0  # seconds after the last fault in which every reader reads again
END = 15.0  # seconds in which programs end that are told to
AGAIN = 0.2  # seconds until a process that ended by itself is started again
LONG = 25.0  # seconds of a stop that a lease does not survive: 10 without a sign of life, and 10 more


class RaceFault(NamedTuple):
    """``seconds`` until it is undone: started again, or continued."""

    kind: str  # kill, stop
    role: str  # server, reader, publisher, coordinator, relay
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.role}s {'killed' if self.kind == 'kill' else 'stopped'}"


FIRST = (
    RaceFault("kill", "reader", 0.1),
    RaceFault("kill", "server", 0.1),
    RaceFault("kill", "publisher", 0.1),
    RaceFault("stop", "reader", 0.5),
    RaceFault("kill", "coordinator", 0.1),
    RaceFault("kill", "relay", 0.1),
)
"""One of each: a race has them all, however short."""

_WEIGHTS: tuple[tuple[str, str, int, float, float], ...] = (
    ("kill", "server", 8, 0.1, 1.0),
    ("kill", "reader", 6, 0.1, 0.5),
    ("kill", "publisher", 5, 0.1, 0.5),
    ("kill", "coordinator", 2, 0.1, 0.5),
    ("kill", "relay", 3, 0.1, 0.5),
    ("stop", "reader", 6, 0.1, 3.0),
    ("stop", "reader", 1, LONG, LONG + 2.0),
    ("stop", "server", 3, 0.1, 2.5),
    ("stop", "publisher", 2, 0.1, 2.0),
    ("stop", "coordinator", 1, 0.1, 2.0),
    ("stop", "relay", 1, 0.1, 2.0),
)


def faults(random: Random) -> Iterator[RaceFault]:
    """``FIRST``, then without end. One reader at a time is stopped for long, beside whatever else happens."""
    yield from FIRST
    yield RaceFault("stop", "reader", LONG)
    while True:
        kind, role, _, low, high = random.choices(_WEIGHTS, [w[2] for w in _WEIGHTS])[0]
        yield RaceFault(kind, role, round(random.uniform(low, high), 3))


@dataclass(slots=True)
class RaceResult:
    """What happened. ``silent``: readers that did not read again after the last fault."""

    seconds: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


class RaceRun:
    """``every``: seconds between two faults, at least. ``say`` takes a line per event."""

    def __init__(self, cluster: Cluster, monitor: Monitor, seed: int, every: float, say: Callable[[str], None]) -> None:
        self.result = RaceResult()
        self._cluster, self._every, self._say = cluster, every, say
        self._supervisor = Supervisor(cluster, monitor, self._ended, period=TURN, again=AGAIN, each_turn=self._continue)
        self._wait = self._supervisor.wait
        self._random = Random(seed)
        self._begun = time.monotonic()
        self._stopped: dict[str, float] = {}  # until when
        self._readers = [f"r{i}" for i in range(len(KINDS))]

    def run(self, reads: int, seconds: float) -> RaceResult:
        """Until so many reads are done and ``FIRST`` has struck, or time is over; then all heals and go on."""
        for name in (PUBLISHER, RELAY):
            self._cluster.start(name)
        self._must(lambda: counts(self._cluster, PUBLISHER)["published"] > 0, BEGIN, "a version is published")
        for name in self._readers:
            self._cluster.start(name)
        self._must(lambda: all(self._reads(name) for name in self._readers), BEGIN, "every reader reads")
        self._begun = time.monotonic()
        until = self._begun + seconds
        coming, last = faults(self._random), self._begun
        fault = next(coming)

        def over() -> bool:
            done = self._total() >= reads and self.result.struck.total() >= len(FIRST)
            return done or time.monotonic() >= until

        while not over():
            self._supervisor.turn()
            if time.monotonic() >= last + self._every and self._may(fault):
                self._strike(fault)
                last, fault = time.monotonic(), next(coming)
            time.sleep(TURN)
        self._heal()
        self.result.seconds = time.monotonic() - self._begun
        self._end()
        return self.result

    # ---- faults ----------------------------------------------------------------------------------

    def _may(self, fault: RaceFault) -> bool:
        """A server is struck only when every shard has its copies: one fault per shard at a time is the promise."""
        return bool(self._targets(fault)) and (fault.role != "server" or self._whole())

    def _targets(self, fault: RaceFault) -> list[str]:
        names = {
            "server": [f"s{i}" for i in range(SERVERS)],
            "reader": self._readers,
            "publisher": [PUBLISHER],
            "coordinator": ["coordinator"],
            "relay": [RELAY],
        }[fault.role]
        return [name for name in names if self._cluster.members[name].running and name not in self._stopped]

    def _whole(self) -> bool:
        now = time.monotonic()
        over = max(member.since for role in ("server", "coordinator") for member in self._cluster.of(role))
        since = max(now - QUIET, over + QUIET)
        return self._supervisor.all_servers_run() and now > since and self._supervisor.redundant_since(since)

    def _strike(self, fault: RaceFault) -> None:
        name = self._random.choice(self._targets(fault))
        self._note(f"{fault.kind} {name} for {fault.seconds:g} s")
        self.result.struck[fault.name] += 1
        if fault.kind == "kill":
            self._cluster.kill(name)
            self._cluster.members[name].due = time.monotonic() + fault.seconds
        else:
            self._cluster.stop(name)
            self._stopped[name] = time.monotonic() + fault.seconds

    def _heal(self) -> None:
        for name in self._stopped:
            self._stopped[name] = 0.0
        self._supervisor.turn()
        before = {name: self._reads(name) for name in self._readers}
        published = counts(self._cluster, PUBLISHER)["published"]

        def again() -> bool:
            self.result.silent = [name for name in self._readers if self._reads(name) <= before[name]]
            if counts(self._cluster, PUBLISHER)["published"] <= published:
                self.result.silent.append(PUBLISHER)
            return not self.result.silent

        if not self._wait(again, HEALING):
            self._note(f"FAILED: {self.result.silent} did nothing more after the last fault")

    # ---- turns -----------------------------------------------------------------------------------

    def _continue(self, now: float) -> None:
        for name in [name for name, until in self._stopped.items() if until <= now]:
            del self._stopped[name]
            self._cluster.go_on(name)
            self._note(f"{name} goes on")

    def _ended(self, member: RigProcess, code: int) -> None:
        self.result.surprises.append(f"{member.name} ended by itself (code {code})")
        self._note(f"{self.result.surprises[-1]}: {self._cluster.last_words(member.name)}")

    def _must(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        if not self._wait(done, seconds):
            said = words(self._cluster) or [self._cluster.last_words(name) for name in (PUBLISHER, *self._readers)]
            raise DeadlineExceeded(f"the race waited {seconds:g} s until {what}: {said[-6:]}")

    def _end(self) -> None:
        programs = [self._cluster.members[name] for name in (*self._readers, PUBLISHER)]
        for member in programs:
            member.due = None
            self._cluster.ask_to_end(member.name)
        self._wait(lambda: not any(member.running for member in programs), END)
        for name in self._readers:
            kind = KINDS[int(name[1:])].name
            found = counts(self._cluster, name)
            self.result.kinds[kind] = self.result.kinds.get(kind, Counter()) + found
            self.result.counts += found
        self.result.counts += counts(self._cluster, PUBLISHER)
        self.result.words = words(self._cluster)

    # ---- figures ---------------------------------------------------------------------------------

    def _reads(self, name: str) -> int:
        return counts(self._cluster, name)["reads"]

    def _total(self) -> int:
        return sum(self._reads(name) for name in self._readers)

    def _note(self, text: str) -> None:
        self._say(f"races: {time.monotonic() - self._begun:8.2f} s  {text}")
