"""``headwater bench snapshot``: 500 MB written while a worker trains, and read back by another number of servers.

The worker does nothing but push, so that every moment of the servers is wanted: the hardest case for who writes beside
it. The ceilings are a plain write with fsync, and a plain read, of as many bytes in the same folder.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import headwater
from headwater.launch import Shape
from headwater.server.snapshots.opened import newest
from headwater.wire import messages as m
from headwater_bench.child import Child
from headwater_bench.cluster import exported, launcher, worker_environment
from headwater_bench.options import MEBIBYTE, Options
from headwater_bench.report import Figure, figure
from headwater_bench.saved import declare
from headwater_bench.statistics import Measure, interleave, median_ratio

SIZE = 500
"""MB of 2**20 bytes: values and AdamW's two slots."""
COPIES = 3
ROUNDS = 5
OTHERS = 3
"""Servers that a snapshot is restored onto; it is taken from ``--servers``, 2."""
CALM = 2.0
CHUNK = 4 * MEBIBYTE


class SnapshotRun(NamedTuple):
    """One snapshot, in seconds: ``steps`` are the moments at which the worker's steps ended."""

    begin: float
    end: float
    pause: float
    nbytes: int
    steps: list[float]
    plain: float


def measure(options: Options, size: int = SIZE, calm: float = CALM) -> list[Figure]:
    """The figures of writing, then those of reading."""
    elements = size * MEBIBYTE // COPIES // 4
    rounds = options.rounds_or(ROUNDS)
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as scratch:
        root = Path(scratch) / "snapshots"
        options.note(f"snapshot: {options.servers} servers, {size} MB, {rounds} snapshots while a worker trains")
        found = write_figures(_write(options, root, elements, rounds, calm))
        options.note(f"snapshot: restored by {OTHERS} servers")
        found += read_figures(_read(root, rounds))
        options.note(f"snapshot: clusters of {OTHERS} servers, with and without it")
        return found + start_figures(_start(root, elements, max(1, rounds // 2)))


# ---- writing -----------------------------------------------------------------------------------------


def _write(options: Options, root: Path, elements: int, rounds: int, calm: float) -> list[SnapshotRun]:
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(launcher(Shape(options.servers, snapshots=root)))
        worker = stack.enter_context(Child("steady", environment=worker_environment(cluster, 0, 1), elements=elements))
        stack.enter_context(exported(cluster.environment()))
        reader = stack.enter_context(headwater.connect(role="reader"))
        return [_take(worker, reader, root, calm) for _ in range(rounds + 1)][1:]  # the first warms up


def _take(worker: Child, reader: headwater.Client, root: Path, calm: float) -> SnapshotRun:
    worker.ask("begin")
    time.sleep(calm)
    begin = time.monotonic()
    taken = reader.ask(m.TakeSnapshot())
    end = time.monotonic()
    time.sleep(calm / 2)
    steps = worker.ask("end")
    assert isinstance(taken, m.SnapshotTaken)
    return SnapshotRun(begin, end, taken.pause, taken.nbytes, steps, plain_write(root.parent / "plain", taken.nbytes))


def plain_write(path: Path, nbytes: int) -> float:
    """Seconds to write so many bytes and to have them on disk."""
    chunk = os.urandom(CHUNK)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        left = nbytes
        while left > 0:
            left -= file.write(chunk[: min(left, CHUNK)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def write_figures(found: Sequence[SnapshotRun]) -> list[Figure]:
    """What a snapshot takes, and what training loses by it."""
    seconds = [taken.end - taken.begin for taken in found]
    plain = statistics.median(taken.plain for taken in found)
    pauses = [100 * taken.pause / s for taken, s in zip(found, seconds, strict=True)]
    seen = [longest(taken) for taken in found]
    shares = [100 * s / whole for s, whole in zip(seen, seconds, strict=True)]
    return [
        figure("snapshot", "size", found[-1].nbytes / MEBIBYTE, "MB"),
        figure("snapshot", "written while training", statistics.median(seconds), "s", plain),
        figure("snapshot", "servers' pause", statistics.median(t.pause for t in found) * 1e3, "ms", 0.0),
        figure("snapshot", "servers' pause / time to write", statistics.median(pauses), "%", 0.0),
        figure("snapshot", "longest step, beyond the usual", statistics.median(seen) * 1e3, "ms", 0.0),
        figure("snapshot", "longest step, beyond the usual / time to write", statistics.median(shares), "%", 0.0),
        figure("snapshot", "steps meanwhile, time / usual", statistics.median(map(slowed, found)), "×", 1.0),
    ]


def longest(taken: SnapshotRun) -> float:
    """By how much the longest step of those that met the snapshot exceeds the longest one before it."""
    calm, meanwhile = _steps(taken)
    return max(0.0, max(meanwhile) - max(calm))


def slowed(taken: SnapshotRun) -> float:
    """The mean step of those that met the snapshot over the median of the others."""
    calm, meanwhile = _steps(taken)
    return statistics.fmean(meanwhile) / statistics.median(calm)


def _steps(taken: SnapshotRun) -> tuple[list[float], list[float]]:
    """Seconds of each step that was over before the snapshot began, and of those that met it."""
    pairs = list(itertools.pairwise(taken.steps))
    calm = [b - a for a, b in pairs if b <= taken.begin]
    return calm, [b - a for a, b in pairs if b > taken.begin and a < taken.end]


# ---- reading -----------------------------------------------------------------------------------------


def _read(root: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of ``read``, ``check`` and ``load`` with the files on disk only, and (``warm …``) in memory."""
    folder = _newest(root)
    with contextlib.ExitStack() as stack:
        loaders = [stack.enter_context(Child("loader", shard=i, shards=OTHERS)) for i in range(OTHERS)]
        warm: dict[str, Measure] = {
            "read": lambda: plain_read(folder),
            "check": lambda: _check(folder),
            "load": lambda: _load(loaders, folder),
        }
        cold = {name: _cold(measure, folder) for name, measure in warm.items()}
        kept = {f"warm {name}": seconds for name, seconds in interleave(warm, rounds).items()}
        return interleave(cold, rounds, warmup=1) | kept


def _newest(root: Path) -> Path:
    with newest(root).snapshot as snapshot:
        return snapshot.folder


def _check(folder: Path) -> float:
    """What the coordinator does with the newest snapshot: read and check all of it."""
    start = time.perf_counter()
    newest(folder).snapshot.close()
    return time.perf_counter() - start


def _load(loaders: Sequence[Child], folder: Path) -> float:
    """What the servers do then, side by side: make memory, read and check what is theirs."""
    start = time.perf_counter()
    for loader in loaders:
        loader.tell("load", folder=str(folder))
    for loader in loaders:
        loader.answer()
    return time.perf_counter() - start


def plain_read(folder: Path) -> float:
    """Seconds to read a snapshot's files into memory, one after the other, with nothing looked at."""
    start = time.perf_counter()
    held = [path.read_bytes() for path in _files(folder)]
    seconds = time.perf_counter() - start
    del held
    return seconds


def _cold(measure: Measure, folder: Path) -> Measure:
    """The same when the kernel has the files on disk only."""

    def run() -> float:
        for path in _files(folder):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return measure()

    return run


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_figures(seconds: dict[str, list[float]]) -> list[Figure]:
    """Figures from seconds per round."""
    found = []
    for prefix, where in (("", "from disk"), ("warm ", "from the page cache")):
        read, check, load = (seconds[prefix + name] for name in ("read", "check", "load"))
        both = [a + b for a, b in zip(check, load, strict=True)]
        middle = statistics.median(read)
        found += [
            figure("snapshot", f"restore {where}, servers", statistics.median(load), "s", middle),
            figure("snapshot", f"restore {where}, servers / plain read", median_ratio(load, read), "×", 1.0),
            figure("snapshot", f"the coordinator's check before it, {where}", statistics.median(check), "s", middle),
            figure("snapshot", f"restore {where}, with that check / plain read", median_ratio(both, read), "×", 1.0),
        ]
    return found


# ---- a whole cluster ---------------------------------------------------------------------------------


def _start(root: Path, elements: int, rounds: int) -> dict[str, list[float]]:
    folder = _newest(root)
    measures: dict[str, Measure] = {
        "with": lambda: _first_pull(elements, folder),
        "without": lambda: _first_pull(elements, None),
        "read": _cold(lambda: plain_read(folder), folder),
    }
    return interleave(measures, rounds, warmup=0)


def _first_pull(elements: int, restore: Path | None) -> float:
    """Seconds from nothing to the table's values in a worker's hands."""
    start = time.perf_counter()
    with (
        launcher(Shape(OTHERS, restore=restore)) as cluster,
        exported(worker_environment(cluster, 0, 1)),
        headwater.connect() as client,
    ):
        table = declare(client, elements)
        table.pull(out=table.values)
        return time.perf_counter() - start


def start_figures(seconds: dict[str, list[float]]) -> list[Figure]:
    """A cluster's start with a snapshot, less one without."""
    more = [a - b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    read = statistics.median(seconds["read"])
    return [
        figure("snapshot", "cluster start to first pull, without", statistics.median(seconds["without"]), "s"),
        figure("snapshot", "cluster start to first pull, more with it", statistics.median(more), "s", read),
    ]
