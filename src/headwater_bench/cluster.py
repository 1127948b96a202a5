"""A cluster and a client for a benchmark: real processes, except for ``inproc``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import headwater
from headwater.cli.environment import exported as exported
from headwater.launch import Launcher, Shape, cores
from headwater_bench.options import Transport


def server_threads(servers: int) -> int:
    """The threads of one server: what the launcher gives it."""
    return max(1, cores() // servers)


def worker_environment(launcher: Launcher, rank: int, world: int, transport: Transport = "local") -> dict[str, str]:
    """What a worker of this cluster finds in its environment."""
    forced = {"HEADWATER_TRANSPORT": "tcp"} if transport == "tcp" else {}
    return launcher.environment() | {"HEADWATER_RANK": str(rank), "HEADWATER_WORLD_SIZE": str(world)} | forced


def launcher(shape: Shape | int, transport: Transport = "local", **options: Any) -> Launcher:
    """A cluster whose servers reach each other as its workers do. Nobody's ``headwater status`` finds it."""
    forced = {"HEADWATER_TRANSPORT": "tcp"} if transport == "tcp" else {}
    return Launcher(shape, advertise=False, env=forced, **options)


@contextlib.contextmanager
def connected(transport: Transport, servers: int, replicas: int = 1) -> Iterator[headwater.Client]:
    """The only worker of a cluster of ``servers`` servers, which ends with the block."""
    if transport == "inproc":
        with headwater.connect("inproc://", rank=0, world=1, servers=servers) as client:
            yield client
        return
    with (
        launcher(Shape(servers, replicas=replicas), transport) as cluster,
        exported(worker_environment(cluster, 0, 1, transport)),
        headwater.connect() as client,
    ):
        yield client
