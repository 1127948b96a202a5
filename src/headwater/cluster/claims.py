"""Whether a table that is there is the one that a worker means. Part of the coordinator.

What is new is new: an optimizer's table goes on from what an earlier run, or an earlier optimizer of this worker, made
of it only where that is said. Whoever comes late to a run, or is started again in it, finds the run's tables all the
same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.errors import TableConflict, UnknownTable
from headwater.types import Claim, TableSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from headwater.cluster.membership import Member, Membership
    from headwater.cluster.tables import DeclaredTable

_REMEDY = "Nothing was changed. Say resume=True to go on with what it holds, or give the optimizer another name=…"


def check(table: DeclaredTable, claim: Claim, worker: Member | None, membership: Membership) -> None:
    """Raises ``TableConflict`` if ``claim`` means a new table and this one is not of the run, or was left behind."""
    if claim != "new" or worker is None or table.state == "assigning":  # without values it is nobody's yet
        return
    if not _of_this_run(table, membership):
        raise TableConflict(f"table {table.spec.name!r} holds what an earlier run left in this cluster. {_REMEDY}")
    if worker.rank in table.finished:
        raise TableConflict(
            f"table {table.spec.name!r} holds what an earlier process of worker {worker.rank} made of it in this run, "
            f"which has finished and left. {_REMEDY}"
        )


def _of_this_run(table: DeclaredTable, membership: Membership) -> bool:
    """A snapshot's tables (run 0) are for the first run to go on with."""
    return table.run == membership.run or (table.run == 0 and membership.run == 1)


def taken(table: DeclaredTable, claim: Claim, worker: Member, membership: Membership) -> None:
    """A worker uses the table now: it is of this run from here on."""
    table.users[worker.join.session] = worker.rank
    if claim != "any":
        table.run, table.own = membership.run, True
        table.finished.discard(worker.rank)


def owed(tables: Iterable[DeclaredTable], membership: Membership) -> set[int]:
    """Who has left in order and is expected again: others train a table, step by step together, that it has never used.

    It was in an earlier round, and is late for this one: without it the others would take its steps alone.
    """
    together = [t for t in tables if t.own and t.run == membership.run and t.users and t.spec.sync.collective]
    return {rank for rank in membership.left if any(rank not in table.finished for table in together)}


def missing(name: str, there: Iterable[str]) -> UnknownTable:
    """There is nothing to resume."""
    known = ", ".join(map(repr, sorted(there))) or "none"
    return UnknownTable(
        f"resume=True, but the cluster has no table {name!r} to go on with; it has {known}. Nothing was changed. "
        "Leave resume out to begin anew, or give the name that it had"
    )


def comparable(spec: TableSpec, claim: Claim) -> TableSpec:
    """Who goes on with a table may do so with other hyperparameters, which travel with the first step.

    How its first values were made is no matter then.
    """
    return spec.resumed() if claim == "resume" else spec
