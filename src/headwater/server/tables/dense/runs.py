"""Which memory a set of contributions touches, cut into runs that one kernel call can step.

A *run* is the longest stretch of shard memory with one group, one dtype, one step count and one set of
contributors. Runs depend on the ranges that the contributions cover, not on their bytes, so they are built
once per coverage and kept: in a steady state a step finds everything ready but the gradient's own address.

Legend: ``lo``/``hi`` are shard-local bytes unless a name says elements.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch

from headwater.errors import InternalError, ShapeMismatch
from headwater.server.tables.base import Contribution
from headwater.server.tables.dense.kernels import Cohort, Cut, Tensors, accumulator, aggregate
from headwater.types import ITEMSIZE, DenseSpec, Segment
from headwater.wire.tensors import DTYPES

ALIGNMENT = 64
"""Bytes: every parameter starts at a multiple of it."""

BLOCK = 256 * 1024
"""Elements that are aggregated at a time, so that the sum is still in the cache when the kernel reads it."""


Report = Callable[[int, int], None]
"""Called with each shard-local byte range whose gradients have been read for the last time."""

Merge = Callable[[torch.Tensor, Tensors, int, float | None], None]
"""How contributions become one: ``kernels.aggregate`` or ``kernels.average``."""

Coverage = tuple[tuple[tuple[int, int], ...], ...]
"""The ranges of each contribution: the key of a plan."""


class Stretch(NamedTuple):
    """A stretch of a run that a kernel gets as one tensor; ``lo``/``hi`` in elements from the run's start."""

    lo: int
    hi: int


class Block(NamedTuple):
    """Up to ``BLOCK`` elements of a run, aggregated into scratch memory and stepped from there."""

    lo: int
    hi: int
    total: torch.Tensor
    params: Tensors
    grads: Tensors
    slots: tuple[Tensors, ...]


GroupKey = tuple[int, str]
"""A parameter group and a dtype: what decides the kernel."""


class Manner(NamedTuple):
    """How the runs of a group are made: how to cut, which slots to hand over, whether steps are counted."""

    cut: Cut
    slots: tuple[str, ...]
    counts: bool


