"""``headwater bench dense``: one large tensor, pushed, applied and pulled by one worker.

local and inproc: beside the same fused step alone (in a process with as many threads as the servers have together),
and beside a Gloo all-reduce between two ranks plus that step. tcp: beside a raw socket that carries the same bytes
there and back.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator

import torch

import headwater
from headwater_bench.child import Child
from headwater_bench.cluster import connected, server_threads
from headwater_bench.gloo import GlooPair
from headwater_bench.kernel import OPTIMIZERS
from headwater_bench.options import MEBIBYTE, Options, Transport
from headwater_bench.report import Figure, figure
from headwater_bench.sockets import RawSocket
from headwater_bench.statistics import Measure, interleave, median_of, median_ratio

ROUNDS = 30
INNER = 3
GRADIENT = 1e-3


def measure(options: Options) -> list[Figure]:
    """The figures of every transport asked for."""
    found = []
    for transport in options.transports():
        found += _tcp(options) if transport == "tcp" else _same_host(options, transport)
    return found


# ---- Headwater's side ----------------------------------------------------------------------------


class DenseWorker:
    """Dense tables under each optimizer, and what a round trip of one costs the worker.

    One with the default check for NaN and Inf, one that checks nothing, as the kernel alone does not either.
    """

    def __init__(self, client: headwater.Client, size: int) -> None:
        self._tables = {name: _declare(client, name, size, "error") for name in OPTIMIZERS}
        self._unchecked = {name: _declare(client, name, size, "allow") for name in OPTIMIZERS}
        self._mine = torch.full((size // 4,), GRADIENT)
        self._out = torch.empty(size // 4)
        self._steps = dict.fromkeys(OPTIMIZERS, 0)

    def in_place(self, optimizer: str) -> float:
        """Seconds of push + apply + pull. The gradient lies in the table's buffer; the values are live."""
        self._steps[optimizer] += 1
        return _in_place(self._tables[optimizer])

    def unchecked(self, optimizer: str) -> float:
        """``in_place`` with ``nonfinite="allow"``."""
        return _in_place(self._unchecked[optimizer])

    def copied(self, optimizer: str) -> float:
        """Seconds of the same with the gradient copied from the caller's tensor and the values to another."""
        table = self._tables[optimizer]
        self._steps[optimizer] += 1
        start = time.perf_counter()
        table.push(self._mine)
        table.pull(out=self._out)
        return time.perf_counter() - start

    def check(self) -> None:
        """Every step was applied: plain SGD from zero with a constant gradient tells how often."""
        expected = -OPTIMIZERS["SGD"][1]["lr"] * GRADIENT * self._steps["SGD"]
        wrong = (self._tables["SGD"].pull() - expected).abs().max().item()
        if wrong > abs(expected) * 1e-3:
            raise headwater.InternalError(f"the benchmark's values are off by {wrong:g}: not every step was applied")


def _in_place(table: headwater.Dense) -> float:
    start = time.perf_counter()
    table.push(table.gradient)
    table.pull(out=table.values)
    return time.perf_counter() - start


