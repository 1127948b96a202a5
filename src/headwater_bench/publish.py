"""``headwater bench publish``: a version out of a trainer, and into readers, beside one copy of as many bytes.

A worker holds a table of ``--size`` MB on two servers and publishes it; one process copies as many bytes between
warm buffers in turns with it. Readers are processes of their own: one on shared memory, one that is made to use TCP.
Every element of the table has changed from each version to the next, so that no delta helps.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

import headwater
from headwater_bench.child import Child
from headwater_bench.cluster import exported, launcher, worker_environment
from headwater_bench.options import MEBIBYTE, Options
from headwater_bench.published import spec
from headwater_bench.report import Figure, figure
from headwater_bench.statistics import interleave, median_ratio, percentile

ROUNDS = 10
SMALL = (1, 50)
"""MB: other sizes whose leases are measured, which should take as long."""
LEASES = 10
"""Leases of each size that are measured in a round."""
REUSED = 4
"""Versions after which the servers use memory again that a reader has looked at before."""
COMPUTE = 0.3
"""Seconds that the trainer computes between two steps, on an idle core."""
FIRST = 4
"""The first versions of a table, for which the servers have no memory that they have used before."""
STEPS = 1.0
"""Seconds that the trainer takes steps between these."""
DTYPES = ("bfloat16", "float32")
SHORT = {"bfloat16": "bf16", "float32": "fp32"}

Samples = dict[str, list[float]]


def measure(options: Options) -> list[Figure]:
    """The figures of publishing in both dtypes, then those of readers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = []
        for dtype in DTYPES:
            with _cluster(options) as client:
                publisher = PublishedTable(client, "model", options.version * MEBIBYTE, dtype)
                found += _publishing(options, publisher)
                if dtype == DTYPES[0]:
                    found += _reading(options, publisher)
        return found
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _cluster(options: Options) -> Iterator[headwater.Client]:
    with (
        launcher(options.servers) as cluster,
        exported(worker_environment(cluster, 0, 1)),
        headwater.connect() as client,
    ):
        yield client


# ---- the trainer ---------------------------------------------------------------------------------------


class PublishTimes(NamedTuple):
    """A version: seconds until the call returned, until it was ready, and the longest that a shard paused for it."""

    info: headwater.VersionInfo
    call: float
    ready: float
    pause: float


class PublishedTable:
    """The worker: a table whose every element changes with each step."""

    def __init__(self, client: headwater.Client, model: str, nbytes: int, dtype: str) -> None:
        self.model, self.dtype = model, dtype
        self.client = client
        self._names = itertools.count(1)
        self._table = client.table(spec(model, nbytes, dtype))
        self._parameters = [p.name for p in self._table.spec.parameters]
        self.nbytes = sum(p.nbytes for p in self._table.spec.parameters)
        for gradient in self._table.gradients.values():
            gradient.fill_(-1.0)
        self.step()

    def step(self) -> float:
        """Seconds of a step, until it is acknowledged."""
        start = time.perf_counter()
        self._table.push_step(self._parameters, want=False).wait()
        return time.perf_counter() - start

    def begin(self) -> headwater.Publication:
        """Publish, without waiting for the outcome."""
        return self.client.publish([self._table], f"v{next(self._names)}", keep=1)

    def publish(self) -> PublishTimes:
        """Publish, and wait until it can be leased. The servers have nothing else to do."""
        start = time.perf_counter()
        begun = self.begin()
        called = time.perf_counter() - start
        info = begun.wait()
        return PublishTimes(info, called, time.perf_counter() - start, begun.pause)

    def next(self) -> headwater.VersionInfo:
        """A version that differs from the last one in every element."""
        self.step()
        return self.publish().info


class Computation:
    """So much arithmetic that it takes ``seconds`` of an idle core."""

    def __init__(self, seconds: float) -> None:
        self._a = torch.ones(256, 256)
        self._times = 8
        fastest = min(self() for _ in range(5)) / self._times
        self._times = max(1, round(seconds / fastest))

    def __call__(self) -> float:
        start = time.perf_counter()
        for _ in range(self._times):
            torch.mm(self._a, self._a)
        return time.perf_counter() - start


class Pauses:
    """A training step with and without a publication in it; ``compute`` comes between the publication and the push."""

    def __init__(self, publisher: PublishedTable, compute: Computation | None) -> None:
        self._publisher, self._compute = publisher, compute
        self.servers: list[float] = []

    def without(self) -> float:
        start = time.perf_counter()
        self._rest()
        return time.perf_counter() - start

    def with_one(self) -> float:
        start = time.perf_counter()
        begun = self._publisher.begin()
        self._rest()
        seconds = time.perf_counter() - start
        begun.wait()
        self.servers.append(begun.pause)
        return seconds

    def _rest(self) -> None:
        if self._compute is not None:
            self._compute()
        self._publisher.step()


