"""What a replica remembers of one table and of one session."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import torch

from headwater.errors import ProtocolError
from headwater.layout.dense import BLOCK
from headwater.layout.words import spans
from headwater.server import events as e
from headwater.server.replication.records import Contributor, Groups, Prepare, Ranges
from headwater.server.sync import Alike, Clocks, Gathering, Words
from headwater.server.sync.alike import Marks
from headwater.server.tables.dense import DenseShard
from headwater.server.tables.plan import Contribution
from headwater.types import DenseSpec, Segment
from headwater.versions.part_store import PartSource
from headwater.wire.messages import AckBody, Commit


@dataclass(slots=True)
class Session:
    """One client's ordered conversation with this shard.

    By table: ``done``, the last push that was applied, which every replica knows; ``seq``, the last that was
    accepted by the primary, which is on its way to be applied.
    """

    number: int
    rank: int
    members: int = 0  # the membership epoch under which it was opened
    done: dict[int, int] = field(default_factory=dict)
    seq: dict[int, int] = field(default_factory=dict)
    inflight: int = 0  # its updates that are proposed and not applied
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)  # by table: shared or staged

    def finish(self, table: int, seq: int) -> None:
        """A push is applied."""
        self.done[table] = max(self.done.get(table, 0), seq)
        self.seq[table] = max(self.seq.get(table, 0), seq)


@dataclass(slots=True)
class Prepared:
    """A bulk step that waits for its verdict: the promise behind READY."""

    body: Prepare
    sources: list[Contribution]
    divide: int

    @property
    def parts(self) -> tuple[Contributor, ...]:
        return self.body.parts


class Table:
    """One table's slice and what its policy remembers."""

    def __init__(
        self,
        number: int,
        spec: DenseSpec,
        segments: tuple[Segment, ...],
        values: torch.Tensor,
        *,
        alone: bool,
        versions: memoryview | None = None,
    ) -> None:
        self.spec = spec
        self.number = number
        self.dense = DenseShard(spec, segments, values.numel(), values)
        self.values = values
        self.size = values.numel()
        self.alone = alone
        self.versions = versions
        self.collective = spec.sync.collective
        self.gathering = Gathering()
        self.clocks = Clocks(spec.sync)
        self.prepared: Prepared | None = None
        self.writes: list[tuple[int, torch.Tensor]] = []  # the values that the step to be committed starts from
        self.last_commit: Commit | None = None
        self.have: Ranges | None = None  # a learner: the bytes that have arrived; None: all
        # What only a primary knows:
        self.words = Words()
        self.alike = Alike()
        self.marks: Marks = {}  # of the pending bulk step, if its gradients were seen before its end
        self.notes: dict[int, AckBody] = {}  # for the acknowledgements of the pending bulk step, by rank
        self.stepped: Groups | None = None  # the hyperparameters of the last update that was proposed (not bulk)
        self.waiting: list[e.Pull] = []
        self.held: list[e.Push] = []
        self.staged: dict[int, list[tuple[int, int]]] = {}
        self.inflight = 0
        self._starts = [s.offset for s in segments]
        self._ends = [s.end for s in segments]
        self._sound: set[tuple[int, int]] = {(0, 0), (0, self.size)}
        self.capped = spec.sync.staleness_cap is not None
        self.eager = spec.sync.immediate and spec.max_grad_norm is None

    def check_range(self, start: int, stop: int) -> None:
        """A range must begin and end on segments (padding included). Raises ``ProtocolError``."""
        if (start, stop) in self._sound:
            return
        i, j = bisect_left(self._starts, start), bisect_right(self._ends, stop) - 1
        begins = i < len(self._starts) and self._starts[i] == start
        ends = j >= i and (j + 1 == len(self._starts) or self._starts[j + 1] >= stop)
        if not (0 <= start < stop <= self.size and begins and ends):
            raise ProtocolError(
                f"bytes {start}:{stop} of table {self.spec.name!r} do not lie on whole segments of its "
                f"{self.size} bytes here; nothing was applied"
            )
        self._sound.add((start, stop))

    def touch(self, ranges: Ranges) -> None:
        """Turn the block versions of ``ranges``: odd before a write, even after."""
        if self.versions is None:
            return
        for start, stop in ranges:
            for block in range(start // BLOCK, -(-stop // BLOCK)):
                self.versions[block] += 1

    def has(self, ranges: Ranges) -> Ranges:
        """The parts of ``ranges`` that are here."""
        if self.have is None:
            return ranges
        return tuple((max(a, lo), min(b, hi)) for a, b in ranges for lo, hi in self.have if max(a, lo) < min(b, hi))

    def source(self) -> PartSource:
        """What this shard's part of a version of the table is made from, if its moment is now."""
        clock = self.gathering.clock if self.collective else max(self.clocks.clock.values(), default=0)
        return PartSource(self.number, clock, self.values, spans(self.spec, self.dense.segments, self.size))

    def follow_none(self) -> None:
        """This replica is no primary any more, or not yet one: what only a primary knows is void."""
        self.words, self.alike, self.marks, self.notes, self.stepped = Words(), Alike(), {}, {}, None
        self.waiting, self.held, self.staged = [], [], {}
        self.inflight = 0
        self.gathering.parts = {}
        self.gathering.announced = self.prepared is not None
