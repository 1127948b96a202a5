"""The kinds of tables that a client knows: one line for each."""

from __future__ import annotations

from headwater.client.dense.table import DenseTable
from headwater.client.table import Table
from headwater.errors import UsageError
from headwater.types import TableSpec

KINDS: dict[type, type[Table]] = {
    TableSpec: DenseTable,
}
"""By the type of a table's spec."""


def kind_of(spec: object) -> type[Table]:
    """The class of a client's table of this spec. Raises ``UsageError``."""
    found = KINDS.get(type(spec))
    if found is None:
        raise UsageError(f"{type(spec).__name__} is no kind of table that this client knows; nothing was declared")
    return found
