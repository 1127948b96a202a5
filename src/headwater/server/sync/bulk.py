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
    based: int = 0  # how many means of the step went, changed, into what it contributes
    merged: bool = False  # its gradient is all workers' already: it saw their mean and changed it
    wrote: bool = False  # its values were written outside the optimizer; ``writes`` are what they are now
    writes: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    asked: int = 0  # the push behind which it asks for the mean; 0: it does not
    past: bool = False  # what it asks for is the mean of the step before, of which it has pushed its gradient again

    def anew(self) -> None:
        """Forget what was contributed; the worker goes on with something else."""
        self.ranges, self.gradients, self.past = [], None, False


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
        parts = self.parts
        for rank in self.ranks:
            part = parts.get(rank)
            if part is None or not part.ended:
                return False
        return bool(self.ranks)

    def meets(self) -> bool:
        """Somebody asks for the mean, and every rank that the step needs has contributed all it will."""
        for part in self.parts.values():  # nearly always nobody asks
            if part.asked:
                break
        else:
            return False
        seated = self.seated()
        there = len(seated) == len(self.ranks) and all(part.ended or part.asked for part in seated)
        return there and any(part.asked for part in seated)

    def too_late(self) -> list[Part]:
        """Of all who ask, those that ask for the step before while others are in this one: there is no such mean."""
        seated = self.seated()
        past = [part for part in seated if part.asked and part.past]
        return past if len(past) < len(seated) else []

    def apart(self) -> bool:
        """Whether contributions begin from different means: then they do not add up to anything."""
        return len({part.based for part in self.seated() if part.ranges and not part.past}) > 1

    def disagreement(self) -> str | None:
        """What the workers would have to do alike and did not: then there is no step that is all of theirs.

        The lowest rank's changed gradient and written values count; where it has none, nobody may.
        """
        for part in self.parts.values():  # nearly always nobody has changed or written anything
            if part.merged or part.wrote or part.based:
                break
        else:
            return None
        seated = [(rank, part) for rank, part in sorted(self.parts.items()) if rank in self.ranks]
        lowest, first = seated[0]
        merged = [rank for rank, part in seated if part.merged]
        if merged and not first.merged:
            return f"worker {merged[0]} changed its gradients (clipping, unscaling) and worker {lowest} did not"
        if self.apart():
            return "some workers changed their gradients between two backward passes of a step and others did not"
        wrote = [rank for rank, part in seated if part.wrote]
        if wrote and not first.wrote:
            return f"worker {wrote[0]} wrote into its parameters and worker {lowest} did not"
        return None

    def seated(self) -> list[Part]:
        """The parts of the ranks that the step needs, in rank order."""
        if len(self.parts) == 1:
            (rank,) = self.parts
            return [self.parts[rank]] if rank in self.ranks else []
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
