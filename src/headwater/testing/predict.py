"""How fast a cluster would be that no test machine can hold: the simulator with a machine's figures and no faults.

The same classes run as in the fault simulator, over a small table that stands for a large one (`times.Measured.scale`).
What is predicted is what the protocol makes of links, kernels and computing: not the cost of the interpreter, nor of a
network that is shared with others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import patch

from headwater.errors import UsageError
from headwater.server.replication.records import Prepare, Record, Update, spans
from headwater.server.shard import Shard
from headwater.testing.cluster import Eye, SimCluster
from headwater.testing.scenario import Scenario
from headwater.testing.scheduler import Stuck
from headwater.testing.times import Measured, Meter
from headwater.testing.workload import Worker, connect
from headwater.wire.messages import Commit

PAGE = 4096  # bytes of a parameter in the simulated table: one per shard
WARM = 2  # steps that are not counted
EVENTS = 20_000_000  # a prediction that takes more is refused


@dataclass(frozen=True, slots=True)
class Prediction:
    """``steps``: of all workers together per second. ``seconds``: per step of one worker."""

    steps: float
    seconds: float
    events: int


class _Steady(Worker):
    """A worker that does the same in every step: computes, pushes everything and has everything back."""

    def body(self) -> None:
        with connect(self.runtime, "worker", self.rank, 1e9) as client:
            table = client.table(self.scenario.table)
            names = [p.name for p in table.spec.parameters]
            while not self.stopping:
                self.runtime.sleep(self.times.computing(self.random))
                table.push_step(names, want=True).wait()
                table.wait()
                self.steps += 1


def _measured(meter: Meter) -> Eye:
    """Counts what replicas do: contributions that are added up, values that are stepped."""

    def observe(replica: Shard, record: Record) -> None:
        body = record.body
        nbytes = sum(stop - start for start, stop in spans(body))
        if isinstance(body, Prepare):
            meter.copied += nbytes * (len(body.parts) if replica.primary else 0)
            meter.stepped += nbytes if body.commit is not None else 0
        elif isinstance(body, Commit):
            meter.stepped += replica.tables[body.table].size
        elif isinstance(body, Update):
            meter.stepped += nbytes

    return Eye(observe)


def predict(
    times: Measured,
    *,
    nbytes: int,
    mode: str = "bulk",
    servers: int = 1,
    replicas: int = 1,
    workers: int = 1,
    steps: int = 10,
) -> Prediction:
    """Steps a second of a dense table of ``nbytes`` (float64 in the simulation, any dtype in reality).

    ``times.scale`` is set from ``nbytes``. Raises ``UsageError`` for a shape that makes no cluster.
    """
    if min(nbytes, servers, replicas, workers, steps) < 1 or replicas > servers:
        raise UsageError(f"{servers} servers, {replicas} replicas, {workers} workers, {nbytes} bytes: not a cluster")
    one = Scenario(
        0, mode, servers=servers, shards=servers, replicas=replicas, workers=workers, reader=False, skew=False, bound=1
    )
    meter = Meter()
    scaled = replace(times, scale=nbytes / (PAGE * servers))
    cluster = SimCluster(one, times=scaled, worker=_Steady, meter=meter, patience=1e9)
    with patch.object(Shard, "observer", _measured(meter)):
        try:
            return _measure(cluster, workers, steps)
        finally:
            cluster.finish()


def _measure(cluster: SimCluster, workers: int, steps: int) -> Prediction:
    def reached(count: int) -> bool:
        return len(cluster.workers) == workers and all(w.steps >= count for w in cluster.workers.values())

    def run(count: int) -> tuple[float, int]:
        try:
            cluster.scheduler.run(lambda: reached(count), limit=1e12, events=EVENTS)
        except Stuck as stuck:
            raise UsageError(f"this cluster makes no progress: {stuck}") from None
        return cluster.now, sum(w.steps for w in cluster.workers.values())

    cluster.start()
    begun, before = run(WARM)
    ended, after = run(WARM + steps)
    seconds = (ended - begun) / (after - before)
    return Prediction(1.0 / seconds, seconds * workers, cluster.scheduler.count)