class Memory:
    """A shard's bytes: values, one buffer per slot, and scratch. All uint8, 1-D, with the same offsets."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.slots: dict[str, torch.Tensor] = {}
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    def scratch(self, dtype: torch.dtype) -> torch.Tensor:
        """``BLOCK`` elements of reused memory."""
        if dtype not in self._scratch:
            self._scratch[dtype] = torch.zeros(BLOCK, dtype=dtype, device="cpu")
        return self._scratch[dtype]


class Source:
    """A contributor's gradient as a run takes it: flat, in the run's dtype, shorter than the run by padding at most."""

    __slots__ = ("base", "flat", "gradient", "pieces")

    def __init__(self, gradient: weakref.ref[torch.Tensor], base: int, flat: torch.Tensor) -> None:
        self.gradient = gradient
        self.base = base
        self.flat = flat
        self.pieces: Tensors | None = None


class Run:
    """One stretch of shard memory that is stepped alike. Views are made once and kept."""

    def __init__(self, segments: Sequence[Segment], hi: int, manner: Manner, owners: tuple[int, ...],
                 key: GroupKey, cohort: Cohort, memory: Memory) -> None:  # fmt: skip
        self.segments = segments
        self.lo, self.hi = segments[0].offset, hi
        self.owners = owners
        self.key = key
        self.cohort = cohort
        self.dtype = DTYPES[key[1]]
        self.itemsize = ITEMSIZE[key[1]]
        self._memory = memory
        self.elements = (hi - self.lo) // self.itemsize
        buffers = [memory.values, *(memory.slots[name] for name in manner.slots)]
        self._values, *self._slots = (buffer[self.lo : hi].view(self.dtype) for buffer in buffers)
        self.spans: list[tuple[int, int, list[int]]] | None = None  # for norms.py, made when first wanted
        self.pieces = list(self._cut(manner.cut))
        self.params = [self._values[a:b] for a, b in self.pieces]
        self.slots = tuple([slot[a:b] for a, b in self.pieces] for slot in self._slots)
        self._sources: dict[int, Source] = {}  # by contributor

    def sources(self, contributions: Sequence[Contribution]) -> Tensors:
        """The gradients of those who contribute to the run, flat, in the order of ``owners``."""
        return [self._source(owner, contributions[owner]).flat for owner in self.owners]

    def gradients(self, contributions: Sequence[Contribution]) -> Tensors | None:
        """The pieces of the one gradient that there is. ``None``: there are more, or it is too short for them."""
        if len(self.owners) > 1:
            return None
        (owner,) = self.owners
        found = self._source(owner, contributions[owner])
        if found.pieces is None and found.flat.numel() == self.elements:
            found.pieces = self._split(found.flat)
        return found.pieces

    def _source(self, owner: int, contribution: Contribution) -> Source:
        """Made once for memory that comes step after step, and forgotten when whoever owns that lets go of it."""
        gradient, _, base = contribution
        found = self._sources.get(owner)
        if found is None or found.gradient() is not gradient or found.base != base:
            have = (min(self.hi - base, gradient.numel()) - (self.lo - base)) // self.itemsize * self.itemsize
            flat = gradient[self.lo - base : self.lo - base + have].view(self.dtype)
            forget = partial(_forget, self._sources, owner)
            found = self._sources[owner] = Source(weakref.ref(gradient, forget), base, flat)
        return found

    @cached_property
    def split_sizes(self) -> list[int]:
        """Elements of piece, gap, piece, gap, …: what ``split_with_sizes`` wants."""
        sizes = []
        ends = [piece.lo for piece in self.pieces[1:]] + [self.elements]
        for piece, following in zip(self.pieces, ends, strict=True):
            sizes += [piece.hi - piece.lo, following - piece.hi]
        return sizes

    def _split(self, flat: torch.Tensor) -> Tensors:
        if len(self.pieces) == 1 and self.elements == self.pieces[0].hi:
            return [flat]
        return list(flat.split_with_sizes(self.split_sizes)[::2])

    @cached_property
    def blocks(self) -> list[Block]:
        """The run in parts that fit the scratch memory; parts of a piece start at multiples of BLOCK in it."""
        parts = [
            Stretch(lo, min(lo + BLOCK, piece.hi)) for piece in self.pieces for lo in range(piece.lo, piece.hi, BLOCK)
        ]
        return [self._block(group) for group in packed(parts, BLOCK)]

    def _block(self, parts: list[Stretch]) -> Block:
        lo, hi = parts[0].lo, parts[-1].hi
        total = self._memory.scratch(accumulator(self.dtype))[: hi - lo]
        return Block(
            lo,
            hi,
            total,
            [self._values[a:b] for a, b in parts],
            [total[a - lo : b - lo] for a, b in parts],
            tuple([slot[a:b] for a, b in parts] for slot in self._slots),
        )

    def _cut(self, cut: Cut) -> Iterator[Stretch]:
        """The run's pieces as its kernel wants them (see kernels.py)."""
        if cut == "padded":
            yield Stretch(0, self.elements)
            return
        start = self.lo
        for index, segment in enumerate(self.segments):
            last = index + 1 == len(self.segments)
            if cut == "segments" or last or self.segments[index + 1].offset != segment.end:
                yield Stretch((start - self.lo) // self.itemsize, (segment.end - self.lo) // self.itemsize)
                start = segment.end if last else self.segments[index + 1].offset


class Plan(NamedTuple):
    """What one coverage steps: its runs, and the cohorts whose count moves."""

    runs: list[Run]
    cohorts: list[Cohort]


class Planner:
    """Makes plans and keeps the step counts, one per cohort of segments.

    ``manner`` says how the kernel of a group wants its runs.
    """

    def __init__(self, spec: DenseSpec, segments: Sequence[Segment], memory: Memory,
                 manner: Callable[[GroupKey], Manner]) -> None:  # fmt: skip
        self.segments = [segment for segment in segments if segment.nbytes]
        self.keys: list[GroupKey] = [
            (spec.parameters[s.parameter].group, spec.parameters[s.parameter].dtype) for s in self.segments
        ]
        self._memory = memory
        self._manner = manner
        self._offsets = [segment.offset for segment in self.segments]
        self._plans: dict[Coverage, Plan] = {}
        self.set_counts([0] * len(self.segments))

    def counts(self) -> list[int]:
        """Steps taken, per segment of ``segments``."""
        return [cohort.count for cohort in self._cohorts]

    def set_counts(self, counts: Sequence[int]) -> None:
        """Set the steps taken, per segment; segments of a group with equal counts become one cohort."""
        made: dict[tuple[GroupKey, int], Cohort] = {}
        self._cohorts = [
            made.setdefault((key, count), Cohort(count)) for key, count in zip(self.keys, counts, strict=True)
        ]
        self._plans.clear()
        self._scattered = False

    def set_count(self, index: int, count: int) -> None:
        """Set the steps taken by one segment."""
        self._cohorts[index] = Cohort(count)
        self._plans.clear()
        self._scattered = True  # the next plan joins equal counts again

    def forget(self) -> None:
        """Drop all plans: the memory or the way of cutting it has changed."""
        self._plans.clear()

    def plan(self, contributions: Sequence[Contribution]) -> Plan:
        """The plan for these contributions.

        Raises:
            ShapeMismatch: a range cuts a segment or leaves the shard, or a gradient is shorter than its
                ranges. Nothing was applied.
        """
        coverage = tuple([contribution.ranges for contribution in contributions])
        plan = self._plans.get(coverage)
        if plan is None:
            plan = self._build(coverage)
        for contribution in contributions:
            _check_memory(contribution)
        return plan

    def validate(self) -> None:
        """Check what must always hold: a kept plan steps each cohort whole and once. For tests.

        Raises:
            InternalError: it does not.
        """
        of = {segment.offset: cohort for segment, cohort in zip(self.segments, self._cohorts, strict=True)}
        sizes = Counter(map(id, self._cohorts))
        for coverage, plan in self._plans.items():
            stepped = Counter(id(run.cohort) for run in plan.runs for _ in run.segments)
            strangers = [run for run in plan.runs for s in run.segments if of[s.offset] is not run.cohort]
            if strangers or any(sizes[cohort] != count for cohort, count in stepped.items()):
                raise InternalError(f"the plan for {coverage} splits a cohort: {stepped} of {sizes}, {strangers}")

    def _build(self, coverage: Coverage) -> Plan:
        owners = self._owners(coverage)
        if self._scattered:
            self.set_counts(self.counts())
        covered = [index for index, who in enumerate(owners) if who]
        if self._split(covered) or len(self._plans) >= 256:  # coverages follow the model's layout: 256 is plenty
            self._plans.clear()
        runs = [self._run(group, owners[group[0]]) for group in self._grouped(covered, owners)]
        cohorts = list({id(run.cohort): run.cohort for run in runs if self._manner(run.key).counts}.values())
        self._plans[coverage] = plan = Plan(runs, cohorts)
        return plan

    def _owners(self, coverage: Coverage) -> list[tuple[int, ...]]:
        """Per segment, the contributions that cover it, in their order."""
        owners: list[tuple[int, ...]] = [()] * len(self.segments)
        for who, ranges in enumerate(coverage):
            previous = 0
            for lo, hi in ranges:
                first, last = bisect_left(self._offsets, lo), bisect_left(self._offsets, hi)
                cuts_head = first > 0 and self.segments[first - 1].end > lo
                cuts_tail = last > 0 and self.segments[last - 1].end > hi
                if cuts_head or cuts_tail or lo < previous or hi > len(self._memory.values):
                    raise ShapeMismatch(
                        f"contribution {who}: bytes {lo}:{hi} are out of order or do not start and end on "
                        f"segment boundaries of this shard of {len(self._memory.values)} bytes; nothing was applied"
                    )
                previous = hi
                for index in range(first, last):
                    owners[index] += (who,)
        return owners

    def _split(self, covered: list[int]) -> bool:
        """Give covered segments cohorts of their own where others of the cohort are left out."""
        chosen = set(covered)
        left = {id(cohort) for index, cohort in enumerate(self._cohorts) if index not in chosen}
        fresh: dict[int, Cohort] = {}
        for index in covered:
            cohort = self._cohorts[index]
            if id(cohort) in left:
                self._cohorts[index] = fresh.setdefault(id(cohort), Cohort(cohort.count))
        return bool(fresh)

    def _grouped(self, covered: list[int], owners: list[tuple[int, ...]]) -> Iterator[list[int]]:
        """Covered segments, grouped into runs."""
        group: list[int] = []
        for index in covered:
            if group and not self._joins(group[-1], index, owners):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _joins(self, before: int, index: int, owners: list[tuple[int, ...]]) -> bool:
        gap = self.segments[index].offset - self.segments[before].end
        return (
            gap < ALIGNMENT
            and self._cohorts[before] is self._cohorts[index]
            and self.keys[before] == self.keys[index]
            and owners[before] == owners[index]
        )

    def _run(self, group: list[int], owners: tuple[int, ...]) -> Run:
        first, last = group[0], group[-1]
        key = self.keys[first]
        manner, hi = self._manner(key), self.segments[last].end
        if manner.cut == "padded":
            hi = min(-(-hi // ALIGNMENT) * ALIGNMENT, len(self._memory.values))
        segments = self.segments[first : last + 1]
        return Run(segments, hi, manner, owners, key, self._cohorts[first], self._memory)


def packed(parts: Sequence[Stretch], limit: int) -> Iterator[list[Stretch]]:
    """Consecutive parts in groups that span at most ``limit`` elements each."""
    group: list[Stretch] = []
    for part in parts:
        if group and part.hi - group[0].lo > limit:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _forget(sources: dict[int, Source], owner: int, _gradient: object) -> None:
    sources.pop(owner, None)


def fill(block: Block, sources: Tensors, divide: int, scale: float | None, merge: Merge = aggregate) -> None:
    """Merge ``sources`` (the gradients for the block's run) into ``block.total``; missing padding is zero."""
    parts = [part[block.lo : block.hi] for part in sources]
    have = min([part.numel() for part in parts])
    if have == block.total.numel():
        merge(block.total, parts, divide, scale)
    else:
        merge(block.total[:have], [part[:have] for part in parts], divide, scale)
        block.total[have:].zero_()


def _check_memory(contribution: Contribution) -> None:
    gradient, ranges, base = contribution
    if ranges and not (base <= ranges[0][0] and ranges[-1][1] <= base + gradient.numel()):
        raise ShapeMismatch(
            f"a gradient of {len(gradient)} bytes from byte {base} does not hold its ranges "
            f"{ranges[0][0]}:{ranges[-1][1]}; nothing was applied"
        )
