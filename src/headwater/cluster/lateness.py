"""Who keeps others waiting. Part of the coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.wire.data_plan import Late, WhoIsLate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from headwater.cluster.barriers import Barriers
    from headwater.cluster.membership import Member, Membership
    from headwater.cluster.tables import DeclaredTable, Tables


def of(question: WhoIsLate, asker: Member | None, membership: Membership, tables: Tables, barriers: Barriers) -> Late:
    """Of those that ``asker`` waits for, by the last heartbeats."""
    if question.barrier is not None:
        at = barriers.at(question.barrier)
        return _split((rank for rank in membership.ranks() if rank not in at), asker, membership)
    table = tables.named(question.table)
    if table is None:
        return Late()
    if table.state == "creating":
        return Late(shards=tuple(sorted(table.creating)))
    if table.state == "assigning":
        return _split(_initialiser(table, membership), asker, membership)
    behind = (rank for rank in membership.needed() if _reached(membership, rank, table.number) < question.clock)
    return _split(behind, asker, membership)


def _split(ranks: Iterable[int], asker: Member | None, membership: Membership) -> Late:
    others = [rank for rank in ranks if asker is None or rank != asker.rank]
    alive = tuple(rank for rank in others if rank in membership.workers)
    return Late(alive, tuple(rank for rank in others if rank not in membership.workers))


def _initialiser(table: DeclaredTable, membership: Membership) -> list[int]:
    """Who gives the table its first values, or will when it comes."""
    given = [rank for rank, member in membership.workers.items() if member.peer == table.initialiser]
    return given or sorted(membership.ranks())[:1]


def _reached(membership: Membership, rank: int, table: int) -> int:
    member = membership.workers.get(rank)
    return dict(member.report.tables).get(table, 0) if member is not None else 0
