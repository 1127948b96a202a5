"""Who is in the cluster. Pure: the clock is passed in, nothing is sent from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from headwater.errors import ClusterError, RankTaken, UsageError
from headwater.wire.messages import Heartbeat, Join, Members

HEARTBEAT = 0.1  # seconds between heartbeats
BACK = 3.0  # seconds after a restart of the coordinator in which workers come back
MOST = 100_000  # workers: a bound, so that a wrong number is refused and not counted to
SILENCE = 10.0  # seconds without one until a member whose connection still stands counts as dead


DIED = "died: its connection ended"


@dataclass(slots=True)
class Member:
    """One worker or reader. ``gone``: since when its connection is broken."""

    peer: int | None
    join: Join
    rank: int
    since: float
    heard: float
    report: Heartbeat = field(default_factory=Heartbeat)
    gone: float | None = None


def given_up(why: str) -> ClusterError:
    """What a reader is told whose leases end before it does; it comes back over another connection, as a new one."""
    return ClusterError(f"this reader {why} and was given up; its leases end. It may join again")


class Membership:
    """Workers by rank, readers, and the epoch that counts every change among the workers.

    ``silence``: seconds without a heartbeat until a member counts as dead; ``grace``: seconds in which one whose
    connection broke may come back over another.
    ``world`` is the number of ranks that steps wait for: given by the first worker that states one, else the
    workers that are there. A rank that left is not waited for until it joins again.
    """

    def __init__(self, silence: float = SILENCE, grace: float = 0.0) -> None:
        self.silence, self.grace = silence, grace
        self.workers: dict[int, Member] = {}
        self.readers: dict[int, Member] = {}
        self.world: int | None = None
        self.epoch = 0
        self.lost = 0
        self.reason = ""
        self.run = 0  # how many runs there have been: see ``_begin``
        self._departed: set[int] = set()
        self._left: set[int] = set()  # of these, who left in order
        self._owed: set[int] = set()  # of these, who is expected again: see ``expect``
        self._paused: set[int] = set()
        self._to_come: set[int] = set()  # ranks of the present run that have not been there yet
        self._runs: set[str] = set()  # what the workers of the present run call it: each launcher gives a name
        self._missed: set[int] = set()  # ranks that died in it and did not come back

    def needed(self) -> tuple[int, ...]:
        """The ranks that a bulk step needs, ascending: those that are not paused."""
        return tuple(rank for rank in self.ranks() if rank not in self._paused)

    def pause(self, member: Member, paused: bool) -> bool:
        """Bulk steps do without this worker, or need it again. Whether that is news."""
        if (member.rank in self._paused) == paused:
            return False
        self._paused ^= {member.rank}
        self.epoch += 1
        return True

    def ranks(self) -> tuple[int, ...]:
        """The ranks of all workers that are there or expected, ascending."""
        expected = set(range(self.world)) if self.world is not None else set(self.workers)
        return tuple(sorted((expected | set(self.workers)) - (self._departed - self._owed)))

    @property
    def left(self) -> frozenset[int]:
        """Ranks of a stated world whose workers have left in order and not come back."""
        return frozenset(self._left if self.world is not None else ())

    def expect(self, ranks: set[int]) -> bool:
        """Of those that left, these have something to do yet: steps wait for them. Whether that is news."""
        if ranks == self._owed:
            return False
        self._owed = ranks
        self.epoch += 1
        return True

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
        self._begin(rank, join.run, join.world)
        self.world = self.world if join.world is None else join.world
        member = Member(peer, join, rank, now, now)
        self.workers[rank] = member
        for gone in (self._departed, self._left, self._owed):
            gone.discard(rank)
        self.epoch += 1
        return member

    def _begin(self, rank: int, run: str, world: int | None) -> None:
        """A worker that finds others is of their run. The first one begins a run, unless it was started again.

        A run is over when all of its workers have left in order: nobody is started again then. Of a world whose size is
        known, all must have been there.
        """
        if not self.workers and run not in self._runs and rank not in self._to_come:
            self.run += 1
            self._runs, self._missed = set(), set()
            self._to_come = set(range(world or 0))
        if run:
            self._runs.add(run)
        self._missed.discard(rank)
        self._to_come.discard(rank)

    def _rank(self, join: Join) -> int:
        if join.rank is None:
            return next(r for r in range(len(self.workers) + 1) if r not in self.workers)
        if join.rank in self.workers:
            raise _taken(join, self.workers[join.rank].join)
        limit = join.world if join.world is not None else self.world
        if join.rank < 0 or (limit is not None and join.rank >= limit):
            raise UsageError(f"rank {join.rank} is not in 0..{(limit or 1) - 1}")
        return join.rank

    def resume(self, peer: int, join: Join, now: float) -> Member | None:
        """A worker comes back over another connection; ``None`` if it is no member any more."""
        member = self.workers.get(-1 if join.rank is None else join.rank)
        if member is None or member.join.session != join.session:
            return None
        member.peer, member.heard, member.gone = peer, now, None
        return member

    def of(self, peer: int) -> Member | None:
        """The worker or reader on this connection."""
        return self.readers.get(peer) or next((m for m in self.workers.values() if m.peer == peer), None)

    def worker(self, peer: int) -> Member | None:
        """The worker on this connection; ``None`` for a reader or a stranger."""
        member = self.of(peer)
        return member if member is not None and member.rank >= 0 else None

    def require(self, peer: int) -> Member:
        """The worker or reader on this connection. Raises ``ClusterError`` for a stranger."""
        member = self.of(peer)
        if member is None:
            raise ClusterError("join first: only a member can use tables and versions")
        return member

    def require_worker(self, peer: int) -> Member:
        """The worker on this connection. Raises ``ClusterError`` for a reader or a stranger."""
        member = self.worker(peer)
        if member is None:
            raise ClusterError("only a worker that has joined can do this; a reader or a stranger cannot")
        return member

    def depart(self, member: Member, *, clean: bool, why: str = "") -> None:
        """Take a worker or reader out; ``clean`` says that it had finished its steps."""
        if member.rank < 0:
            self.readers = {peer: other for peer, other in self.readers.items() if other is not member}
            return
        del self.workers[member.rank]
        self._departed.add(member.rank)
        self._paused.discard(member.rank)
        self.epoch += 1
        if not clean:
            self.lost = self.epoch
            self.reason = f"worker {member.rank} (process {member.join.pid}) {why or 'died'}"
            self._missed.add(member.rank)
        else:
            self._left.add(member.rank)
        if not self.workers:  # the next ones begin anew
            self.world, self._departed, self._left, self._owed = None, set(), set(), set()
            if not self._missed:
                self._runs = set()

    def holds(self, peer: int) -> bool:
        """Whether this peer is a worker or a reader."""
        return self.of(peer) is not None

    def has(self, session: int) -> bool:
        """Whether a client of this session is there."""
        return any(member.join.session == session for member in [*self.workers.values(), *self.readers.values()])

    def announcement(self) -> Members:
        """What the shards must know: whom steps need, and which sessions are there."""
        sessions = tuple(member.join.session for member in self.workers.values())
        return Members(self.epoch, self.needed(), self.lost, self.reason, sessions)

    def heard(self, peer: int, report: Heartbeat, now: float) -> None:
        member = self.of(peer)
        if member is not None:
            member.heard, member.report = now, report

    def forgive(self, seconds: float) -> None:
        """These seconds count for nobody: nobody could be heard."""
        for member in [*self.workers.values(), *self.readers.values()]:
            member.heard += seconds
            member.gone = None if member.gone is None else member.gone + seconds

    def lost_now(self, now: float) -> list[tuple[Member, str]]:
        """Members to give up: silent for too long, or gone and not back. With the reason."""
        found = []
        for member in [*self.workers.values(), *self.readers.values()]:
            if member.gone is not None and now - member.gone >= self.grace:
                found.append((member, DIED))
            elif now - member.heard > self.silence:
                found.append((member, f"was silent for {self.silence:.0f} s"))
        return found

    def dump(self) -> bytes:
        """What must survive the coordinator."""
        workers = tuple((rank, member.join) for rank, member in sorted(self.workers.items()))
        departed = tuple(sorted(self._departed))
        paused = tuple(sorted(self._paused))
        return msgspec.msgpack.encode(
            _State(
                self.epoch, self.lost, self.reason, self.world, departed, workers, paused,
                self.run, tuple(sorted(self._runs)), tuple(sorted(self._missed)),
                tuple(sorted(self._left)), tuple(sorted(self._owed)), tuple(sorted(self._to_come)),
            )
        )  # fmt: skip

    def restore(self, state: Mapping[str, bytes], now: float) -> None:
        """The workers from before a restart have ``BACK`` seconds from ``now`` to come back."""
        if "members" not in state:
            return
        kept = msgspec.msgpack.decode(state["members"], type=_State)
        self.epoch, self.lost, self.reason, self.world = kept.epoch, kept.lost, kept.reason, kept.world
        self._departed, self._paused = set(kept.departed), set(kept.paused)
        self.run, self._runs, self._missed = kept.run, set(kept.runs), set(kept.missed)
        self._left, self._owed, self._to_come = set(kept.left), set(kept.owed), set(kept.to_come)
        back = now + BACK - self.grace
        self.workers = {rank: Member(None, join, rank, now, now, gone=back) for rank, join in kept.workers}


def _taken(asker: Join, holder: Join) -> RankTaken:
    """Who has the rank, and what to do about it: that depends on who asks."""
    who = f"process {holder.pid} on {holder.node or 'another machine'}"
    if (asker.host, asker.pid) == (holder.host, holder.pid):
        return RankTaken(
            f"this process ({who}) is worker {asker.rank} of this cluster already; nothing was changed. Use the client "
            "that it has (headwater.Optimizer finds it by itself), close() that one first, or pass another rank=…"
        )
    return RankTaken(
        f"rank {asker.rank} is held by {who}, which is alive; nothing was changed. Start this worker with a rank of "
        "its own (HEADWATER_RANK, from 0 below HEADWATER_WORLD_SIZE), or end that process if it should not be there"
    )


class _State(msgspec.Struct, frozen=True):
    epoch: int
    lost: int
    reason: str
    world: int | None
    departed: tuple[int, ...]
    workers: tuple[tuple[int, Join], ...]
    paused: tuple[int, ...] = ()
    run: int = 0
    runs: tuple[str, ...] = ()
    missed: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    owed: tuple[int, ...] = ()
    to_come: tuple[int, ...] = ()
