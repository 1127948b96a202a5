"""``headwater bench memory``: what the servers hold, beside what the table needs.

*Needed*: parameters + optimizer slots + one gradient. *RSS*: ``VmRSS`` of all servers, less that of as many bare
interpreters. *Bare* is ``bare.py``: a process that imported what a server imports, torch included, and ran one AdamW
step on 1,024 elements. Shared pages count: a gradient buffer that a server has touched is in its RSS, whoever owns it.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import headwater
from headwater.launch import Launcher
from headwater_bench.child import Child
from headwater_bench.cluster import server_threads, worker_environment
from headwater_bench.kernel import OPTIMIZERS
from headwater_bench.options import MEBIBYTE, Options
from headwater_bench.report import Figure, figure
from headwater_bench.statistics import slope

STEPS = 1000
SAMPLES = 20
WARM_UP = 20
WORLDS = (1, 2, 3)
COPIES = 4
"""Times the table's own size: values, AdamW's two slots, one gradient."""


def measure(options: Options) -> list[Figure]:
    """The figures for 1, 2 and 3 workers; ``rounds`` is the number of steps."""
    bare = _bare(options.servers)
    needed = COPIES * options.size * MEBIBYTE
    samples = {}
    for world in WORLDS:
        options.note(f"memory: {world} worker(s), {options.rounds_or(STEPS)} steps")
        samples[world] = _watch(options, world)
    return memory_figures(samples, bare * options.servers, needed, options.rounds_or(STEPS))


def resident(pid: int | str) -> int:
    """``VmRSS`` of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has ended")


class MemoryWorker:
    """The child's side: one worker that pushes and pulls a dense table of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        torch.set_num_threads(1)
        kind, hyper = OPTIMIZERS["AdamW"]
        self._client = headwater.connect()
        self._table = self._client.dense("bench", (size // 4,), optimizer=kind, sync=headwater.Bulk(), **hyper)
        self._table.gradient.fill_(1e-3)

    def steps(self, times: int) -> int:
        for _ in range(times):
            self._table.push(self._table.gradient)
            self._table.pull(out=self._table.values)
        return times


def _bare(servers: int) -> int:
    """Bytes of one bare interpreter with a server's number of threads: the median of three."""
    environment = os.environ | {"OMP_NUM_THREADS": str(server_threads(servers)), "OMP_WAIT_POLICY": "passive"}
    # By path and with -P: as a module it would bring the command line's own imports along.
    command = [sys.executable, "-P", str(Path(__file__).with_name("bare.py"))]
    return statistics.median_low(int(subprocess.check_output(command, env=environment)) for _ in range(3))


def _watch(options: Options, world: int) -> list[int]:
    """Bytes of all servers together after each of ``SAMPLES`` parts of the run."""
    part = max(1, options.rounds_or(STEPS) // SAMPLES)
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(Launcher(options.servers, advertise=False))
        workers = [
            stack.enter_context(
                Child(
                    "pusher",
                    environment=worker_environment(launcher, rank, world),
                    size=options.size * MEBIBYTE,
                )
            )
            for rank in range(world)
        ]
        _all_steps(workers, WARM_UP)
        found = []
        for _ in range(SAMPLES):
            _all_steps(workers, part)
            found.append(sum(resident(server.pid) for server in launcher.servers))
    return found


def _all_steps(workers: list[Child], times: int) -> None:
    for worker in workers:
        worker.tell("steps", times=times)
    for worker in workers:
        worker.answer()


def memory_figures(samples: dict[int, list[int]], bare: int, needed: int, steps: int) -> list[Figure]:
    """Figures from the servers' bytes over a run of ``steps``, by number of workers; all sizes in bytes."""
    middle = {world: statistics.median(found) for world, found in samples.items()}
    found = [
        figure("memory", "bare interpreters, all servers", bare / MEBIBYTE, "MB"),
        figure("memory", "needed: parameters + slots + one gradient", needed / MEBIBYTE, "MB"),
    ]
    for world, held in samples.items():
        name = f"{world} worker{'s' if world > 1 else ''}"
        clocks = [(i + 1) * steps / len(held) for i in range(len(held))]
        growth = slope(clocks, held) * 1000 / needed * 100
        ours = middle[world] - bare
        found += [
            figure("memory", f"{name} RSS over bare", ours / MEBIBYTE, "MB", needed / MEBIBYTE),
            figure("memory", f"{name} RSS / needed", ours / needed, "×", 1.0),
            figure("memory", f"{name} growth over 1,000 steps", growth, "% of needed", 0.0),
        ]
    first, last = min(samples), max(samples)
    if first != last:
        more = (middle[last] - middle[first]) / needed * 100
        found.append(figure("memory", f"{last} workers more than {first} worker", more, "% of needed", 0.0))
    return found
