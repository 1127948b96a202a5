"""One published version, as the coordinator and relays keep it (``Entry``), and the checks of a request for one."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from headwater.errors import ClusterError, ProtocolError, UsageError
from headwater.types import TableSpec, VersionInfo
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker

LATEST = "latest"
METADATA = 64 << 10  # bytes of a version's metadata
NAME = 200  # characters of a model's, version's or tag's name
TAGS = 64  # of one model
ASKERS = 256  # questions that wait for one version, or of one connection for news; more are refused


@dataclass(slots=True)
class Entry:
    """One version. ``parts``: by (shard, table); ``holders``: servers by shard; ``leases``: how many by session.

    ``early``: by (shard, server), what backups say that their primary has not said yet. ``missed``: (shard, server) of
    holders that are dead, as far as is known.
    ``origin``: of one that was made elsewhere, how it was leased there.
    """

    info: VersionInfo
    ask: v.Publish
    shards: tuple[int, ...]
    state: str = "waiting"
    begun: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    parts: dict[tuple[int, int], v.PartDigest] = field(default_factory=dict)
    holders: dict[int, set[int]] = field(default_factory=dict)
    early: dict[tuple[int, int], v.PartDone] = field(default_factory=dict)
    missed: set[tuple[int, int]] = field(default_factory=set)
    pause: float = 0.0
    leases: Counter[int] = field(default_factory=Counter)
    since: float = 0.0  # by the desk's clock, which begins anew with its process
    publishers: list[Asker] = field(default_factory=list)
    awaiting: list[Asker] = field(default_factory=list)
    origin: v.Leased | None = None

    @property
    def number(self) -> int:
        return self.info.number

    @property
    def whole(self) -> bool:
        """Whether somebody holds each part."""
        return all(self.holders.get(shard) for shard in self.shards)

    @property
    def held(self) -> int:
        """Bytes that its holders hold, all copies."""
        return sum(part.size * len(self.holders.get(shard, ())) for (shard, _), part in self.parts.items())


def adopted(origin: v.Leased, keep: int, since: float) -> Entry:
    """A version that was made elsewhere and is here now, whole."""
    parts = {(part.shard, part.table): v.PartDigest(part.table, part.size, part.digest) for part in origin.parts}
    shards = tuple(sorted({shard for shard, _ in parts}))
    ask = v.Publish(origin.info.model, origin.info.name, origin.tables, keep=keep)
    holders = {shard: {0} for shard in shards}
    return Entry(origin.info, ask, shards, "ready", parts=parts, holders=holders, since=since, origin=origin)


class Prints:
    """Fingerprints of tables' specs: made once, since every lease asks for them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[TableSpec, int]] = {}

    def of(self, table: int, spec: TableSpec) -> int:
        """That of a table. One that is told of again, by a relay's upstream, may be another."""
        known = self._known.get(table)
        if known is None or known[0] is not spec:
            known = self._known[table] = (spec, v.fingerprint(spec))
        return known[1]


class Saved(msgspec.Struct, frozen=True):
    info: VersionInfo
    ask: v.Publish
    shards: tuple[int, ...]
    parts: tuple[tuple[int, v.PartDigest], ...]  # (shard, …)


def saved(entry: Entry) -> bytes:
    """A version as the coordinator's store keeps it."""
    parts = tuple((shard, part) for (shard, _), part in sorted(entry.parts.items()))
    return msgspec.msgpack.encode(Saved(entry.info, entry.ask, entry.shards, parts))


class Waiting(NamedTuple):
    """What somebody waits for over a connection."""

    peer: int
    ask: v.Watch

    def news(self, entry: Entry | None) -> Entry | None:
        """What its name means, if that is a version to read, and another one than it knows."""
        if entry is None or entry.state != "ready":
            return None
        known = entry.number == self.ask.after and self.ask.digest in ("", entry.info.digest)
        return None if known else entry


def check(ask: v.Publish) -> None:
    """Raises ``UsageError`` or ``ProtocolError`` for a version that cannot be."""
    check_name("model", ask.model)
    check_name("version", ask.name)
    if ask.name == LATEST:
        raise UsageError(f"{LATEST!r} is a tag; a version needs a name of its own. Nothing was published")
    if not ask.tables or len(set(ask.tables)) != len(ask.tables):
        raise UsageError("a version is of one table or more, each named once; nothing was published")
    steps = [table for table, clock in ask.clocks if table in ask.tables and 0 <= clock < 1 << 63]
    if len(steps) < len(ask.clocks) or len(set(steps)) < len(steps) or not math.isfinite(ask.time):
        raise ProtocolError("a version is of its own tables' steps, each named once; nothing was published")
    if not 0 < ask.keep < 1 << 63 or (ask.age is not None and not ask.age > 0):
        raise UsageError(f"keep={ask.keep}, age={ask.age}: keep 1 or more, for more than 0 s; nothing was published")
    if ask.step is not None and not 0 <= ask.step < 1 << 63:
        raise UsageError(f"step={ask.step}: 0 or more; nothing was published")
    size = sum(len(key.encode()) + len(value.encode()) for key, value in ask.metadata.items())
    if size > METADATA:
        raise UsageError(f"metadata of {size} bytes, over the bound of {METADATA}; nothing was published")
    for tag in ask.tags[: TAGS + 1]:
        check_name("tag", tag)
        if tag in (LATEST, ask.name):
            raise UsageError(f"tag {tag!r}: {LATEST!r} moves by itself, and a tag is not a version's name")


def check_name(what: str, name: str) -> None:
    """Raises ``UsageError`` for what cannot be the name of a model, version or tag."""
    if not 0 < len(name) <= NAME or not name.isprintable() or name != name.strip():
        raise UsageError(f"{what} name {name[:NAME]!r}: 1 to {NAME} printable characters without spaces at the ends")


def same(ask: v.Publish, other: v.Publish) -> bool:
    """Whether two wishes mean one version."""
    return ask == other or (bool(ask.clocks) and (ask.tables, ask.clocks) == (other.tables, other.clocks))


def wait(askers: list[Asker], asker: Asker) -> None:
    """One more that waits. Raises ``ClusterError`` if they are too many."""
    if len(askers) >= ASKERS:
        raise ClusterError(f"{ASKERS} others wait for this version already; ask again when it is there")
    askers.append(asker)
