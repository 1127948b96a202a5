"""One shard's part of a snapshot: a cut of each of its tables, then a file of what they hold.

What the shard's loop does, in this order::

    capture = Capture(folder, snapshot, shard)
    capture.prepare(table, store)            # as soon as it hears of the snapshot: memory is made ready meanwhile
    capture.begin(Mark(table, clock, …), store)      # for each table at its moment, before the next record is applied
    capture.seal(lsn, sessions)              # all tables have begun: the file follows by itself
    capture.before_write(table, lo, hi)      # all the while, before anything changes these bytes
    capture.result()                         # now and then; None until it is there
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from headwater.errors import InternalError
from headwater.server.snapshots.disk import DISK, Disk
from headwater.server.snapshots.files import Piece, write_shard
from headwater.server.snapshots.format import Mark, SessionMark, ShardMark, Written
from headwater.server.tables.base import TableStore
from headwater.versions.copying import Allocate, Cut, anonymous

_NICE = 10


class TableCut(Protocol):
    """A copy of one table's content, made behind the back of who changes it. ``copy``: of its memory."""

    @property
    def table(self) -> int: ...
    @property
    def copy(self) -> Cut: ...

    def begin(self, *, thread: bool = True) -> None:
        """This is the moment: what the table holds now is what the copy will hold."""

    def pieces(self) -> Iterator[Piece]:
        """What the copy holds. Call it when ``copy`` is done."""


class Capture:
    """See the top. ``landed`` is called by the writing thread when ``result`` has something to say.

    Its calls never block for longer than a copy takes and raise nothing that a disk does: what goes wrong is in
    ``error``, and the snapshot is to be given up then (``drop``).
    """

    def __init__(
        self,
        folder: Path,
        snapshot: int,
        shard: int,
        *,
        landed: Callable[[], None] | None = None,
        disk: Disk = DISK,
        threads: bool = True,
        allocate: Allocate = anonymous,
    ) -> None:
        self.folder, self.snapshot, self.shard = folder, snapshot, shard
        self.error = ""
        self._landed = landed
        self._disk = disk
        self._threads = threads
        self._allocate = allocate
        self._tables: dict[int, TableCut] = {}
        self._marks: dict[int, Mark] = {}
        self._mark: ShardMark | None = None
        self._written: Written | None = None
        self._dropped = False

    def prepare(self, table: int, store: TableStore) -> None:
        """Make memory ready for a copy of this table. May be left out."""
        cut = self._tables[table] = store.cut(table, self._allocate)
        if self._threads:
            cut.copy.prepare()

    @property
    def prepared(self) -> bool:
        """Whether all that memory is ready."""
        return not self._threads or all(cut.copy.prepared for cut in self._tables.values())

    def begin(self, mark: Mark, store: TableStore) -> None:
        """This is the moment of table ``mark.table``."""
        if mark.table in self._marks:
            raise InternalError(f"table {mark.table} was cut twice for snapshot {self.snapshot}")
        cut = self._tables.get(mark.table)
        if cut is None:
            cut = self._tables[mark.table] = store.cut(mark.table, self._allocate)
        self._marks[mark.table] = mark
        cut.begin(thread=self._threads)

    def has(self, table: int) -> bool:
        """Whether this table's moment has been."""
        return table in self._marks

    def before_write(self, table: int, lo: int, hi: int) -> None:
        """Bytes ``lo:hi`` of the table, values or optimizer state, are about to change."""
        cut = self._tables.get(table)
        if cut is not None:
            cut.copy.before_write(lo, hi)

    def seal(self, lsn: int, sessions: tuple[SessionMark, ...]) -> None:
        """Every table has had its moment. The file is written from here on."""
        self._mark = ShardMark(self.snapshot, self.shard, lsn, sessions, tuple(self._marks.values()))
        for table in self._tables.keys() - self._marks.keys():  # dropped before its moment
            self._tables.pop(table).copy.drop()
        if self._threads:
            threading.Thread(target=self._finish, name="headwater-snapshot", daemon=True).start()

    def advance(self, units: int = 1) -> bool:
        """Without threads: copy this many blocks; write the file after the last. Whether it is written."""
        for cut in self._tables.values():
            if self.has(cut.table) and cut.copy.advance(units):
                return False
        if self._mark is not None and self._written is None and not self.error:
            self._finish()
        return self._written is not None

    def result(self) -> Written | None:
        """The file, once it is on disk."""
        return self._written

    @property
    def pause(self) -> float:
        """Seconds of the owner's that the copying took."""
        return sum(cut.copy.pause for cut in self._tables.values())

    def drop(self) -> None:
        """Give it up, and a file that is half written with it."""
        self._dropped = True
        for cut in self._tables.values():
            cut.copy.drop()

    def _finish(self) -> None:
        assert self._mark is not None
        if self._threads:
            with suppress(OSError):  # hashing and writing must not take a core from training
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            cuts = list(self._tables.values())
            for cut in cuts:
                cut.copy.wait()
            pieces = [piece for cut in cuts for piece in cut.pieces()]
            self._written = write_shard(self.folder, pieces, self._mark, self._disk, lambda: not self._dropped)
        except Exception as error:  # noqa: BLE001 - told to the coordinator, which gives the snapshot up
            self.error = f"shard {self.shard} could not write its part: {type(error).__name__}: {error}"
        finally:
            for cut in self._tables.values():
                cut.copy.release()
        if self._landed is not None:
            self._landed()
