"""What a shard needs of a table, whatever its kind (docs/design.md: "to add a kind of table").

A shard, its log, its followers, the disk, snapshots and versions see a table's content through ``TableStore`` only.
They speak of bytes: a *push* is bytes ``start:stop`` of an address space of ``size`` bytes that means something to the
store alone. A dense table's addresses are those of its values; a kind whose pushes are lists of keys and rows lets
every payload begin at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from headwater.types import Hyper, Span, TableSpec

if TYPE_CHECKING:
    from headwater.server.snapshots.capture import TableCut
    from headwater.server.snapshots.restore import Snapshot
    from headwater.transports.memory import Region
    from headwater.versions.copying import Allocate

Ranges = tuple[tuple[int, int], ...]

Slot = tuple[int, str, int, torch.Tensor]
"""(parameter index, slot name, first element, tensor): a part of one parameter's optimizer state."""


class Contribution(NamedTuple):
    """What one worker has pushed to a shard for one step.

    ``gradient``: uint8, 1-D; its byte 0 is byte ``base`` of the table's addresses. It is only read. ``ranges``: which
    of them it covers, sorted and disjoint, each a push that ``TableStore.check`` has let pass, or several.
    """

    gradient: torch.Tensor
    ranges: Ranges
    base: int = 0


class TableStore(Protocol):
    """The content of one table on one shard. One loop owns it; nothing here waits or fails halfway.

    ``size``: bytes of the address space of pushes. ``limit``: no payload of a frame is longer. ``fds``: descriptors by
    which a client of this host maps the values; none if it cannot. ``key_limit``: no pull's keys are longer; 0 where
    a pull has none.
    """

    @property
    def spec(self) -> TableSpec: ...
    @property
    def size(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def key_limit(self) -> int: ...
    @property
    def fds(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes now: values and optimizer state."""

    def initialise(self) -> None:
        """The first values of a new table."""

    def restore(self, snapshot: Snapshot) -> None:
        """The first values instead, from a snapshot of any number of shards. Raises ``SnapshotCorrupt``."""

    def close(self) -> None:
        """Give the memory back."""

    # ---- pushes: each may be refused before it counts, never after ---------------------------------

    def check(self, start: int, stop: int) -> None:
        """Raises ``ProtocolError`` if no push can be of these bytes."""

    def check_groups(self, groups: Sequence[Mapping[str, Hyper]]) -> object:
        """Raises ``UnknownOptimizer`` if these cannot be the hyperparameters; changes nothing."""

    def gradients_in(self, fd: int, size: int) -> Region:
        """A client's shared memory of ``size`` bytes, as this shard's addresses. Raises ``ProtocolError``."""

    def extent(self, parts: Sequence[Contribution]) -> Ranges:
        """The bytes that ``aggregate`` of these would cover."""

    def aggregate(
        self, contributions: Sequence[Contribution], divide: int, out: torch.Tensor, *, gradients: bool = False
    ) -> None:
        """Write to ``out`` (uint8, ``size`` bytes) one contribution that is their sum, divided: what followers get.

        ``change`` by it gives the bits that ``change`` by all of them gives. ``gradients``: somebody wants to see them.
        """

    def square_norm(self, contributions: Sequence[Contribution], divide: int = 1) -> list[float]:
        """The squared norm of that sum as an exact expansion (``wire.exact``): the same on any number of shards."""

    # ---- changes: the same on every replica --------------------------------------------------------

    @property
    def groups(self) -> Sequence[Mapping[str, Hyper]]:
        """The hyperparameters of each group of parameters."""

    def set_groups(self, groups: Sequence[Mapping[str, Hyper]]) -> None:
        """From the next change on."""

    def present(self, parts: Sequence[Contribution]) -> Sequence[Contribution]:
        """What of these concerns the part of the state that is here: a learner's is not whole."""

    def touched(self, parts: Sequence[Contribution]) -> Ranges:
        """The bytes of memory that ``change`` by these would overwrite: who copies them behind its back is told."""

    def change(self, parts: Sequence[Contribution], ranges: Ranges, divide: int, scale: float | None) -> None:
        """Take a step by the sum of the parts, divided and scaled. ``ranges``: their ``touched``."""

    def written(self, start: int, stop: int) -> Ranges:
        """What of an assignment of bytes ``start:stop`` concerns the part of the state that is here."""

    def assign(self, start: int, stop: int, data: torch.Tensor) -> None:
        """Overwrite values: one of the ranges of ``written``."""

    def read_slots(self) -> list[Slot]:
        """The optimizer state, as clients see it."""

    def write_slot(self, parameter: int, name: str, start: int, tensor: torch.Tensor) -> None:
        """Set a part of it. Raises ``UnknownOptimizer`` or ``ShapeMismatch``."""

    def reset_slots(self) -> None:
        """Forget it."""

    # ---- answers -----------------------------------------------------------------------------------

    def check_keys(self, keys: bytes) -> None:
        """Raises ``ProtocolError`` if no pull can be of these. Called only where there is a ``key_limit``."""

    def answer(self, start: int, stop: int, keys: bytes) -> Sequence[tuple[int, memoryview]]:
        """What a pull of bytes ``start:stop`` is answered, or of ``keys``: pieces with where each begins, in order.

        A view of memory that ``change`` overwrites is good for as long as ``touched`` is told.
        """

    # ---- state that travels: to learners, to the disk, in chunks at one LSN each ------------------

    def chunks(self) -> list[tuple[int, int]]:
        """Which bytes the state is cut into; together they are all of it."""

    @property
    def chunk_limit(self) -> int:
        """No chunk's payload is longer: nothing more is allocated by a frame's word."""

    def read_chunk(self, start: int, stop: int) -> tuple[bytes, torch.Tensor]:
        """A chunk as it is now: what its payload is made of, and the payload (uint8, its own memory)."""

    def write_chunk(self, start: int, stop: int, body: bytes, payload: torch.Tensor) -> None:
        """The inverse. Raises ``ProtocolError`` or ``ShapeMismatch`` where it does not fit."""

    def begin_partial(self) -> None:
        """Chunks will come: until ``complete`` a change counts for those only that are here."""

    def complete(self) -> None:
        """All chunks are here."""

    @property
    def whole(self) -> bool:
        """Whether all of the state is here."""

    # ---- copies ------------------------------------------------------------------------------------

    def cut(self, table: int, allocate: Allocate) -> TableCut:
        """Prepare a copy of everything for a snapshot."""

    def published(self) -> tuple[torch.Tensor, tuple[Span, ...]]:
        """What a version holds: bytes (uint8), and which of them are words of which size, for deltas.

        The bytes may be the live memory: ``touched`` is told before they change.
        """

    # ---- for tests ---------------------------------------------------------------------------------

    def fingerprint(self) -> list[bytes | memoryview]:
        """What replicas must agree on."""

    def validate(self) -> None:
        """Invariants between two changes. Raises ``AssertionError``."""


class StoreKind(NamedTuple):
    """How a kind of table is held. ``Any`` is its own spec, ``int, int``: how many shards there are, and which this is.

    ``room``: bytes that a table will take here, before anything is allocated. ``make``: the store, with empty memory;
    ``share``: clients of this host may map it; ``consumed(start, stop)`` may be called while a step goes on, when these
    bytes of every contribution have been read for the last time.
    """

    room: Callable[[Any, int, int], int]
    make: Callable[[Any, int, int, bool, Callable[[int, int], None]], TableStore]


def union(ranges: list[tuple[int, int]]) -> Ranges:
    """Sorted, with neighbours joined; overlapping ranges count once."""
    if len(ranges) == 1:
        return tuple(ranges)
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return tuple(joined)
