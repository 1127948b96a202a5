"""``headwater bench relay``: a reader that joins late behind a relay, and what leaves the publisher for many readers.

A worker holds a table of ``--size`` MB of bf16 on two servers and publishes it; from each version to the next, 1 % of
the elements change. The relay and the readers are processes of their own, and all bytes go over TCP on the loopback.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

import headwater
from headwater_bench.child import Child
from headwater_bench.cluster import exported, launcher, worker_environment
from headwater_bench.options import MEBIBYTE, Options
from headwater_bench.relayed import MODEL
from headwater_bench.report import Figure, figure
from headwater_bench.statistics import median_ratio

ROUNDS = 8
CHANGED = 0.01
"""Share of the elements that change from each version to the next."""
CROWDS = (1, 4, 16)
CROWD_SIZE = 64
"""MB at most: sixteen readers hold two versions each in their own memory."""
VERSIONS = 3
"""That each crowd fetches after its first one."""
STEADY = 0.5
"""Seconds in which servers have told what they sent: five heartbeats."""


def measure(options: Options) -> list[Figure]:
    """The figures of a late joiner, then those of crowds of readers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_late(options), *_crowds(options)]
    finally:
        torch.set_num_threads(before)


class RelayedTable:
    """The worker: a table of ``size`` MB of bf16, of which a hundredth changes with each version."""

    def __init__(self, client: headwater.Client, size: int) -> None:
        self.client = client
        self.elements = size * MEBIBYTE // 2
        self._table = client.dense(
            MODEL, (self.elements,), init=headwater.init.constant(1.0), optimizer="SGD", lr=1.0, dtype=torch.bfloat16
        )
        self._gradient = torch.zeros(self.elements, dtype=torch.bfloat16)
        self._chance = torch.Generator().manual_seed(0)
        self._names = itertools.count(1)

    def publish(self) -> int:
        """The number of a new version, which can be leased."""
        where = torch.randint(self.elements, (int(self.elements * CHANGED),), generator=self._chance)
        self._gradient[where] = 2.0**-7  # one unit in the last place of most
        self._table.push(self._gradient).wait()
        self._gradient[where] = 0.0
        return self.client.publish([self._table], f"v{next(self._names)}", keep=2).wait().number

    def sent(self) -> int:
        """Bytes that have left the servers. Nobody pulls the table, so readers of versions had all of them."""
        deadline = time.monotonic() + STEADY
        found = -1
        while time.monotonic() < deadline:
            now = sum(server.pulled_bytes for server in self.client.status().servers)
            if now != found:
                found, deadline = now, time.monotonic() + STEADY
            time.sleep(STEADY / 5)
        return found


class Scene(NamedTuple):
    """A cluster's publisher, a relay behind it, and a process for readers behind that."""

    publisher: RelayedTable
    relay: Child
    readers: Child
    address: str

    def next(self) -> int:
        """A new version, which the relay has. Its number."""
        number = self.publisher.publish()
        if not self.relay.ask("wait", number=number):
            raise TimeoutError(f"the relay did not take version {number}")
        return number


@contextlib.contextmanager
def _scene(options: Options, size: int) -> Iterator[Scene]:
    with (
        launcher(options.servers, "tcp") as cluster,
        exported(worker_environment(cluster, 0, 1)),
        headwater.connect() as client,
        Child("relay", environment={"HEADWATER_TRANSPORT": "tcp"}) as relay,
        Child("readers", environment={"HEADWATER_TRANSPORT": "tcp"}) as readers,
    ):
        assert cluster.address is not None
        scene = Scene(RelayedTable(client, size), relay, readers, relay.ask("begin", upstream=cluster.address))
        scene.next()
        scene.next()  # and what makes deltas is loaded everywhere
        yield scene
        relay.ask("end")


# ---- one that joins late -------------------------------------------------------------------------------


class JoinTimes(NamedTuple):
    """Seconds of a dense fetch; of an anchor, and of the delta after it; and of a join while a version is published."""

    dense: float
    anchor: float
    delta: float
    racing: float
    dense_bytes: int
    chain_bytes: int


