"""From a lease to a version in this process: shared memory from holders on this host, bytes or deltas from others."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from headwater.errors import (
    DeadlineExceeded,
    DeltaCorrupt,
    HeadwaterError,
    LinkBroken,
    ProtocolError,
    VersionExpired,
)
from headwater.readers.checks import WORTH, Check
from headwater.readers.line import Answer, Dial, Line
from headwater.readers.stored import Base, Key, Mapped, Mine, Place, Stored, StoredTable, TensorMap, Theirs, plan
from headwater.transports import memory
from headwater.transports.buffers import Buffer, BufferPool
from headwater.types import TableSpec
from headwater.wire import delta, sums
from headwater.wire import versions as v

SILENT = 20.0  # seconds in which a holder must send something: a delta may have to be made first
MOST = 100_000  # shards: a bound, so that a wrong number is refused and not counted to


class Counts(NamedTuple):
    """Parts that came as memory, as all of their bytes, as deltas; and those that came damaged."""

    shared_parts: int = 0
    whole_parts: int = 0
    deltas: int = 0
    damaged: int = 0


class _Asked(NamedTuple):
    """A part on its way over ``line``: into ``buffer``, or as shared memory."""

    at: v.PartAt
    key: Key
    line: Line
    answer: Answer
    buffer: list[Buffer]
    check: list[Check]  # of one that comes whole, and is large
    base: Base | None = None  # whose memory it may have


class _Landed(NamedTuple):
    """Where a part is, and the question that it came in answer to: the second, if the first one's was damaged."""

    place: Place
    asked: _Asked


class Got(NamedTuple):
    """A part in memory of this process. ``delta``: what came instead of the whole part, if it did."""

    at: v.PartAt
    buffer: Buffer
    sums: sums.Sums
    delta: memoryview | None


