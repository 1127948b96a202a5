"""What is counted: a small push and pull, a bulk step of two workers, a lease. All on public names, as a user's."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator

import torch

import headwater
from headwater.cli.environment import exported
from headwater.server.__main__ import main as serve
from headwater_bench.guard.counting import Counts, Profile, count
from headwater_bench.guard.lockstep import Lockstep

SMALL = 256  # float32 elements: 1 KB
LARGE = 600_000  # float32 elements: a table that lies on both shards
SILENCE = 3600.0  # seconds without a sign of life until anyone is given up: no heartbeat falls due in between

Found = tuple[Counts, list[tuple[str, float]]]


def bulk_step(profile: Profile) -> Found:
    """Two workers push, both shards take the step, both workers wait for it: direct calls, no sockets."""
    address = "inproc://guard"
    spec = headwater.DenseSpec(
        "bulk",
        (headwater.ParameterSpec("w", (LARGE,)),),
        headwater.OptimizerSpec("SGD", ({"lr": 0.1},)),
        headwater.Bulk(),
    )
    tables: dict[int, headwater.DenseTable] = {}

    def join(rank: int) -> None:
        client = headwater.connect(address, rank=rank, world=2, servers=2)
        tables[rank] = client.table(spec)
        tables[rank].gradients["w"].fill_(1e-3)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def step() -> None:
        tickets = [tables[rank].push_step(["w"], want=True) for rank in range(2)]
        for ticket in tickets:
            ticket.wait()

    return count(step, profile)


def lease(profile: Profile) -> Found:
    """A reader leases the newest version, takes a tensor of it, and lets go."""
    address = "inproc://guard-lease"
    with headwater.connect(address, rank=0, world=1, servers=2) as client:
        table = client.dense("model", (LARGE,), optimizer=torch.optim.SGD, sync=headwater.Bulk(), lr=0.1)
        table.push(table.gradient).wait()
        client.publish([table], "one", model="model").wait()
        with headwater.reader("model", address) as reader:

            def operation() -> None:
                weights = reader.lease()
                weights[next(iter(weights))]
                weights.release()

            return count(operation, profile)


def small_push(profile: Profile) -> Found:
    """1 KB pushed, applied and pulled over a unix socket and shared memory: client and server in lockstep."""
    lockstep = Lockstep()
    profile.watch()
    with lockstep.installed(), _cluster() as address, exported({"HEADWATER_ADDRESS": address}):
        client = headwater.connect(rank=0, world=1)
        table = client.dense("small", (SMALL,), optimizer=torch.optim.SGD, sync=headwater.Bulk(), lr=0.1)
        gradient = torch.full((SMALL,), 1e-3)
        table.push_pull(gradient)
        with lockstep.on():
            return count(lambda: _round_trip(table, gradient), profile)


def _round_trip(table: headwater.Dense, gradient: torch.Tensor) -> None:
    table.push_pull(gradient)


@contextlib.contextmanager
def _cluster() -> Iterator[str]:
    """A coordinator and a server as threads of this process, which live as long as it does."""
    logging.basicConfig(level=logging.ERROR)
    with exported({"HEADWATER_TOKEN": "guard"}):
        address = _start(["--role", "coordinator", "--silence", str(SILENCE), "--worker-silence", str(SILENCE)])
        _start(["--role", "server", "--coordinator", address])
        yield address


def _start(arguments: list[str]) -> str:
    """Returns the address that it listens on."""
    ready, write = os.pipe()
    threading.Thread(target=serve, args=([*arguments, "--ready-fd", str(write)],), daemon=True).start()
    with os.fdopen(ready, "rb") as file:
        address: str = json.loads(file.readline())["address"]
        return address


WORKLOADS: dict[str, Callable[[Profile], Found]] = {
    # The small push last: its server takes over settings of this process.
    "bulk step": bulk_step,
    "lease": lease,
    "small push": small_push,
}
