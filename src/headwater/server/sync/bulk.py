"""Bulk-synchronous gathering: what each worker contributed to the step, complete or not.

Source: Valiant, "A Bridging Model for Parallel Computation", CACM 1990. A contribution is keyed by
(membership, step, worker); a step that loses a worker is dropped on every shard, never half applied.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Part:
    """One worker's contribution: byte ranges as they came, and whether the step is ended."""

    session: int
    members: int = 0  # the membership epoch under which it was pushed
    ranges: list[tuple[int, int]] = field(default_factory=list)
    seq: int = 0
    ended: bool = False
    skip: bool = False
    wants: bool = False  # send fresh values after the commit
    gradients: torch.Tensor | None = None  # kept here: once READY is said, the step no longer needs the connection


class Gathering:
    """The pending step of one table on one shard."""

    def __init__(self) -> None:
        self.clock = 0  # the last step that was committed
        self.members = 0
        self.ranks: tuple[int, ...] = ()
        self.lost = 0  # the membership epoch of the last death
        self.parts: dict[int, Part] = {}
        self.announced = False  # READY was said for the pending step

    def part(self, rank: int, session: int, members: int) -> Part:
        """What this worker has contributed. Pushed again under a newer membership, a contribution begins anew."""
        found = self.parts.get(rank)
        if found is None or found.session != session or found.members < members:
            found = self.parts[rank] = Part(session, members)
        return found

    def complete(self) -> bool:
        """Every rank that the step needs has ended it."""
        return bool(self.ranks) and all(r in self.parts and self.parts[r].ended for r in self.ranks)

    def seated(self) -> list[Part]:
        """The parts of the ranks that the step needs, in rank order."""
        return [part for rank, part in sorted(self.parts.items()) if rank in self.ranks]

    def members_changed(self, epoch: int, ranks: tuple[int, ...], lost: int) -> list[Part]:
        """Returns the parts that a death made void: their workers must be told."""
        self.members, self.ranks, self.announced = epoch, ranks, False
        self.lost = max(self.lost, lost)
        seated = {rank: part for rank, part in self.parts.items() if rank in ranks}
        self.parts = {rank: part for rank, part in seated.items() if part.members >= self.lost}
        return [part for part in seated.values() if part.members < self.lost]

    def finish(self) -> list[Part]:
        """The step is decided: its parts in rank order; the next step begins."""
        done = self.seated()
        self.parts, self.announced = {}, False
        self.clock += 1
        return done