def _publishing(options: Options, publisher: PublishedTable) -> list[Figure]:
    name, rounds = SHORT[publisher.dtype], options.rounds_or(ROUNDS)
    calls: list[float] = []

    def publish() -> float:
        done = publisher.publish()
        calls.append(done.call)
        return done.ready

    with Child("copier", nbytes=publisher.nbytes) as copier:
        options.note(f"publish: {name}, the first {FIRST} versions of {options.version} MB")
        first = [_first(publisher, copier) for _ in range(FIRST)]
        options.note(f"publish: {name}, {options.version} MB, while nothing else is done")
        measures = {"publish": publish, "memcpy": lambda: float(copier.ask("copy"))}
        alone = interleave(measures, rounds, warmup=REUSED + 2)
    found = publish_figures(name, publisher.nbytes, alone, calls[-rounds:]) + first_figures(name, first)
    for compute in (Computation(COMPUTE), None):
        options.note(f"publish: {name}, in a trainer that {'computes' if compute else 'does nothing but push'}")
        pauses = Pauses(publisher, compute)
        steps = interleave({"with": pauses.with_one, "without": pauses.without}, rounds)
        found += pause_figures(name, compute is not None, steps, pauses.servers[-rounds:], alone["publish"])
    return found


def publish_figures(name: str, nbytes: int, seconds: Samples, calls: list[float]) -> list[Figure]:
    """From seconds of ``publish`` and ``memcpy`` by round, and of the call alone."""
    publish, memcpy = statistics.median(seconds["publish"]), statistics.median(seconds["memcpy"])
    ratio = median_ratio(seconds["publish"], seconds["memcpy"])
    return [
        figure("publish", f"{name} size", nbytes / MEBIBYTE, "MB"),
        figure("publish", f"{name} publish, until ready", publish * 1e3, "ms", memcpy * 1e3),
        figure("publish", f"{name} publish / one memcpy", ratio, "×", 1.0),
        figure("publish", f"{name} publish, the call", statistics.median(calls) * 1e3, "ms", 0.0),
    ]


def _first(publisher: PublishedTable, copier: Child) -> float:
    """A publication beside one memcpy, after a while of training."""
    end = time.perf_counter() + STEPS
    while time.perf_counter() < end:
        publisher.step()
    memcpy = float(copier.ask("copy"))
    return publisher.publish().ready / memcpy


def first_figures(name: str, ratios: list[float]) -> list[Figure]:
    """From publications beside one memcpy each, the first ones of a table."""
    return [
        figure("publish", f"{name} first publication / one memcpy", ratios[0], "×", 1.0),
        figure("publish", f"{name} first {len(ratios)} publications / one memcpy", statistics.mean(ratios), "×", 1.0),
    ]


def pause_figures(name: str, computes: bool, steps: Samples, servers: list[float], alone: list[float]) -> list[Figure]:
    """From seconds of steps ``with`` and ``without`` a publication by round, and the servers' own account of it."""
    where = f"{name} in a trainer that computes" if computes else f"{name} right before a push"
    more = [max(0.0, a - b) for a, b in zip(steps["with"], steps["without"], strict=True)]
    step, usual = statistics.median(steps["with"]) * 1e3, statistics.median(steps["without"]) * 1e3
    share = 100 * statistics.median(more) / statistics.median(alone)
    return [
        figure("publish", f"{where}: servers' pause", statistics.median(servers) * 1e3, "ms", 0.0),
        figure("publish", f"{where}: step with one", step, "ms", usual),
        figure("publish", f"{where}: step, more with one", statistics.median(more) * 1e3, "ms", 0.0),
        figure("publish", f"{where}: step, more with one / publish", share, "%", 0.0),
    ]


# ---- readers -------------------------------------------------------------------------------------------


def _reading(options: Options, publisher: PublishedTable) -> list[Figure]:
    found = []
    for size in SMALL:
        small = PublishedTable(publisher.client, f"model-{size}", size * MEBIBYTE, publisher.dtype)
        with _reader(small) as reader:
            found += _leases(options, small, reader)
    with _reader(publisher) as reader:
        found += _leases(options, publisher, reader)
        options.note("publish: a reader on shared memory takes versions out, and follows")
        found += _copied(options, publisher, reader) + _swaps(options, publisher, reader, "local")
    with _reader(publisher, tcp=True) as reader:
        options.note("publish: a reader over TCP fetches versions, and follows")
        reader.ask("first")
        found += _fetched(options, publisher, reader) + _swaps(options, publisher, reader, "tcp")
    return found


@contextlib.contextmanager
def _reader(publisher: PublishedTable, tcp: bool = False) -> Iterator[Child]:
    publisher.next()
    forced = {"HEADWATER_TRANSPORT": "tcp"} if tcp else {}
    model, nbytes, dtype = publisher.model, publisher.nbytes, publisher.dtype
    with Child("reading", environment=forced, model=model, nbytes=nbytes, dtype=dtype) as reader:
        yield reader


def _leases(options: Options, publisher: PublishedTable, reader: Child) -> list[Figure]:
    size = f"{publisher.nbytes // MEBIBYTE} MB"
    options.note(f"publish: leases of {size}")
    first = reader.ask("first")
    count = LEASES * options.rounds_or(ROUNDS)
    seconds = [reader.ask("lease", name=publisher.publish().info.name) for _ in range(count + 2)][2:]
    return lease_figures(size, seconds, *first)