def _declare(client: headwater.Client, optimizer: str, size: int, nonfinite: str) -> headwater.Dense:
    kind, hyper = OPTIMIZERS[optimizer]
    table = client.dense(
        f"bench-{optimizer}-{nonfinite}",
        (size // 4,),
        optimizer=kind,
        sync=headwater.Bulk(),
        nonfinite=nonfinite,
        **hyper,
    )
    table.gradient.fill_(GRADIENT)
    return table


@contextlib.contextmanager
def _worker(transport: Transport, options: Options) -> Iterator[DenseWorker]:
    with connected(transport, options.servers) as client:
        worker = DenseWorker(client, options.size * MEBIBYTE)
        yield worker
        worker.check()


def _kernel(options: Options) -> Child:
    threads = server_threads(options.servers) * options.servers
    sizes = [options.size * MEBIBYTE // 4]
    return Child("kernel", threads=threads, sizes=sizes, optimizers=list(OPTIMIZERS))


def _steps(kernel: Child, optimizer: str) -> Measure:
    return lambda: statistics.median(kernel.ask("step", optimizer=optimizer, times=INNER))


# ---- the same host ---------------------------------------------------------------------------------


def _same_host(options: Options, transport: Transport) -> list[Figure]:
    found = []
    with contextlib.ExitStack() as stack:
        options.note(f"dense {transport}: starting the servers, the kernel's process and two Gloo ranks")
        worker = stack.enter_context(_worker(transport, options))
        kernel = stack.enter_context(_kernel(options))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        gloo = GlooPair(folder, options.size * MEBIBYTE)
        stack.callback(gloo.close)
        for optimizer in OPTIMIZERS:
            options.note(f"dense {transport}: {optimizer}")
            measures: dict[str, Measure] = {
                "ours": median_of(lambda name=optimizer: worker.in_place(name), INNER),  # type: ignore[misc]
                "kernel": _steps(kernel, optimizer),
                "unchecked": median_of(lambda name=optimizer: worker.unchecked(name), INNER),  # type: ignore[misc]
                "copied": median_of(lambda name=optimizer: worker.copied(name), INNER),  # type: ignore[misc]
                "gloo": lambda: statistics.median(gloo.all_reduce(INNER)),
            }
            found += same_host_figures(transport, optimizer, interleave(measures, options.rounds_or(ROUNDS)))
    return found


def same_host_figures(transport: str, optimizer: str, seconds: dict[str, list[float]]) -> list[Figure]:
    """Figures from seconds per round of ``ours``, ``unchecked``, ``copied``, ``kernel`` and ``gloo``."""
    name = f"{transport} {optimizer}"
    ours, kernel = seconds["ours"], seconds["kernel"]
    both = [a + b for a, b in zip(seconds["gloo"], kernel, strict=True)]
    alone = statistics.median(kernel) * 1e3
    return [
        figure("dense", f"{name} push + apply + pull", statistics.median(ours) * 1e3, "ms", alone),
        figure("dense", f"{name} time / kernel alone", median_ratio(ours, kernel), "×", 1.0),
        figure("dense", f"{name} unchecked time / kernel alone", median_ratio(seconds["unchecked"], kernel), "×", 1.0),
        figure("dense", f"{name} copied in and out", statistics.median(seconds["copied"]) * 1e3, "ms", alone),
        figure("dense", f"{name} Gloo all-reduce + step", statistics.median(both) * 1e3, "ms"),
        figure("dense", f"{name} speed-up over Gloo + step", median_ratio(both, ours), "×", median_ratio(both, kernel)),
    ]


# ---- tcp -------------------------------------------------------------------------------------------


def _tcp(options: Options) -> list[Figure]:
    found = []
    with contextlib.ExitStack() as stack:
        options.note("dense tcp: starting the servers, the kernel's process and a raw socket")
        worker = stack.enter_context(_worker("tcp", options))
        kernel = stack.enter_context(_kernel(options))
        raw = RawSocket("tcp", options.size * MEBIBYTE)
        stack.callback(raw.close)
        for optimizer in OPTIMIZERS:
            options.note(f"dense tcp: {optimizer}")
            measures: dict[str, Measure] = {
                "ours": median_of(lambda name=optimizer: worker.in_place(name), INNER),  # type: ignore[misc]
                "raw": lambda: statistics.median(raw.round_trips(INNER)),
                "kernel": _steps(kernel, optimizer),
            }
            found += tcp_figures(optimizer, options.size, interleave(measures, options.rounds_or(ROUNDS)))
    return found


def tcp_figures(optimizer: str, size: int, seconds: dict[str, list[float]]) -> list[Figure]:
    """Figures from seconds per round of ``ours``, ``raw`` (the socket) and ``kernel``; ``size`` in MB of 2**20 bytes.

    *Without the kernel* takes the kernel's own time, measured alone in the same round, off ours. Blocks are applied
    while others travel, so that part of it was hidden already: this figure may exceed 1.
    """
    ours, raw, kernel = seconds["ours"], seconds["raw"], seconds["kernel"]
    bare = [max(a - b, 1e-9) for a, b in zip(ours, kernel, strict=True)]
    middle = {side: statistics.median(found) for side, found in seconds.items()}
    moved = 2 * size * MEBIBYTE / 1e9
    name = f"tcp {optimizer}"
    return [
        figure("dense", f"{name} push + apply + pull", middle["ours"] * 1e3, "ms", middle["raw"] * 1e3),
        figure("dense", f"{name} bytes both ways", moved / middle["ours"], "GB/s", moved / middle["raw"]),
        figure("dense", f"{name} throughput / raw socket, without the kernel", median_ratio(raw, bare), "×", 1.0),
        figure("dense", f"{name} throughput / raw socket, with the kernel", median_ratio(raw, ours), "×", 1.0),
        figure("dense", f"{name} kernel alone", middle["kernel"] * 1e3, "ms"),
    ]
