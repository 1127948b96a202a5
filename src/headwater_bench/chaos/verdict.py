"""The end of a run: the sums, read from the primaries, and once more after a backup has taken over."""

from __future__ import annotations

import time

import torch

import headwater
from headwater.client import DenseTable
from headwater.errors import HeadwaterError
from headwater_bench.chaos.ledger import WIDTHS, Verdict, judge
from headwater_bench.chaos.runner import ChaosRun
from headwater_bench.chaos.workload import Workload
from headwater_bench.rig.cluster import Cluster
from headwater_bench.rig.supervisor import WHOLE

PATIENCE = 30.0


def examine(run: ChaosRun, cluster: Cluster, workload: Workload) -> Verdict:
    """Compare the sums with the ledgers, and the copies with one another."""
    try:
        with headwater.connect(role="reader", timeout=PATIENCE) as client:
            table = client.table(workload.ledger_table())
            pages, shard_of = _read(table)
            verdict = judge(run.ledgers.values(), pages, shard_of)
            other = client.table(workload.large_table())
            other.pull().wait()
            other.wait()
            rest = {name: value.clone() for name, value in other.values.items()}
        if workload.mode != "bulk":
            _weigh(run, rest)
        for i in range(len(cluster.of("server"))):
            _compare_copies(run, cluster, workload, f"s{i}", pages | {1000 + k: v for k, v in enumerate(rest.values())})
    except HeadwaterError as error:
        run.fail(f"the sums cannot be read: {error.code}: {error}")
        return Verdict(0, 0, ())
    run.note(f"lost: {verdict.lost}, doubled: {verdict.doubled}")
    return verdict


def _read(table: DenseTable) -> tuple[dict[int, torch.Tensor], dict[int, int]]:
    """The pages' values, and the shard that each lies on."""
    table.pull().wait()
    table.wait()
    pages = {i: table.values[f"page{i}"].clone() for i in range(len(WIDTHS))}
    shard_of = {}
    for i in pages:
        at = table.layout.offsets[i]
        shard_of[i] = next(b.shard for b in table.layout.blocks if b.start <= at < b.start + b.size)
    return pages, shard_of


def _weigh(run: ChaosRun, ballast: dict[str, torch.Tensor]) -> None:
    """Each element of the ballast counts the pushes of all workers."""
    sure = sum(len(ledger.acknowledged("ballast")) for ledger in run.ledgers.values())
    most = sure + sum(len(ledger.unknown("ballast")) for ledger in run.ledgers.values())
    for name, value in ballast.items():
        low, high = float(value.min()), float(value.max())
        if low < sure or high > most:
            run.fail(f"ballast {name}: between {low:.0f} and {high:.0f} everywhere, of {sure} to {most} pushes")


def _compare_copies(
    run: ChaosRun, cluster: Cluster, workload: Workload, server: str, before: dict[int, torch.Tensor]
) -> None:
    """Kill a server: what its backups serve must be the same to the last bit."""
    begun = time.monotonic()
    cluster.kill(server)
    with headwater.connect(role="reader", timeout=PATIENCE) as client:
        pages, _ = _read(client.table(workload.ledger_table()))
        other = client.table(workload.large_table())
        other.pull().wait()
        other.wait()
        after = pages | {1000 + k: v.clone() for k, v in enumerate(other.values.values())}
    different = [k for k, value in before.items() if not torch.equal(value, after[k])]
    if different:
        run.fail(f"without {server}, the copies of tensors {different} differ from what the primaries had")
    cluster.start(server)
    if not run.wait_whole(begun, WHOLE):
        run.fail(f"not all copies {WHOLE:g} s after {server} was killed at the end: {run.shards()}")
