"""Stale-synchronous and asynchronous reading: each worker's clock, and the bound on how far reads lag.

Source: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013.
"""

from __future__ import annotations

from collections.abc import Collection

from headwater.types import Policy


class Clocks:
    """Steps finished by each worker on one shard, and what had been applied when each last read.

    ``applied`` counts the steps applied on this shard. The staleness of a push is the number of others'
    steps that were applied between the worker's last read and now.
    """

    def __init__(self, sync: Policy) -> None:
        self._bound = sync.read_bound
        self._cap = sync.staleness_cap
        self.applied = 0
        self.clock: dict[int, int] = {}
        self.read: dict[int, int] = {}
        self.paused: dict[int, int] = {}  # rank: session, of who waits for others and is not waited for
        self._active: set[int] = set()  # ranks that have read and not yet pushed since

    def members(self, ranks: tuple[int, ...]) -> None:
        """Only these ranks count; a newcomer starts at the slowest clock."""
        slowest = min(self.clock.values(), default=0)
        self.clock = {rank: self.clock.get(rank, slowest) for rank in ranks}
        self.read = {rank: self.read.get(rank, self.applied) for rank in ranks}
        self.paused = {rank: session for rank, session in self.paused.items() if rank in ranks}
        self._active &= set(ranks)

    def pause(self, rank: int, session: int) -> None:
        """A worker waits for others, at a barrier or for data: nobody waits for it."""
        if rank in self.clock:
            self.paused[rank] = session

    def resume(self, rank: int, session: int) -> None:
        """It does not any more, or its session has ended."""
        if self.paused.get(rank) == session:
            del self.paused[rank]

    def pushed(self, rank: int, clock: int) -> int:
        """A worker's step was applied; returns its staleness in steps."""
        staleness = self.applied - self.read.get(rank, self.applied)
        self.applied += 1
        if rank in self.clock:
            self.clock[rank] = max(self.clock[rank], clock)
            self._active.discard(rank)
        return staleness

    def was_read(self, rank: int) -> None:
        """A worker got fresh values."""
        if rank in self.clock:
            self.read[rank] = self.applied
            self._active.add(rank)

    def forget_reads(self) -> None:
        """Reads are in no record: to a new primary every worker has read just now, and computes nothing yet."""
        self.read = dict.fromkeys(self.clock, self.applied)
        self._active.clear()

    def may_read(self, rank: int, clock: int) -> bool:
        """Whether the slowest of the others has reached ``clock`` minus the policy's read bound."""
        if self._bound is None or rank not in self.clock:
            return True
        others = [at for other, at in self.clock.items() if other != rank and other not in self.paused]
        return not others or min(others) >= max(clock, self.clock[rank]) - self._bound

    def may_apply(self, rank: int, held: Collection[int] = ()) -> bool:
        """Whether one more step leaves every worker that still computes within the cap.

        ``held`` ranks have pushed and wait here themselves. They do not count, or two workers could wait for
        each other for ever; so a step that waited may be up to world - 1 steps staler than the cap.
        """
        if self._cap is None:
            return True
        computing = self._active.difference(held, self.paused, (rank,))
        return all(self.applied + 1 - self.read[other] <= self._cap for other in computing)
