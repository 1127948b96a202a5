"""One shard of a dense table: values, optimizer state, and the step that turns gradients into values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from headwater.errors import ShapeMismatch, UnknownOptimizer
from headwater.server.tables.base import Contribution, Slot
from headwater.server.tables.dense import initialise, norms
from headwater.server.tables.dense.generic import Generic, copy_part, no_slot
from headwater.server.tables.dense.kernels import FLAT, Kernel, Tensors, accumulator, aggregate, average, kernel
from headwater.server.tables.dense.runs import (
    ALIGNMENT,
    BLOCK,
    GroupKey,
    Manner,
    Memory,
    Merge,
    Plan,
    Planner,
    Report,
    Run,
    fill,
)
from headwater.types import ITEMSIZE, DenseSpec, Hyper, Segment
from headwater.wire import optimizers
from headwater.wire.tensors import DTYPES

SERIAL = 256 << 10
"""Bytes up to which a shard steps on one thread: torch's fused kernels call every thread for any size, and on
busy cores the others arrive milliseconds later."""

own_process = False
"""Whether the number of torch's threads is the server's to change: in a script's process it is the script's."""

REPORT = 4 << 20
"""Bytes between two calls of ``after_block``."""


class DenseShard:
    """The memory of one shard and its optimizer.

    ``values``: uint8, 1-D, ``size`` bytes, 64-byte aligned and zero-filled, owned by the caller; segments lie
    in it at their offsets, and what lies between them is padding that stays zero. Not thread-safe: one loop
    owns a shard.

    ``after_block(lo, hi)``, if set, is called while a step with two or more contributions goes on, each time
    some 4 MB (shard-local bytes lo:hi) of every gradient have been read for the last time.

    Raises:
        UnknownOptimizer: the servers cannot run the table's optimizer on its parameters.
        UsageError: a parameter's init does not suit its shape or dtype.
        ShapeMismatch: the segments do not fit the memory.
    """

    after_block: Callable[[int, int], None] | None = None

    def __init__(self, spec: DenseSpec, segments: Sequence[Segment], size: int, values: torch.Tensor) -> None:
        optimizer = optimizers.check(spec)
        _check_layout(spec, segments, size, values)
        for parameter in spec.parameters:
            initialise.resolve(parameter)
        self.spec = spec
        self.segments = tuple(segments)
        self.size = size
        self._groups = list(optimizer.groups)
        self._merge: Merge = average if optimizer.name == "Assign" else aggregate
        self._memory = Memory(values)
        self._planner = Planner(spec, segments, self._memory, self._manner)
        self._of_parameter: dict[int, list[int]] = {}
        for index, segment in enumerate(self._planner.segments):
            self._of_parameter.setdefault(segment.parameter, []).append(index)
        self._kernels: dict[GroupKey, Kernel] = {}
        self._generic: Generic | None = None
        if spec.optimizer.name in FLAT:
            self._bind()
        else:
            self._generic = Generic(spec, self._groups, segments, values)

    def initialise(self) -> None:
        """Fill every parameter by its ``Init``: the same values however the table is cut into shards."""
        for segment in self.segments:
            parameter = self.spec.parameters[segment.parameter]
            out = self._memory.values[segment.offset : segment.end].view(DTYPES[parameter.dtype])
            initialise.fill(out, parameter, segment.start, self.spec.seed)

    def set_groups(self, groups: Sequence[Mapping[str, Hyper]]) -> None:
        """New hyperparameters, all or some of each group's, from the next step on.

        Raises:
            UnknownOptimizer: another number of groups, an unknown key or a bad value; nothing was changed.
        """
        merged = self.check_groups(groups)
        if merged == self._groups:
            return
        self._groups = merged
        if self._generic is not None:
            self._generic.set_groups(merged)
        else:
            self._bind()

    def check_groups(self, groups: Sequence[Mapping[str, Hyper]]) -> list[dict[str, Hyper]]:
        """What ``set_groups`` would make of ``groups``; changes nothing and raises the same."""
        if len(groups) != len(self._groups):
            raise UnknownOptimizer(
                f"table {self.spec.name!r} has {len(self._groups)} parameter group(s), not {len(groups)}; "
                "nothing was changed"
            )
        name = self.spec.optimizer.name
        return [
            optimizers.complete(name, {**old, **optimizers.checked(name, new)})
            for old, new in zip(self._groups, groups, strict=True)
        ]

    def step(self, contributions: Sequence[Contribution], divide: int = 1, scale: float | None = None) -> None:
        """One optimizer step on what the contributions cover.

        The gradient is their sum, in the given order, divided by ``divide`` and multiplied by ``scale``. A
        parameter that no contribution covers is skipped: neither its value nor its step count changes.

        Raises:
            ShapeMismatch: a contribution does not fit the shard; nothing was applied.
        """
        plan = self._planner.plan(contributions)
        threads = torch.get_num_threads() if self.size <= SERIAL and own_process else 1
        if threads > 1:
            torch.set_num_threads(1)
        try:
            self._apply_plan(plan, contributions, divide, scale)
        finally:
            if threads > 1:
                torch.set_num_threads(threads)

    def _apply_plan(self, plan: Plan, contributions: Sequence[Contribution], divide: int, scale: float | None) -> None:
        report = _Report(self.after_block) if self.after_block and len(contributions) > 1 else None
        if self._generic is not None:
            self._generic.step_parts(plan, contributions, divide, scale, report)
        else:
            self._apply_flat(plan, contributions, divide, scale, report)
        if report:
            report.flush()

    def square_norm(self, contributions: Sequence[Contribution], divide: int = 1) -> list[float]:
        """The sum of squares of the aggregate gradient (before any scale) as an exact expansion.

        ``wire.exact.merge`` over the expansions of all shards gives a float64 that does not depend on the
        number of shards, nor on threads.

        Raises:
            ShapeMismatch: a contribution does not fit the shard.
        """
        return norms.square_norm(self._planner.plan(contributions), contributions, divide, self._memory)

    def aggregate(
        self, contributions: Sequence[Contribution], divide: int, out: torch.Tensor, *, gradients: bool = False
    ) -> None:
        """Write the aggregate gradient (before any scale) to ``out``: uint8, laid out as the values.

        ``step`` by it alone gives the bits that ``step`` by the contributions gives. ``gradients``: they are
        gradients whatever the optimizer: one that assigns otherwise takes them for state (see ``kernels.average``).

        Raises:
            ShapeMismatch: a contribution does not fit the shard.
        """
        merge = aggregate if gradients else self._merge
        for run in self._planner.plan(contributions).runs:
            sources = run.sources(contributions)
            total = out[run.lo : run.hi].view(run.dtype)
            for lo in range(0, min(map(len, sources)), BLOCK):
                parts = [part[lo : lo + BLOCK] for part in sources]
                have = min(map(len, parts))
                self._aggregate_block(merge, total[lo : lo + have], [part[:have] for part in parts], divide)

    def _aggregate_block(self, merge: Merge, out: torch.Tensor, parts: Tensors, divide: int) -> None:
        wide = accumulator(out.dtype)
        if wide is out.dtype:
            merge(out, parts, divide, None)
        else:
            scratch = self._memory.scratch(wide)[: len(out)]
            merge(scratch, parts, divide, None)
            out.copy_(scratch)

    def regions(self) -> dict[str, torch.Tensor]:
        """The bytes of values and slots (uint8, equal offsets); a generic optimizer's slots are not among them."""
        return {"value": self._memory.values, **self._memory.slots}

    def counts(self) -> list[int]:
        """Steps taken by each segment that holds elements."""
        return self._planner.counts()

    def read_block(self, start: int, stop: int) -> tuple[list[int], list[Slot]]:
        """The optimizer state of bytes ``start:stop`` (whole segments): counts per segment, and slots.

        With the values of the same bytes it is all there is to know about them: ``write_block`` is the inverse.
        Slots of a flat optimizer are (-1, name, start, uint8); tensors are views.
        """
        inside = [i for i, s in enumerate(self._planner.segments) if start <= s.offset < stop]
        counts = self._planner.counts()
        kept = [counts[i] for i in inside]
        if self._generic is not None:
            return kept, self._generic.read_block(start, stop)
        return kept, [(-1, name, start, memory[start:stop]) for name, memory in self._memory.slots.items()]

    def write_block(self, start: int, stop: int, counts: Sequence[int], slots: Sequence[Slot]) -> None:
        """Set what ``read_block`` gave.

        Raises:
            ShapeMismatch: it does not fit this shard.
        """
        inside = [i for i, s in enumerate(self._planner.segments) if start <= s.offset < stop]
        if len(inside) != len(counts):
            raise ShapeMismatch(f"state of {len(counts)} segments for bytes {start}:{stop}, which hold {len(inside)}")
        merged = self._planner.counts()
        for index, count in zip(inside, counts, strict=True):
            merged[index] = count
        self._planner.set_counts(merged)
        if self._generic is not None:
            self._generic.write_block(start, stop, slots)
            return
        for _, name, _, tensor in slots:
            if name not in self._memory.slots:
                self._memory.slots[name] = torch.zeros(self.size, dtype=torch.uint8, device="cpu")
            self._memory.slots[name][start:stop] = tensor

    @property
    def groups(self) -> list[dict[str, Hyper]]:
        """The hyperparameters of each group, complete."""
        return self._groups

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The names that ``read_slots`` gives now, as ``torch.optim`` names them."""
        return tuple(dict.fromkeys(name for _, name, _, _ in self.read_slots()))

    def read_slots(self) -> list[Slot]:
        """The optimizer state of every parameter that has been stepped, with the names of ``torch.optim``.

        A slot is (parameter index, name, first element, tensor). A 1-D tensor is the part of the flattened
        slot from that element on; a 0-D tensor (``step``) or one in the shape that torch gives it (matrix
        optimizers) is whole. Tensors are views where they can be: copy before the next step.
        """
        return list(self._read_flat()) if self._generic is None else self._generic.read_slots()

    def write_slot(self, parameter: int, name: str, start: int, tensor: torch.Tensor) -> None:
        """Set a part of the optimizer state, as ``read_slots`` gave it or any other part of the flat slot.

        Elements that lie in other shards are ignored, so a client may send whole slots to every shard.
        ``step`` sets the count of the parameter's steps.

        Raises:
            UnknownOptimizer: the optimizer, with these hyperparameters, has no such slot.
            ShapeMismatch: a matrix optimizer's slot has another shape.
        """
        if self._generic is None:
            self._write_flat(parameter, name, start, tensor)
        else:
            self._generic.write_slot(parameter, name, start, tensor)

    def reset_slots(self) -> None:
        """Forget the optimizer state: every parameter is as before its first step."""
        if self._generic is not None:
            self._generic.reset_slots()
            return
        self._planner.set_counts([0] * len(self._planner.segments))
        for name, memory in self._memory.slots.items():
            memory.zero_()
            self._fill_initial(name)

    @property
    def nbytes(self) -> int:
        """Bytes of values and optimizer state."""
        slots = len(self._memory.slots) * self.size if self._generic is None else self._generic.nbytes
        return self.size + slots

    def _manner(self, key: GroupKey) -> Manner:
        """How runs of a group are made; a generic optimizer needs them for norms and owners only."""
        if self._generic is not None:
            return Manner("padded", (), False)
        step = self._kernels[key]
        return Manner(step.cut, step.slots, step.counts)

    def _bind(self) -> None:
        """Make the kernels of the present hyperparameters and the slots they need."""
        keys = tuple(dict.fromkeys(self._planner.keys))
        before = [self._manner(key) for key in keys if self._kernels]
        name = self.spec.optimizer.name
        self._kernels = {key: kernel(name, self._groups[key[0]], DTYPES[key[1]]) for key in keys}
        for slot in dict.fromkeys(slot for step in self._kernels.values() for slot in step.slots):
            if slot not in self._memory.slots:
                self._memory.slots[slot] = torch.zeros(self.size, dtype=torch.uint8, device="cpu")
                self._fill_initial(slot)
        if before != [self._manner(key) for key in keys]:
            self._planner.forget()

    def _fill_initial(self, slot: str) -> None:
        for segment, key in zip(self._planner.segments, self._planner.keys, strict=True):
            step = self._kernels[key]
            if slot in step.slots and step.initial != 0.0:
                self._flat(slot, segment).fill_(step.initial)

    def _apply_flat(self, plan: Plan, contributions: Sequence[Contribution], divide: int, scale: float | None,
                    report: Report | None) -> None:  # fmt: skip
        for cohort in plan.cohorts:
            cohort.advance()
        plain = divide == 1 and scale is None
        for run in plan.runs:
            gradients = run.gradients(contributions) if plain else None
            if gradients is None:
                self._apply_blocks(run, run.sources(contributions), divide, scale, report)
                continue
            self._kernels[run.key](run.params, gradients, run.slots, run.cohort)
            if report:
                report(run.lo, run.hi)

    def _apply_blocks(self, run: Run, sources: Tensors, divide: int, scale: float | None,
                      report: Report | None) -> None:  # fmt: skip
        step = self._kernels[run.key]
        for block in run.blocks:
            fill(block, sources, divide, scale, self._merge)
            step(block.params, block.grads, block.slots, run.cohort)
            if report:
                report(run.lo + block.lo * run.itemsize, run.lo + block.hi * run.itemsize)

    def _flat(self, slot: str, segment: Segment) -> torch.Tensor:
        dtype = DTYPES[self.spec.parameters[segment.parameter].dtype]
        return self._memory.slots[slot][segment.offset : segment.end].view(dtype)

    def _read_flat(self) -> Iterator[Slot]:
        planner = self._planner
        seen = set()
        for segment, key, count in zip(planner.segments, planner.keys, planner.counts(), strict=True):
            step = self._kernels[key]
            if count and step.has_step and segment.parameter not in seen:
                seen.add(segment.parameter)
                yield segment.parameter, "step", 0, torch.tensor(float(count), dtype=torch.float32, device="cpu")
            for name in step.slots if count else ():
                yield segment.parameter, name, segment.start, self._flat(name, segment)

    def _write_flat(self, parameter: int, name: str, start: int, tensor: torch.Tensor) -> None:
        planner = self._planner
        for index in self._of_parameter.get(parameter, ()):
            segment, step = planner.segments[index], self._kernels[planner.keys[index]]
            if name == "step" and step.has_step:
                planner.set_count(index, int(tensor.item()))
            elif name not in step.slots:
                raise no_slot(self.spec, parameter, name, ("step", *step.slots) if step.has_step else step.slots)
            elif copy_part(self._flat(name, segment), segment.start, tensor, start) and not step.has_step:
                planner.set_count(index, 1)  # SGD keeps no step: what counts is that its buffer exists


class _Report:
    """Joins consumed byte ranges into some ``REPORT`` bytes each and passes those on."""

    def __init__(self, after_block: Callable[[int, int], None]) -> None:
        self._after_block = after_block
        self._lo = self._hi = 0

    def __call__(self, lo: int, hi: int) -> None:
        if lo - self._hi >= ALIGNMENT or lo < self._hi:
            self.flush()
            self._lo = lo
        self._hi = hi
        if hi - self._lo >= REPORT:
            self.flush()

    def flush(self) -> None:
        if self._hi > self._lo:
            self._after_block(self._lo, self._hi)
        self._lo = self._hi


def state_bytes(spec: DenseSpec, segments: Sequence[Segment]) -> int:
    """Bytes that a shard with these segments will take: values, optimizer state, and one gradient.

    Computed before anything is allocated. Temporaries of matrix optimizers are not in it.

    Raises:
        UnknownOptimizer: the servers cannot run the table's optimizer on its parameters.
    """
    optimizer = optimizers.check(spec)
    size = max((segment.end for segment in segments), default=0)
    if optimizer.name in FLAT:
        used = {spec.parameters[segment.parameter].group for segment in segments}
        slots = max((optimizers.info(optimizer.name).slots(optimizer.groups[group]) for group in used), default=0)
        return size * (2 + slots)
    total = 2 * size
    for segment in segments:
        parameter = spec.parameters[segment.parameter]
        hyper = optimizer.groups[parameter.group]
        elements = optimizers.slot_elements(optimizer.name, hyper, parameter.shape, segment.stop - segment.start)
        total += elements * ITEMSIZE[parameter.dtype]
    return total


def _check_layout(spec: DenseSpec, segments: Sequence[Segment], size: int, values: torch.Tensor) -> None:
    if values.dtype is not torch.uint8 or values.dim() != 1 or len(values) != size:
        raise ShapeMismatch(f"values must be {size} bytes (uint8, 1-D), not {values.dtype} {tuple(values.shape)}")
    whole = optimizers.info(spec.optimizer.name).whole_tensor
    end = 0
    for segment in segments:
        parameter = spec.parameters[segment.parameter]
        fits = 0 <= segment.start <= segment.stop <= parameter.numel
        sized = segment.nbytes == (segment.stop - segment.start) * ITEMSIZE[parameter.dtype]
        if not fits or not sized or segment.offset < end or segment.offset % ALIGNMENT or segment.end > size:
            raise ShapeMismatch(f"{segment} of parameter {parameter.name!r} does not fit a shard of {size} bytes")
        if whole and segment.stop - segment.start != parameter.numel:
            raise ShapeMismatch(f"{spec.optimizer.name} needs parameter {parameter.name!r} whole, not {segment}")
        end = segment.end
