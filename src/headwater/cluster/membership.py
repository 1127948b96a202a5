"""Who is in the cluster. Pure: the clock is passed in, nothing is sent from here."""

from __future__ import annotations

from dataclasses import dataclass, field

from headwater.errors import RankTaken, UsageError
from headwater.wire.messages import Heartbeat, Join

HEARTBEAT = 0.5  # seconds between heartbeats
MOST = 100_000  # workers: a bound, so that a wrong number is refused and not counted to
SILENCE = 20.0  # seconds without one until a member whose connection still stands counts as dead


@dataclass(slots=True)
class Member:
    """One process that joined: a server, a worker or a reader."""

    peer: int
    join: Join
    rank: int
    since: float
    heard: float
    report: Heartbeat = field(default_factory=Heartbeat)
    leaving: bool = False


class Membership:
    """Workers by rank, readers, and the epoch that counts every change among the workers.

    ``world`` is the number of ranks that steps wait for: given by the first worker that states one, else the
    workers that are there. A rank that left is not waited for until it joins again.
    """

    def __init__(self) -> None:
        self.workers: dict[int, Member] = {}
        self.readers: dict[int, Member] = {}
        self.world: int | None = None
        self.epoch = 0
        self.lost = 0
        self.reason = ""
        self._departed: set[int] = set()

    def ranks(self) -> tuple[int, ...]:
        """The ranks that a step needs, ascending."""
        expected = set(range(self.world)) if self.world is not None else set(self.workers)
        return tuple(sorted((expected | set(self.workers)) - self._departed))

    def admit(self, peer: int, join: Join, now: float) -> Member:
        """Let a worker or reader in. Raises ``RankTaken`` or ``UsageError``; nothing has changed then."""
        if join.role == "reader":
            member = Member(peer, join, -1, now, now)
            self.readers[peer] = member
            return member
        if join.world is not None and not 1 <= join.world <= MOST:
            raise UsageError(f"world size {join.world}: a cluster has between 1 and {MOST} workers")
        if join.world is not None and self.world is not None and join.world != self.world:
            raise UsageError(f"this worker says world size {join.world}, the ones before said {self.world}")
        rank = self._rank(join)
        self.world = self.world if join.world is None else join.world
        member = Member(peer, join, rank, now, now)
        self.workers[rank] = member
        self._departed.discard(rank)
        self.epoch += 1
        return member

    def _rank(self, join: Join) -> int:
        if join.rank is None:
            return next(r for r in range(len(self.workers) + 1) if r not in self.workers)
        if join.rank in self.workers:
            holder = self.workers[join.rank].join
            raise RankTaken(
                f"rank {join.rank} is held by process {holder.pid} on host {holder.host or '?'}; "
                "give each worker its own rank (HEADWATER_RANK), or wait until the other has left"
            )
        limit = join.world if join.world is not None else self.world
        if join.rank < 0 or (limit is not None and join.rank >= limit):
            raise UsageError(f"rank {join.rank} is not in 0..{(limit or 1) - 1}")
        return join.rank

    def depart(self, peer: int, *, clean: bool, why: str = "") -> Member | None:
        """Take a worker or reader out; ``clean`` says that it had finished its steps. ``None`` if it was no member."""
        if peer in self.readers:
            return self.readers.pop(peer)
        member = next((m for m in self.workers.values() if m.peer == peer), None)
        if member is None:
            return None
        del self.workers[member.rank]
        self._departed.add(member.rank)
        self.epoch += 1
        if not clean:
            self.lost = self.epoch
            self.reason = f"worker {member.rank} (process {member.join.pid}) {why or 'died'}"
        if not self.workers:  # the next ones begin anew
            self.world, self._departed = None, set()
        return member

    def holds(self, peer: int) -> bool:
        """Whether this peer is a worker or a reader."""
        return peer in self.readers or any(member.peer == peer for member in self.workers.values())

    def heard(self, peer: int, report: Heartbeat, now: float) -> None:
        for member in [*self.workers.values(), *self.readers.values()]:
            if member.peer == peer:
                member.heard, member.report = now, report

    def silent(self, now: float) -> list[Member]:
        """Members whose heartbeat has been missing for too long."""
        return [m for m in [*self.workers.values(), *self.readers.values()] if now - m.heard > SILENCE]
