"""What things cost in time: links, kernels, a worker's own computing. No faults here (`faults.py`).

Faults are tried under ``Jitter``, where everything is quick and nothing is regular. Predictions use ``Measured``, with
a machine's figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol


@dataclass(slots=True)
class Line:
    """A process's connection to the network: when each direction is free again (seconds of virtual time)."""

    out: float = 0.0
    into: float = 0.0


@dataclass(slots=True)
class Meter:
    """Bytes that a server has copied and stepped since it was last asked."""

    copied: int = 0
    stepped: int = 0

    def take(self) -> tuple[int, int]:
        found = self.copied, self.stepped
        self.copied = self.stepped = 0
        return found


class TimeModel(Protocol):
    """Costs in seconds of virtual time."""

    def latency(self, random: Random) -> float:
        """One way, of nothing."""

    def arrival(self, now: float, source: Line, target: Line, nbytes: int, random: Random) -> float:
        """When the last of ``nbytes`` that leave now is there."""

    def handling(self, copied: int, stepped: int) -> float:
        """What a server takes to receive or add up ``copied`` bytes, and to run its kernel over ``stepped``."""

    def computing(self, random: Random) -> float:
        """What a worker takes between two steps."""


@dataclass(frozen=True, slots=True)
class Jitter:
    """Quick and irregular: ``low`` to ``high`` seconds per message, now and then ten times as long."""

    low: float = 0.0001
    high: float = 0.002
    step: float = 0.05

    def latency(self, random: Random) -> float:
        value = random.random()
        return (self.low + (self.high - self.low) * value) * (10.0 if value > 0.97 else 1.0)

    def arrival(self, now: float, source: Line, target: Line, nbytes: int, random: Random) -> float:
        return now + self.latency(random)

    def handling(self, copied: int, stepped: int) -> float:
        return 0.0

    def computing(self, random: Random) -> float:
        return self.step * (0.2 + 1.6 * random.random())


@dataclass(frozen=True, slots=True)
class Measured:
    """A machine's figures.

    ``bandwidth``: bytes/s of each host in each direction. ``delay``: seconds one way. ``compute``: seconds of forward
    and backward. ``copy``, ``kernel``: bytes/s of a server's memory, of gradients summed and of values stepped.
    ``scale``: what a byte of the simulation stands for, so that a table of megabytes stands for one of terabytes.
    """

    bandwidth: float
    delay: float
    compute: float
    copy: float = 10e9
    kernel: float = 5e9
    scale: float = 1.0

    def latency(self, random: Random) -> float:
        return self.delay

    def arrival(self, now: float, source: Line, target: Line, nbytes: int, random: Random) -> float:
        """Each host's line carries one message after the other; the two lines work at the same time."""
        if nbytes < 4096:  # control: its share of a line is nothing, and its own connection is not behind bulk
            return now + self.delay
        seconds = nbytes * self.scale / self.bandwidth
        begins = max(now, source.out)
        source.out = begins + seconds
        target.into = max(begins + self.delay, target.into) + seconds
        return target.into

    def handling(self, copied: int, stepped: int) -> float:
        return self.scale * (copied / self.copy + stepped / self.kernel)

    def computing(self, random: Random) -> float:
        return self.compute
