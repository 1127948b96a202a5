"""``headwater bench replicas``: what a second copy of every shard costs: a training step, and a push of 16 MB.

Two clusters stand side by side, one with one copy and one with two, and take turns in phases. What the second copy
cannot cost less than on this machine is the ceiling: the backup runs the optimizer's kernel once more on the same
cores, and over TCP the gradient goes through one more socket.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

import headwater
from headwater.launch import Shape
from headwater_bench.child import Child
from headwater_bench.cluster import connected, launcher, server_threads
from headwater_bench.kernel import OPTIMIZERS
from headwater_bench.options import MEBIBYTE, Options, Transport
from headwater_bench.report import Figure, figure
from headwater_bench.sockets import RawSocket
from headwater_bench.statistics import Measure, interleave, median_of, median_ratio
from headwater_bench.step import BATCHES, LENGTH, MODEL, SIZE, trainers

ROUNDS = 8
PHASE = 8
PUSH_ROUNDS = 20
INNER = 5
PUSH = 16
"""MB of 2**20 bytes."""
COPIES = (1, 2)


def measure(options: Options, model: str = MODEL, size: str = SIZE) -> list[Figure]:
    """The figures of every transport asked for."""
    found = []
    for transport in options.transports():
        found += _steps(options, transport, model, size)
        found += _pushes(options, transport)
    return found


# ---- a training step ---------------------------------------------------------------------------------


def _steps(options: Options, transport: Transport, model: str, size: str) -> list[Figure]:
    found = []
    with contextlib.ExitStack() as stack:
        options.note(f"replicas {transport}: starting two clusters with two workers each")
        workers = {copies: stack.enter_context(_workers(options, transport, copies, model, size)) for copies in COPIES}
        parameters = workers[1][0].ask("parameters")
        extra = stack.enter_context(_extra(options, transport, parameters, "AdamW"))
        for batch in BATCHES:
            options.note(f"replicas {transport}: batch {batch}")
            measures = {str(copies): _phase(workers[copies], batch) for copies in COPIES} | {"extra": extra}
            found += step_figures(transport, batch, interleave(measures, options.rounds_or(ROUNDS), warmup=1))
    return found


@contextlib.contextmanager
def _workers(options: Options, transport: Transport, copies: int, model: str, size: str) -> Iterator[list[Child]]:
    """Two workers of a cluster of their own, with the model."""
    with contextlib.ExitStack() as stack:
        shape = Shape(max(COPIES[-1], options.servers), replicas=copies)
        cluster = stack.enter_context(launcher(shape, transport))
        yield trainers(stack, cluster, transport, model=model, size=size, kinds=["headwater"])


def _phase(workers: list[Child], batch: int) -> Measure:
    """Seconds per step of a phase: the mean of the workers'."""

    def run() -> float:
        for worker in workers:
            worker.tell("phase", kind="headwater", steps=PHASE, batch=batch, length=LENGTH)
        return statistics.fmean([worker.answer() for worker in workers])

    return run


@contextlib.contextmanager
def _extra(options: Options, transport: Transport, elements: int, optimizer: str) -> Iterator[Measure]:
    """Seconds of what a second copy does at least: the kernel once more, and over TCP the bytes once more."""
    threads = server_threads(options.servers) * options.servers
    with contextlib.ExitStack() as stack:
        kernel = stack.enter_context(Child("kernel", threads=threads, sizes=[elements], optimizers=[optimizer]))
        carry: Callable[[], float] = float
        if transport == "tcp":
            raw = RawSocket("tcp", 4 * elements)
            stack.callback(raw.close)
            carry = lambda: statistics.median(raw.round_trips(3)) / 2  # noqa: E731
        yield lambda: statistics.median(kernel.ask("step", optimizer=optimizer, times=3)) + carry()


def step_figures(transport: str, batch: int, seconds: dict[str, list[float]]) -> list[Figure]:
    """Figures from seconds per step with ``1`` and ``2`` copies and of the ``extra`` work, by round."""
    name = f"{transport} batch {batch}"
    one, two, extra = seconds["1"], seconds["2"], seconds["extra"]
    least = [a + b for a, b in zip(one, extra, strict=True)]
    return [
        figure("replicas", f"{name} step, 1 replica", _ms(one), "ms"),
        figure("replicas", f"{name} step, 2 replicas", _ms(two), "ms", _ms(least)),
        figure("replicas", f"{name} 2 replicas / 1", median_ratio(two, one), "×", median_ratio(least, one)),
    ]


def _ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


# ---- a push ------------------------------------------------------------------------------------------


def _pushes(options: Options, transport: Transport) -> list[Figure]:
    elements = PUSH * MEBIBYTE // 4
    with contextlib.ExitStack() as stack:
        options.note(f"replicas {transport}: {PUSH} MB pushes")
        servers = max(COPIES[-1], options.servers)
        tables = {copies: _table(stack.enter_context(connected(transport, servers, copies))) for copies in COPIES}
        extra = stack.enter_context(_extra(options, transport, elements, "SGD"))
        measures: dict[str, Measure] = {
            str(copies): median_of(lambda table=table: _push(table), INNER)  # type: ignore[misc]
            for copies, table in tables.items()
        }
        return push_figures(transport, interleave(measures | {"extra": extra}, options.rounds_or(PUSH_ROUNDS)))


def _table(client: headwater.Client) -> headwater.Dense:
    kind, hyper = OPTIMIZERS["SGD"]
    elements = PUSH * MEBIBYTE // 4
    table = client.dense("bench-replicas", (elements,), optimizer=kind, sync=headwater.Bulk(), **hyper)
    table.gradient.copy_(torch.full((elements,), 1e-3))
    return table


def _push(table: headwater.Dense) -> float:
    """Seconds until a push is acknowledged."""
    start = time.perf_counter()
    table.push(table.gradient).wait()
    return time.perf_counter() - start


def push_figures(transport: str, seconds: dict[str, list[float]]) -> list[Figure]:
    """Figures from seconds per acknowledged push with ``1`` and ``2`` copies, and of the ``extra`` work."""
    one, two, extra = seconds["1"], seconds["2"], seconds["extra"]
    least = [a + b for a, b in zip(one, extra, strict=True)]
    name = f"{transport} {PUSH} MB push"
    return [
        figure("replicas", f"{name}, 1 replica", _ms(one), "ms", _ms(extra)),
        figure("replicas", f"{name}, 2 replicas", _ms(two), "ms", _ms(least)),
        figure("replicas", f"{name}, 2 replicas / 1", median_ratio(two, one), "×", median_ratio(least, one)),
    ]
