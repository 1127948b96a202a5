"""Messages of the data plan: which samples a worker trains on next. messages.py lists them."""

from __future__ import annotations

import msgspec

ANY = 1 << 62
"""A ``WhoIsLate.clock`` that no worker reaches: it asks about every other worker."""


class PlanNext(msgspec.Struct, frozen=True, tag="plan_next"):
    """Worker to coordinator: my next chunk of the plan ``name``, please; and these I have finished.

    All workers must give the same ``n``, ``epochs``, ``seed``, ``chunk`` and ``overlap``; the first to ask makes the
    plan. ``turn``: the number of this question among the session's, from 1; a repeated one gets the same chunk again.
    ``finished``: (chunk, clock) pairs; the clock is that of the bulk step in which the chunk's last sample was used,
    0 if it was not a bulk step. ``want``: false if the worker only reports what it has finished.
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


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """Worker to coordinator: bulk steps do without me (``paused``), or need me again. Answered by ``Paused``.

    A worker that waits for data would hold up the steps of those that it waits for.
    """

    paused: bool


class PauseTable(msgspec.Struct, frozen=True, tag="pause_table"):
    """Worker to server: reads and steps of others do without me (``paused``) or wait for me again. Answered: ``Done``.

    Under ``Stale`` and ``Async``; values and clocks stay as they are.
    """

    table: int
    paused: bool


class Paused(msgspec.Struct, frozen=True, tag="paused"):
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