class Fetcher:
    """The connections of one reader, and the memory that it fetches into.

    ``share``: map holders' memory where possible. ``pool``: memory that others use too. ``now``: the clock, in
    seconds, that deadlines are of. One thread at a time fetches;
    what goes wrong is a ``LinkError``, ``VersionExpired``, ``NotEnoughMemory`` or ``DeadlineExceeded``.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        share: bool = True,
        pool: BufferPool | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool or BufferPool(share=True)
        self._now = now
        self.counts = Counts()
        self._dial = dial
        self._share = share
        self._lines: dict[str, Line] = {}
        self._unmapped: queue.SimpleQueue[tuple[Line, Key]] = queue.SimpleQueue()
        self._plans: dict[int, TensorMap] = {}
        self._warmed = False
        self._gone_bytes = 0  # that came over connections which have ended
        self._turn = threading.RLock()

    # ---- whole versions --------------------------------------------------------------------------

    def _planned(self, leased: v.Leased, specs: Mapping[int, TableSpec]) -> dict[int, TensorMap]:
        """Where the tables' bytes are. Raises ``ProtocolError`` if the parts are not theirs."""
        missing = [table for table in leased.tables if table not in specs]
        if missing or not 0 < leased.shards <= MOST:
            raise ProtocolError(
                f"a lease of tables {missing} on {leased.shards} shards, of which nothing else is known"
            )
        for table in leased.tables:
            known = self._plans.get(table)
            if known is None or known.spec is not specs[table] or known.shards != leased.shards:
                self._plans[table] = plan(specs[table], leased.shards)
        plans = {table: self._plans[table] for table in leased.tables}
        layouts = {table: found.layout for table, found in plans.items()}
        wanted = {(shard, table): of.sizes[shard] for table, of in layouts.items() for shard in of.participants}
        if len(leased.parts) != len(wanted) or {(at.shard, at.table): at.size for at in leased.parts} != wanted:
            raise ProtocolError(
                f"version number {leased.info.number} was leased with parts that its tables do not have"
            )
        return plans

    def store(
        self, leased: v.Leased, specs: Mapping[int, TableSpec], base: Stored | Base | None, deadline: float
    ) -> Stored:
        """Fetch a version. ``base``: one that is here; where that helps, only what changed since is fetched.

        If nobody looks at the base's memory any more, it becomes the new version's; ``base`` has that part no more.
        """
        with self._turn:
            plans = self._planned(leased, specs)
            self.settle()
            places = self._places(leased, base, deadline)
        tables: list[StoredTable] = []
        buffers = {key: place.buffer for key, place in places.items() if isinstance(place, Mine)}
        for buffer in buffers.values():  # when its loans are over
            self.pool.give(buffer)
        try:
            for number, found in plans.items():
                mine = {shard: places[shard, number] for shard in found.layout.participants}
                tables.append(StoredTable(found, Mapped(found.layout, mine)))
                places = {key: place for key, place in places.items() if key[1] != number}
        except HeadwaterError:  # no address space: what is mapped already goes with its mapping
            for place in places.values():
                self._give_up(place)
            raise
        return Stored(leased.info, tables, buffers)

    def _places(self, leased: v.Leased, base: Stored | Base | None, deadline: float) -> dict[tuple[int, int], Place]:
        """All parts are asked for at once, then waited for one by one; a base that is this version has them."""
        have = base.buffers if base is not None else {}
        if base is not None and base.info == leased.info and len(have) == len(leased.parts):
            return {key: Mine(buffer, buffer.lend()) for key, buffer in have.items()}
        mine = base if isinstance(base, Base) else None

        def wait(asked: _Asked) -> v.Part:
            return self._patient(asked, SILENT, deadline)

        number = base.info.number if base is not None else 0
        asked: list[_Asked] = []
        places: dict[tuple[int, int], Place] = {}
        try:
            for at in leased.parts:
                buffer = have.get((at.shard, at.table))
                usable = number if buffer is not None and buffer.size == at.size else 0
                asked.append(self._ask(leased.info.number, at, usable, mine))
            for each in asked:
                places[each.at.shard, each.at.table] = self._wait(each, have, wait).place
        except BaseException:
            for place in places.values():
                self._give_up(place)
            self._abandon(asked[len(places) :])
            raise
        return places

    def _abandon(self, asked: Sequence[_Asked]) -> None:
        """Nobody waits for these; their answers could still come, into memory that nobody wants."""
        for each in asked:
            self._drop(each.line)
        for each in asked:
            self._recycle(each)

    def _give_up(self, place: Place) -> None:
        if isinstance(place, Mine):  # its loan ends with it
            self.pool.give(place.buffer)
        else:
            memory.close_all((place.fd,))
            place.unmapped()

    # ---- parts -----------------------------------------------------------------------------------

    def parts(
        self,
        number: int,
        wanted: Sequence[v.PartAt],
        base: int,
        have: Mapping[tuple[int, int], Buffer],
        stall: float,
        got: Callable[[Got], None],
    ) -> None:
        """Parts of a version in memory of this process, for a relay, each handed to ``got`` as it comes.

        ``have``: those of version ``base`` that are here, by (shard, table). ``stall``: seconds in which something must
        come. Raises as ``store``.
        """
        with self._turn:
            asked: list[_Asked] = []
            landed = 0
            try:
                for at in wanted:
                    buffer = have.get((at.shard, at.table))
                    asked.append(self._ask(number, at, base if buffer is not None and buffer.size == at.size else 0))
                for each in asked:
                    place, last = self._wait(each, have, lambda each: self._patient(each, stall))
                    landed += 1
                    assert isinstance(place, Mine)
                    assert last.answer.part is not None
                    delta = last.answer.target if last.answer.part.encoding == "delta" else None
                    got(Got(each.at, place.buffer, sums.unpack(last.answer.part.sums), delta))
            except BaseException:
                self._abandon(asked[landed:])
                raise

    def _patient(self, asked: _Asked, stall: float, deadline: float = math.inf) -> v.Part:
        """Wait for a part for as long as bytes come. Raises ``LinkBroken`` if none come: another may have it too."""
        while True:
            before = self.fetched_bytes
            try:
                return asked.line.wait(asked.answer, min(deadline, self._now() + stall))
            except DeadlineExceeded:
                if self._now() >= deadline:
                    raise
                if self.fetched_bytes == before:
                    raise LinkBroken(f"{asked.line.holder.address} has sent nothing for {stall:.0f} s") from None

    def _ask(self, number: int, at: v.PartAt, base: int, mine: Base | None = None) -> _Asked:
        line = self._line(at)
        buffer: list[Buffer] = []
        check: list[Check] = []
        fetch = v.Fetch(number, at.shard, at.table, base, self._share and line.shared, line.rate)

        def land(part: v.Part) -> memoryview:
            _check_part(part, at, number, line.holder)
            if part.encoding == "delta":
                if not 0 < part.nbytes <= at.size:
                    raise ProtocolError(f"a delta of {part.nbytes} bytes to a part of {at.size}")
                return memoryview(bytearray(part.nbytes))
            if part.encoding == "whole":
                if part.nbytes != at.size:
                    raise ProtocolError(f"{part.nbytes} bytes of a part of {at.size}")
                old = mine.yielded((at.shard, at.table)) if mine is not None and base else None
                buffer.append(old or self.pool.take(at.size))
                if at.size >= WORTH:
                    check.append(Check(buffer[0].array, sums.unpack(part.sums)))
                return buffer[0].array.data
            return memoryview(b"")

        def arrived(start: int, stop: int) -> None:
            for each in check:
                each.arrived(start, stop)

        return _Asked(at, (number, at.shard, at.table), line, line.ask(fetch, land, arrived), buffer, check, mine)

    def _wait(
        self,
        asked: _Asked,
        have: Mapping[tuple[int, int], Buffer],
        wait: Callable[[_Asked], v.Part],
        *,
        again: bool = True,
    ) -> _Landed:
        """The part, checked. What came damaged is fetched once more, whole."""
        try:
            part = wait(asked)
            if part.encoding == "shared":
                return _Landed(self._shared(asked), asked)
            if part.encoding == "delta":
                self._apply(asked, have[asked.at.shard, asked.at.table])
            else:
                self._count(whole_parts=1)
                self._warm()
            self._verify(asked, part)
            self.pool.written(asked.buffer[0])
            return _Landed(Mine(asked.buffer[0], asked.buffer[0].lend()), asked)
        except DeltaCorrupt:
            self._recycle(asked)
            self._count(damaged=1)
            if again:
                return self._once_more(asked, have, wait)
            raise
        except HeadwaterError:
            self._recycle(asked)
            raise

    def _once_more(
        self,
        asked: _Asked,
        have: Mapping[tuple[int, int], Buffer],
        wait: Callable[[_Asked], v.Part],
    ) -> _Landed:
        second = self._ask(asked.key[0], asked.at, 0)
        try:
            return self._wait(second, have, wait, again=False)
        except BaseException:
            if not second.answer.done:  # it could still come, to nobody
                self._drop(second.line)
            raise

    def _recycle(self, asked: _Asked) -> None:
        fds, asked.answer.fds = asked.answer.fds, ()
        memory.close_all(fds)
        if fds:
            self._unmapped.put((asked.line, asked.key))
        for check in asked.check:
            check.end()
        while asked.buffer:
            buffer = asked.buffer.pop()
            buffer.tainted = not asked.answer.done  # bytes may still be on their way into it
            self.pool.give(buffer)

    def _shared(self, asked: _Asked) -> Theirs:
        if len(asked.answer.fds) != 1:
            raise ProtocolError(f"{asked.line.holder.address} shares a part without a descriptor")
        memory.verify(asked.answer.fds[0], asked.at.size)
        self._count(shared_parts=1)
        # Whoever lets go of memory may be the garbage collector, in any thread: it only makes a note (``settle``).
        note, at, windows = (asked.line, asked.key), asked.at, asked.line.windows
        fd = asked.answer.fds[0]
        return Theirs(fd, lambda: self._unmapped.put(note), lambda: windows.look((at.shard, at.table), fd, at.size))

    def settle(self) -> None:
        """Tell the holders what is not mapped here any more, so that they use its memory again."""
        with contextlib.suppress(queue.Empty):  # not after ``empty()``: several threads come here
            while True:
                line, key = self._unmapped.get_nowait()
                with contextlib.suppress(HeadwaterError):
                    line.unmap(key)

    def _apply(self, asked: _Asked, old: Buffer) -> None:
        """The version before, copied if somebody may look at it, and what changed since."""
        mine = asked.base.yielded((asked.at.shard, asked.at.table)) if asked.base is not None else None
        asked.buffer.append(mine or self.pool.take(asked.at.size))
        if mine is None:
            np.copyto(asked.buffer[0].array, old.array)
        delta.apply(asked.buffer[0].array, asked.answer.target)
        self._count(deltas=1)

    def _verify(self, asked: _Asked, part: v.Part) -> None:
        if asked.check:
            bad = asked.check[0].damaged()
        else:
            bad = sums.damaged(asked.buffer[0].array, sums.unpack(part.sums), range(sums.blocks(asked.at.size)))
        if bad:
            raise DeltaCorrupt(
                f"{len(bad)} blocks of version number {asked.key[0]} (shard {asked.at.shard}) came damaged from "
                f"{asked.line.holder.address}; they were thrown away. The version that was here before stays"
            )

    # ---- connections -----------------------------------------------------------------------------

    def _line(self, at: v.PartAt) -> Line:
        """A connection to one who holds the part: one that is there, or the first that answers."""
        for holder in at.holders:
            line = self._lines.get(holder.address)
            if line is not None and not line.broken:
                return line
            if line is not None:
                self._drop(line)
        error: HeadwaterError = VersionExpired(f"nobody holds shard {at.shard} of this version any more")
        for holder in at.holders:
            try:
                line = self._lines[holder.address] = Line(self._dial, holder)
            except HeadwaterError as refused:  # also one whose address is none
                error = refused
            else:
                return line
        raise error

    def _drop(self, line: Line) -> None:
        line.close()
        if self._lines.get(line.holder.address) is line:
            del self._lines[line.holder.address]
            self._gone_bytes += line.fetched_bytes

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came over connections."""
        return self._gone_bytes + sum(line.fetched_bytes for line in list(self._lines.values()))

    def _warm(self) -> None:
        """What comes next may be a delta: load its code while nobody waits for it."""
        if not self._warmed:
            self._warmed = True
            threading.Thread(target=delta.warm, name="headwater-warm", daemon=True).start()

    def _count(self, **more: int) -> None:
        self.counts = self.counts._replace(**{name: getattr(self.counts, name) + by for name, by in more.items()})

    def hang_up(self) -> None:
        """From any thread: end a fetch that is under way with ``LinkBroken``."""
        for line in list(self._lines.values()):
            line.close()

    def close(self) -> None:
        """Hang up. Versions that are here stay."""
        with self._turn:
            self.settle()
            for line in list(self._lines.values()):
                self._drop(line)
            self.pool.close()


def _check_part(part: v.Part, at: v.PartAt, number: int, holder: v.Holder) -> None:
    """Whether it is the one that was leased. Raises ``ProtocolError``."""
    if part.size != at.size or len(part.sums) != 8 * sums.blocks(at.size):
        raise ProtocolError(f"{holder.address} sent a part of {part.size} bytes instead of {at.size}")
    if sums.digest(sums.unpack(part.sums)) != at.digest:
        raise ProtocolError(f"{holder.address} holds another version than number {number}")
