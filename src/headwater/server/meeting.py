"""What the workers' contributions to a bulk step come to: the mean that they ask to see, the record that is proposed.

From what a table has gathered to what is answered. Nothing is proposed or applied here: ``shard.py`` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from headwater.cluster.tables import decide
from headwater.server import events as e
from headwater.server.notes import look, notes
from headwater.server.replication import records as r
from headwater.server.sync.bulk import Part
from headwater.server.table import Table
from headwater.server.tables.base import Contribution, union
from headwater.wire.messages import Ready


def contributions(table: Table, parts: Sequence[Part]) -> list[Contribution]:
    """In rank order, each with its union of ranges; of gradients that are all workers' already, the first."""
    merged = [part for part in parts if part.merged]
    found = [
        Contribution(part.gradients, union(part.ranges)) for part in merged[:1] or parts if part.gradients is not None
    ]
    return found[:1] if table.spec.sync.combined == "lowest" else found


def divisor(table: Table, parts: Sequence[Part]) -> int:
    """What their sum is divided by."""
    workers = len(table.gathering.ranks)
    if workers == 1 or table.spec.sync.combined != "mean" or any(part.merged for part in parts):
        return 1
    return workers


def answers(table: Table) -> list[e.SendMean | e.Fail]:
    """To all who ask for the mean, once every worker has contributed what it will."""
    gathering = table.gathering
    if late := gathering.too_late():
        return _too_late(table, late)
    if gathering.apart():
        return [*give_up(table, gathering.disagreement() or "")]
    parts = gathering.seated()
    asking = [part for part in parts if part.asked]
    # Asked for while somebody has ended the step with the mean that it saw: that one is the step's.
    found = contributions(table, parts)
    if not table.marks and not any(part.merged or part.past for part in parts):
        table.marks = look(table)  # while each one's gradient is its own
    mean = torch.zeros(table.size, dtype=torch.uint8, device="cpu")
    if found:
        table.store.aggregate(found, divisor(table, parts), mean, gradients=True)
    ranges, out = table.store.extent(found), list[e.SendMean | e.Fail]()
    for part in asking:
        seq, part.asked = part.asked, 0
        out.append(e.SendMean(part.session, seq, table.number, gathering.clock + 1, mean, ranges))
    return out


def _too_late(table: Table, late: Collection[Part]) -> list[e.SendMean | e.Fail]:
    clock = table.gathering.clock
    message = (
        f"the gradient of step {clock} was looked at after that step, and not on every worker: the servers have "
        "merged it and keep nothing of it. Look at it on all workers, or between backward() and step()"
    )
    out = list[e.SendMean | e.Fail]()
    for part in late:
        seq, part.asked = part.asked, 0
        out.append(e.Fail(part.session, seq, table.number, clock + 1, "UsageError", message))
    return out


def prepare(table: Table, shard: int) -> tuple[r.Prepare, list[Contribution], int]:
    """The step that every worker has ended, the gradients that it is made of, and what their sum is divided by.

    If it is skipped there are none.
    """
    gathering = table.gathering
    parts = {rank: part for rank, part in sorted(gathering.parts.items()) if rank in gathering.ranks}
    seated = list(parts.values())
    skip = any(part.skip for part in seated)
    found = [] if skip else contributions(table, seated)
    divide = divisor(table, seated)
    squares: tuple[float, ...] = ()
    if table.spec.max_grad_norm is not None and not skip:
        squares = tuple(table.store.square_norm(found, divide))
    clock, members = gathering.clock + 1, gathering.members
    ready = Ready(table.number, shard, clock, members, squares, skip)
    table.words.count()
    groups = table.words.of_step({rank: part.session for rank, part in parts.items()}) if table.words.new else None
    table.notes = notes(table, parts, skip)
    table.words.new = skip and table.words.new  # a step that is skipped takes no hyperparameters over
    contributors = tuple([r.Contributor(rank, part.session, part.seq, part.wants) for rank, part in parts.items()])
    verdict = decide(table.spec, [ready]) if table.alone else None
    spans = table.store.extent(found)
    writes = len(seated[0].writes)
    body = r.Prepare(table.number, clock, members, skip, squares, spans, groups, contributors, verdict, writes)
    return body, found, divide


def writes(table: Table) -> list[tuple[r.Values, torch.Tensor]]:
    """What the lowest rank wrote into its parameters: the state that the step starts from."""
    gathering = table.gathering
    clock, members = gathering.clock + 1, gathering.members
    return [
        (r.Values(table.number, 0, 0, start, len(data), last=False, clock=clock, members=members), data)
        for start, data in gathering.seated()[0].writes
    ]


def give_up(table: Table, why: str) -> list[e.Fail]:
    """Nobody's contribution to the step counts; each worker is told, and may push it anew."""
    clock = table.gathering.clock + 1
    message = (
        f"{why}; step {clock} was not applied. Workers must do the same between two steps: clip, unscale and write "
        "on every one of them, by values that are the same on all (the gradients that they see are)"
    )
    parts, table.gathering.parts = table.gathering.parts, {}
    table.words.undo()
    return [
        e.Fail(part.session, part.seq, table.number, clock, "UsageError", message, push=True) for part in parts.values()
    ]
