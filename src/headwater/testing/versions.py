"""Versions in the simulator: who publishes and reads them, and what must be true of each.

A version is judged against the shards' logs: its part of a shard is what the log adds up to at the record of its
moment, and under ``Bulk`` that moment is right after one same step on all shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from headwater.client.client import Client
from headwater.client.dense.table import DenseTable
from headwater.errors import HeadwaterError, LinkError
from headwater.readers.reading import Reader
from headwater.testing.links import SimRuntime
from headwater.testing.oracles import Oracles, Violation
from headwater.testing.scenario import Scenario
from headwater.types import VersionInfo
from headwater.versions.part_cut import PartCut
from headwater.versions.part_store import PartSource, PartStore
from headwater.versions.parts import Held, Key

if TYPE_CHECKING:
    from headwater.client.publication import Publication
    from headwater.layout.dense import Layout
    from headwater.readers.weights import Weights
    from headwater.versions.catalogue import Catalogue

SHARE = 0.15  # of a worker's steps that are published
KEEPS = (1, 2, 3)
HELD = 1.0  # seconds that a reader keeps a version, at most
TIMEOUT = 5.0  # seconds of any wait of a reader
TAG = "stable"
LEASE = 1.0  # seconds that the lease of a reader that is gone stands, in the simulator
HEAL = 0.5  # seconds between two looks for missing copies

Values = dict[str, bytes]


class Read(NamedTuple):
    """A version as a reader found it, and how its tables lie."""

    info: VersionInfo
    values: Values
    layout: Layout


class SimPartStore(PartStore):
    """A server's parts. A copy takes ``later``: until then the values may change, and must be kept aside."""

    def __init__(self, number: int, shards: int, later: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(number, shards)
        self._later = later

    def _cut(self, key: Key, source: PartSource) -> None:
        buffer = self.pool.take(len(source.values))
        cut = self._cutting[key] = PartCut(source.values, buffer, lambda: None)
        self.parts[key] = Held(buffer, source.spans, cut=cut)
        cut.begin(thread=False)
        self._later(lambda: self._finish(key, cut))

    def _finish(self, key: Key, cut: PartCut) -> None:
        if self._cutting.get(key) is cut:
            cut.finish()
            cut.pause = 0.0  # of the machine's time, which no run may depend on


class VersionOracle:
    """Judges every version that somebody has read whole. ``reads``: how many reads there were."""

    def __init__(self, oracles: Oracles) -> None:
        self.reads = 0
        self.published = 0
        self._oracles = oracles
        self._infos: dict[int, VersionInfo] = {}
        self._early: list[Read] = []  # the log does not say yet what they should be

    def read(self, found: Read) -> None:
        """A reader holds a version."""
        self.reads += 1
        before = self._infos.setdefault(found.info.number, found.info)
        if before != found.info:
            raise Violation("versions", f"a version was {before} and is {found.info}")
        if any(found.info.number not in self._oracles.log(shard).cuts for shard in found.layout.participants):
            self._early.append(found)
        else:
            self._judge(found)

    def kept(self, first: Values, now: Values, info: VersionInfo) -> None:
        """A reader looks again at what it has held for a while."""
        if first != now:
            raise Violation("versions", f"version {info.number} changed under a reader that held it")

    def finish(self) -> None:
        """When all is quiet: what was read early is in the logs by now, or never was."""
        for found in self._early:
            self._judge(found)

    def _judge(self, found: Read) -> None:
        info, clocks = found.info, set()
        for shard in found.layout.participants:
            log = self._oracles.log(shard)
            cut = log.cuts.get(info.number)
            if cut is None:
                raise Violation("versions", f"version {info.number} was read; shard {shard} never published it")
            ((table, fold),) = log.folds.items()
            lsn, clock = cut[table]
            clocks.add(clock)
            expected = np.frombuffer(fold.at(lsn))
            for s in found.layout.segments[shard]:
                got = np.frombuffer(found.values[fold.spec.parameters[s.parameter].name])
                if got[s.start : s.stop].tobytes() != expected[s.offset // 8 : s.end // 8].tobytes():
                    raise Violation(
                        "versions", f"version {info.number}, shard {shard}: not what the log says at LSN {lsn}"
                    )  # fmt: skip
        if fold.spec.sync.collective and clocks != {info.step}:
            raise Violation("versions", f"version {info.number} is labelled step {info.step}; shards cut at {clocks}")


class Publisher:
    """A worker's habit of publishing now and then. What is refused is counted; the worker goes on."""

    def __init__(self, scenario: Scenario, oracle: VersionOracle, random: Random, name: str) -> None:
        self._scenario, self._oracle, self._random, self._name = scenario, oracle, random, name
        self._count = 0
        self._under_way: list[Publication] = []
        self.refused: Counter[str] = Counter()

    def stepped(self, client: Client, table: DenseTable) -> None:
        """The worker has finished a step. Raises ``LinkError``: then it has to join again."""
        if not self._scenario.versions or self._random.random() >= SHARE:
            return
        self._count += 1
        tags = (TAG,) if self._random.random() < 0.2 else ()
        try:
            name = f"{self._name}-{self._count}"
            publication = client.publish([table], name, keep=self._random.choice(KEEPS), tags=tags)
            self._under_way.append(publication)
            if self._random.random() < 0.4:
                self._wait()
        except LinkError:
            raise
        except HeadwaterError as error:
            self.refused[error.code] += 1

    def _wait(self) -> None:
        while self._under_way:
            self._under_way.pop().wait(TIMEOUT)
            self._oracle.published += 1


class VersionReader:
    """A process that leases, checks, holds and releases versions."""

    def __init__(self, scenario: Scenario, runtime: SimRuntime, oracle: VersionOracle, random: Random) -> None:
        self.stopping = False
        self.finished = False
        self.failures: list[str] = []
        self._scenario, self._runtime, self._oracle, self._random = scenario, runtime, oracle, random

    def body(self) -> None:
        """The process's main function."""
        while not self.stopping:
            try:
                reader = Reader("t", self._runtime.dial, timeout=TIMEOUT, share=False, runtime=self._runtime)
                try:
                    while not self.stopping:
                        self._runtime.sleep(0.1 * self._random.random())
                        self._look(reader)
                finally:
                    reader.close()
            except HeadwaterError as error:
                self.failures.append(f"{self._runtime.now():.3f} {type(error).__name__}: {error}")
                self._runtime.sleep(0.1)
        self.finished = True

    def _look(self, reader: Reader) -> None:
        name = "latest" if self._random.random() < 0.8 else TAG
        try:
            weights = reader.lease(name, TIMEOUT)
        except LinkError:
            raise
        except HeadwaterError as error:
            self.failures.append(f"{self._runtime.now():.3f} {type(error).__name__}: {error}")
            return
        held = dict(weights)  # tensors, which stay as they are also without a lease
        found = read(weights)
        self._oracle.read(found)
        if self._random.random() < 0.3:
            weights.release()
        if self._random.random() < 0.3:
            self._runtime.sleep(HELD * self._random.random())
            self._oracle.kept(found.values, {name: t.numpy().tobytes() for name, t in held.items()}, found.info)
        weights.release()


def read(weights: Weights) -> Read:
    """What a reader holds, copied."""
    (table,) = weights._stored.tables if weights._stored is not None else ()  # noqa: SLF001
    return Read(weights.version, {name: t.numpy().tobytes() for name, t in weights.items()}, table.mapped.layout)


class VersionAuditor:
    """Comes last: what is published now can be leased."""

    def __init__(self, scenario: Scenario, runtime: SimRuntime, oracle: VersionOracle) -> None:
        self.finished = False
        self._scenario, self._runtime, self._oracle = scenario, runtime, oracle

    def body(self) -> None:
        """The process's main function."""
        dial, runtime = self._runtime.dial, self._runtime
        with Client(dial, role="reader", timeout=TIMEOUT, runtime=runtime) as client:
            table = client.table(self._scenario.table)
            last = client.publish([table], "last").wait()
            with Reader("t", dial, timeout=TIMEOUT, share=False, runtime=runtime) as reader:
                weights = reader.lease()
                if weights.version != last:
                    raise Violation("versions", f"{last} was published last, the newest is {weights.version}")
                self._oracle.read(read(weights))
                weights.release()
        self.finished = True


def unrest(catalogue: Catalogue, stores: Iterable[tuple[int, PartStore]]) -> str:
    """Why versions are not as they should be when all is quiet, or "".

    Nothing is on its way for ever; nobody that is gone holds a lease; servers keep nothing that is dropped; what is
    said to be ready is held, and what is said to be lost is not.
    """
    held = dict(stores)
    for entry in catalogue.entries.values():
        if entry.state in ("waiting", "cutting"):
            return f"version {entry.number} is still {entry.state}: begun {sorted(entry.begun)}, held {entry.holders}"
        if +entry.leases:
            return f"version {entry.number} is leased by {dict(entry.leases)}"
        there = all(
            any(_holds(part_store, entry.number, shard) for part_store in held.values()) for shard in entry.shards
        )
        if there != (entry.state == "ready"):
            return f"version {entry.number} is said to be {entry.state}; its parts are {'' if there else 'not '}held"
    for server, part_store in held.items():
        left = {key.number for key in part_store.parts if key.number not in catalogue.entries}
        left |= {number for number, _ in part_store._making if number not in catalogue.entries}  # noqa: SLF001
        if left:
            return f"server {server} holds parts of versions {sorted(left)}, which nobody knows"
    return ""


def _holds(part_store: PartStore, number: int, shard: int) -> bool:
    return any(k.number == number and k.shard == shard and h.sums is not None for k, h in part_store.parts.items())
