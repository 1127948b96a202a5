"""What one run is: the cluster's shape, its workers' habits, its faults. Drawn from a seed, and only data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from headwater.testing.faults import FaultPlan, draw, kills, watched
from headwater.types import Async, Bulk, DenseSpec, Init, OptimizerSpec, ParameterSpec, Stale, Sync

MODES = ("bulk", "stale", "async")
MARKS = 448  # elements of each parameter that pushes mark
NOISE = 56  # elements of each parameter that hold numbers which a sum rounds


@dataclass(frozen=True, slots=True)
class Scenario:
    """``seed`` draws what is not stated here: latencies, clocks, gradients."""

    seed: int
    mode: str
    servers: int = 3
    shards: int = 2
    replicas: int = 2
    workers: int = 2
    reader: bool = True
    seconds: float = 2.0
    plan: FaultPlan = field(default_factory=FaultPlan)
    skew: bool = True
    clip: bool = False
    bound: int = 1
    cap: int | None = None
    pace: float = 0.05  # seconds between two steps of a worker, about
    versions: bool = False  # workers publish, and somebody reads what they publish

    @property
    def sync(self) -> Sync:
        match self.mode:
            case "bulk":
                return Bulk(reduce="sum")
            case "stale":
                return Stale(self.bound)
            case _:
                return Async(self.cap)

    @property
    def table(self) -> DenseSpec:
        """One page per parameter and one parameter per shard: the smallest table that lies on every shard."""
        parameters = tuple(ParameterSpec(f"p{i}", (512,), "float64", 0, Init("zeros")) for i in range(self.shards))
        optimizer = OptimizerSpec("SGD", ({"lr": 1.0, "maximize": True},))
        return DenseSpec("t", parameters, optimizer, self.sync, 1.5 if self.clip else None)

    def __str__(self) -> str:
        text = (
            f"seed {self.seed}, {self.mode}: {self.servers} servers, {self.shards} shards x {self.replicas}, "
            f"{self.workers} workers{', a reader' * self.reader}{', clocks differ' * self.skew}"
            f"{', clipped' * self.clip}{', versions' * self.versions}"
        )
        return text + "".join(f"\n    {fault}" for fault in self.plan.faults)


def scenario(seed: int, mode: str | None = None) -> Scenario:
    """The run of this seed; every fourth is ``harsh``, and in every fifth there are versions."""
    one = harsh(seed, mode) if seed % 4 == 3 else usual(seed, mode)
    return published(one) if seed % 5 == 3 else one


def published(one: Scenario) -> Scenario:
    """The same with versions: workers publish, and their reader is struck too."""
    return replace(one, versions=True, plan=watched(Random(f"versions {one.seed}"), one.plan, one.seconds))


def usual(seed: int, mode: str | None = None) -> Scenario:
    """A cluster of any shape, and faults of any kind."""
    random = Random(f"scenario {seed}")
    mode = mode or MODES[seed % len(MODES)]
    servers = random.choice((2, 3, 3, 4))
    workers = random.choice((1, 2, 2, 3))
    replicas = 3 if servers > 2 and random.random() < 0.35 else 2
    seconds = random.choice((0.8, 1.2, 1.6))
    return Scenario(
        seed,
        mode,
        servers=servers,
        shards=random.choice((1, 2, 2, 3)),
        replicas=replicas,
        workers=workers,
        reader=random.random() < 0.5,
        seconds=seconds,
        plan=draw(random, servers, workers, seconds, rate=random.choice((1.0, 2.0, 4.0))),
        skew=random.random() < 0.5,
        clip=random.random() < 0.1,
        bound=random.choice((0, 1, 3)),
        cap=random.choice((None, None, 2)),
    )


def harsh(seed: int, mode: str | None = None) -> Scenario:
    """One shard whose servers die in the middle of records, and workers that always have something under way."""
    random = Random(f"harsh {seed}")
    replicas = random.choice((2, 3))
    return Scenario(
        seed,
        mode or MODES[seed % len(MODES)],
        servers=replicas + random.choice((0, 1)),
        shards=1,
        replicas=replicas,
        workers=random.choice((2, 3)),
        reader=False,
        seconds=1.2,
        plan=kills(random, 1.2),
        pace=0.01,
    )
