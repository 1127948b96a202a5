"""A worker's place in a data plan of the coordinator: which samples it is given, and which it has used.

A sample is *given* when the loader has taken its index, and *used* when a step was taken with it. Between the two
lies what the loader fetches ahead. A chunk all of whose samples are used is finished, and reported as such.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from headwater.cluster.dataplan import check
from headwater.errors import DeadlineExceeded, InternalError, UsageError
from headwater.layout.order import order
from headwater.wire.data_plan import PlanChunk, PlanNext

_PAUSE, _LONGEST_PAUSE = 0.01, 0.2  # seconds between questions while others hold what is left


class Runtime(Protocol):
    """A client's time."""

    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class PlanClient(Protocol):
    """What a reader of a plan needs of ``headwater.Client``."""

    @property
    def step_timeout(self) -> float: ...
    @property
    def tables(self) -> Mapping[str, Any]: ...
    @property
    def runtime(self) -> Runtime: ...
    def ask(self, message: PlanNext, timeout: float | None = None) -> Any: ...
    def paused(self) -> contextlib.AbstractContextManager[None]: ...


class PlanReader:
    """This worker's share of a data plan; see ``headwater.data.shards`` for the arguments.

    One ``iter()`` gives the samples of one epoch that fall to this worker. Nobody knows their number beforehand, so
    there is no ``len()``. ``epochs()`` is the loop around it, and it ends when every sample of every epoch is done::

        for epoch in reader.epochs():
            for index in reader:
                ...
                reader.commit(1)

    ``epochs()`` gives a number again if a worker died and left samples of that epoch. An iteration that was broken off
    goes on where it stopped: with the samples that were not committed, or after those that were handed out if
    ``commit`` was never called.

    Without ``commit`` and ``lag`` what this worker did counts when its next round begins.
    """

    def __init__(
        self,
        n: int,
        epochs: int,
        seed: int,
        *,
        client: PlanClient | None,
        name: str,
        chunk: int | None,
        overlap: bool,
        lag: int | None,
    ) -> None:
        if chunk is None:
            chunk = max(1, min(1024, n // 256))
        self.spec = PlanNext(name, n, epochs, seed, chunk, overlap, turn=0)
        check(self.spec)
        if lag is not None and lag < 0:
            raise UsageError(f"lag={lag} is a number of samples, 0 or more")
        self.lag = lag
        self._client = client
        self._cursor: PlanCursor | None = None
        self._epoch: int | None = None  # of the round; None: it is over
        self._announced = False  # by epochs(), and not begun
        self._rounds = 0
        self._exhausted = True

    # ---- what a user calls -------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        """Indices of one epoch, from 0 to n - 1."""
        if not self._announced:
            self._begin()
        self._announced = self._exhausted = False
        self._rounds += 1
        mine = self._rounds
        while (lease := self._lease()) is not None:
            for index in lease.rest(self.spec):
                lease.given += 1
                yield index
                if self._rounds != mine:
                    raise UsageError("a newer iteration over this sampler has begun; go on with that one")
        self._exhausted = True

    def epochs(self) -> Iterator[int]:
        """The number of the epoch of each round, from 0; iterate over the sampler, or its loader, once in each.

        Raises ``DeadlineExceeded`` if this worker waits for samples that others hold, and nobody gets on.
        """
        while True:
            self._begin()
            if self._epoch is None:
                return
            self._announced = True
            yield self._epoch
            if self._announced:
                raise UsageError("the loop over epochs() took nothing from the sampler; iterate over its loader in it")

    def commit(self, samples: int) -> None:
        """A step was taken with the next ``samples`` of those that were handed out. Call it after ``opt.step()``.

        From the first call on, only what was committed counts as trained on. Raises ``UsageError`` for more samples
        than were handed out, and if ``lag`` was given, which counts by itself.
        """
        cursor = self._at()
        if self.lag is not None:
            raise UsageError(f"commit() and lag={self.lag} exclude each other: leave lag out")
        if not 0 <= samples <= cursor.ahead:
            raise UsageError(f"commit({samples}): {cursor.ahead} samples are handed out and not committed")
        cursor.explicit, cursor.idle = True, 0
        cursor.use(samples, self._clock())
        if cursor.finished and (self._exhausted or cursor.ready() is not None):  # else the next question says it
            self._ask(want=False)

    def finish(self) -> None:
        """All that was handed out has been trained on. Call it last after a loop other than ``epochs()``."""
        cursor = self._at()
        cursor.use(cursor.ahead, self._clock())
        if cursor.finished:
            self._ask(want=False)

    # ---- rounds ------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """A round begins: what was handed out in the last one is settled; waits until there is something to do."""
        cursor = self._at()
        cursor.close_round(self._clock(), self._exhausted)
        self._announced = False
        waiting = [lease.epoch for lease in cursor.leases if lease.given < lease.size]
        if not waiting:
            if self._ask().chunk < 0:
                self._wait()
        elif self._exhausted and max(waiting) == self._epoch:  # its end was not committed: it opens the next round
            self._ask()
        if cursor.finished:
            self._ask(want=False)
        self._epoch = max((lease.epoch for lease in cursor.leases if lease.given < lease.size), default=None)

    def _lease(self) -> ChunkLease | None:
        """What the round goes on with. It never waits for others: what the loader holds must be trained on first."""
        cursor = self._at()
        if self._epoch is None:
            return None
        if cursor.ready() is None:
            if self.lag is not None:
                cursor.use(max(0, cursor.ahead - self.lag), self._clock())
            self._ask()
        lease = cursor.ready()
        return lease if lease is not None and lease.epoch <= self._epoch else None

    def _wait(self) -> None:
        """Until there is a chunk, or the plan is over. Nothing of ours is unfinished meanwhile."""
        client, cursor = self._connected(), self._at()
        if cursor.over:
            return
        with client.paused():  # else the others' steps would wait for ours
            self._poll()

    def _poll(self) -> None:
        client = self._connected()
        runtime = client.runtime
        pause, seen, since = _PAUSE, None, runtime.now()
        while True:
            answer = self._ask()
            if answer.over or answer.chunk >= 0:
                return
            if (answer.epoch, answer.left) != seen:
                seen, since = (answer.epoch, answer.left), runtime.now()
            elif runtime.now() - since > client.step_timeout:  # who holds them is alive, else they were given back
                raise DeadlineExceeded(
                    f"data plan {self.spec.name!r}: other workers hold the last {answer.left} samples of epoch "
                    f"{answer.epoch}, and none was finished for {client.step_timeout:g} s (HEADWATER_STEP_TIMEOUT); "
                    "what this worker did is reported"
                )
            runtime.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    # ---- the coordinator ---------------------------------------------------------------------------

    def _ask(self, *, want: bool = True) -> PlanChunk:
        cursor, client = self._at(), self._connected()
        request = cursor.request(want)
        for table in client.tables.values() if request.finished else ():
            if not table.spec.sync.collective:  # a bulk step's clock says whether it was committed
                table.settle()
        answer = client.ask(request)
        if not isinstance(answer, PlanChunk):
            raise InternalError(f"the coordinator answered {type(answer).__name__} to a question for data")
        cursor.answered(request, answer)
        return answer

    def _connected(self) -> PlanClient:
        if self._client is None:
            self._client = _current()
        return self._client

    def _at(self) -> PlanCursor:
        """Where this process is in the plan; samplers of one client and name share it."""
        if self._cursor is None:
            cursors = _CURSORS.setdefault(self._connected(), {})
            self._cursor = cursors.setdefault(self.spec.name, PlanCursor(self.spec))
            if self._cursor.spec != self.spec:
                raise UsageError(f"this process has another data plan {self.spec.name!r}; give this one another name")
        return self._cursor

    def _clock(self) -> int:
        """Of the last bulk step that was begun here; 0 without one."""
        tables = self._connected().tables.values()
        return max((int(table.clock) for table in tables if table.spec.sync.collective), default=0)


@dataclass(slots=True)
class ChunkLease:
    """A chunk that is ours. 0 ≤ used ≤ given ≤ size, in samples."""

    chunk: int
    epoch: int
    start: int
    stop: int
    given: int = 0
    used: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start

    def rest(self, spec: PlanNext) -> list[int]:
        """The samples that are left to give."""
        found: list[int] = order(spec.n, spec.seed, self.epoch, self.start + self.given, self.stop).tolist()
        return found


@dataclass(slots=True)
class PlanCursor:
    """One session's place in one plan: the chunks that it holds, in the order in which they were given."""

    spec: PlanNext
    turns: int = 0
    leases: list[ChunkLease] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)  # (chunk, clock), not yet reported
    explicit: bool = False  # commit() has been called
    idle: int = 0  # rounds in a row that came to their end without a commit
    over: bool = False

    def request(self, want: bool) -> PlanNext:
        s = self.spec
        turn = self.turns + 1 if want else self.turns
        return PlanNext(s.name, s.n, s.epochs, s.seed, s.chunk, s.overlap, turn, tuple(self.finished), want)

    def answered(self, request: PlanNext, answer: PlanChunk) -> None:
        del self.finished[: len(request.finished)]
        self.over = answer.over
        if answer.chunk >= 0:
            self.turns += 1
            self.leases.append(ChunkLease(answer.chunk, answer.epoch, answer.start, answer.stop))

    def ready(self) -> ChunkLease | None:
        """The first chunk of which something is left to give."""
        return next((lease for lease in self.leases if lease.given < lease.size), None)

    @property
    def ahead(self) -> int:
        """Samples that were given and not yet used."""
        return sum(lease.given - lease.used for lease in self.leases)

    def use(self, samples: int, clock: int) -> None:
        """The oldest ``samples`` of those given."""
        for lease in self.leases:
            taken = min(samples, lease.given - lease.used)
            lease.used += taken
            samples -= taken
            if lease.used == lease.size:
                self.finished.append((lease.chunk, clock))
        self.leases = [lease for lease in self.leases if lease.used < lease.size]

    def close_round(self, clock: int, exhausted: bool) -> None:
        """What was given in it is used. With ``commit``, what was not committed is given again.

        But not for ever: what two whole rounds in a row did not commit is what ``drop_last`` drops.
        """
        if self.ahead and exhausted and self.explicit:
            self.idle += 1
        if not self.explicit or self.idle > 2:
            self.use(self.ahead, clock)
            self.idle = 0
        for lease in self.leases:
            lease.given = lease.used


_CURSORS: weakref.WeakKeyDictionary[PlanClient, dict[str, PlanCursor]] = weakref.WeakKeyDictionary()


def _current() -> PlanClient:
    from headwater.client import current

    return current()
