"""A coordinator as far as versions concern it: a desk, a clock, and what is said."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from headwater.errors import (
    HeadwaterError,
    UnknownTable,
)
from headwater.types import DenseSpec
from headwater.versions import entries
from headwater.versions.catalogue import Catalogue
from headwater.versions.entries import Entry
from headwater.versions.leases import Leases
from headwater.versions.lifecycle import Known, Lifecycle
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker
from tests.cluster.fake_peers import spec

W, READER = 1, 9  # peers
SIZE = 4096


class FakeCoordinator:
    """Versions of a cluster of two shards with table 1 (bulk, on both) and 2 (asynchronous, on shard 1).

    Server n leads shard n. What each peer hears, what is saved, ordered and dropped is kept.
    """

    def __init__(self, state: dict[str, bytes] | None = None) -> None:
        self.now = 1000.0
        self.clock: int | None = 0
        self.heard: dict[int, list[Any]] = defaultdict(list)
        self.state = dict(state or {})
        self.cuts: list[v.CutVersion] = []
        self.holds: list[tuple[int, v.Hold]] = []
        self.dropped: list[int] = []
        self.up = {0, 1, 2, 3}
        self.views: dict[int, tuple[int, ...]] = {0: (0,), 1: (1,)}
        self.catalogue = Catalogue()
        self.leases = Leases(self, self.catalogue, 2, lambda: self.now)
        self.lifecycle = Lifecycle(self, self.catalogue, self.leases, lambda: self.now)
        self.lifecycle.restore(self.state)
        self._seq = 0

    # ---- the desk ----------------------------------------------------------------------------------

    def reply(self, asker: Asker, message: m.Reply) -> None:
        self.heard[asker.peer].append(message)

    def fail(self, asker: Asker, error: HeadwaterError) -> None:
        self.heard[asker.peer].append(error)

    def save(self, key: str, value: bytes | None) -> None:
        if value is None:
            self.state.pop(key, None)
        else:
            self.state[key] = value

    def tell(self, shard: int, message: v.CutVersion) -> None:
        assert message.shard == shard
        self.cuts.append(message)

    def drop(self, numbers: tuple[int, ...]) -> None:
        self.dropped += numbers

    def removed(self, entry: Entry) -> None:
        self.drop((entry.number,))
        if entry.state in ("ready", "lost"):
            self.save(f"version/{entry.number}", None)

    def spec(self, table: int) -> DenseSpec:
        return self.table(table).spec

    def table(self, number: int) -> Known:
        if number not in (1, 2):
            raise UnknownTable(f"table {number}")
        return Known(spec(f"t{number}"), (0, 1) if number == 1 else (1,), self.clock if number == 1 else None)

    def holder(self, server: int) -> v.Holder | None:
        return v.Holder(f"tcp://127.0.0.1:{server}", "", "") if server in self.up else None

    def copies(self, shard: int) -> tuple[int, ...]:
        return self.views[shard]

    def order(self, server: int, message: v.Hold) -> None:
        self.holds.append((server, message))

    # ---- what happens ------------------------------------------------------------------------------

    def asker(self, peer: int = W) -> Asker:
        self._seq += 1
        return Asker(peer, self._seq)

    def publish(self, name: str, peer: int = W, model: str = "m", **changes: Any) -> v.Publish:
        ask = v.Publish(model, name, **{"tables": (1,), **changes})
        self.lifecycle.publish(self.asker(peer), ask)
        return ask

    def said(
        self,
        number: int,
        server: int,
        shard: int | None = None,
        *,
        begun: bool = False,
        leads: bool = True,
        **more: Any,
    ) -> None:
        """A server's word: it holds its part, of as many bytes as its tables have, or has only ``begun``."""
        shard = server if shard is None else shard
        tables = [t for t in self.catalogue.entries[number].ask.tables if shard in self.table(t).shards]
        parts = () if begun else tuple(v.PartDigest(t, SIZE, 100 * number + shard) for t in tables)
        clocks = tuple((t, self.clock or 0) for t in tables)
        done = v.PartDone(number, shard, server, **{"parts": parts, "clocks": clocks, **more})
        self.lifecycle.part(done, leads=leads)

    def make(self, name: str, **changes: Any) -> int:
        """A version that is ready; its number."""
        self.publish(name, **changes)
        number = max(self.catalogue.entries)
        for shard in self.catalogue.entries[number].shards:
            self.said(number, shard)
        return number

    def take(self, peer: int) -> list[Any]:
        return self.heard.pop(peer, [])

    def lease(self, name: str, session: int = 50, **more: Any) -> v.Leased:
        self.leases.lease(self.asker(READER), session, v.Lease("m", name, **more))
        leased = self.take(READER)[-1]
        assert isinstance(leased, v.Leased)
        return leased

    def tag(self, tag: str, name: str, model: str = "m") -> None:
        self.lifecycle.set_tag(self.asker(), v.SetTag(model, tag, name))

    def watch(self, name: str, after: int = 0, peer: int = READER) -> None:
        self.leases.watch(self.asker(peer), v.Watch("m", name, after))

    def means(self, name: str) -> int:
        return self.catalogue.resolve("m", name).number

    @property
    def names(self) -> list[str]:
        return [entry.info.name for _, entry in sorted(self.catalogue.entries.items())]

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1)
            self.tick()

    def tick(self) -> None:
        self.leases.tick(self.now)
        self.lifecycle.tick(self.now)

    def gone(self, peer: int) -> None:
        self.leases.gone(peer)
        self.lifecycle.gone(peer)

    def restart(self) -> FakeCoordinator:
        """Another coordinator with the same state."""
        return FakeCoordinator(self.state)


def again(act: Callable[[int], object], times: int = 2 * entries.ASKERS) -> None:
    """Do it more often than is allowed."""
    for i in range(times):
        act(i)
