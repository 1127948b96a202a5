"""Barriers, and what others do without a worker that waits: it pauses until it resumes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

from headwater import interrupts
from headwater.client.patience import Patience
from headwater.client.shards import Shards
from headwater.client.table import Table
from headwater.wire import messages as m

_BRIEF = 2.0  # seconds at least, after a wait that took all its time, to tell the shards that the worker resumes
_SECOND = "\0back"  # makes of a barrier's name that of its second half: nobody passes it who is still paused


class Pauses:
    """``tables``: the worker's present ones, by name."""

    def __init__(self, shards: Shards, tables: Mapping[str, Table]) -> None:
        self._shards = shards
        self._tables = tables
        self._paused = False  # inside ``paced_do_without``
        self._turns: Counter[str] = Counter()

    def meet(self, name: str, value: bytes, timeout: float | None) -> m.Reply:
        """A barrier, in two halves: who is early pauses in the first; past the second all are waited for again."""
        self._turns[name] += 1
        patience = Patience(self._shards, timeout, partial(m.WhoIsLate, barrier=name))
        with self.paced_do_without(patience.deadline):
            met = self._shards.ask_for_others(m.Barrier(name, self._turns[name], value), patience)
        self._shards.ask_for_others(m.Barrier(name + _SECOND, self._turns[name]), patience)
        return met

    @contextlib.contextmanager
    def paced_do_without(self, deadline: float) -> Iterator[None]:
        """Inside, this worker waits for others: under ``Stale`` and ``Async(max_staleness)`` they do not wait for it.

        Its values and clocks stay as they are.
        """
        if self._paused or self._shards.rank < 0:
            yield
            return
        paced = [table for table in self._tables.values() if table.paced]
        self._paused = True
        try:
            for table in paced:
                table.pause(deadline)
            yield
        finally:
            self._paused = False
            until = max(deadline, self._shards.runtime.now() + _BRIEF)
            for table in paced:
                table.resume(until)

    @contextlib.contextmanager
    def all_do_without(self) -> Iterator[None]:
        """Inside, bulk steps too are taken without this worker; afterwards its tables are where the others are.

        Its own steps are finished first.
        """
        for table in self._tables.values():
            table.wait()
        with self.paced_do_without(self._shards.deadline()):
            if not any(table.spec.sync.collective for table in self._tables.values()):
                yield
                return
            self._say(True)
            try:
                yield
            finally:
                self._say(False)
                for table in self._tables.values():
                    table.catch_up(self._shards.members)

    @interrupts.deferred
    def _say(self, paused: bool) -> None:
        answer = self._shards.ask(m.Pause(paused))
        assert isinstance(answer, m.Paused)
        self._shards.members = max(self._shards.members, answer.members)
