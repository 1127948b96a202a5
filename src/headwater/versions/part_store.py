"""The parts of versions that one process holds: how they come and go. A state machine; what it says is its ``outbox``.

A server puts parts here from its shards' memory (``begin``), a relay from the bytes that it has fetched (``put``). What
takes long, the copy and the deltas, is done by threads; ``woken`` collects what they have finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headwater.errors import HeadwaterError
from headwater.layout import kinds
from headwater.transports.buffers import Buffer, BufferPool
from headwater.types import Span, TableSpec
from headwater.versions.part_answers import PartAnswers
from headwater.versions.part_cut import PartCut
from headwater.versions.parts import Encoded, Held, Key, PartOutbox
from headwater.wire import versions as v
from headwater.wire.frames import Frame
from headwater.wire.sums import Sums, digest


class PartSource(NamedTuple):
    """A table whose part of a version begins now: its memory, and the step that it has taken last."""

    table: int
    clock: int
    values: torch.Tensor
    spans: tuple[Span, ...]


@dataclass(slots=True)
class _Making:
    """One shard's parts of a version, and how their making went."""

    keys: list[Key]
    clocks: tuple[tuple[int, int], ...]
    pause: float = 0.0
    error: str = ""


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
        self.outbox = PartOutbox()
        self._number = number
        self._shards = shards
        self._wake = wake
        self._making: dict[tuple[int, int], _Making] = {}
        self._cutting: dict[Key, PartCut] = {}
        self._to_start: list[PartCut] = []
        self._answers = PartAnswers(self.parts, self.outbox, wake, checked=checked)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts that are held."""
        return sum(held.buffer.size for held in self.parts.values())

    @property
    def sent_bytes(self) -> int:
        """Bytes that went to readers over connections."""
        return self._answers.sent_bytes

    def receive(self, peer: int, frame: Frame) -> None:
        """A reader's question or word. Raises ``ProtocolError`` for what a reader does not say."""
        self._answers.receive(peer, frame)

    def closed(self, peer: int) -> None:
        """A reader's connection ended. It may still map what it was given."""
        self._answers.closed(peer)

    # ---- parts -----------------------------------------------------------------------------------

    def begin(self, number: int, shard: int, sources: Sequence[PartSource]) -> None:
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

    def _cut(self, key: Key, source: PartSource) -> None:
        size = len(source.values)
        buffer = self.pool.take(size)
        cut = PartCut(source.values, buffer, self._landed)
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

    def _landed(self) -> None:
        """A copying thread is done."""
        if self._wake is not None:
            self._wake()

    def _prepare(self, number: int) -> None:
        """Have memory for a version like this one made ready while nobody waits for it."""
        sizes = Counter(held.buffer.size for key, held in self.parts.items() if key.number == number)
        for size, count in sizes.items() if self._wake is not None else ():
            self.pool.prepare(size, count)

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
        self.outbox.reports.append(self._standing(number, shard))

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

    def drop(self, numbers: Sequence[int]) -> None:
        """Nobody wants these versions any more; a reader that waits for one is told."""
        for key in [key for key in self.parts if key.number in numbers]:
            self._discard(key)
        for made in [made for made in self._making if made[0] in numbers]:
            del self._making[made]

    def _discard(self, key: Key) -> None:
        held = self.parts.pop(key, None)
        if held is None:
            return
        cut = self._cutting.pop(key, None)
        if cut is not None:
            cut.drop()
            held.buffer.tainted = True  # its thread may still write into it
        self.pool.give(held.buffer)
        if all(each.buffer.size != held.buffer.size for each in self.parts.values()):
            self.pool.unwanted(held.buffer.size)  # no more versions of this table, or not for now
        self._answers.dropped(key, held)

    def woken(self) -> None:
        """What the threads have finished. Copies that begin do so here."""
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
                self._prepare(number)
            self.report(number, shard)
        self._answers.woken()

    def close(self) -> None:
        """Let go of everything; what readers map stays theirs."""
        self._answers.close()
        for cut in self._cutting.values():
            cut.drop()
        for held in self.parts.values():
            held.buffer.close()
        self.pool.close()
