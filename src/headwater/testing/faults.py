"""What goes wrong in a run, drawn from its seed. No times of links or kernels here (`times.py`).

A plan is data: it can be printed, shortened and run again. Whether a fault may strike is asked when its time comes, for
the promise covers one fault per shard at a time; one that may not is passed over and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

LETHAL = frozenset({"kill", "vanish"})

SERVER = ("kill", "kill", "kill", "vanish", "stop", "isolate", "cut", "deaf", "mute")
WORKER = ("kill", "stop", "cut", "isolate")
COORDINATOR = ("kill", "kill", "before_put", "after_put", "stop", "cut", "isolate")

ON = ("RECORD", "RECORD", "RECORD", "ACK", "ACK", "ACCEPT", "STATE", "DATA", "REPLY", "NOTICE", "REQUEST")
"""Kinds of frames that a fault may wait for: it strikes as the target sends one, be it one of several."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Strikes ``target`` at ``at`` (seconds), or as it sends a frame of kind ``on`` after that; lasts ``seconds``.

    kill: SIGKILL, started again after ``seconds``. vanish: the machine is gone, started again likewise. stop: SIGSTOP.
    isolate: nothing gets in or out. deaf, mute: one way only. cut: its connections break, and may be made anew.
    ``target``: s0, w0, coordinator, or the primary or a backup of shard 0, whoever that is then.
    before_put, after_put: the coordinator is killed on either side of its next write. daring: it may strike while an
    earlier fault is not healed; what it then destroys is excused. first: before the frame leaves, not right after.
    """

    at: float
    kind: str
    target: str
    seconds: float
    on: str = ""
    daring: bool = False
    first: bool = False

    def __str__(self) -> str:
        trigger = f" {'before' if self.first else 'after'} {self.on}" if self.on else ""
        return f"{self.at:.3f} {self.kind} {self.target} for {self.seconds:.3f} s{trigger}{' daring' * self.daring}"


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults of one run."""

    faults: tuple[Fault, ...] = ()

    def without(self, drop: set[int]) -> FaultPlan:
        """The plan less some of its faults, by position."""
        return replace(self, faults=tuple(f for i, f in enumerate(self.faults) if i not in drop))


def draw(random: Random, servers: int, workers: int, seconds: float, rate: float) -> FaultPlan:
    """About ``rate`` faults a second for ``seconds``."""
    faults = []
    at = 0.3 + random.expovariate(rate)
    while at < seconds:
        faults.append(_fault(random, at, servers, workers))
        # now and then two at once: faults strike during recovery
        at += random.expovariate(rate) if random.random() < 0.8 else random.random() * 0.05
    return FaultPlan(tuple(faults))


def kills(random: Random, seconds: float) -> FaultPlan:
    """Servers that die, or lose their connections, as they say something about a record of shard 0."""
    faults = []
    at = 0.1
    while at < seconds:
        kind = random.choice(("kill", "vanish", "vanish", "cut", "isolate"))
        target, on = random.choice((("primary", "RECORD"), ("primary", "ACK"), ("backup", "ACCEPT")))
        length = round(0.02 + 0.3 * random.random(), 6)
        daring, first = random.random() < 0.5, random.random() < 0.5
        faults.append(Fault(round(at, 6), kind, target, length, "" if kind == "isolate" else on, daring, first))
        at += 0.1 + 0.2 * random.random()
    return FaultPlan(tuple(faults))


def watched(random: Random, plan: FaultPlan, seconds: float) -> FaultPlan:
    """The same plan, and faults of the reader of versions: some last longer than its leases."""
    faults = list(plan.faults)
    for _ in range(random.choice((0, 1, 2))):
        at, length = 0.3 + random.random() * (seconds - 0.3), random.choice((0.05, 0.5, 4.0)) * (0.5 + random.random())
        faults.append(Fault(round(at, 6), random.choice(WORKER), "v0", round(length, 6)))
    return FaultPlan(tuple(sorted(faults, key=lambda fault: fault.at)))


def _fault(random: Random, at: float, servers: int, workers: int) -> Fault:
    which = random.random()
    if which < 0.65:
        target, kind = f"s{random.randrange(servers)}", random.choice(SERVER)
    elif which < 0.85:
        target, kind = f"w{random.randrange(workers)}", random.choice(WORKER)
    else:
        target, kind = "coordinator", random.choice(COORDINATOR)
    on = random.choice(ON) if random.random() < 0.5 and kind in ("kill", "vanish", "stop", "cut") else ""
    seconds = random.choice((0.01, 0.1, 0.3, 1.0)) * (0.5 + random.random())
    return Fault(round(at, 6), kind, target, round(seconds, 6), on, random.random() < 0.2, random.random() < 0.5)
