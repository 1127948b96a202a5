"""``headwater bench small``: 1 KB pushed and pulled, beside the same bytes bouncing over a bare socket."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch

import headwater
from headwater.launch import cores
from headwater_bench.cluster import connected
from headwater_bench.options import Options, Transport
from headwater_bench.report import Figure, figure
from headwater_bench.sockets import RawSocket
from headwater_bench.statistics import percentile

ROUNDS = 20
BYTES = 1024
INNER = 200
Placement = Literal["two cores", "one core", "unpinned"]
PLACEMENTS: tuple[Placement, ...] = ("two cores", "one core", "unpinned")


def measure(options: Options) -> list[Figure]:
    """The figures of every transport asked for: on two cores, on one, and as the kernel's scheduler places them."""
    found = []
    for transport in options.transports():
        for placement in PLACEMENTS if cores() > 1 else ("one core",):
            options.note(f"small {transport}, {placement}")
            name = transport if placement == "two cores" else f"{placement}, {transport}"
            found += small_figures(name, *_pairs(options, transport, placement))
    return found


def _pairs(options: Options, transport: Transport, placement: Placement) -> tuple[list[list[float]], list[list[float]]]:
    """Ours and the bare socket's, a list of ``INNER`` round trips per round, in turns.

    Both pairs are placed alike: client and server on two cores, as when both have work; sharing one core, where a
    bare socket needs no wake-up at all and what is left is the interpreter's time; or unpinned.
    """
    ours: list[list[float]] = []
    bare: list[list[float]] = []
    with connected(transport, options.servers) as client:
        table = client.dense("bench-small", (BYTES // 4,), optimizer=torch.optim.SGD, sync=headwater.Bulk(), lr=0.1)
        raw = RawSocket("tcp" if transport == "tcp" else "local", BYTES)
        every = _pin(placement, [s.pid for s in client.status().servers if s.pid] + [raw.pid])
        try:
            sides: list[tuple[list[list[float]], Callable[[], list[float]]]] = [
                (ours, lambda: _round_trips(table)),
                (bare, lambda: raw.round_trips(INNER)),
            ]
            for turn in range(1 + options.rounds_or(ROUNDS)):
                for kept, side in sides if turn % 2 else sides[::-1]:
                    seconds = side()
                    if turn:  # the first round is the warm-up
                        kept.append(seconds)
        finally:
            raw.close()
            os.sched_setaffinity(0, every)
    return ours, bare


def _pin(placement: Placement, others: list[int]) -> set[int]:
    """This process on one core, ``others`` on another or the same; returns the cores it had."""
    every = os.sched_getaffinity(0)
    if placement == "unpinned":
        return every
    first, *rest = sorted(every)
    second = {rest[0] if placement == "two cores" else first}
    os.sched_setaffinity(0, {first})
    for pid in others:
        os.sched_setaffinity(pid, second)
    return every


def _round_trips(table: headwater.Dense) -> list[float]:
    gradient = torch.full((BYTES // 4,), 1e-3)
    found = []
    for _ in range(INNER):
        start = time.perf_counter()
        table.push_pull(gradient)
        found.append(time.perf_counter() - start)
    return found


def small_figures(transport: str, ours: list[list[float]], bare: list[list[float]]) -> list[Figure]:
    """Figures from the round trips of each round, in seconds."""

    def over_rounds(rounds: list[list[float]], share: float) -> list[float]:
        return [percentile(one, share) for one in rounds]

    def micros(rounds: list[list[float]], share: float) -> float:
        return statistics.median(over_rounds(rounds, share)) * 1e6

    ratios = [a / b for a, b in zip(over_rounds(ours, 0.5), over_rounds(bare, 0.5), strict=True)]
    return [
        figure("small", f"{transport} p50", micros(ours, 0.5), "µs", micros(bare, 0.5)),
        figure("small", f"{transport} p99", micros(ours, 0.99), "µs", micros(bare, 0.99)),
        figure("small", f"{transport} p50 / raw socket", statistics.median(ratios), "×", 1.0),
    ]
