"""Who runs next: requests, slots and versions in; what to run out. Pure: no model, no thread, the clock is passed in.

A step of the engine is one plan: first some of the oldest unfinished prompt, then one token for every sequence that
has read its prompt, the sequences of each version together. A sequence begins on the version that is the newest when
it gets its slot, and stays on it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from headwater.gateway.engine_types import GenerationRequest, QueueFull, Reason

Extra = TypeVar("Extra")


@dataclass(eq=False, slots=True)
class Sequence(Generic[Extra]):
    """A request on its way. ``extra`` is the engine's; the scheduler does not look at it.

    ``version`` is the engine's key of it, once it has a slot. ``length``: positions that are stored in its row, those
    of the prompt first; the token that was generated last is not among them: it is the next forward's input. A
    cancelled sequence is taken out by the next plan.
    """

    request: GenerationRequest
    extra: Extra
    version: int | None = None
    length: int = 0
    generated: int = 0
    cancelled: bool = False

    @property
    def decoding(self) -> bool:
        """Whether the prompt has been read."""
        return self.length >= len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Extra]):
    """Positions ``start`` to ``stop`` of a prompt that are read in this step."""

    sequence: Sequence[Extra]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class EngineStep(Generic[Extra]):
    """One step: who is over, who got a slot, which prompts are read, which versions generate."""

    over: tuple[tuple[Sequence[Extra], Reason], ...]
    begun: tuple[Sequence[Extra], ...]
    chunks: tuple[Chunk[Extra], ...]
    versions: tuple[int, ...]

    @property
    def empty(self) -> bool:
        return not (self.over or self.chunks or self.versions)


@dataclass(frozen=True, slots=True)
class Vacated:
    """A row that a sequence left, and the moves (source, target, positions) that close the gap, in order."""

    row: int
    length: int
    moves: tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class Scheduler(Generic[Extra]):
    """``slots`` sequences run, ``queue`` wait, first come first served; a step reads ``chunk`` tokens of prompts."""

    slots: int
    queue: int
    chunk: int
    waiting: deque[Sequence[Extra]] = field(default_factory=deque)
    batches: dict[int, list[Sequence[Extra]]] = field(default_factory=dict)
    """The rows of each version: those that generate first, then those that still read their prompt."""

    @property
    def running(self) -> int:
        return sum(map(len, self.batches.values()))

    def add(self, sequence: Sequence[Extra]) -> None:
        """Queue a sequence, or raise ``QueueFull``."""
        if len(self.waiting) >= self.queue + max(self.slots - self.running, 0):
            raise QueueFull(
                f"{len(self.waiting)} requests wait already, the most this gateway takes; nothing was queued: "
                "try again later, or start it with a longer queue"
            )
        self.waiting.append(sequence)

    def plan(self, now: float, newest: int) -> EngineStep[Extra]:
        """What to do now. Those that are over hold their rows until ``leave``; the free slots are given away."""
        over = [(s, reason) for s in (*self._all_running(), *self.waiting) if (reason := _verdict(s, now))]
        gone = {id(s) for s, _ in over}
        self.waiting = deque(s for s in self.waiting if id(s) not in gone)
        begun = []
        while self.waiting and self.running < self.slots:
            sequence = self.waiting.popleft()
            sequence.version = newest
            self.batches.setdefault(newest, []).append(sequence)
            begun.append(sequence)
        versions = [v for v, rows in self.batches.items() if any(s.decoding and id(s) not in gone for s in rows)]
        return EngineStep(tuple(over), tuple(begun), self._chunks(gone), tuple(versions))

    def _chunks(self, gone: set[int]) -> tuple[Chunk[Extra], ...]:
        """Pieces of whole prompts or of ``chunk`` tokens, the oldest first: where a prompt is cut does not depend on
        who else is there, as the values of its positions would too.
        """
        budget, chunks = self.chunk, []
        for sequence in self._all_running():
            size = min(len(sequence.request.prompt) - sequence.length, self.chunk)
            if size <= 0 or id(sequence) in gone:
                continue
            if size > budget:
                break
            chunks.append(Chunk(sequence, sequence.length, sequence.length + size))
            budget -= size
        return tuple(chunks)

    def _all_running(self) -> list[Sequence[Extra]]:
        """Those of the oldest batch first; in a batch, of those that read their prompt, the oldest first."""
        return [s for rows in self.batches.values() for s in rows]

    def generating(self, version: int) -> list[Sequence[Extra]]:
        """The sequences that a forward of this version serves: row i is the i-th."""
        return [s for s in self.batches.get(version, ()) if s.decoding]

    def row(self, sequence: Sequence[Extra]) -> int:
        assert sequence.version is not None
        return self.batches[sequence.version].index(sequence)

    def leave(self, sequence: Sequence[Extra]) -> Vacated:
        """Take a running sequence out and close the gap in its batch.

        The last of those that generate takes its place; those that read their prompt move up, of which only the first
        can have anything stored.
        """
        assert sequence.version is not None
        rows = self.batches[sequence.version]
        row, length, moves = rows.index(sequence), sequence.length, []
        vacant = row
        if sequence.decoding:
            vacant = len(self.generating(sequence.version)) - 1
            if vacant != row:
                moves.append((vacant, row, rows[vacant].length))
                rows[row] = rows[vacant]
        moves += [(i, i - 1, s.length) for i, s in enumerate(rows) if i > vacant and s.length]
        del rows[vacant]
        if not rows:
            del self.batches[sequence.version]
        return Vacated(row, length, tuple(moves))


def _verdict(sequence: Sequence[Extra], now: float) -> Reason | None:
    if sequence.cancelled:
        return "cancelled"
    deadline = sequence.request.deadline
    return "deadline" if deadline is not None and now >= deadline else None