def lease_figures(size: str, seconds: list[float], connect: float, first: float) -> list[Figure]:
    """From seconds of leases, each of another version, and of the first one of a process."""
    return [
        figure("publish", f"lease of {size}, p50", percentile(seconds, 0.5) * 1e3, "ms", 0.0),
        figure("publish", f"lease of {size}, p99", percentile(seconds, 0.99) * 1e3, "ms", 0.0),
        figure("publish", f"first lease of a process, {size}", first * 1e3, "ms", 0.0),
        figure("publish", f"connecting before it, {size}", connect * 1e3, "ms", 0.0),
    ]


def _copied(options: Options, publisher: PublishedTable, reader: Child) -> list[Figure]:
    all_of_them: list[float] = []
    alone: list[float] = []

    def copy_out() -> float:
        first, second = reader.ask("copy_out", name=publisher.next().name)
        all_of_them.append(first)
        alone.append(second)
        return all_of_them[-1]

    rounds = options.rounds_or(ROUNDS)
    measures = {
        "copy": copy_out,
        "memcpy": lambda: float(reader.ask("memcpy")),
        "tensors": lambda: float(reader.ask("copy_tensors")),
    }
    seconds = interleave(measures, rounds, warmup=REUSED)
    return copy_figures(publisher.nbytes, seconds | {"one": alone[-rounds:], "first": all_of_them[:1]})


def copy_figures(nbytes: int, seconds: Samples) -> list[Figure]:
    """From seconds of ``copy`` (out of a new version), ``one`` (by one thread) and ``memcpy`` by round.

    ``first``: of a process, out of memory that it has never looked at. ``tensors``: as many copied from others of their
    own size into the same ones.
    """
    middle = {side: statistics.median(found) for side, found in seconds.items()}
    return [
        figure("publish", "local copy-out", nbytes / middle["copy"] / 1e9, "GB/s", nbytes / middle["memcpy"] / 1e9),
        figure("publish", "local copy-out, first of a process", nbytes / middle["first"] / 1e9, "GB/s"),
        figure("publish", "local copy-out / memcpy", median_ratio(seconds["memcpy"], seconds["copy"]), "×", 1.0),
        figure(
            "publish",
            "local copy-out by one thread / memcpy",
            median_ratio(seconds["memcpy"], seconds["one"]),
            "×",
            1.0,
        ),
        figure(
            "publish", "copies of such tensors / memcpy", median_ratio(seconds["memcpy"], seconds["tensors"]), "×", 1.0
        ),
        figure(
            "publish",
            "local copy-out by one thread / copies of such tensors",
            median_ratio(seconds["tensors"], seconds["one"]),
            "×",
            1.0,
        ),
    ]


def _fetched(options: Options, publisher: PublishedTable, reader: Child) -> list[Figure]:
    measures = {
        "fetch": lambda: float(reader.ask("lease", name=publisher.next().name)),
        "both": lambda: float(reader.ask("fetch_and_copy", name=publisher.next().name)),
        "raw": lambda: float(reader.ask("raw")),
    }
    return fetch_figures(publisher.nbytes, interleave(measures, options.rounds_or(ROUNDS)))


def fetch_figures(nbytes: int, seconds: Samples) -> list[Figure]:
    """From seconds of ``fetch`` (a whole version), ``both`` (and a copy out of it) and ``raw`` (a socket) by round."""
    middle = {side: statistics.median(found) for side, found in seconds.items()}
    return [
        figure("publish", "tcp fetch", nbytes / middle["fetch"] / 1e9, "GB/s", nbytes / middle["raw"] / 1e9),
        figure("publish", "tcp fetch / raw socket", median_ratio(seconds["raw"], seconds["fetch"]), "×", 1.0),
        figure("publish", "tcp fetch + copy-out", nbytes / middle["both"] / 1e9, "GB/s", nbytes / middle["raw"] / 1e9),
    ]


def _swaps(options: Options, publisher: PublishedTable, reader: Child, name: str) -> list[Figure]:
    reader.ask("follow")
    found = [reader.ask("swap", number=publisher.next().number) for _ in range(options.rounds_or(ROUNDS) + 1)][1:]
    reader.ask("unfollow")
    return swap_figures(name, [pause for pause, _ in found], [sync for _, sync in found])


def swap_figures(name: str, pauses: list[float], syncs: list[float]) -> list[Figure]:
    """From seconds between two forwards, and from news of a version until a forward is answered by it."""
    sync = statistics.median(syncs) * 1e3
    return [
        figure("publish", f"{name} follower: synchronisation", sync, "ms"),
        figure("publish", f"{name} follower: swap between two forwards", statistics.median(pauses) * 1e3, "ms", 0.0),
        figure("publish", f"{name} follower: swap / synchronisation", 100 * median_ratio(pauses, syncs), "%", 0.0),
    ]
