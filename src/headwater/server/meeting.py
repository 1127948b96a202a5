"""What the workers' contributions to a bulk step come to: the mean that they ask to see, the record that is proposed.

From what a table has gathered to what is answered. Nothing is proposed or applied here: ``shard.py`` does.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from headwater.cluster.tables import decide
from headwater.server import events as e
from headwater.server.notes import look, notes
from headwater.server.replication import records as r
from headwater.server.sync.bulk import Part
from headwater.server.table import Table
from headwater.server.tables.plan import Contribution
from headwater.wire.messages import Ready


def contributions(table: Table) -> list[Contribution]:
    """In rank order, each with its union of ranges; of gradients that are all workers' already, the first."""
    parts = table.gathering.seated()
    merged = [part for part in parts if part.merged]
    found = [
        Contribution(part.gradients, r.union(part.ranges)) for part in merged[:1] or parts if part.gradients is not None
    ]
    return found[:1] if table.spec.sync.combined == "lowest" else found


def divisor(table: Table) -> int:
    """What their sum is divided by."""
    mean = table.spec.sync.combined == "mean"
    merged = any(part.merged for part in table.gathering.seated())
    return len(table.gathering.ranks) if mean and not merged else 1


def answers(table: Table) -> list[e.SendMean | e.Fail]:
    """To all who ask for the mean, once every worker has contributed what it will."""
    gathering = table.gathering
    if late := gathering.too_late():
        return _too_late(table, late)
    if gathering.apart():
        return [*give_up(table, gathering.disagreement() or "")]
    asking = [part for part in gathering.seated() if part.asked]
    # Asked for while somebody has ended the step with the mean that it saw: that one is the step's.
    found = contributions(table)
    if not table.marks and not any(part.merged or part.past for part in gathering.seated()):
        table.marks = look(table)  # while each one's gradient is its own
    mean = torch.zeros(table.size, dtype=torch.uint8, device="cpu")
    if found:
        table.dense.aggregate(found, divisor(table), mean, gradients=True)
    ranges, out = _covered(found), list[e.SendMean | e.Fail]()
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


def prepare(table: Table, shard: int) -> tuple[r.Prepare, list[Contribution]]:
    """The step that every worker has ended, and the gradients that it is made of: none if it is skipped."""
    gathering = table.gathering
    skip = any(part.skip for part in gathering.seated())
    found = [] if skip else contributions(table)
    squares: tuple[float, ...] = ()
    if table.spec.max_grad_norm is not None and not skip:
        squares = tuple(table.dense.square_norm(found, divisor(table)))
    clock, members = gathering.clock + 1, gathering.members
    ready = Ready(table.number, shard, clock, members, squares, skip)
    parts = {rank: part for rank, part in sorted(gathering.parts.items()) if rank in gathering.ranks}
    table.words.count()
    groups = table.words.of_step({rank: part.session for rank, part in parts.items()})
    table.notes = notes(table, parts, skip)
    table.words.new = skip and table.words.new  # a step that is skipped takes no hyperparameters over
    contributors = tuple(r.Contributor(rank, part.session, part.seq, part.wants) for rank, part in parts.items())
    verdict = decide(table.spec, [ready]) if table.alone else None
    spans = _covered(found)
    writes = len(gathering.seated()[0].writes)
    return r.Prepare(table.number, clock, members, skip, squares, spans, groups, contributors, verdict, writes), found


def writes(table: Table) -> list[tuple[r.Values, torch.Tensor]]:
    """What the lowest rank wrote into its parameters: the state that the step starts from."""
    gathering = table.gathering
    clock, members = gathering.clock + 1, gathering.members
    return [
        (r.Values(table.number, 0, 0, start, len(data), last=False, clock=clock, members=members), data)
        for start, data in gathering.seated()[0].writes
    ]


def _covered(found: list[Contribution]) -> r.Ranges:
    if len(found) == 1:
        return found[0].ranges
    return r.union([span for c in found for span in c.ranges])


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
