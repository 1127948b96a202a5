"""Control messages of publication: versions, tags, leases, and the parts that hold their bytes (FORMAT.md).

A version consists of parts: one per shard and table, with the bytes of that table's memory on that shard as they were
at the version's cut. Whoever holds a part, a server or a relay, hands it out in the same way.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import xxhash

from headwater.types import TableSpec, VersionInfo

SUM_BLOCK = 1 << 20
"""Bytes of a part under one checksum (XXH3-64)."""


def fingerprint(spec: TableSpec) -> int:
    """A table's spec in one number (XXH3-64 of its msgpack)."""
    return xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(spec))


# ---- client -> coordinator -------------------------------------------------------------------------


class Publish(msgspec.Struct, frozen=True, tag="publish"):
    """Make a version of these tables. Answered by ``Publishing`` when its moment is past.

    ``clocks``: (table, step) of bulk tables; the version is the state right after these steps, if they are the last or
    still to come. ``keep``: the newest versions of this model that are kept; ``age``: seconds after which one that is
    not the newest goes; tags and leases hold versions beyond both. ``time``: seconds since 1970, for people to read.
    ``step``: what readers are told; None: the newest clock of the tables, which counts from the cluster's beginning.
    """

    model: str
    name: str
    tables: tuple[int, ...]
    clocks: tuple[tuple[int, int], ...] = ()
    metadata: dict[str, str] = {}
    keep: int = 3
    age: float | None = None
    tags: tuple[str, ...] = ()
    time: float = 0.0
    step: int | None = None


class Publishing(msgspec.Struct, frozen=True, tag="publishing"):
    """Every shard has begun its part: what is pushed from now on is not in the version."""

    number: int


class Await(msgspec.Struct, frozen=True, tag="await"):
    """Answered by ``Found`` when the version can be leased; an error if it never will be."""

    number: int


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Answered by ``Found`` when the version that ``name`` (a name or tag) means is not number ``after``.

    ``digest``: of that one, since another cluster counts from 1 again; empty: any.
    """

    model: str
    name: str
    after: int = 0
    digest: str = ""


class Found(msgspec.Struct, frozen=True, tag="found"):
    info: VersionInfo
    pause: float = 0.0  # seconds in which a shard did nothing else for it, at most


class Lease(msgspec.Struct, frozen=True, tag="lease"):
    """Hold a version, until ``Release`` or the reader's end.

    ``known``: (table, ``fingerprint``) of the specs that this reader has; another cluster may have others.
    ``patience``: seconds in which a relay may fetch a version that it has not. ``turn``: which of this reader's leases
    it is, counted from 1, so that asking again is harmless; 0: it is not asked again.
    """

    model: str
    name: str
    known: tuple[tuple[int, int], ...] = ()
    patience: float = 0.0
    turn: int = 0


class Holder(msgspec.Struct, frozen=True):
    """A process that holds a part, and where it listens."""

    address: str
    local: str
    host: str


class PartAt(msgspec.Struct, frozen=True):
    """A part: ``size`` bytes, the XXH3-64 of its blocks' checksums, and who holds it."""

    shard: int
    table: int
    size: int
    digest: int
    holders: tuple[Holder, ...]


class Leased(msgspec.Struct, frozen=True, tag="leased"):
    """``shards``: of the cluster, from which the tables' layouts follow. ``specs``: of tables that were not known."""

    info: VersionInfo
    shards: int
    tables: tuple[int, ...]
    specs: tuple[tuple[int, TableSpec], ...]
    parts: tuple[PartAt, ...]


class Release(msgspec.Struct, frozen=True, tag="release"):
    """A lease of this version ends; not answered."""

    number: int
    turn: int = 0


class Holding(msgspec.Struct, frozen=True, tag="holding"):
    """All leases that a reader has, as (turn, number), of those with a ``turn`` up to ``upto``; not answered.

    So a lease whose answer or release was lost ends, and one that was forgotten stands again.
    """

    leases: tuple[tuple[int, int], ...]
    upto: int


