"""The parts of versions that one process holds, and its answers to readers: memory, bytes or a delta.

A server puts parts here from its shards' memory (``begin``), a relay from the bytes that it has fetched (``put``). What
takes long, the copy and the deltas, is done by threads; ``woken`` collects what they have finished.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from headwater.errors import ClusterError, HeadwaterError, ProtocolError, VersionExpired
from headwater.layout import kinds
from headwater.layout.dense import BLOCK
from headwater.transports.buffers import Buffer, BufferPool
from headwater.types import Span, TableSpec
from headwater.versions.part_cut import PartCut
from headwater.wire import delta
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind, seal
from headwater.wire.outgoing import Instruction, Outgoing
from headwater.wire.sums import Sums, digest, pack

log = logging.getLogger("headwater")

DELTAS = 8
"""Encoded deltas of one part that are kept, each from another base; together they are no larger than the part."""


Encoded = bytes | memoryview
"""A delta."""


class Key(NamedTuple):
    """A part: of which version, shard and table."""

    number: int
    shard: int
    table: int


class Asked(NamedTuple):
    """A reader that waits for an answer."""

    peer: int
    seq: int


class Source(NamedTuple):
    """A table whose part of a version begins now: its memory, and the step that it has taken last."""

    table: int
    clock: int
    values: torch.Tensor
    spans: tuple[Span, ...]


@dataclass(slots=True)
class Held:
    """A part. ``cut``: it is still being copied. ``deltas``: by the base's number; ``None``: not worth its time.

    ``tried``: the share of the part that they were allowed. ``waiting``: readers that wait for a delta, by its base.
    """

    buffer: Buffer
    spans: tuple[Span, ...]
    sums: Sums | None = None
    cut: PartCut | None = None
    deltas: dict[int, Encoded | None] = field(default_factory=dict)
    tried: dict[int, float] = field(default_factory=dict)
    waiting: dict[int, list[Asked]] = field(default_factory=dict)


@dataclass(slots=True)
class _Making:
    """One shard's parts of a version, and how their making went."""

    keys: list[Key]
    clocks: tuple[tuple[int, int], ...]
    pause: float = 0.0
    error: str = ""


@dataclass(slots=True)
class _Given:
    """A part whose memory one reader may map.

    ``count``: how often the reader was given it, less how often it has said that it unmapped it. It says so without
    naming the mapping, so the buffers are the reader's until ``count`` is 0.
    """

    buffers: set[Buffer] = field(default_factory=set)
    count: int = 0


class _Job(NamedTuple):
    """A delta to be encoded, if it takes no more than ``most`` of the part.

    The views keep both parts' memory from being used again meanwhile.
    """

    held: Held
    key: Key
    base: int
    old: memoryview
    new: memoryview
    spans: tuple[Span, ...]
    most: float


