"""Which worker trains on which samples: each sample once per epoch, across deaths and rejoins. Pure.

A plan cuts the order of an epoch (layout/order.py) into *chunks*; a worker asks for one at a time and says which it has
finished. What a worker held when it was lost goes to whoever asks next. A chunk carries the clock of the bulk step
that used the last of it, for two reasons: a step that dies with its worker takes its chunks back, and a snapshot at
clock c counts a chunk as done only if its clock is at most c.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from headwater.errors import ClusterError, SessionExpired, StateCorrupt, UsageError
from headwater.wire.data_plan import PlanChunk, PlanNext

MOST_SAMPLES = 1 << 48
MOST_PLANS = 1000
ALL = 1 << 62
"""A clock that no step reaches: everything reported is settled."""

_FORMAT = 1


class _EpochState(msgspec.Struct, frozen=True):
    """``done``: ranges of chunks. ``late``: (chunk, clock, session). ``held``: (chunk, session)."""

    number: int
    fresh: int
    done: tuple[tuple[int, int], ...]
    again: tuple[int, ...]
    late: tuple[tuple[int, int, int], ...]
    held: tuple[tuple[int, int], ...]


class _PlanState(msgspec.Struct, frozen=True):
    """``cursors``: (session, turns that were answered with a chunk, the last of those chunks)."""

    format: int
    spec: PlanNext
    begun: int
    epochs: tuple[_EpochState, ...]
    cursors: tuple[tuple[int, int, int], ...]


class Ranges:
    """A set of numbers as few ranges ``[start, stop)``, ascending and apart."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges = list(ranges)

    def __contains__(self, number: int) -> bool:
        at = bisect_left(self._ranges, (number + 1,)) - 1
        return at >= 0 and number < self._ranges[at][1]

    def add(self, number: int) -> None:
        """Of a number that is not there."""
        at = bisect_left(self._ranges, (number + 1,))
        start, stop = number, number + 1
        first = at
        if at and self._ranges[at - 1][1] == number:
            first, start = at - 1, self._ranges[at - 1][0]
        if at < len(self._ranges) and self._ranges[at][0] == stop:
            stop, at = self._ranges[at][1], at + 1
        self._ranges[first:at] = [(start, stop)]

    def dump(self) -> tuple[tuple[int, int], ...]:
        return tuple(self._ranges)


@dataclass(slots=True)
class _Late:
    """A finished chunk whose step may not be in the next snapshot, or may die with its worker."""

    clock: int
    session: int


