"""``headwater bench many``: 1,000 tensors of 1 KB in one table, through ``Table.push``, ``step`` and ``wait``."""

from __future__ import annotations

import statistics
import time

import headwater
from headwater_bench.child import Child
from headwater_bench.cluster import connected, server_threads
from headwater_bench.kernel import OPTIMIZERS
from headwater_bench.options import Options
from headwater_bench.report import Figure, figure
from headwater_bench.statistics import Measure, interleave, median_of

ROUNDS = 30
INNER = 3
TENSORS = 1000
ELEMENTS = 256
OPTIMIZER = "AdamW"


def measure(options: Options) -> list[Figure]:
    """The figures of every transport asked for."""
    found = []
    threads = server_threads(options.servers) * options.servers
    with (
        Child("kernel", threads=threads, sizes=[ELEMENTS] * TENSORS, optimizers=[OPTIMIZER]) as kernel,
        Child("kernel", threads=threads, sizes=[ELEMENTS * TENSORS], optimizers=[OPTIMIZER]) as flat,
    ):
        for transport in options.transports():
            options.note(f"many {transport}")
            with connected(transport, options.servers) as client:
                worker = ManyWorker(client)
                measures: dict[str, Measure] = {
                    "ours": median_of(worker.at_once, INNER),
                    "kernel": steps(kernel),
                    "flat": steps(flat),
                    "single": median_of(worker.one_by_one, INNER),
                }
                found += many_figures(transport, interleave(measures, options.rounds_or(ROUNDS)))
    return found


def steps(kernel: Child) -> Measure:
    """Seconds of a step of the kernel alone."""
    return lambda: statistics.median(kernel.ask("step", optimizer=OPTIMIZER, times=INNER))


class ManyWorker:
    """A table of many small tensors."""

    def __init__(self, client: headwater.Client) -> None:
        self._names = [f"p{i:04}" for i in range(TENSORS)]
        self._table = client.table(_spec(self._names))
        for gradient in self._table.gradients.values():
            gradient.fill_(1e-3)

    def at_once(self) -> float:
        """Seconds of a step whose gradients leave in one push."""
        start = time.perf_counter()
        self._table.push(self._names)
        self._table.step()
        self._table.wait()
        return time.perf_counter() - start

    def one_by_one(self) -> float:
        """Seconds of a step with a push for every tensor."""
        start = time.perf_counter()
        for name in self._names:
            self._table.push((name,))
        self._table.step()
        self._table.wait()
        return time.perf_counter() - start


def _spec(names: list[str]) -> headwater.DenseSpec:
    return headwater.DenseSpec(
        name="bench-many",
        parameters=tuple(headwater.ParameterSpec(name, (ELEMENTS,)) for name in names),
        optimizer=headwater.OptimizerSpec(OPTIMIZER, ({**OPTIMIZERS[OPTIMIZER][1]},)),
        sync=headwater.Bulk(),
    )


def many_figures(transport: str, seconds: dict[str, list[float]]) -> list[Figure]:
    """Figures from seconds per step of ``ours``, ``single`` (a push per tensor), ``kernel`` and ``flat``.

    The ceiling is ``flat``: the fused step on one tensor of all the elements. ``kernel`` is the same step on as many
    tensors, which is what a torch user runs; Headwater's tables are flat and may be faster.
    """
    per_tensor = {side: statistics.median(found) / TENSORS * 1e6 for side, found in seconds.items()}
    alone = per_tensor["flat"]
    return [
        figure("many", f"{transport} time per tensor", per_tensor["ours"], "µs", alone),
        figure("many", f"{transport} time per tensor, a push for each", per_tensor["single"], "µs", alone),
        figure("many", f"{transport} torch's fused step on the tensors", per_tensor["kernel"], "µs", alone),
    ]
