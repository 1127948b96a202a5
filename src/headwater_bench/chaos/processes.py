"""The clients of a chaos run: workers that push and a reader that only looks."""

from __future__ import annotations

from headwater_bench.chaos.workload import Workload
from headwater_bench.rig.cluster import Cluster


def add_workers(cluster: Cluster, workload: Workload) -> None:
    """``w0`` … and ``reader``; none is started yet."""
    for rank in (*range(workload.workers), -1):
        name = f"w{rank}" if rank >= 0 else "reader"
        # the first worker shares memory with the servers; the others go over TCP, through the proxies
        forced = {} if rank == 0 or cluster.local else {"HEADWATER_TRANSPORT": "tcp"}
        arguments = ["--rank", str(rank), "--ranks", str(workload.workers), "--mode", workload.mode]
        arguments += ["--ledger", str(cluster.file(name))]
        cluster.add(name, "worker", "headwater_bench.chaos.pusher", arguments, cluster.client() | forced)