@dataclass(slots=True)
class _Epoch:
    """A chunk is either not yet given out (``fresh`` and above, or in ``again``), or held, late or done."""

    number: int
    chunks: int
    fresh: int = 0  # the first that was never given out
    again: list[int] = field(default_factory=list)  # a heap: given out, and come back
    held: dict[int, int] = field(default_factory=dict)  # chunk → session
    late: dict[int, _Late] = field(default_factory=dict)
    done: Ranges = field(default_factory=Ranges)

    def take(self, session: int) -> int | None:
        """What came back is given out first."""
        if self.again:
            chunk = heapq.heappop(self.again)
        elif self.fresh < self.chunks:
            chunk, self.fresh = self.fresh, self.fresh + 1
        else:
            return None
        self.held[chunk] = session
        return chunk

    def finish(self, session: int, chunk: int, clock: int, settled: int) -> bool:
        """Whether this says something new.

        A report about what another holds, or nobody, is passed over. That of a worker that was given up is one: its
        last step may have been dropped with it, so the chunk is trained on again.
        """
        if self.held.get(chunk) != session:
            return False
        del self.held[chunk]
        if clock <= settled:
            self.done.add(chunk)
        else:
            self.late[chunk] = _Late(clock, session)
        return True

    def settle(self, clock: int) -> bool:
        ripe = [chunk for chunk, late in self.late.items() if late.clock <= clock]
        for chunk in ripe:
            del self.late[chunk]
            self.done.add(chunk)
        return bool(ripe)

    def forget(self, session: int, committed: int) -> bool:
        """Give out again what this session held, and what it finished in steps that were never committed."""
        back = [chunk for chunk, holder in self.held.items() if holder == session]
        void = [c for c, late in self.late.items() if late.session == session and late.clock > committed]
        for chunk in back:
            del self.held[chunk]
        for chunk in void:
            del self.late[chunk]
        for chunk in (*back, *void):
            heapq.heappush(self.again, chunk)
        return bool(back or void)

    @property
    def finished(self) -> bool:
        """Every chunk is finished; some of them may still be late."""
        return self.fresh == self.chunks and not self.again and not self.held

    @property
    def over(self) -> bool:
        return self.finished and not self.late

    def validate(self) -> None:
        scattered = [*self.again, *self.held, *self.late]
        ranges = self.done.dump()
        edges = [edge for span in ranges for edge in span]
        apart = all(a < b for a, b in pairwise(edges))
        inside = all(0 <= chunk < self.fresh and chunk not in self.done for chunk in scattered)
        count = len(scattered) + sum(stop - start for start, stop in ranges)
        if edges and not 0 <= edges[0] <= edges[-1] <= self.fresh:
            inside = False
        if not (0 <= self.fresh <= self.chunks and apart and inside and len(set(scattered)) == len(scattered)):
            raise ValueError(f"epoch {self.number}: a chunk is in two places, or none that exists")
        if count != self.fresh:
            raise ValueError(f"epoch {self.number}: {self.fresh} chunks were given out, {count} are known")

    def dump(self) -> _EpochState:
        late = tuple(sorted((chunk, late.clock, late.session) for chunk, late in self.late.items()))
        return _EpochState(
            self.number, self.fresh, self.done.dump(), tuple(sorted(self.again)), late, tuple(sorted(self.held.items()))
        )

    def snapshot(self, clock: int) -> _EpochState:
        """As a cluster that begins again from the values at ``clock`` must see it."""
        copy = _Epoch(self.number, self.chunks, self.fresh, list(self.again), {}, {}, Ranges(self.done.dump()))
        for chunk, late in sorted(self.late.items()):
            if late.clock <= clock:
                copy.done.add(chunk)
            else:
                copy.again.append(chunk)
        copy.again += self.held
        return copy.dump()


@dataclass(slots=True)
class _Cursor:
    turns: int = 0
    last: tuple[int, int] = (0, 0)  # epoch and chunk that answered the last turn


