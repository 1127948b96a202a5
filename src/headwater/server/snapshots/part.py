"""What a shard's primary does about a snapshot: from the coordinator's ``Cut`` to its ``CutDone``.

All tables of a shard are cut at one LSN: the last that was proposed when the ``Cut`` came. The coordinator sends the
``Cut`` after the COMMITs of the clocks that it names and before any later one, so the tables are at those clocks then;
a shard where they are not says so, and the coordinator begins anew.

The owner calls ``due`` before it applies a record and now and then, ``before_write`` before it changes bytes of a
table (values or optimizer state), ``result`` now and then, and ``drop`` when it is not the primary any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.server.snapshots.capture import Capture
from headwater.server.snapshots.disk import DISK, Disk
from headwater.server.snapshots.format import Mark, SessionMark
from headwater.server.snapshots.restore import Snapshot
from headwater.wire import messages as m

if TYPE_CHECKING:
    from headwater.server.shard import Shard
    from headwater.server.table import Table


class SnapshotPart:
    """One at a time: a new ``Cut`` ends the one before.

    ``threads=False``: nothing happens by itself, ``advance`` copies and writes; for the simulator.
    """

    def __init__(
        self, shard: Shard, *, landed: Callable[[], None] | None = None, disk: Disk = DISK, threads: bool = True
    ) -> None:
        self._shard = shard
        self._landed = landed
        self._disk = disk
        self._threads = threads
        self._capture: Capture | None = None
        self._cut: m.Cut | None = None
        self._error = ""
        self._at = self._lsn = 0
        self._begun = False
        self._told = False  # that it is prepared
        self._clocks: tuple[tuple[int, int], ...] = ()

    def cut(self, message: m.Cut) -> None:
        """The coordinator wants this shard's part of a snapshot, or will want it soon; or not any more (no folder)."""
        if not message.folder:
            self.drop()
            return
        ready = self._cut is not None and self._cut.prepare and self._cut.snapshot == message.snapshot
        if not ready or message.prepare:
            self.drop()
            self._capture = Capture(
                Path(message.folder), message.snapshot, self._shard.number,
                landed=self._landed, disk=self._disk, threads=self._threads,
            )  # fmt: skip
            for table in self._shard.tables.values():
                self._capture.prepare(table.number, table.store)
        self._cut, self._at = message, self._shard.log.last
        self.due()

    def due(self) -> None:
        """Records may have been applied since, and the next one is not yet: perhaps this is the moment."""
        if self._capture is None or self._cut is None or self._begun or self._shard.lsn < self._at:
            return
        if self._cut.prepare:
            return
        self._begun, self._lsn = True, self._shard.lsn
        self._error = self._missed(self._cut)
        if self._error:
            self._capture.drop()
            return
        tables = self._shard.tables.values()
        self._clocks = tuple((table.number, table.gathering.clock) for table in tables if table.collective)
        for table in tables:
            self._capture.begin(_mark(table), table.store)
        self._capture.seal(self._lsn, self._sessions())

    def before_write(self, table: int, ranges: Sequence[tuple[int, int]]) -> None:
        """These bytes of the table are about to change."""
        if self._capture is not None and self._begun:
            for lo, hi in ranges:
                self._capture.before_write(table, lo, hi)

    def advance(self, units: int = 1) -> None:
        """Without threads: go on with it."""
        if self._capture is not None and self._begun and not self._error:
            self._capture.advance(units)

    def result(self) -> m.CutDone | None:
        """What became of it, once; or that it is prepared, once."""
        cut, capture = self._cut, self._capture
        if cut is not None and cut.prepare and not self._told and capture is not None and capture.prepared:
            self._told = True
            return m.CutDone(cut.snapshot, cut.shard, prepared=True)
        if cut is None or capture is None or not self._begun:
            return None
        written, error = capture.result(), self._error or capture.error
        if written is None and not error:
            return None
        self._cut = self._capture = None
        self._begun = False
        if written is None:
            return m.CutDone(cut.snapshot, cut.shard, error=error)
        return m.CutDone(
            cut.snapshot, cut.shard, written.name, written.nbytes, written.sha256, self._lsn, self._clocks,
            capture.pause,
        )  # fmt: skip

    def drop(self) -> None:
        """Give it up, if there is one."""
        if self._capture is not None:
            self._capture.drop()
        self._cut = self._capture = None
        self._begun, self._told, self._error = False, False, ""

    def _missed(self, cut: m.Cut) -> str:
        for number, clock in cut.clocks:
            table = self._shard.tables.get(number)
            if table is not None and table.gathering.clock != clock:
                return (
                    f"table {table.spec.name!r} is at clock {table.gathering.clock} on shard {cut.shard}, "
                    f"not at {clock}"
                )
        return ""

    def _sessions(self) -> tuple[SessionMark, ...]:
        found = sorted(self._shard.sessions.values(), key=lambda session: session.number)
        return tuple(SessionMark(s.number, s.rank, tuple(sorted(s.done.items()))) for s in found if s.rank >= 0)


def _mark(table: Table) -> Mark:
    clocks = tuple(sorted(table.clocks.clock.items()))
    clock = table.gathering.clock if table.collective else max((clock for _, clock in clocks), default=0)
    groups = tuple(dict(group) for group in table.store.groups)
    return Mark(table.number, clock, table.clocks.applied, () if table.collective else clocks, groups)


def fill(table: Table, snapshot: Snapshot) -> None:
    """Values, optimizer state and clocks of a table that was just made. Raises ``SnapshotCorrupt``."""
    table.store.restore(snapshot)
    mark = snapshot.table(table.spec.name).mark
    table.clocks.applied = mark.applied
    table.clocks.clock = dict(mark.clocks)
    table.clocks.read = dict.fromkeys(table.clocks.clock, mark.applied)
    if table.collective:
        table.gathering.clock = mark.clock