class ListVersions(msgspec.Struct, frozen=True, tag="list_versions"):
    """``model``: empty for all. ``after``: a list that is known; answered when there is another one, at once for 0."""

    model: str = ""
    after: int = 0


class VersionStatus(msgspec.Struct, frozen=True):
    """``state``: cutting, ready or lost. ``copies``: of the part that fewest processes hold."""

    info: VersionInfo
    state: str
    tags: tuple[str, ...]
    leases: int
    copies: int


class VersionList(msgspec.Struct, frozen=True, tag="version_list"):
    """``revision``: another one, if what there is changes. ``silent``: seconds since a relay last heard from where its
    versions come from, 0 while it hears; ``why``: what it knows of that.
    """

    versions: tuple[VersionStatus, ...]
    revision: int = 0
    silent: float = 0.0
    why: str = ""


class SetTag(msgspec.Struct, frozen=True, tag="set_tag"):
    """Let ``tag`` mean the version of this name; an empty name takes the tag away. Answered by ``Done``."""

    model: str
    tag: str
    name: str


class Retire(msgspec.Struct, frozen=True, tag="retire"):
    """Let a version go that nobody leases and no tag means. Answered by ``Done``."""

    model: str
    name: str


# ---- coordinator <-> server ------------------------------------------------------------------------


class CutVersion(msgspec.Struct, frozen=True, tag="cut_version"):
    """To the primary: begin your part now; where ``clocks`` name a table's step, not before it.

    ``late``: other shards have begun theirs long ago; say what became of it, do not begin now.
    """

    number: int
    shard: int
    tables: tuple[int, ...]
    clocks: tuple[tuple[int, int], ...] = ()
    late: bool = False


class PartDigest(msgspec.Struct, frozen=True):
    table: int
    size: int
    digest: int


class PartDone(msgspec.Struct, frozen=True, tag="part_done"):
    """A replica holds its parts of a version; or, without ``parts``, will; or, with ``error``, will not.

    ``clocks``: (table, step) that they are the state of.
    """

    number: int
    shard: int
    server: int
    parts: tuple[PartDigest, ...] = ()
    clocks: tuple[tuple[int, int], ...] = ()
    pause: float = 0.0
    error: str = ""


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """To a server that has become a copy of a shard: fetch its parts of a version, so that it can serve them too."""

    number: int
    shard: int
    parts: tuple[PartDigest, ...]
    specs: tuple[tuple[int, TableSpec], ...]
    holder: Holder


class DropVersion(msgspec.Struct, frozen=True, tag="drop_version"):
    """Nobody wants these any more."""

    numbers: tuple[int, ...]


# ---- reader -> whoever holds a part ------------------------------------------------------------------


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Give me a part. ``shared``: as memory, if you can; ``base``: I have that version of it, a delta will do.

    ``link``: bytes per second that came over this connection last time, 0 if that is not known: what a delta may take.

    Answered by ``Part``; its bytes follow as PIECE frames of the same ``seq``.
    """

    number: int
    shard: int
    table: int
    base: int = 0
    shared: bool = False
    link: float = 0.0


Encoding = Literal["shared", "whole", "delta"]


class Part(msgspec.Struct, frozen=True, tag="part"):
    """``sums``: the XXH3-64 of each 1 MiB of the part, 8 bytes each. ``nbytes`` follow, END on the last.

    ``shared``: nothing follows; a descriptor of a sealed memfd is beside this frame.
    """

    size: int
    sums: bytes
    encoding: Encoding
    nbytes: int


class Unmap(msgspec.Struct, frozen=True, tag="unmap"):
    """Nothing of the shared part is mapped any more; its memory may be used again. Not answered."""

    number: int
    shard: int
    table: int


VersionRequest = Publish | Await | Watch | Lease | ListVersions | SetTag | Retire | Fetch
VersionReply = Publishing | Found | Leased | VersionList | Part
VersionNotice = Release | Holding | CutVersion | PartDone | DropVersion | Hold | Unmap
