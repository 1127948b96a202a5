"""What a primary tells each worker of a bulk step, beside that it is applied or skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from headwater.server.sync.alike import Marks, differ
from headwater.server.sync.bulk import Part
from headwater.server.table import Table
from headwater.server.tables.base import union
from headwater.wire.messages import AckBody


def notes(table: Table, parts: Mapping[int, Part], skip: bool) -> dict[int, AckBody]:
    """By rank, of a step that all ``parts`` have ended; ranks that there is nothing to tell are left out."""
    if not (skip or table.words.new or table.marks) and _nothing_to_compare(table, parts):  # nearly always
        return {}
    sessions = {rank: part.session for rank, part in parts.items()}
    found = table.words.notes(sessions, tuple(rank for rank, part in parts.items() if part.skip))
    marks, table.marks = table.marks, {}
    if not marks and not skip and not table.alike.over(len(parts)):
        gradients = table.spec.optimizer.name != "Assign" and not any(part.merged for part in parts.values())
        marks = look(table) if gradients else {}
    for rank, (mark, others) in marks.items():
        found[rank] = msgspec.structs.replace(found.get(rank, AckBody()), alike=others, mark=mark)
    if not skip and _changed_differently(list(parts.values())):
        found = {rank: msgspec.structs.replace(found.get(rank, AckBody()), differ=True) for rank in parts}
    return found


def _nothing_to_compare(table: Table, parts: Mapping[int, Part]) -> bool:
    return table.alike.over(len(parts)) and not any(part.merged for part in parts.values())


def _changed_differently(parts: Sequence[Part]) -> bool:
    """Whether somebody changed the mean that all have seen, and not everybody in the same way."""
    merged = [part for part in parts if part.merged]
    if not merged:
        return False
    return len(merged) < len(parts) or differ([(part.gradients, union(part.ranges)) for part in merged])


def look(table: Table) -> Marks:
    """Who contributes the same bits to the pending step."""
    gathering = table.gathering
    parts = {rank: part for rank, part in sorted(gathering.parts.items()) if rank in gathering.ranks}
    return table.alike.look({rank: (part.gradients, union(part.ranges)) for rank, part in parts.items()})
