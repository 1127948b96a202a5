"""A dense table on one shard: its values in memory that clients may map, the step, and the state as it travels."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import msgspec
import torch

from headwater.errors import ProtocolError
from headwater.layout.dense import BLOCK, PAGE, Block, layout
from headwater.layout.words import spans
from headwater.server.snapshots.restore import Snapshot
from headwater.server.tables.base import Contribution, Ranges, union
from headwater.server.tables.dense.saved import DenseCut, load
from headwater.server.tables.dense.shard import DenseShard, state_bytes
from headwater.transports import memory
from headwater.types import DenseSpec, Segment, Span
from headwater.versions.copying import Allocate
from headwater.wire.messages import decoded
from headwater.wire.tensors import DTYPES, dtype_name

MOST = 16  # times the size of a chunk: values and slots of the most state-hungry optimizer


class SlotState(msgspec.Struct, frozen=True):
    """A tensor of optimizer state in a chunk's payload. ``place``: see ``DenseShard.read_block``."""

    place: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class ChunkState(msgspec.Struct, frozen=True):
    """A chunk's body. The payload: the values, then each slot. ``counts``: steps taken, by segment."""

    counts: tuple[int, ...]
    slots: tuple[SlotState, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ChunkState)


class DenseStore(DenseShard):
    """A ``DenseShard`` and where its bytes are: shared or not, whole or still arriving. See ``base.TableStore``.

    ``blocks``: how the values are cut. ``versions``: a counter per 4 MiB, odd while a step writes there, for clients
    that copy without asking. More methods than other classes have: they are those of the protocol.
    """

    key_limit = 0

    def __init__(
        self,
        spec: DenseSpec,
        segments: Sequence[Segment],
        values: torch.Tensor,
        blocks: Sequence[Block] = (),
        versions: memoryview | None = None,
        fds: tuple[int, ...] = (),
    ) -> None:
        super().__init__(spec, segments, values.numel(), values)
        self.values = values
        self.blocks = tuple(blocks)
        self.versions = versions
        self.limit = max((block.size for block in blocks), default=0)
        self.have: Ranges | None = None  # the bytes that have arrived; None: all
        self._fds = fds
        self._view = as_bytes(values)
        self._starts = [s.offset for s in segments]
        self._ends = [s.end for s in segments]
        self._sound: set[tuple[int, int]] = {(0, 0), (0, self.size)}

    @property
    def fds(self) -> tuple[int, ...]:
        return self._fds

    def restore(self, snapshot: Snapshot) -> None:
        load(snapshot, self)

    def close(self) -> None:
        fds, self._fds = self._fds, ()
        memory.close_all(fds)

    # ---- pushes ------------------------------------------------------------------------------------

    def check(self, start: int, stop: int) -> None:
        """A range must begin and end on segments (padding included)."""
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

    def gradients_in(self, fd: int, size: int) -> memory.Region:
        memory.verify(fd, size)
        if size < max((b.start + b.size for b in self.blocks), default=0):
            raise ProtocolError(f"gradient memory of {size} bytes is smaller than table {self.spec.name!r}")
        return memory.Region([memory.Piece(fd, b.start, b.size) for b in self.blocks], writable=False)

    def extent(self, parts: Sequence[Contribution]) -> Ranges:
        if len(parts) == 1:
            return parts[0].ranges
        return union([span for part in parts for span in part.ranges])

    # ---- changes -----------------------------------------------------------------------------------

    def present(self, parts: Sequence[Contribution]) -> Sequence[Contribution]:
        if self.have is None:
            return parts
        here = [Contribution(c.gradient, self._arrived(c.ranges), c.base) for c in parts]
        return [c for c in here if c.ranges]

    def touched(self, parts: Sequence[Contribution]) -> Ranges:
        return self.extent(parts)

    def change(self, parts: Sequence[Contribution], ranges: Ranges, divide: int, scale: float | None) -> None:
        self._turn(ranges)
        self.step(parts, divide, scale)
        self._turn(ranges)

    def written(self, start: int, stop: int) -> Ranges:
        return self._arrived(((start, stop),))

    def assign(self, start: int, stop: int, data: torch.Tensor) -> None:
        self._turn(((start, stop),))
        self.values[start:stop] = data
        self._turn(((start, stop),))

    def _arrived(self, ranges: Ranges) -> Ranges:
        if self.have is None:
            return ranges
        return tuple((max(a, lo), min(b, hi)) for a, b in ranges for lo, hi in self.have if max(a, lo) < min(b, hi))

    def _turn(self, ranges: Ranges) -> None:
        """Odd before a write, even after."""
        if self.versions is None:
            return
        for start, stop in ranges:
            for block in range(start // BLOCK, -(-stop // BLOCK)):
                self.versions[block] += 1

    # ---- answers -----------------------------------------------------------------------------------

    def check_keys(self, keys: bytes) -> None:
        raise ProtocolError(f"a pull by keys, which table {self.spec.name!r} has not")

    def answer(self, start: int, stop: int, keys: bytes) -> Sequence[tuple[int, memoryview]]:
        pieces = []
        for block in self.blocks:
            first, last = max(start, block.local), min(stop, block.local + block.size)
            if first < last:
                pieces.append((first, self._view[first:last]))
        return pieces

    # ---- state that travels ------------------------------------------------------------------------

    def chunks(self) -> list[tuple[int, int]]:
        return [(b.local, b.local + b.size) for b in self.blocks if b.size]

    @property
    def chunk_limit(self) -> int:
        return MOST * (self.size + 4096)

    def read_chunk(self, start: int, stop: int) -> tuple[bytes, torch.Tensor]:
        counts, slots = self.read_block(start, stop)
        pieces = [self.values[start:stop]]
        described = []
        for place, name, _, tensor in slots:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            described.append(SlotState(place, name, tuple(tensor.shape), dtype_name(tensor.dtype), flat.numel()))
            pieces.append(flat)
        return _encoder.encode(ChunkState(tuple(counts), tuple(described))), torch.cat(pieces)

    def write_chunk(self, start: int, stop: int, body: bytes, payload: torch.Tensor) -> None:
        state = decoded(_decoder, body, "chunk of a dense table")
        size = stop - start
        if size < 0 or stop > self.size or size + sum(x.nbytes for x in state.slots) != len(payload):
            raise ProtocolError(f"a block of {size} bytes with {len(payload)} bytes of payload")
        self.assign(start, stop, payload[:size])
        slots = []
        at = size
        for x in state.slots:
            if x.dtype not in DTYPES:
                raise ProtocolError(f"a slot of dtype {x.dtype!r}")
            # cloned: its bytes need not lie where the dtype wants them
            slots.append((x.place, x.name, 0, payload[at : at + x.nbytes].clone().view(DTYPES[x.dtype]).view(x.shape)))
            at += x.nbytes
        self.write_block(start, stop, state.counts, slots)
        if self.have is not None:
            self.have = union([*self.have, (start, stop)])

    def begin_partial(self) -> None:
        self.have = ()

    def complete(self) -> None:
        self.have = None

    @property
    def whole(self) -> bool:
        return self.have is None

    # ---- copies ------------------------------------------------------------------------------------

    def cut(self, table: int, allocate: Allocate) -> DenseCut:
        return DenseCut(table, self, allocate)

    def published(self) -> tuple[torch.Tensor, tuple[Span, ...]]:
        return self.values, spans(self.spec, self.segments, self.size)

    def fingerprint(self) -> list[bytes | memoryview]:
        found: list[bytes | memoryview] = [self.values.numpy().data]
        for parameter, name, start, tensor in self.read_slots():
            found.append(f"{parameter} {name} {start}".encode())
            found.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found

    def validate(self) -> None:
        assert self.versions is None or all(v % 2 == 0 for v in self.versions), "a block was left half written"


def room(spec: DenseSpec, shards: int, shard: int) -> int:
    """Values, optimizer state, one gradient."""
    return state_bytes(spec, layout(spec, shards).segments[shard])


def make(spec: DenseSpec, shards: int, shard: int, share: bool, consumed: Callable[[int, int], None]) -> DenseStore:
    """Zeros, in memory of its own kind if it is to be shared. Raises ``NotEnoughMemory``."""
    plan = layout(spec, shards)
    segments, size, blocks = plan.segments[shard], plan.sizes[shard], plan.blocks_of(shard)
    if not share:
        store = DenseStore(spec, segments, torch.zeros(size, dtype=torch.uint8, device="cpu"), blocks)
    else:
        store = _shared(spec, segments, size, blocks)
    store.after_block = consumed
    return store


def _shared(spec: DenseSpec, segments: Sequence[Segment], size: int, blocks: Sequence[Block]) -> DenseStore:
    """In memory that clients can map. If something of it cannot be made, nothing of it stays."""
    count = -(-size // BLOCK)
    room = -(-count * 8 // PAGE) * PAGE
    fds = [memory.create(spec.name[:64], size)]
    try:
        fds.append(memory.create(f"{spec.name[:64]}.versions", room))
        region = memory.Region([memory.Piece(fds[0], 0, size)])
        versions = memory.Region([memory.Piece(fds[1], 0, room)]).view[: count * 8].cast("Q")
        values = torch.frombuffer(region.buffer, dtype=torch.uint8)[:size]
        return DenseStore(spec, segments, values, blocks, versions, tuple(fds))
    except BaseException:
        memory.close_all(fds)
        raise


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A uint8 tensor's bytes."""
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
