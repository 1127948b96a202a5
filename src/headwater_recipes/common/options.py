"""Command-line options that all recipes have, with their words of help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Resume = Annotated[bool, typer.Option("--resume", help="Go on with --run, or the newest run.")]
Workers = Annotated[int | None, typer.Option("--workers", "-w", help="Worker processes.")]
Servers = Annotated[int | None, typer.Option("--servers", "-s", help="Servers. Default: 2.")]
Replicas = Annotated[
    int | None,
    typer.Option("--replicas", "-r", help="Copies of every shard; with 2 a server may die. Default: 1."),
]
Shards = Annotated[int | None, typer.Option(help="Slices of the model. Default: as many as servers.")]
MinCopies = Annotated[int | None, typer.Option(help="Block rather than go on with fewer copies.")]
Ack = Annotated[str | None, typer.Option(help="memory, or disk: acknowledge what is in logs. Default: memory.")]
StateFolder = Annotated[
    Path | None, typer.Option(help="Folder of what the coordinator remembers (and logs). Default: a private one.")
]
Snapshots = Annotated[Path | None, typer.Option(help="Folder that the cluster's snapshots go to.")]
SnapshotEvery = Annotated[float | None, typer.Option(help="Seconds between two snapshots.")]
Restore = Annotated[Path | None, typer.Option(help="Begin with the values of this snapshot.")]
Sync = Annotated[str | None, typer.Option(help="bulk, stale:N, async or async:N. Default: bulk.")]
Steps = Annotated[int | None, typer.Option(help="Train for so many steps in all.")]
Seed = Annotated[int | None, typer.Option(help="Of everything that is drawn.")]
Precision = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16: of the workers' matrix products.")]
SaveEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.")]
ValidateEvery = Annotated[int | None, typer.Option(help="Steps between validations.")]
OnlyRank0 = Annotated[
    bool, typer.Option("--only-rank0", help="Of what the workers write show rank 0's alone, and why another fails.")
]
LogEvery = Annotated[int | None, typer.Option(help="Steps between rows of metrics.jsonl.")]


def let_threads_sleep() -> None:
    """Threads of a matrix product that wait for each other sleep, here and in the workers: to be called before torch
    is imported. On a machine with other things to do, say answering from what is trained, spinning costs most of the
    time; on an idle one it gains little.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
