"""Messages of the data plan: which samples a worker trains on next. messages.py lists them."""

from __future__ import annotations

import msgspec

ANY = 1 << 62


class PlanNext(msgspec.Struct, frozen=True, tag="plan_next"):
    """Worker to coordinator: my next chunk of the plan ``name``, please; and these I have finished.

    The five that follow the name are what every worker must say alike; the first to ask makes the plan. ``turn`` counts
    the chunks that this session has been given, from 1, so that asking again is harmless. ``finished``: pairs of a
    chunk's number and the clock of the bulk step that used the last of it (0: not a bulk step). Without ``want`` this
    only reports.
    """

    name: str
    n: int
    epochs: int
    seed: int
    chunk: int
    overlap: bool
    turn: int
    finished: tuple[tuple[int, int], ...] = ()
    want: bool = True


class PlanChunk(msgspec.Struct, frozen=True, tag="plan_chunk"):
    """Positions ``start:stop`` of the order of ``epoch`` are yours; or there is nothing now.

    ``wait``: others still hold chunks; ask again, with the same turn. ``over``: every sample of every epoch is
    done. ``left``: samples of ``epoch`` that are not done yet, so that who waits sees whether others get on.
    """

    epoch: int
    chunk: int = -1
    start: int = 0
    stop: int = 0
    wait: bool = False
    over: bool = False
    left: int = 0


class Rest(msgspec.Struct, frozen=True, tag="rest"):
    """Worker to coordinator: bulk steps do without me (``away``), or need me again. Answered by ``Rested``.

    A worker that waits for data would hold up the steps of those that it waits for.
    """

    away: bool


class Aside(msgspec.Struct, frozen=True, tag="aside"):
    """Worker to server: reads and steps of others do without me (``away``) or wait for me again. Answered by ``Done``.

    Under ``Stale`` and ``Async``; values and clocks stay as they are.
    """

    table: int
    away: bool


class Rested(msgspec.Struct, frozen=True, tag="rested"):
    """``members``: the membership epoch from which on it holds."""

    members: int


class WhoIsLate(msgspec.Struct, frozen=True, tag="who_is_late"):
    """Worker to coordinator: I wait for others; for whom? Answered by ``Late``.

    At a barrier, if ``barrier`` names one; else for the first values of a table, or until all have come to step
    ``clock`` of it (``ANY``: until one of the others gets on).
    """

    table: str = ""
    clock: int = 0
    barrier: str | None = None


class Late(msgspec.Struct, frozen=True, tag="late"):
    """Ranks that are waited for, by whether they are there; ``shards`` that have not made the table yet."""

    alive: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    shards: tuple[int, ...] = ()
