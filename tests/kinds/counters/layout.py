"""Counters under keys of any length: a second kind of table, as a package beside Headwater would bring it.

This file is for everybody, ``server.py`` has the store, ``client.py`` a worker's table. Headwater knows none of them.
A key lies on the shard that its checksum names, and comes into being when it is first counted.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from headwater.errors import UsageError
from headwater.layout import kinds
from headwater.layout.saved import Saved
from headwater.types import Async, NonFinite, OptimizerSpec, Span, Sync, TableSpec, table_kind

HEAD = struct.Struct("<HHq")
SLOT = "counts"

Counts = dict[bytes, int]


@table_kind
class CounterSpec(TableSpec, msgspec.Struct, frozen=True, tag_field="kind", tag="counters"):
    """A table of counters. ``limit``: bytes of one push, or of what a step of all workers comes to."""

    name: str
    sync: Sync = Async()
    optimizer: OptimizerSpec = OptimizerSpec("Sum", ())
    max_grad_norm: float | None = None
    nonfinite: NonFinite = "error"
    limit: int = 1 << 16

    def resumed(self) -> CounterSpec:
        return self


class Everywhere(NamedTuple):
    """Any shard may hold any number of keys."""

    participants: tuple[int, ...]
    sizes: tuple[int, ...]


def shard_of(key: bytes, shards: int) -> int:
    return zlib.crc32(key) % shards


def pack(counts: Mapping[bytes, int]) -> bytes:
    """Each key behind its length and its count, in the order of the keys, in multiples of four bytes."""
    return b"".join(HEAD.pack(len(key), 0, n) + key + bytes(-len(key) % 4) for key, n in sorted(counts.items()))


def unpack(data: bytes) -> Counts:
    """The inverse; a key that comes twice is counted twice. Raises ``struct.error`` if it is none."""
    found: Counts = {}
    at = 0
    while at < len(data):
        length, _, count = HEAD.unpack_from(data, at)
        at += HEAD.size
        key = data[at : at + length]
        found[key] = found.get(key, 0) + count
        at += length + -length % 4
    return found


def _check(spec: CounterSpec) -> None:
    if spec.limit < HEAD.size:
        raise UsageError(f"pushes of {spec.limit} bytes hold no counter; nothing was declared")


def _place(spec: CounterSpec, shards: int) -> Everywhere:
    return Everywhere(tuple(range(shards)), (spec.limit,) * shards)


def _spans(spec: CounterSpec, shards: int, shard: int, size: int) -> tuple[Span, ...]:
    return (Span(0, size, 4),)


def _missing(spec: CounterSpec, shards: int, saved: Saved) -> str:
    there = {extent.start for extent in saved(0, SLOT) if extent.whole}
    return next((f"what shard {shard} counted" for shard in range(shards) if shard not in there), "")


kinds.register(CounterSpec, kinds.Geometry(_check, _place, _spans, _missing))