class DataPlan:
    """One named plan. ``revision`` counts the changes, so that the host knows when to make it durable.

    Args:
        spec: what the first worker asked for; ``turn`` and ``finished`` do not matter.

    Raises:
        UsageError: numbers that make no plan.
    """

    def __init__(self, spec: PlanNext) -> None:
        check(spec)
        self.spec = msgspec.structs.replace(spec, turn=0, finished=(), want=True)
        self.chunks = -(-spec.n // spec.chunk)
        self.revision = 0
        self._begun = 0  # epochs
        self._open: list[_Epoch] = []  # those that are not over, oldest first
        self._cursors: dict[int, _Cursor] = {}

    # ---- events ------------------------------------------------------------------------------------

    def ask(self, session: int, request: PlanNext, settled: int = ALL) -> PlanChunk:
        """What this session trains on next. Asking again with the same turn gives the same answer.

        ``settled``: the clock up to which steps are committed, and which no snapshot under way is older than.
        Raises ``UsageError`` for another plan under this name, ``SessionExpired`` for a session that was forgotten.
        Nothing has changed then.
        """
        self._agree(request)
        cursor = self._cursors.get(session) or _Cursor()
        if request.want and request.turn not in (max(cursor.turns, 1), cursor.turns + 1):
            raise SessionExpired(
                f"data plan {request.name!r} has given session {session:016x} {cursor.turns} chunks, and is asked for "
                f"number {request.turn}: what it held was given to others when it was lost. Connect again"
            )
        if request.epochs != self.spec.epochs:
            self.spec = msgspec.structs.replace(self.spec, epochs=request.epochs)
            self.revision += 1
        self.settle(settled)
        for number, clock in request.finished:
            self._finish(session, number, clock, settled)
        if not request.want:
            return self._nothing()
        if request.turn == cursor.turns and cursor.turns:
            return self._chunk(*cursor.last)
        return self._next(session, cursor)

    def settle(self, clock: int) -> None:
        """Steps up to ``clock`` can neither be lost nor be missing from a snapshot any more."""
        for epoch in self._open:
            self.revision += epoch.settle(clock)
        self._open = [epoch for epoch in self._open if not epoch.over]

    def forget(self, session: int, committed: int = ALL) -> None:
        """A session has ended. What it held is given out again, and what it finished in steps after ``committed``."""
        for epoch in self._open:
            self.revision += epoch.forget(session, committed)
        self.revision += self._cursors.pop(session, None) is not None

    @property
    def over(self) -> bool:
        """Every sample of every epoch is done."""
        return self._begun == self.spec.epochs and not self._open

    # ---- state -------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """Everything, for the coordinator that takes over: its workers go on where they are."""
        cursors = tuple((session, c.turns, self._number(*c.last)) for session, c in sorted(self._cursors.items()))
        return self._pack(tuple(epoch.dump() for epoch in self._open), cursors)

    def snapshot(self, clock: int = ALL) -> bytes:
        """As of the values at ``clock``: what is held, or was finished later, is not done; and no sessions."""
        return self._pack(tuple(epoch.snapshot(clock) for epoch in self._open), ())

    def _pack(self, epochs: tuple[_EpochState, ...], cursors: tuple[tuple[int, int, int], ...]) -> bytes:
        return msgspec.msgpack.encode(_PlanState(_FORMAT, self.spec, self._begun, epochs, cursors))

    @classmethod
    def load(cls, data: bytes) -> DataPlan:
        """From ``dump`` or ``snapshot``. Raises ``StateCorrupt``."""
        try:
            state = msgspec.msgpack.decode(data, type=_PlanState)
            if state.format != _FORMAT:
                raise ValueError(f"it has format {state.format}, this Headwater reads format {_FORMAT}")
            plan = cls(state.spec)
            plan._restore(state)
            plan.validate()
        except (msgspec.MsgspecError, ValueError) as error:
            raise StateCorrupt(f"a data plan that cannot be read: {error}") from None
        return plan

    def _restore(self, state: _PlanState) -> None:
        self._begun = state.begun
        for past in state.epochs:
            epoch = _Epoch(past.number, self.chunks, past.fresh, list(past.again), dict(past.held))
            epoch.late = {chunk: _Late(clock, session) for chunk, clock, session in past.late}
            epoch.done = Ranges(past.done)
            self._open.append(epoch)
        for session, turns, last in state.cursors:
            self._cursors[session] = _Cursor(turns, divmod(last, self.chunks))

    def validate(self) -> None:
        """Every chunk is in exactly one place. Raises ``ValueError``: a bug, or a damaged state."""
        numbers = [epoch.number for epoch in self._open]
        if not 0 <= self._begun <= self.spec.epochs or numbers != sorted(set(numbers)):
            raise ValueError(f"epochs {numbers} of {self.spec.epochs}, {self._begun} begun")
        if numbers and not 0 <= numbers[0] <= numbers[-1] < self._begun:
            raise ValueError(f"epochs {numbers}, {self._begun} begun")
        for epoch in self._open:
            epoch.validate()

    # ---- inside ------------------------------------------------------------------------------------

    def _agree(self, request: PlanNext) -> None:
        old, new = self.spec, request
        for name in ("n", "epochs", "seed", "chunk", "overlap"):
            here, there = getattr(old, name), getattr(new, name)
            if here == there:
                continue
            if name == "epochs" and not self._cursors and there >= self._begun:
                continue  # nobody is in it: a run that goes on for longer, or shorter, than was planned
            raise UsageError(
                f"data plan {old.name!r} exists with {name}={here}, not {there}; nothing was changed. "
                "Use another name, or ask for it everywhere in the same way"
            )

    def _finish(self, session: int, number: int, clock: int, settled: int) -> None:
        epoch_number, chunk = divmod(number, self.chunks)
        for epoch in self._open:
            if epoch.number == epoch_number:
                self.revision += epoch.finish(session, chunk, clock, settled)
        self._open = [epoch for epoch in self._open if not epoch.over]

    def _next(self, session: int, cursor: _Cursor) -> PlanChunk:
        for epoch in self._candidates():
            chunk = epoch.take(session)
            if chunk is not None:
                cursor.turns, cursor.last = cursor.turns + 1, (epoch.number, chunk)
                self._cursors[session] = cursor
                self.revision += 1
                return self._chunk(epoch.number, chunk)
        return self._nothing()

    def _candidates(self) -> Iterable[_Epoch]:
        """The epochs that have begun, oldest first, and then the one that may begin now."""
        yield from self._open
        unfinished = sum(not epoch.finished for epoch in self._open)
        if self._begun < self.spec.epochs and unfinished <= int(self.spec.overlap):
            self._open.append(_Epoch(self._begun, self.chunks))
            self._begun += 1
            yield self._open[-1]

    def _chunk(self, epoch: int, chunk: int) -> PlanChunk:
        start = chunk * self.spec.chunk
        return PlanChunk(epoch, self._number(epoch, chunk), start, min(self.spec.n, start + self.spec.chunk))

    def _nothing(self) -> PlanChunk:
        """Wait, or it is over. ``left`` counts whole chunks, the last one as large as the others."""
        if self.over:
            return PlanChunk(self.spec.epochs - 1, over=True)
        number = self._open[0].number if self._open else self._begun
        left = sum(e.chunks - e.fresh + len(e.again) + len(e.held) + len(e.late) for e in self._open[:1])
        return PlanChunk(number, wait=True, left=left * self.spec.chunk)

    def _number(self, epoch: int, chunk: int) -> int:
        """A chunk's number on the wire: unique in the plan."""
        return epoch * self.chunks + chunk


def check(spec: PlanNext) -> None:
    """Raises ``UsageError`` that names what is wrong."""
    for name, most in (("n", MOST_SAMPLES), ("epochs", 1 << 32), ("chunk", MOST_SAMPLES)):
        value = getattr(spec, name)
        if not 1 <= value <= most:
            raise UsageError(f"data plan {spec.name!r}: {name}={value} must be between 1 and {most}")
    if not -(1 << 63) <= spec.seed < 1 << 63:
        raise UsageError(f"data plan {spec.name!r}: seed={spec.seed} must fit into 64 bits")
    if not 1 <= len(spec.name) <= 200:
        raise UsageError("the name of a data plan has between 1 and 200 characters")


class DataPlans:
    """All plans of a cluster, by name: what the coordinator keeps.

    ``changes`` gives what must be durable before an answer is sent; ``state`` is what ``changes`` gave before.
    """

    PREFIX = "plan/"

    def __init__(self, state: Mapping[str, bytes] | None = None) -> None:
        self._plans: dict[str, DataPlan] = {}
        self._kept: dict[str, int] = {}  # revisions that changes() has given
        for key, data in (state or {}).items():
            if key.startswith(self.PREFIX):
                plan = self._plans[key.removeprefix(self.PREFIX)] = DataPlan.load(data)
                self._kept[plan.spec.name] = plan.revision

    def ask(self, session: int, request: PlanNext, settled: int = ALL) -> PlanChunk:
        """As ``DataPlan.ask``; the first to name a plan makes it."""
        plan = self._plans.get(request.name)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                raise ClusterError(f"this cluster has {MOST_PLANS} data plans, which is the most; nothing was changed")
            plan = DataPlan(request)
        answer = plan.ask(session, request, settled)
        self._plans[request.name] = plan
        return answer

    def settle(self, clock: int) -> None:
        for plan in self._plans.values():
            plan.settle(clock)

    def forget(self, session: int, committed: int = ALL) -> None:
        for plan in self._plans.values():
            plan.forget(session, committed)

    def changes(self) -> dict[str, bytes]:
        """The plans that have changed since this was last called, as keys and values of a store."""
        changed = {name: plan for name, plan in self._plans.items() if self._kept.get(name) != plan.revision}
        self._kept.update({name: plan.revision for name, plan in changed.items()})
        return {self.PREFIX + name: plan.dump() for name, plan in changed.items()}

    def snapshot(self, clock: int = ALL) -> bytes:
        """All plans as of the values at ``clock``.

        When to take it, so that no sample is left out: if all tables are Bulk, once the shards have made their cut,
        and nothing above ``clock`` settled until then (who reports until then is counted); else before they make it.
        """
        return msgspec.msgpack.encode({name: plan.snapshot(clock) for name, plan in self._plans.items()})

    def restore(self, data: bytes) -> None:
        """Begin from what ``snapshot`` gave. Raises ``StateCorrupt``; nothing has changed then."""
        try:
            found = msgspec.msgpack.decode(data, type=dict[str, bytes])
        except msgspec.MsgspecError as error:
            raise StateCorrupt(f"the data plans of a snapshot cannot be read: {error}") from None
        self._plans = {name: DataPlan.load(plan) for name, plan in found.items()}
        self._kept = {}