def _late(options: Options) -> list[Figure]:
    with _scene(options, options.version) as scene:
        rounds = []
        for turn in range(options.rounds_or(ROUNDS) + 1):
            options.note(f"relay: late joiner, round {turn}")
            rounds.append(_join(scene, first=turn % 2 == 0))
        return _late_figures(rounds[1:], scene.publisher.elements * 2)


def _join(scene: Scene, *, first: bool) -> JoinTimes:
    """Each way once; ``first``: the dense fetch before the others."""
    dense = _dense(scene) if first else None
    anchor = scene.readers.ask("join", address=scene.address)
    scene.next()
    delta = scene.readers.ask("catch_up")
    chain_bytes, deltas = scene.readers.ask("leave")
    if not deltas:
        raise ValueError("no delta came; the relay does not hold the version that the reader had")
    trainer = threading.Thread(target=scene.publisher.publish)
    scene.readers.tell("current", address=scene.address)
    trainer.start()
    racing = scene.readers.answer()
    trainer.join()
    scene.readers.ask("leave")
    scene.next()
    dense = dense or _dense(scene)
    return JoinTimes(dense[0], anchor, delta, racing, dense[1], chain_bytes)


def _dense(scene: Scene) -> tuple[float, int]:
    seconds = scene.readers.ask("join", address=scene.address)
    return seconds, scene.readers.ask("leave")[0]


def _late_figures(rounds: list[JoinTimes], size: int) -> list[Figure]:
    dense, chain = [each.dense for each in rounds], [each.anchor + each.delta for each in rounds]
    racing = [each.racing for each in rounds]
    spread = (max(dense) - min(dense)) / statistics.median(dense)
    return [
        figure("relay", "size", size / MEBIBYTE, "MB"),
        figure("relay", "dense fetch", statistics.median(dense), "s"),
        figure("relay", "dense fetches, spread", 100 * spread, "%"),
        figure("relay", "late joiner: the delta alone", statistics.median(each.delta for each in rounds), "s"),
        figure("relay", "late joiner: anchor + chain", statistics.median(chain), "s", statistics.median(dense)),
        figure("relay", "late joiner: anchor + chain / dense fetch", median_ratio(chain, dense), "×", 1.0),
        figure(
            "relay", "late joiner: bytes / dense fetch",
            statistics.median(each.chain_bytes / each.dense_bytes for each in rounds), "×", 1.0,
        ),
        figure("relay", "joiner while a version is published / dense fetch", median_ratio(racing, dense), "×", 1.0),
    ]  # fmt: skip


# ---- many ----------------------------------------------------------------------------------------------


def _crowds(options: Options) -> list[Figure]:
    left, served = {}, {}
    size = min(options.version, CROWD_SIZE)
    for count in CROWDS:
        options.note(f"relay: {count} readers")
        with _scene(options, size) as scene:
            left[count], served[count] = _crowd(scene, count)
    figures = []
    for count in CROWDS:
        name = "1 reader" if count == 1 else f"{count} readers"
        figures.append(figure("relay", f"left the publisher for {name}", left[count] / MEBIBYTE, "MB"))
        figures.append(figure("relay", f"left the relay for {name}", served[count] / MEBIBYTE, "MB"))
    most, least = max(left.values()), min(left.values())
    figures.append(figure("relay", "left the publisher, most / least", most / least, "×", 1.0))
    return figures


def _crowd(scene: Scene, count: int) -> tuple[int, int]:
    """Bytes that left the servers and the relay while so many readers took some versions."""
    scene.readers.ask("crowd", address=scene.address, count=count)
    scene.readers.ask("lease")
    before, given = scene.publisher.sent(), scene.relay.ask("sent")
    for _ in range(VERSIONS):
        number = scene.next()
        if scene.readers.ask("lease") != number:
            raise ValueError(f"a reader did not get version {number}")
    found = scene.publisher.sent() - before, scene.relay.ask("sent") - given
    scene.readers.ask("part")
    return found
