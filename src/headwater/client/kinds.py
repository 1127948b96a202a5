"""The kinds of tables that a client knows."""

from __future__ import annotations

from headwater.client.dense.table import DenseTable
from headwater.client.table import Table
from headwater.errors import UsageError
from headwater.layout.kinds import load
from headwater.types import DenseSpec, TableSpec

_TABLES: dict[type[TableSpec], type[Table]] = {}


def register(kind: type[TableSpec], table: type[Table]) -> None:
    """From here on a client's tables of specs of this kind are made by this class."""
    _TABLES[kind] = table


register(DenseSpec, DenseTable)


def kind_of(spec: TableSpec) -> type[Table]:
    """The class of a client's table of this spec. Raises ``UsageError``."""
    if type(spec) not in _TABLES:
        load(spec, "client")
    found = _TABLES.get(type(spec))
    if found is None:
        raise UsageError(f"a client has no table for a {type(spec).__name__}; nothing was declared")
    return found
