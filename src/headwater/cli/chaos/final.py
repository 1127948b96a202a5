"""The end of a run: the sums, read from the primaries, and once more after a backup has taken over."""

from __future__ import annotations

import time

import torch

import headwater
from headwater.cli.chaos.cluster import Cluster
from headwater.cli.chaos.drill import WHOLE, Drill
from headwater.cli.chaos.ledger import WIDTHS, Verdict, judge
from headwater.cli.chaos.monitor import Monitor
from headwater.cli.chaos.pusher import ballast_table, ledger_table, model_table
from headwater.client import DenseTable
from headwater.errors import HeadwaterError

PATIENCE = 30.0


def examine(drill: Drill, cluster: Cluster, monitor: Monitor) -> Verdict:
    """Compare the sums with the ledgers, and the copies with one another."""
    try:
        with headwater.connect(role="reader", timeout=PATIENCE) as client:
            table = client.table(ledger_table(cluster.mode, cluster.workers))
            pages, shard_of = _read(table)
            verdict = judge(drill.ledgers.values(), pages, shard_of)
            other = client.table(model_table() if cluster.mode == "bulk" else ballast_table(cluster.mode))
            other.pull().wait()
            other.wait()
            rest = {name: value.clone() for name, value in other.values.items()}
        if cluster.mode != "bulk":
            _weigh(drill, rest)
        for i in range(len(cluster.of("server"))):
            _compare_copies(
                drill, cluster, monitor, f"s{i}", pages | {1000 + k: v for k, v in enumerate(rest.values())}
            )
    except HeadwaterError as error:
        drill.fail(f"the sums cannot be read: {error.code}: {error}")
        return Verdict(0, 0, ())
    drill.note(f"lost: {verdict.lost}, doubled: {verdict.doubled}")
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


def _weigh(drill: Drill, ballast: dict[str, torch.Tensor]) -> None:
    """Each element of the ballast counts the pushes of all workers."""
    sure = sum(len(ledger.acknowledged("ballast")) for ledger in drill.ledgers.values())
    most = sure + sum(len(ledger.unknown("ballast")) for ledger in drill.ledgers.values())
    for name, value in ballast.items():
        low, high = float(value.min()), float(value.max())
        if low < sure or high > most:
            drill.fail(f"ballast {name}: between {low:.0f} and {high:.0f} everywhere, of {sure} to {most} pushes")


def _compare_copies(
    drill: Drill, cluster: Cluster, monitor: Monitor, server: str, before: dict[int, torch.Tensor]
) -> None:
    """Kill a server: what its backups serve must be the same to the last bit."""
    begun = time.monotonic()
    cluster.kill(server)
    with headwater.connect(role="reader", timeout=PATIENCE) as client:
        pages, _ = _read(client.table(ledger_table(cluster.mode, cluster.workers)))
        other = client.table(model_table() if cluster.mode == "bulk" else ballast_table(cluster.mode))
        other.pull().wait()
        other.wait()
        after = pages | {1000 + k: v.clone() for k, v in enumerate(other.values.values())}
    different = [k for k, value in before.items() if not torch.equal(value, after[k])]
    if different:
        drill.fail(f"without {server}, the copies of tensors {different} differ from what the primaries had")
    cluster.start(server)
    if not drill.wait_whole(begun, WHOLE):
        drill.fail(f"not all copies {WHOLE:g} s after {server} was killed at the end: {drill.shards()}")
