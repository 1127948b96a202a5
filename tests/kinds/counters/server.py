"""The store of counters on one shard: see ``layout.py``. A push is a list of keys and amounts, which begins at 0."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from headwater.errors import ProtocolError, UnknownOptimizer
from headwater.server.snapshots.files import Piece
from headwater.server.snapshots.restore import Snapshot
from headwater.server.tables import kinds
from headwater.server.tables.base import Contribution, Ranges, Slot, StoreKind
from headwater.transports.memory import Region
from headwater.types import Hyper, Span
from headwater.versions.copying import Allocate, Cut
from tests.kinds.counters.layout import SLOT, CounterSpec, Counts, pack, shard_of, unpack

CHUNKS = 8


def _tensor(packed: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8) if packed else torch.empty(0, dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


class CounterStore:
    """See ``base.TableStore``."""

    fds = ()
    groups: tuple[Mapping[str, Hyper], ...] = ()

    def __init__(self, spec: CounterSpec, shards: int, shard: int) -> None:
        self.spec = spec
        self.size = self.limit = self.chunk_limit = self.key_limit = spec.limit
        self.counts: Counts = {}
        self._shards, self._shard = shards, shard
        self._have: set[int] | None = None  # the chunks that have arrived

    @property
    def nbytes(self) -> int:
        return sum(len(key) + 8 for key in self.counts)

    def initialise(self) -> None:
        """No key is there yet."""

    def restore(self, snapshot: Snapshot) -> None:
        for piece in snapshot.every(self.spec.name, 0, SLOT):
            mine = {key: n for key, n in unpack(_bytes(piece)).items() if shard_of(key, self._shards) == self._shard}
            self.counts.update(mine)

    def close(self) -> None:
        self.counts = {}

    def check(self, start: int, stop: int) -> None:
        if start:
            raise ProtocolError(f"a list of counters from byte {start} on; it begins at 0")

    def check_groups(self, groups: Sequence[Mapping[str, Hyper]]) -> None:
        if groups:
            raise UnknownOptimizer("counters have no hyperparameters")

    set_groups = check_groups

    def gradients_in(self, fd: int, size: int) -> Region:
        raise ProtocolError("counters are not pushed through shared memory")

    def extent(self, parts: Sequence[Contribution]) -> Ranges:
        size = len(pack(self._sum(parts)))
        return ((0, size),) if size else ()

    def aggregate(
        self, contributions: Sequence[Contribution], divide: int, out: torch.Tensor, *, gradients: bool = False
    ) -> None:
        packed = _tensor(pack(self._sum(contributions)))
        out[: len(packed)] = packed

    def square_norm(self, contributions: Sequence[Contribution], divide: int = 1) -> list[float]:
        return [float(sum(count * count for count in self._sum(contributions).values()))]

    def present(self, parts: Sequence[Contribution]) -> Sequence[Contribution]:
        packed = _tensor(pack({key: n for key, n in self._sum(parts).items() if _chunk(key) in (self._have or ())}))
        return [Contribution(packed, ((0, len(packed)),))] if len(packed) else []

    def touched(self, parts: Sequence[Contribution]) -> Ranges:
        return ()  # nobody copies it behind a step's back

    def change(self, parts: Sequence[Contribution], ranges: Ranges, divide: int, scale: float | None) -> None:
        for key, count in self._sum(parts).items():
            self.counts[key] = self.counts.get(key, 0) + count

    def _sum(self, parts: Sequence[Contribution]) -> Counts:
        total: Counts = {}
        for gradient, ranges, base in parts:
            for start, stop in ranges:
                for key, count in unpack(_bytes(gradient[start - base : stop - base])).items():
                    total[key] = total.get(key, 0) + count
        return total

    def written(self, start: int, stop: int) -> Ranges:
        return ((start, stop),)

    def assign(self, start: int, stop: int, data: torch.Tensor) -> None:
        self.counts.update(unpack(_bytes(data)))

    def read_slots(self) -> list[Slot]:
        return []

    def write_slot(self, parameter: int, name: str, start: int, tensor: torch.Tensor) -> None:
        raise UnknownOptimizer("counters have no optimizer state")

    def reset_slots(self) -> None:
        """There is none."""

    def check_keys(self, keys: bytes) -> None:
        try:
            unpack(keys)
        except struct.error:
            raise ProtocolError(f"{len(keys)} bytes that are no list of keys") from None

    def answer(self, start: int, stop: int, keys: bytes) -> Sequence[tuple[int, memoryview]]:
        """The counters of these keys, or all."""
        wanted = {key: self.counts.get(key, 0) for key in unpack(keys)} if keys else self.counts
        return [(0, memoryview(pack(wanted)))]

    def chunks(self) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(CHUNKS)]

    def read_chunk(self, start: int, stop: int) -> tuple[bytes, torch.Tensor]:
        return b"", _tensor(pack({key: n for key, n in self.counts.items() if start <= _chunk(key) < stop}))

    def write_chunk(self, start: int, stop: int, body: bytes, payload: torch.Tensor) -> None:
        self.counts.update(unpack(_bytes(payload)))
        if self._have is not None:
            self._have.update(range(start, stop))

    def begin_partial(self) -> None:
        self._have = set()

    def complete(self) -> None:
        self._have = None

    @property
    def whole(self) -> bool:
        return self._have is None

    def cut(self, table: int, allocate: Allocate) -> CounterCut:
        return CounterCut(table, self, self._shard)

    def published(self) -> tuple[torch.Tensor, tuple[Span, ...]]:
        packed = _tensor(pack(self.counts))
        return packed, (Span(0, len(packed), 4),)

    def fingerprint(self) -> list[bytes | memoryview]:
        return [pack(self.counts)]

    def validate(self) -> None:
        assert all(shard_of(key, self._shards) == self._shard for key in self.counts), f"not all mine: {self.counts}"


class CounterCut:
    """All of it is packed at the moment: it is small."""

    def __init__(self, table: int, store: CounterStore, shard: int) -> None:
        self.table = table
        self.copy = Cut({})
        self._store = store
        self._shard = shard

    def begin(self, *, thread: bool = True) -> None:
        self.copy.drop()
        self.copy = Cut({SLOT: _tensor(pack(self._store.counts))})
        self.copy.begin(thread=thread)

    def pieces(self) -> Iterator[Piece]:
        yield Piece(self.table, 0, SLOT, self._shard, self.copy.copies[SLOT], whole=True)


def _chunk(key: bytes) -> int:
    return zlib.adler32(key) % CHUNKS


def _room(spec: CounterSpec, shards: int, shard: int) -> int:
    return spec.limit


def _make(
    spec: CounterSpec, shards: int, shard: int, share: bool, consumed: Callable[[int, int], None]
) -> CounterStore:
    return CounterStore(spec, shards, shard)


kinds.register(CounterSpec, StoreKind(_room, _make))
