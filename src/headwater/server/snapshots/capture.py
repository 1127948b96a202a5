"""One shard's part of a snapshot: a cut of each of its tables, then a file of what they hold.

What the shard's loop does, in this order::

    capture = Capture(folder, snapshot, shard)
    capture.prepare(table, dense)            # as soon as it hears of the snapshot: memory is made ready meanwhile
    capture.begin(Mark(table, clock, …), dense)      # for each table at its moment, before the next record is applied
    capture.seal(lsn, sessions)              # all tables have begun: the file follows by itself
    capture.before_write(table, lo, hi)      # all the while, before anything changes these bytes
    capture.result()                         # now and then; None until it is there
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from headwater.errors import InternalError
from headwater.server.snapshots.disk import DISK, Disk
from headwater.server.snapshots.files import Piece, write_shard
from headwater.server.snapshots.format import COUNT, VALUE, Mark, SessionMark, ShardMark, Written
from headwater.server.tables.dense import DenseShard
from headwater.types import ITEMSIZE, Segment
from headwater.versions.copying import Allocate, Cut, Loose, anonymous
from headwater.wire import optimizers
from headwater.wire.tensors import DTYPES

_NICE = 10


class TableCut:
    """One table's memory as it is at ``begin``."""

    def __init__(self, table: int, dense: DenseShard, allocate: Allocate = anonymous) -> None:
        self.table = table
        self._dense = dense
        self._allocate = allocate
        self._regions = dense.regions()
        self.cut = Cut(self._regions, allocate)
        self._counts: list[int] = []
        self._slots: list[tuple[int, str]] = []

    def begin(self, *, thread: bool = True) -> None:
        if self._dense.regions().keys() != self._regions.keys():  # new hyperparameters have brought a slot
            self.cut.drop()
            self._regions = self._dense.regions()
            self.cut = Cut(self._regions, self._allocate)
        self._counts, slots = self._dense.read_block(0, self._dense.size)
        # What is in no region: the tensors of torch's own optimizers, each with the bytes that it changes with.
        own = [slot for slot in slots if slot[0] >= 0]
        self._slots = [(offset, name) for offset, name, _, _ in own]
        self.cut.begin(list(self._loose([offset for offset, *_ in own], [slot[3] for slot in own])), thread=thread)

    def _loose(self, offsets: list[int], tensors: list[torch.Tensor]) -> Iterator[Loose]:
        starts = [segment.offset for segment in self._held()]
        places = sorted(set(offsets))
        following = dict(zip(places, [*places[1:], self._dense.size], strict=True)) if places else {}
        for offset, tensor in zip(offsets, tensors, strict=True):
            segment = self._held()[bisect_right(starts, offset) - 1]
            yield Loose(offset, min(segment.end, following[offset]), tensor)

    def _held(self) -> list[Segment]:
        return [segment for segment in self._dense.segments if segment.nbytes]

    def pieces(self) -> Iterator[Piece]:
        """What the cut holds. Call it when the cut is done."""
        copies = self.cut.copies
        for segment, count in zip(self._held(), self._counts, strict=True):
            dtype = DTYPES[self._dense.spec.parameters[segment.parameter].dtype]
            for slot, memory in copies.items():
                if slot == VALUE or count:
                    part = memory[segment.offset : segment.end].view(dtype)
                    yield Piece(self.table, segment.parameter, slot, segment.start, part)
            if count:
                number = torch.tensor(count, dtype=torch.int64, device="cpu")
                yield Piece(self.table, segment.parameter, COUNT, segment.start, number, whole=True)
        yield from self._loose_pieces()

    def _loose_pieces(self) -> Iterator[Piece]:
        held = self._held()
        starts = [segment.offset for segment in held]
        matrix = optimizers.info(self._dense.spec.optimizer.name).whole_tensor
        for (offset, name), tensor in zip(self._slots, self.cut.loose, strict=True):
            segment = held[bisect_right(starts, offset) - 1]
            parameter = self._dense.spec.parameters[segment.parameter]
            start = segment.start + (offset - segment.offset) // ITEMSIZE[parameter.dtype]
            each = tuple(tensor.shape) == parameter.shape if matrix else tensor.dim() == 1
            if each:
                yield Piece(self.table, segment.parameter, name, start, tensor.reshape(-1))
            else:
                yield Piece(self.table, segment.parameter, name, start, tensor, whole=True)


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

    def prepare(self, table: int, dense: DenseShard) -> None:
        """Make memory ready for a copy of this table. May be left out."""
        cut = self._tables[table] = TableCut(table, dense, self._allocate)
        if self._threads:
            cut.cut.prepare()

    @property
    def prepared(self) -> bool:
        """Whether all that memory is ready."""
        return not self._threads or all(cut.cut.prepared for cut in self._tables.values())

    def begin(self, mark: Mark, dense: DenseShard) -> None:
        """This is the moment of table ``mark.table``."""
        if mark.table in self._marks:
            raise InternalError(f"table {mark.table} was cut twice for snapshot {self.snapshot}")
        cut = self._tables.get(mark.table)
        if cut is None:
            cut = self._tables[mark.table] = TableCut(mark.table, dense, self._allocate)
        self._marks[mark.table] = mark
        cut.begin(thread=self._threads)

    def has(self, table: int) -> bool:
        """Whether this table's moment has been."""
        return table in self._marks

    def before_write(self, table: int, lo: int, hi: int) -> None:
        """Bytes ``lo:hi`` of the table, values or optimizer state, are about to change."""
        cut = self._tables.get(table)
        if cut is not None:
            cut.cut.before_write(lo, hi)

    def seal(self, lsn: int, sessions: tuple[SessionMark, ...]) -> None:
        """Every table has had its moment. The file is written from here on."""
        self._mark = ShardMark(self.snapshot, self.shard, lsn, sessions, tuple(self._marks.values()))
        for table in self._tables.keys() - self._marks.keys():  # dropped before its moment
            self._tables.pop(table).cut.drop()
        if self._threads:
            threading.Thread(target=self._finish, name="headwater-snapshot", daemon=True).start()

    def advance(self, units: int = 1) -> bool:
        """Without threads: copy this many blocks; write the file after the last. Whether it is written."""
        for cut in self._tables.values():
            if self.has(cut.table) and cut.cut.advance(units):
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
        return sum(cut.cut.pause for cut in self._tables.values())

    def drop(self) -> None:
        """Give it up, and a file that is half written with it."""
        self._dropped = True
        for cut in self._tables.values():
            cut.cut.drop()

    def _finish(self) -> None:
        assert self._mark is not None
        if self._threads:
            with suppress(OSError):  # hashing and writing must not take a core from training
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            cuts = list(self._tables.values())
            for cut in cuts:
                cut.cut.wait()
            pieces = [piece for cut in cuts for piece in cut.pieces()]
            self._written = write_shard(self.folder, pieces, self._mark, self._disk, lambda: not self._dropped)
        except Exception as error:  # noqa: BLE001 - told to the coordinator, which gives the snapshot up
            self.error = f"shard {self.shard} could not write its part: {type(error).__name__}: {error}"
        finally:
            for cut in self._tables.values():
                cut.cut.release()
        if self._landed is not None:
            self._landed()
