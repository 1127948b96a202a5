"""The kinds of tables that servers can hold: one line each."""

from __future__ import annotations

from collections.abc import Callable

from headwater.errors import UsageError
from headwater.layout import kinds
from headwater.server.tables.base import StoreKind, TableStore
from headwater.server.tables.dense import store as dense
from headwater.types import DenseSpec, TableSpec

_STORES: dict[type[TableSpec], StoreKind] = {}


def register(kind: type[TableSpec], store: StoreKind) -> None:
    """From here on servers hold tables of this kind."""
    _STORES[kind] = store


register(DenseSpec, StoreKind(dense.room, dense.make))


def _of(spec: TableSpec) -> StoreKind:
    if type(spec) not in _STORES:
        kinds.load(spec, "server")
    if type(spec) not in _STORES:
        raise UsageError(f"this server cannot hold a {type(spec).__name__}: no store is registered for it")
    return _STORES[type(spec)]


def room(spec: TableSpec, shards: int, shard: int) -> int:
    """Bytes that a table will take on a shard. Raises what makes the table impossible."""
    kinds.check_table(spec)
    return _of(spec).room(spec, shards, shard)


def size(spec: TableSpec, shards: int, shard: int) -> int:
    """Bytes of the address space of its pushes."""
    kinds.check_table(spec)
    return kinds.place(spec, shards).sizes[shard]


def make(spec: TableSpec, shards: int, shard: int, *, share: bool, consumed: Callable[[int, int], None]) -> TableStore:
    """An empty store. Raises ``NotEnoughMemory``, or ``UsageError`` where this server does not know the kind."""
    return _of(spec).make(spec, shards, shard, share, consumed)
