"""The other processes of ``bench snapshot``: who trains while it is written, and who reads it back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

import headwater
from headwater.layout.dense import layout
from headwater.server.snapshots.restore import Snapshot
from headwater.server.tables.dense import DenseShard
from headwater.server.tables.dense.saved import load
from headwater_bench.kernel import OPTIMIZERS

TABLE = "bench-snapshot"


def declare(client: headwater.Client, elements: int) -> headwater.Dense:
    """The table that is saved: values and AdamW's two slots."""
    kind, hyper = OPTIMIZERS["AdamW"]
    return client.dense(TABLE, (elements,), optimizer=kind, sync=headwater.Bulk(), **hyper)


class Steady:
    """A worker that trains from ``begin`` to ``end``: it pushes, waits, and pushes again."""

    def __init__(self, elements: int) -> None:
        torch.set_num_threads(1)
        self._table = declare(headwater.connect(), elements)
        self._table.gradient.fill_(1e-3)
        self._stop = threading.Event()
        self._moments: list[float] = []
        self._thread: threading.Thread | None = None
        self._push()  # the slots are allocated by the first step

    def begin(self) -> None:
        self._stop.clear()
        self._moments = [time.monotonic()]
        self._thread = threading.Thread(target=self._run, name="headwater-bench", daemon=True)
        self._thread.start()

    def end(self) -> list[float]:
        """When each step was acknowledged; first, when it began."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        return self._moments

    def _run(self) -> None:
        while not self._stop.is_set():
            self._push()
            self._moments.append(time.monotonic())

    def _push(self) -> None:
        self._table.push(self._table.gradient).wait()


class Loader:
    """One server's share of a restore, without a server: shard ``shard`` of ``shards``."""

    def __init__(self, shard: int, shards: int) -> None:
        self._shard, self._shards = shard, shards

    def load(self, folder: str) -> int:
        """Memory made, values and optimizer state read and checked; returns the bytes of the values."""
        with Snapshot(Path(folder)) as snapshot:
            spec = snapshot.table(TABLE).dense
            found = layout(spec, self._shards)
            size = found.sizes[self._shard]
            memory = torch.zeros(size + 64, dtype=torch.uint8)
            start = -memory.data_ptr() % 64
            dense = DenseShard(spec, found.segments[self._shard], size, memory[start : start + size])
            load(snapshot, dense)
            return size
