"""What goes wrong in a run, drawn from its seed. A plan is data; `runner.py` carries it out.

A fault that could cost a server its data waits until every shard has all its copies again: the promise is for one
fault per shard at a time. Faults that strike during a recovery (``early``) cannot: they hit the same server again, the
coordinator, a worker, or connections.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import Literal

from headwater.errors import UsageError
from headwater_bench.rig.cluster import SERVERS

Kind = Literal[
    "kill", "stop", "isolate", "cut-in", "cut-out", "half-open", "reset", "delay", "flip", "truncate",
    "disk-full", "second-coordinator", "replay",
]  # fmt: skip

WORKERS = 3

# Kind, whom it strikes, how often (relative), and from how many to how many seconds it lasts.
_WEIGHTS: tuple[tuple[Kind, str, int, float, float], ...] = (
    ("kill", "server", 24, 0.1, 0.6),
    ("kill", "worker", 6, 0.1, 0.6),
    ("kill", "coordinator", 4, 0.05, 0.5),
    ("stop", "server", 5, 0.1, 5.0),
    ("stop", "worker", 2, 0.1, 2.0),
    ("stop", "coordinator", 2, 0.1, 3.0),
    ("isolate", "server", 4, 0.3, 3.0),
    ("cut-in", "server", 2, 0.3, 3.0),
    ("cut-out", "server", 2, 0.3, 3.0),
    ("half-open", "server", 2, 0.3, 3.0),
    ("isolate", "worker", 1, 0.3, 2.0),
    ("half-open", "worker", 1, 0.3, 2.0),
    ("reset", "server", 3, 0.0, 0.0),
    ("reset", "worker", 2, 0.0, 0.0),
    ("reset", "coordinator", 2, 0.0, 0.0),
    ("delay", "server", 2, 0.5, 2.0),
    ("flip", "server", 3, 0.5, 1.0),
    ("truncate", "server", 3, 0.5, 1.0),
    ("disk-full", "coordinator", 2, 0.5, 1.5),
    ("second-coordinator", "coordinator", 1, 0.0, 0.0),
    ("replay", "worker", 3, 0.0, 0.0),
)
_EARLY: tuple[tuple[Kind, str], ...] = (
    ("kill", "same"),
    ("kill", "same"),
    ("kill", "coordinator"),
    ("kill", "worker"),
    ("reset", "worker"),
    ("reset", "coordinator"),
    ("stop", "coordinator"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: ``after`` seconds after the one before is over (``early``: has begun), for ``seconds``."""

    kind: Kind
    target: str  # s0 …, w0 …, or coordinator; "same": the server that the fault before struck
    after: float
    seconds: float
    early: bool = False

    @property
    def role(self) -> str:
        return {"s": "server", "w": "worker", "c": "coordinator"}[self.target[0]]

    @property
    def name(self) -> str:
        """``kill server``."""
        return f"{self.kind} {self.role}"

    @property
    def risky(self) -> bool:
        """Whether a server may lose its place by it."""
        return self.role == "server"

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.2f} s" if self.seconds else ""
        return f"{self.kind} {self.target}{lasting}{' during recovery' if self.early else ''}"


NAMES = tuple(f"{kind} {role}" for kind, role, *_ in _WEIGHTS)
"""What ``only`` may name."""


def draw(seed: int, count: int, *, workers: int = WORKERS, only: Collection[str] = ()) -> list[Fault]:
    """``count`` faults. Without ``workers`` only servers and the coordinator are struck; ``only``: such faults alone.

    Raises ``UsageError`` for a fault that does not exist.
    """
    random = Random(seed)
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise UsageError(f"there is no fault {unknown[0]!r}; there are {', '.join(NAMES)}; nothing was started")
    weights = [w for w in _WEIGHTS if (workers or w[1] != "worker") and (not only or f"{w[0]} {w[1]}" in only)]
    faults: list[Fault] = []
    while len(faults) < count:
        kind, role, _, low, high = random.choices(weights, [w[2] for w in weights])[0]
        target = _target(random, role, workers)
        faults.append(Fault(kind, target, round(random.uniform(0.0, 0.4), 3), round(random.uniform(low, high), 3)))
        if role == "server" and not only and random.random() < 0.25:
            faults.append(_early(random, target, workers, again=kind == "kill"))
    return faults[:count]


def _early(random: Random, struck: str, workers: int, again: bool) -> Fault:
    """``again``: the server that was struck holds nothing that is needed, so it may be killed once more."""
    kind, role = random.choice([e for e in _EARLY if (workers or e[1] != "worker") and (again or e[1] != "same")])
    target = struck if role == "same" else _target(random, role, workers)
    seconds = 0.0 if kind == "reset" else random.uniform(0.05, 0.5)
    return Fault(kind, target, round(random.uniform(0.05, 0.6), 3), round(seconds, 3), early=True)


def _target(random: Random, role: str, workers: int) -> str:
    if role == "coordinator":
        return role
    return f"{role[0]}{random.randrange(SERVERS if role == 'server' else workers)}"