class PartStore:
    """``wake`` makes the owner call ``woken`` soon; without it (no threads) everything is done at once.

    ``number``: of this server, in a cluster of ``shards`` shards. ``checked``: frames carry checksums of their bytes,
    beside the parts' own.
    """

    def __init__(
        self,
        number: int = 0,
        shards: int = 1,
        *,
        share: bool = False,
        wake: Callable[[], None] | None = None,
        checked: bool = False,
    ) -> None:
        self.pool = BufferPool(share)
        self.parts: dict[Key, Held] = {}
        self.sent_bytes = 0  # to readers, over connections
        self._number = number
        self._shards = shards
        self._wake = wake
        self._checked = checked
        self._making: dict[tuple[int, int], _Making] = {}
        self.outbox: list[v.PartDone] = []  # for the coordinator, on its way
        self._cutting: dict[Key, PartCut] = {}
        self._to_start: list[PartCut] = []
        self._given: dict[tuple[Key, int], _Given] = {}  # by whom the descriptors went to
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[tuple[Held, Key, int, bytes | None]] = queue.SimpleQueue()
        self._encoder: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the parts that are held."""
        return sum(held.buffer.size for held in self.parts.values())

    # ---- parts -----------------------------------------------------------------------------------

    def begin(self, number: int, shard: int, sources: Sequence[Source]) -> None:
        """Now: what these tables hold at this moment is this shard's part of version ``number``."""
        if self.has_begun(number, shard):  # begun by a record that was rolled back with its primary
            self._let_go(number, shard)
        clocks = tuple((source.table, source.clock) for source in sources)
        making = self._making[number, shard] = _Making([], clocks)
        try:
            for source in sources:
                making.keys.append(Key(number, shard, source.table))
                self._cut(making.keys[-1], source)
        except (HeadwaterError, MemoryError, RuntimeError) as refused:
            making.error = f"shard {shard} could not begin its part: {refused}"
            for key in making.keys:
                self._discard(key)
            making.keys = []
        self.report(number, shard)

    def _cut(self, key: Key, source: Source) -> None:
        size = len(source.values)
        buffer = self.pool.take(size)
        cut = PartCut(source.values, buffer, lambda: self._landed(size))
        held = self.parts[key] = Held(buffer, source.spans, cut=cut)
        if self._wake is None:
            cut.finish()
            self._have(held, cut)
        else:
            self._cutting[key] = cut
            cut.begin(thread=False)  # the copying thread starts when this is said: a publisher waits for the word
            self._to_start.append(cut)
            self._wake()

    def _have(self, held: Held, cut: PartCut) -> None:
        held.sums, held.cut = cut.sums, None
        self.pool.written(held.buffer)

    def _landed(self, size: int) -> None:
        """A copying thread is done; the next version's memory is made ready while nobody waits for it."""
        if self._wake is not None:
            self._wake()
            self.pool.prepare(size)

    def has_begun(self, number: int, shard: int, parts: Sequence[v.PartDigest] = ()) -> bool:
        """Whether this shard's moment in version ``number`` has been.

        ``parts``: what the part must be. If another is held here, it was begun by a record that was rolled back with
        its primary, and is let go of.
        """
        known = (number, shard) in self._making
        if known and parts and (mine := self._standing(number, shard).parts) and set(mine) != set(parts):
            self._let_go(number, shard)
            return False
        return known

    def _let_go(self, number: int, shard: int) -> None:
        for key in self._making.pop((number, shard)).keys:
            self._discard(key)

    def report_all(self) -> None:
        """Say all of it again, to a coordinator that has forgotten."""
        for number, shard in self._making:
            self.report(number, shard)

    def _standing(self, number: int, shard: int) -> v.PartDone:
        making = self._making[number, shard]
        if making.error:
            return v.PartDone(number, shard, self._number, error=making.error)
        parts = []
        for key in making.keys:
            sums = self.parts[key].sums
            if sums is None:  # begun, and on its way
                return v.PartDone(number, shard, self._number, clocks=making.clocks)
            parts.append(v.PartDigest(key.table, self.parts[key].buffer.size, digest(sums)))
        return v.PartDone(number, shard, self._number, tuple(parts), making.clocks, making.pause)

    def report(self, number: int, shard: int) -> None:
        """Let the coordinator hear of this shard's part of a version."""
        self.outbox.append(self._standing(number, shard))

    def take_in(
        self,
        number: int,
        shard: int,
        got: Sequence[tuple[Key, Buffer, Sums]],
        specs: Sequence[tuple[int, TableSpec]],
    ) -> None:
        """All of a shard's part of a version, fetched from another server: from now on this one holds it too."""
        if self.has_begun(number, shard):  # it has been made here meanwhile
            for _, buffer, _ in got:
                self.pool.give(buffer)
            return
        known = dict(specs)
        for key, buffer, sums in got:
            self.put(key, buffer, sums, kinds.spans(known[key.table], self._shards, shard, buffer.size))
        self._making[number, shard] = _Making([key for key, _, _ in got], ())
        self.report(number, shard)

    def put(
        self,
        key: Key,
        buffer: Buffer,
        sums: Sums,
        layout: tuple[Span, ...],
        deltas: Mapping[int, Encoded | None] | None = None,
    ) -> None:
        """A part that was fetched. ``deltas``: to it, by the number of their base, as they came."""
        self.parts[key] = Held(buffer, layout, sums, deltas=dict(deltas or {}))
        self.pool.written(buffer)

    def before_write(self, shard: int, table: int, ranges: Sequence[tuple[int, int]]) -> None:
        """These bytes of a table are about to change."""
        for key, cut in self._cutting.items():
            if key.shard == shard and key.table == table:
                for lo, hi in ranges:
                    cut.before_write(lo, hi)

    def drop(self, numbers: Sequence[int]) -> list[Instruction]:
        """Nobody wants these versions any more; a reader that waits for one is told."""
        out: list[Instruction] = []
        for key in [key for key in self.parts if key.number in numbers]:
            out += self._discard(key)
        for made in [made for made in self._making if made[0] in numbers]:
            del self._making[made]
        return out

    def _discard(self, key: Key) -> list[Instruction]:
        held = self.parts.pop(key, None)
        if held is None:
            return []
        cut = self._cutting.pop(key, None)
        if cut is not None:
            cut.drop()
            held.buffer.tainted = True  # its thread may still write into it
        self.pool.give(held.buffer)
        if all(each.buffer.size != held.buffer.size for each in self.parts.values()):
            self.pool.unwanted(held.buffer.size)  # no more versions of this table, or not for now
        return [_refuse(asked, _expired(key)) for waiting in held.waiting.values() for asked in waiting]

    def woken(self) -> list[Instruction]:
        """What the threads have finished; what concerns the coordinator is ``said``. Copies that begin do so here."""
        starting, self._to_start = self._to_start, []
        for cut in starting:
            cut.start()
        for (number, shard), making in self._making.items():
            cuts = {key: self._cutting[key] for key in making.keys if key in self._cutting}
            failed = next((cut.failed for cut in cuts.values() if cut.failed is not None), None)
            if failed is not None:
                making.error = f"shard {shard} could not copy its part: {failed}"
                for key in making.keys:
                    self._discard(key)
                making.keys = []
            elif not cuts or not all(cut.summed for cut in cuts.values()):
                continue
            else:
                making.pause = max(cut.pause for cut in cuts.values())
                for key, cut in cuts.items():
                    del self._cutting[key]
                    self._have(self.parts[key], cut)
            self.report(number, shard)
        out: list[Instruction] = []
        while not self._made.empty():
            held, key, base, encoded = self._made.get()
            if self.parts.get(key) is held:  # else dropped meanwhile, perhaps for another; who waited was told
                out += self._encoded(key, base, encoded)
        return out

    def close(self) -> None:
        """Let go of everything; what readers map stays theirs."""
        self._jobs.put(None)
        for cut in self._cutting.values():
            cut.drop()
        for held in self.parts.values():
            held.buffer.close()
        self.pool.close()

    # ---- readers ---------------------------------------------------------------------------------

    def receive(self, peer: int, frame: Frame) -> list[Instruction]:
        """A reader's question or word. Raises ``ProtocolError`` for what a reader does not say."""
        if frame.kind == Kind.REQUEST:
            request = m.unpack_request(frame.body)
            if isinstance(request, v.Fetch):
                return self._fetch(Asked(peer, frame.seq), request)
            raise ProtocolError(f"{type(request).__name__} from a reader of versions")
        if frame.kind != Kind.NOTICE:
            raise ProtocolError(f"{frame.kind.name} from a reader of versions")
        notice = m.unpack_notice(frame.body) if frame.body else None
        if isinstance(notice, v.Unmap):
            self._unmapped(Key(notice.number, notice.shard, notice.table), peer)
        return []

    def _unmapped(self, key: Key, peer: int) -> None:
        given = self._given.get((key, peer))
        if given is None:
            return
        given.count -= 1
        if not given.count:
            self._forget((key, peer), clean=True)

    def _forget(self, given: tuple[Key, int], *, clean: bool) -> None:
        for buffer in self._given.pop(given).buffers:
            buffer.forget(given[1], clean=clean)

    def closed(self, peer: int) -> None:
        """A reader's connection ended. It may still map what it was given."""
        for given in [given for given in self._given if given[1] == peer]:
            self._forget(given, clean=False)
        for held in self.parts.values():
            for base, waiting in held.waiting.items():
                held.waiting[base] = [asked for asked in waiting if asked.peer != peer]

    def _fetch(self, asked: Asked, request: v.Fetch) -> list[Instruction]:
        key = Key(request.number, request.shard, request.table)
        held = self.parts.get(key)
        if held is None or held.sums is None:
            return [_refuse(asked, _expired(key))]
        if request.shared and held.buffer.fd >= 0:
            held.buffer.readers.add(asked.peer)
            given = self._given.setdefault((key, asked.peer), _Given())
            given.buffers.add(held.buffer)
            given.count += 1
            body = m.pack(self._part(held, "shared", 0))
            return [Outgoing(asked.peer, Frame(Kind.REPLY, seq=asked.seq, body=body), (held.buffer.fd,))]
        base = self.parts.get(key._replace(number=request.base))
        if base is None or base.sums is None or base is held or base.buffer.size != held.buffer.size:
            return self._whole(asked, held)
        most = delta.worth(request.link) if request.link > 0 else delta.DENSE
        if request.base in held.deltas:
            encoded = held.deltas[request.base]
            if encoded is not None or held.tried.get(request.base, most) >= most:
                fits = encoded is not None and len(encoded) <= most * held.buffer.size
                return self._answer(asked, held, encoded if fits else None)
        waiting = held.waiting.get(request.base)
        if waiting is not None:  # it is being made
            if any(other.peer == asked.peer for other in waiting):
                raise ProtocolError(f"a reader asked for one delta of {key} again before it was answered")
            waiting.append(asked)
        else:
            held.waiting[request.base] = [asked]
            held.tried[request.base] = most
            self._encode(_Job(held, key, request.base, base.buffer.lend(), held.buffer.lend(), held.spans, most))
        return self.woken() if self._wake is None else []

    def _answer(self, asked: Asked, held: Held, encoded: Encoded | None) -> list[Instruction]:
        if encoded is None:
            return self._whole(asked, held)
        return self._send(asked, self._part(held, "delta", len(encoded)), memoryview(encoded))

    def _whole(self, asked: Asked, held: Held) -> list[Instruction]:
        if self._wake is not None:
            self._start()  # who fetches one version whole will ask for a delta to the next
        return self._send(asked, self._part(held, "whole", held.buffer.size), held.buffer.lend())

    def _part(self, held: Held, encoding: v.Encoding, nbytes: int) -> v.Part:
        assert held.sums is not None
        return v.Part(held.buffer.size, pack(held.sums), encoding, nbytes)

    def _send(self, asked: Asked, part: v.Part, data: memoryview) -> list[Instruction]:
        """The reply, then the bytes in blocks: so that other connections get their turn."""
        self.sent_bytes += len(data)
        out: list[Instruction] = [Outgoing(asked.peer, Frame(Kind.REPLY, seq=asked.seq, body=m.pack(part)))]
        for at in range(0, len(data), BLOCK):
            piece = data[at : at + BLOCK]
            end = Flag.END if at + len(piece) == len(data) else Flag.NONE
            frame = Frame(Kind.PIECE, end, seq=asked.seq, start=at, stop=at + len(piece), payload=piece)
            if self._checked:
                seal(frame)
            out.append(Outgoing(asked.peer, frame))
        return out

    # ---- deltas ------------------------------------------------------------------------------------

    def _encode(self, job: _Job) -> None:
        if self._wake is None:
            self._made.put(_made(job))
            return
        self._start()
        self._jobs.put(job)

    def _start(self) -> None:
        if self._encoder is None:
            self._encoder = threading.Thread(target=self._run, name="headwater-delta", daemon=True)
            self._encoder.start()

    def _run(self) -> None:
        delta.warm()
        while (job := self._jobs.get()) is not None:
            self._made.put(_made(job))
            del job  # its views hold memory
            if self._wake is not None:
                self._wake()

    def _encoded(self, key: Key, base: int, encoded: bytes | None) -> list[Instruction]:
        held = self.parts[key]
        held.deltas[base] = encoded
        while len(held.deltas) > DELTAS or (len(held.deltas) > 1 and _bytes_of(held.deltas) > held.buffer.size):
            oldest = next(iter(held.deltas))
            del held.deltas[oldest]
            held.tried.pop(oldest, None)
        return [x for asked in held.waiting.pop(base, ()) for x in self._answer(asked, held, encoded)]


def _made(job: _Job) -> tuple[Held, Key, int, bytes | None]:
    old, new = np.frombuffer(job.old, dtype=np.uint8), np.frombuffer(job.new, dtype=np.uint8)
    try:
        return job.held, job.key, job.base, delta.encode(old, new, job.spans, job.most)
    except Exception:  # whatever it is, the next one may go well, and readers wait for this one
        log.exception("no delta from version number %d to %s: it is sent whole", job.base, job.key)
        return job.held, job.key, job.base, None


def _bytes_of(deltas: Mapping[int, Encoded | None]) -> int:
    return sum(len(encoded) for encoded in deltas.values() if encoded is not None)


def _refuse(asked: Asked, error: ClusterError) -> Outgoing:
    return Outgoing(asked.peer, Frame(Kind.ERROR, seq=asked.seq, body=m.error_body(error)))


def _expired(key: Key) -> VersionExpired:
    return VersionExpired(
        f"version number {key.number} is not held here (shard {key.shard}, table {key.table}): it was retired, or this "
        "process has just begun. Lease the newest one"
    )
