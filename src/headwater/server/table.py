"""What a replica remembers of one table and of one session."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from headwater.errors import ProtocolError
from headwater.server import events as e
from headwater.server.replication.records import Contributor, Groups, Prepare
from headwater.server.sync import Alike, Clocks, Gathering, Words
from headwater.server.sync.alike import Marks
from headwater.server.tables.base import Contribution, TableStore
from headwater.versions.part_store import PartSource
from headwater.wire.messages import AckBody, Commit, StepBody


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

    def gradients_of(self, table: Table) -> torch.Tensor:
        """Where this worker's pushes to a table lie. Raises ``ProtocolError``."""
        found = self.gradients.get(table.number)
        if found is None:
            raise ProtocolError(f"a push to table {table.spec.name!r} without bytes and without shared memory")
        return found

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
    """One table's slice (``store``), and what its policy remembers. ``alone``: no other shard has a part of it."""

    def __init__(
        self,
        number: int,
        store: TableStore,
        *,
        alone: bool,
    ) -> None:
        spec = store.spec
        self.spec = spec
        self.number = number
        self.store = store
        self.size = store.size
        self.alone = alone
        self.collective = spec.sync.collective
        self.gathering = Gathering()
        self.clocks = Clocks(spec.sync)
        self.prepared: Prepared | None = None
        self.writes: list[tuple[int, torch.Tensor]] = []  # the values that the step to be committed starts from
        self.last_commit: Commit | None = None
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
        self.capped = spec.sync.staleness_cap is not None
        self.eager = spec.sync.immediate and spec.max_grad_norm is None

    def hear(self, session: Session, body: StepBody | None) -> None:
        """What a worker says beside its push. Raises ``UnknownOptimizer``."""
        if body is not None:
            if body.groups is not None:
                self.store.check_groups(body.groups)
            self.words.hear(session.number, body)

    def source(self) -> PartSource:
        """What this shard's part of a version of the table is made from, if its moment is now."""
        clock = self.gathering.clock if self.collective else max(self.clocks.clock.values(), default=0)
        return PartSource(self.number, clock, *self.store.published())

    def follow_none(self) -> None:
        """This replica is no primary any more, or not yet one: what only a primary knows is void."""
        self.words, self.alike, self.marks, self.notes, self.stepped = Words(), Alike(), {}, {}, None
        self.waiting, self.held, self.staged = [], [], {}
        self.inflight = 0
        self.gathering.parts = {}
        self.gathering.announced = self.prepared is not None
        self.clocks.forget_reads()
