"""Where the bytes of a table lie, whatever its kind: which shards hold a part of it, and how large each is at first.

A kind of table says so by one line of registration here; only rooms of that kind ask for more than this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from headwater.errors import UsageError
from headwater.layout import dense, words
from headwater.layout.saved import Saved
from headwater.types import DenseSpec, KindRoom, Span, TableSpec, load_kind


class Placement(Protocol):
    """A table over a number of shards."""

    @property
    def participants(self) -> tuple[int, ...]:
        """The shards that hold a part of the table."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of values on each shard when the table begins."""


class Geometry(NamedTuple):
    """What a kind of table has to say. ``Any`` is its own spec, ``int`` the number of shards.

    ``check``: raises ``UsageError``, ``UnknownOptimizer`` or ``NotEnoughMemory`` where a table cannot exist at all.
    ``place``: over so many shards. ``spans``: for deltas, (spec, shards, shard, size) → which bytes of a version's part
    of that size hold words of which size. ``missing``: what of its values a snapshot of so many shards lacks, in words;
    empty if it has all of them.
    """

    check: Callable[[Any], None]
    place: Callable[[Any, int], Placement]
    spans: Callable[[Any, int, int, int], tuple[Span, ...]]
    missing: Callable[[Any, int, Saved], str]


_GEOMETRIES: dict[type[TableSpec], Geometry] = {}


def register(kind: type[TableSpec], geometry: Geometry) -> None:
    """From here on there are tables of this kind."""
    _GEOMETRIES[kind] = geometry


register(DenseSpec, Geometry(dense.check_table, dense.layout, words.dense_spans, dense.missing))


def load(spec: TableSpec, room: KindRoom) -> None:
    """Let a package that was installed beside Headwater register the rest of this kind. Raises ``UsageError``."""
    try:
        load_kind(type(spec).__struct_config__.tag, room)  # type: ignore[attr-defined]  # of the kind, which is a struct
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_table(spec: TableSpec) -> None:
    """Whether a table of this spec can exist at all; whether a server has room for it is not known here."""
    _GEOMETRIES[type(spec)].check(spec)


def place(spec: TableSpec, shards: int) -> Placement:
    """The table over so many shards; the same for everybody who asks."""
    return _GEOMETRIES[type(spec)].place(spec, shards)


def spans(spec: TableSpec, shards: int, shard: int, size: int) -> tuple[Span, ...]:
    """A shard's part of a version, of ``size`` bytes, as stretches of 2-byte and of 4-byte words."""
    return _GEOMETRIES[type(spec)].spans(spec, shards, shard, size)


def missing(spec: TableSpec, shards: int, saved: Saved) -> str:
    """What of the table's values a snapshot of so many shards lacks, in words; empty if it has all of them."""
    return _GEOMETRIES[type(spec)].missing(spec, shards, saved)
