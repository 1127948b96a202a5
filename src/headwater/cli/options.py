"""Options that several commands share: what a cluster is made of, and which one is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Shards = Annotated[int | None, typer.Option(min=1, help="Slices of every table. Default: as many as servers.")]
Replicas = Annotated[
    int, typer.Option("--replicas", "-r", min=1, help="Copies of every shard; with 2 or more a server may die.")
]
MinCopies = Annotated[int, typer.Option(min=1, help="Block rather than go on with fewer copies of a shard than this.")]
Ack = Annotated[
    Literal["memory", "disk"],
    typer.Option(help="memory: what is acknowledged is in every copy's memory; disk: in their logs too."),
]
State = Annotated[
    Path | None,
    typer.Option(help="Folder of what the coordinator remembers (and logs); with it, the coordinator may die."),
]
Snapshots = Annotated[Path | None, typer.Option(help="Folder that snapshots go to.")]
SnapshotEvery = Annotated[float | None, typer.Option(min=0.1, help="Seconds between two snapshots.")]
Restore = Annotated[Path | None, typer.Option(help="Begin with this snapshot, or with the newest in this folder.")]

Address = Annotated[str | None, typer.Option(help="Default: HEADWATER_ADDRESS, or your cluster here.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the cluster's answer.")]
