"""The race itself: who is struck and when, who is started again, and until when it goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from headwater_bench.races.processes import KINDS, PUBLISHER, RELAY, Town
from headwater_bench.rig.cluster import Member
from headwater_bench.rig.monitor import Monitor
from headwater_bench.chaos.schedule import SERVERS
from headwater.errors import DeadlineExceeded

TURN = 0.02  # seconds between two looks
BEGIN = 30.0  # seconds until everybody is at work
HEALING = 20.0  # seconds after the last fault in which every reader reads again
WHOLE = 30.0  # seconds after a fault in which every shard has all its copies again
END = 15.0  # seconds in which programs end that are told to
QUIET = 0.5  # seconds after a server's fault until another may be struck: the first may have later effects
AGAIN = 0.2  # seconds until a process that ended by itself is started again
LONG = 25.0  # seconds of a stop that a lease does not survive: 10 without a sign of life, and 10 more


class Fault(NamedTuple):
    """``seconds`` until it is undone: started again, or continued."""

    kind: str  # kill, stop
    role: str  # server, reader, publisher, coordinator, relay
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.role}s {'killed' if self.kind == 'kill' else 'stopped'}"


FIRST = (
    Fault("kill", "reader", 0.1),
    Fault("kill", "server", 0.1),
    Fault("kill", "publisher", 0.1),
    Fault("stop", "reader", 0.5),
    Fault("kill", "coordinator", 0.1),
    Fault("kill", "relay", 0.1),
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


def faults(random: Random) -> Iterator[Fault]:
    """``FIRST``, then without end. One reader at a time is stopped for long, beside whatever else happens."""
    yield from FIRST
    yield Fault("stop", "reader", LONG)
    while True:
        kind, role, _, low, high = random.choices(_WEIGHTS, [w[2] for w in _WEIGHTS])[0]
        yield Fault(kind, role, round(random.uniform(low, high), 3))


@dataclass(slots=True)
class Course:
    """What happened. ``silent``: readers that did not read again after the last fault."""

    seconds: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


class Race:
    """``every``: seconds between two faults, at least. ``say`` takes a line per event."""

    def __init__(self, town: Town, monitor: Monitor, seed: int, every: float, say: Callable[[str], None]) -> None:
        self.course = Course()
        self._town, self._monitor, self._every, self._say = town, monitor, every, say
        self._random = Random(seed)
        self._begun = time.monotonic()
        self._stopped: dict[str, float] = {}  # until when
        self._risky = 0.0  # when the last fault of a server was over
        self._readers = [f"r{i}" for i in range(len(KINDS))]

    def run(self, reads: int, seconds: float) -> Course:
        """Until so many reads are done and ``FIRST`` has struck, or time is over; then all heals and go on."""
        for name in (PUBLISHER, RELAY):
            self._town.start(name)
        self._must(lambda: self._town.counts(PUBLISHER)["published"] > 0, BEGIN, "a version is published")
        for name in self._readers:
            self._town.start(name)
        self._must(lambda: all(self._reads(name) for name in self._readers), BEGIN, "every reader reads")
        self._begun = time.monotonic()
        until = self._begun + seconds
        coming, last = faults(self._random), self._begun
        fault = next(coming)

        def over() -> bool:
            done = self._total() >= reads and self.course.struck.total() >= len(FIRST)
            return done or time.monotonic() >= until

        while not over():
            self._turn()
            if time.monotonic() >= last + self._every and self._may(fault):
                self._strike(fault)
                last, fault = time.monotonic(), next(coming)
            time.sleep(TURN)
        self._heal()
        self.course.seconds = time.monotonic() - self._begun
        self._end()
        return self.course

    # ---- faults ----------------------------------------------------------------------------------

    def _may(self, fault: Fault) -> bool:
        """A server is struck only when every shard has its copies: one fault per shard at a time is the promise."""
        return bool(self._targets(fault)) and (fault.role != "server" or self._whole())

    def _targets(self, fault: Fault) -> list[str]:
        names = {
            "server": [f"s{i}" for i in range(SERVERS)],
            "reader": self._readers,
            "publisher": [PUBLISHER],
            "coordinator": ["coordinator"],
            "relay": [RELAY],
        }[fault.role]
        return [name for name in names if self._town.members[name].running and name not in self._stopped]

    def _whole(self) -> bool:
        servers, now = self._town.of("server"), time.monotonic()
        up = all(member.running and not member.stopped for member in servers)
        since = max(now - QUIET, self._risky + QUIET)
        return up and now > since and self._monitor.redundant_since(since, {m.pid for m in servers})

    def _strike(self, fault: Fault) -> None:
        name = self._random.choice(self._targets(fault))
        self._note(f"{fault.kind} {name} for {fault.seconds:g} s")
        self.course.struck[fault.name] += 1
        if fault.kind == "kill":
            self._town.kill(name)
            self._town.members[name].due = time.monotonic() + fault.seconds
        else:
            self._town.stop(name)
            self._stopped[name] = time.monotonic() + fault.seconds

    def _heal(self) -> None:
        for name in self._stopped:
            self._stopped[name] = 0.0
        self._turn()
        before = {name: self._reads(name) for name in self._readers}
        published = self._town.counts(PUBLISHER)["published"]

        def again() -> bool:
            self.course.silent = [name for name in self._readers if self._reads(name) <= before[name]]
            if self._town.counts(PUBLISHER)["published"] <= published:
                self.course.silent.append(PUBLISHER)
            return not self.course.silent

        if not self._wait(again, HEALING):
            self._note(f"FAILED: {self.course.silent} did nothing more after the last fault")

    # ---- turns -----------------------------------------------------------------------------------

    def _turn(self) -> None:
        now = time.monotonic()
        self._town.reap()
        exits, self._town.exits = self._town.exits, []
        for member, code in exits:
            self._ended(member, code, now)
        for name in [name for name, until in self._stopped.items() if until <= now]:
            del self._stopped[name]
            self._town.go_on(name)
            self._over(name)
            self._note(f"{name} goes on")
        for member in self._town.members.values():
            if member.due is not None and member.due <= now and not member.running:
                self._town.start(member.name, wait=False)
                self._over(member.name)

    def _over(self, name: str) -> None:
        if self._town.members[name].role in ("server", "coordinator"):
            self._risky = time.monotonic()

    def _ended(self, member: Member, code: int, now: float) -> None:
        if member.killed or member.leaving:
            return
        self.course.surprises.append(f"{member.name} ended by itself (code {code})")
        self._note(f"{self.course.surprises[-1]}: {self._town.last_words(member.name)}")
        member.due = now + AGAIN

    def _wait(self, done: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() >= until:
                return False
            self._turn()
            time.sleep(TURN)
        return True

    def _must(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        if not self._wait(done, seconds):
            said = self._town.words() or [self._town.last_words(name) for name in (PUBLISHER, *self._readers)]
            raise DeadlineExceeded(f"the race waited {seconds:g} s until {what}: {said[-6:]}")

    def _end(self) -> None:
        programs = [self._town.members[name] for name in (*self._readers, PUBLISHER)]
        for member in programs:
            member.due = None
            self._town.ask_to_end(member.name)
        self._wait(lambda: not any(member.running for member in programs), END)
        for name in self._readers:
            kind = KINDS[int(name[1:])].name
            found = self._town.counts(name)
            self.course.kinds[kind] = self.course.kinds.get(kind, Counter()) + found
            self.course.counts += found
        self.course.counts += self._town.counts(PUBLISHER)
        self.course.words = self._town.words()

    # ---- figures ---------------------------------------------------------------------------------

    def _reads(self, name: str) -> int:
        return self._town.counts(name)["reads"]

    def _total(self) -> int:
        return sum(self._reads(name) for name in self._readers)

    def _note(self, text: str) -> None:
        self._say(f"races: {time.monotonic() - self._begun:8.2f} s  {text}")
