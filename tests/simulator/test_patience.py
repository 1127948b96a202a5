"""A worker that is slow is waited for, one that is gone or a server that is dead is not: on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest

from headwater.client.client import Client
from headwater.client.dense.table import DenseTable
from headwater.errors import DeadlineExceeded, HeadwaterError
from headwater.server.shard import Shard
from headwater.testing.cluster import Eye, SimCluster
from headwater.testing.scenario import Scenario
from headwater.testing.workload import Worker

TIMEOUT, LONGER = 3.0, 20.0  # seconds: HEADWATER_TIMEOUT and HEADWATER_STEP_TIMEOUT
STEPS = 4

Deed = Callable[[Worker, Client, DenseTable], None]


class _Lone(Worker):
    """Rank 0 does something alone before its second step; ``ended`` is when and how the process ended."""

    longer = LONGER
    deed: Deed
    ended: tuple[float, HeadwaterError | None]

    def body(self) -> None:
        begun, error = self.runtime.now(), None
        try:
            with Client(
                self.runtime.dial, rank=self.rank, world=2, timeout=TIMEOUT, step_timeout=self.longer,
                runtime=self.runtime,
            ) as client:  # fmt: skip
                table = client.table(self.scenario.table)
                client.barrier("begin")
                for step in range(STEPS):
                    if self.rank == 0 and step == 1:
                        begun = self.runtime.now()
                        type(self).deed(self, client, table)
                    begun = self.runtime.now()
                    self._step(client, table)
                    table.wait()
                client.barrier("end")
        except HeadwaterError as caught:
            error = caught
        self.ended = self.runtime.now() - begun, error
        self.finished = True


def run(deed: Deed, mode: str = "bulk", longer: float = LONGER, cap: int | None = 1) -> list[_Lone]:
    """Both workers, when they have ended."""
    scenario = Scenario(0, mode, servers=2, shards=2, replicas=1, reader=False, skew=False, bound=0, cap=cap)
    kind = type("_Lone", (_Lone,), {"deed": staticmethod(deed), "longer": longer})
    cluster = SimCluster(scenario, worker=kind)
    with patch.object(Shard, "observer", Eye(cluster.oracles.observe)):
        try:
            cluster.start()
            cluster.scheduler.run(
                lambda: len(cluster.workers) == 2 and all(w.finished for w in cluster.workers.values()),
                limit=cluster.now + 200.0, events=1_000_000,
            )  # fmt: skip
        finally:
            cluster.finish()
    found = [cluster.workers[name] for name in ("w0", "w1")]
    assert all(isinstance(worker, _Lone) for worker in found)
    return found  # type: ignore[return-value]


def sleeps(seconds: float, worker: Worker, client: Client, table: DenseTable) -> None:
    worker.runtime.sleep(seconds)


@pytest.mark.parametrize(("mode", "cap"), [("bulk", None), ("stale", None), ("async", 1)])
def test_a_worker_that_is_alive_is_waited_for(mode: str, cap: int | None) -> None:
    workers = run(partial(sleeps, 4 * TIMEOUT), mode, cap=cap)
    assert [worker.ended[1] for worker in workers] == [None, None]
    assert [worker.steps for worker in workers] == [STEPS, STEPS]


def test_but_not_for_ever() -> None:
    _, waited = run(partial(sleeps, 2 * LONGER))
    seconds, error = waited.ended
    assert isinstance(error, DeadlineExceeded)
    assert LONGER <= seconds < LONGER + 1.0
    assert "worker 0 did not come to step 2 of table 't'" in str(error)
    assert "HEADWATER_STEP_TIMEOUT" in str(error)


def test_without_a_longer_time_the_timeout_counts() -> None:
    _, waited = run(partial(sleeps, 4 * TIMEOUT), longer=0.0)
    seconds, error = waited.ended
    assert isinstance(error, DeadlineExceeded)
    assert TIMEOUT <= seconds < TIMEOUT + 1.0
