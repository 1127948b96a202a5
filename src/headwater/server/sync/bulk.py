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
    ranges: list[tuple[int, int]] = field(default_factory=list)
    seq: int = 0
    ended: bool = False
    skip: bool = False
    wants: bool = False  # send fresh values after the commit
    gradients: torch.Tensor | None = None  # kept here: once READY is said, the step no longer needs the connection


def union(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted, with neighbours joined; overlapping ranges count once."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return tuple(joined)


class Gathering:
    """The pending step of one table on one shard."""

    def __init__(self) -> None:
        self.clock = 0  # the last step that was committed
        self.members = 0
        self.ranks: tuple[int, ...] = ()
        self.lost = 0  # the membership epoch of the last death
        self.parts: dict[int, Part] = {}
        self.announced = False  # READY was said for the pending step

    def part(self, rank: int, session: int) -> Part:
        found = self.parts.get(rank)
        if found is None or found.session != session:
            found = self.parts[rank] = Part(session)
        return found

    def complete(self) -> bool:
        """Every rank that the step needs has ended it."""
        return bool(self.ranks) and all(r in self.parts and self.parts[r].ended for r in self.ranks)

    def seated(self) -> list[Part]:
        """The parts of the ranks that the step needs, in rank order."""
        return [part for rank, part in sorted(self.parts.items()) if rank in self.ranks]

    def forget(self, rank: int, session: int) -> None:
        """The connection of a worker ended. Its part goes, unless READY was said with it: then all shards decide."""
        part = self.parts.get(rank)
        if part is not None and part.session == session and not self.announced:
            del self.parts[rank]

    def members_changed(self, epoch: int, ranks: tuple[int, ...], lost: int) -> list[Part]:
        """Returns the parts that a death made void: their workers must be told."""
        self.members, self.ranks, self.announced = epoch, ranks, False
        if lost <= self.lost:
            self.parts = {rank: part for rank, part in self.parts.items() if rank in ranks}
            return []
        self.lost = lost
        void, self.parts = [p for r, p in self.parts.items() if r in ranks], {}
        return void

    def finish(self) -> list[Part]:
        """The step is decided: its parts in rank order; the next step begins."""
        done = self.seated()
        self.parts, self.announced = {}, False
        self.clock += 1
        return done
