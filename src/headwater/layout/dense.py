"""Where every byte of a table lives: one flat address space, cut into blocks, dealt to shards.

Pure and deterministic: client, coordinator and servers compute the same layout from the same spec, so
that only ranges cross the wire. The cuts lie on pages, so a process on the same host can map the shards'
memories side by side and see each tensor whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from headwater.errors import NotEnoughMemory, UsageError
from headwater.layout.saved import VALUE, Saved
from headwater.types import ITEMSIZE, DenseSpec, ParameterSpec, Segment, TableSpec
from headwater.wire.optimizers import KNOWN, check

PAGE = 4096
ALIGN = 64  # a cache line: every tensor and every fused run starts on one
BLOCK = 4 << 20  # bytes: what one data frame carries at most (a larger whole tensor is sent in parts)
HUGE = 1 << 30  # bytes: a parameter above this is cut into whole blocks only, or placing it would take minutes
LARGEST = 1 << 40  # bytes of values: a larger table is a mistake, refused before anything is computed from it
CHUNK = 16384  # elements: a large parameter is cut at multiples of this, so that sums do not depend on the cuts


class Block(msgspec.Struct, frozen=True):
    """Bytes ``start:start+size`` of the table's address space, at byte ``local`` of ``shard``'s memory."""

    start: int
    size: int
    shard: int
    local: int


class Layout(msgspec.Struct, frozen=True):
    """The address space of one table over ``len(sizes)`` shards."""

    size: int
    offsets: tuple[int, ...]
    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]

    @property
    def participants(self) -> tuple[int, ...]:
        """The shards that hold a part of the table."""
        return tuple(shard for shard, size in enumerate(self.sizes) if size)

    def blocks_of(self, shard: int) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.shard == shard)


class _Atom(msgspec.Struct, frozen=True):
    """The smallest part of a parameter that is never cut."""

    parameter: int
    start: int
    stop: int
    nbytes: int
    align: int


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _atoms(index: int, parameter: ParameterSpec, whole: bool) -> list[_Atom]:
    itemsize = ITEMSIZE[parameter.dtype]
    if whole or parameter.numel <= CHUNK:
        return [_Atom(index, 0, parameter.numel, parameter.nbytes, ALIGN)]
    each = CHUNK if parameter.nbytes <= HUGE else BLOCK // itemsize  # a multiple of CHUNK too
    atoms = []
    for start in range(0, parameter.numel, each):
        stop = min(start + each, parameter.numel)
        atoms.append(_Atom(index, start, stop, (stop - start) * itemsize, PAGE))
    return atoms


def _cut(atoms: Sequence[_Atom], shards: int) -> tuple[list[list[tuple[int, _Atom]]], int]:
    """Give every atom an offset and gather consecutive atoms into page-aligned blocks of about equal size."""
    total = sum(_up(atom.nbytes, ALIGN) for atom in atoms)
    count = shards * max(1, -(-total // (shards * BLOCK)))
    target = max(PAGE, _up(-(-total // count), PAGE))
    blocks: list[list[tuple[int, _Atom]]] = []
    begin = offset = 0
    for atom in atoms:
        at = _up(offset, atom.align)
        if not blocks or at + atom.nbytes - begin > target:
            begin = at = _up(offset, PAGE)
            blocks.append([])
        blocks[-1].append((at, atom))
        offset = at + atom.nbytes
    return blocks, _up(offset, PAGE)


def _merge(placed: list[tuple[int, _Atom]], shift: int) -> list[Segment]:
    """Atoms of one parameter in one block become one segment; ``shift`` turns a flat offset into a local one."""
    segments: list[Segment] = []
    for at, atom in placed:
        last = segments[-1] if segments else None
        if last is not None and last.parameter == atom.parameter:
            segments[-1] = Segment(last.parameter, last.start, atom.stop, last.offset, last.nbytes + atom.nbytes)
        else:
            segments.append(Segment(atom.parameter, atom.start, atom.stop, at + shift, atom.nbytes))
    return segments


@lru_cache(maxsize=64)
def _layout(key: bytes, shards: int) -> Layout:
    spec = msgspec.msgpack.decode(key, type=DenseSpec)
    whole = KNOWN[spec.optimizer.name].whole_tensor
    order = sorted(range(len(spec.parameters)), key=lambda i: (spec.parameters[i].group, spec.parameters[i].dtype, i))
    atoms = [atom for i in order for atom in _atoms(i, spec.parameters[i], whole)]
    cut, size = _cut(atoms, shards)
    offsets = [0] * len(spec.parameters)
    sizes = [0] * shards
    blocks: list[Block] = []
    segments: list[list[Segment]] = [[] for _ in range(shards)]
    turn = zlib.crc32(spec.name.encode()) % shards  # small tables spread over the shards
    for i, placed in enumerate(cut):
        start = placed[0][0]
        stop = cut[i + 1][0][0] if i + 1 < len(cut) else size
        shard = min(range(shards), key=lambda s: (sizes[s], (s - turn) % shards))
        blocks.append(Block(start, stop - start, shard, sizes[shard]))
        segments[shard] += _merge(placed, sizes[shard] - start)
        sizes[shard] += stop - start
        for at, atom in placed:
            if atom.start == 0:
                offsets[atom.parameter] = at
    # blocks of one shard that follow each other locally may continue a parameter: that stays two segments
    return Layout(size, tuple(offsets), tuple(blocks), tuple(sizes), tuple(tuple(s) for s in segments))


def check_table(spec: DenseSpec) -> None:
    """Whether a table of this spec can exist at all; whether a server has room for it is not known here.

    Raises ``UsageError``, ``UnknownOptimizer`` or ``NotEnoughMemory``, naming the parameter.
    """
    names = set()
    for p in spec.parameters:
        if p.name in names:
            raise UsageError(f"table {spec.name!r} has two parameters called {p.name!r}; nothing was declared")
        names.add(p.name)
        if p.dtype not in ITEMSIZE or min(p.shape, default=0) < 0:
            raise UsageError(
                f"parameter {p.name!r} of shape {p.shape} and dtype {p.dtype!r}: sizes are 0 or more and the dtype "
                f"is one of {', '.join(ITEMSIZE)}; nothing was declared"
            )
    total = sum(p.nbytes for p in spec.parameters)
    if not total:
        raise UsageError(f"table {spec.name!r} holds no elements; nothing was declared")
    if total > LARGEST:
        raise NotEnoughMemory(
            f"table {spec.name!r} would take {total / 2**40:.1f} TiB, over the bound of {LARGEST >> 40} TiB for one "
            "table; nothing was declared"
        )
    if spec.nonfinite not in ("error", "skip", "allow"):
        raise UsageError(f"nonfinite={spec.nonfinite!r} is none of 'error', 'skip' and 'allow'; nothing was declared")
    if spec.max_grad_norm is not None and not spec.max_grad_norm >= 0:
        raise UsageError(f"max_grad_norm={spec.max_grad_norm} is not 0 or more; nothing was declared")
    check(spec)


def missing(spec: DenseSpec, shards: int, saved: Saved) -> str:
    """See ``kinds.missing``: every element of every parameter must be there once."""
    for index, parameter in enumerate(spec.parameters):
        at = 0
        for extent in saved(index, VALUE):
            if extent.whole:
                continue
            if extent.start != at or extent.dtype != parameter.dtype:
                break
            at = extent.stop
        if at != parameter.numel:
            return f"element {at} of parameter {parameter.name!r}"
    return ""


def only(spec: TableSpec) -> DenseSpec:
    """``spec``, where no other kind of table than a dense one is known. Raises ``UsageError``."""
    if not isinstance(spec, DenseSpec):
        raise UsageError(f"table {spec.name!r} is no dense table, which is what this can be done with")
    return spec


def layout(spec: DenseSpec, shards: int) -> Layout:
    """Cut ``spec`` into blocks for ``shards`` shards.

    Raises ``ValueError`` for fewer than one shard; what cannot exist must have been refused before
    (``check_table``).
    """
    if shards < 1:
        raise ValueError(f"a table needs at least one shard, not {shards}")
    shape_only = msgspec.structs.replace(spec, sync=DenseSpec.__struct_defaults__[0])
    return _layout(msgspec.msgpack.encode(shape_only), shards)
