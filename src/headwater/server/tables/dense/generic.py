"""The optimizers without a flat kernel: real ``torch.optim`` instances over a shard's segments."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from headwater.errors import ShapeMismatch, UnknownOptimizer
from headwater.server.tables.base import Contribution, Slot
from headwater.server.tables.dense.kernels import aggregate
from headwater.server.tables.dense.runs import Plan, Report
from headwater.types import ITEMSIZE, DenseSpec, Hyper, Segment
from headwater.wire import optimizers
from headwater.wire.tensors import DTYPES

PART = 256 * 1024
"""Elements of a part: what an element-wise optimizer gets as one tensor. Matrix optimizers get whole segments."""

BATCH = 1024 * 1024
"""Elements of a batch of parts, which share an optimizer instance and, when aggregated, scratch memory."""


class ParameterSlice:
    """Elements ``start:stop`` of a parameter at shard-local byte ``offset``; ``tensor`` is their value."""

    def __init__(self, parameter: int, start: int, stop: int, offset: int, tensor: torch.Tensor) -> None:
        self.parameter, self.start, self.stop = parameter, start, stop
        self.offset, self.end = offset, offset + tensor.nbytes
        self.tensor = tensor
        self.room = -(-(stop - start) // 64) * 64  # elements

    def __repr__(self) -> str:
        return f"ParameterSlice(parameter={self.parameter}, elements={self.start}:{self.stop}, offset={self.offset})"


class Batch:
    """Parts of one group, and the ``torch.optim`` instance that steps those of them that have a gradient."""

    def __init__(self, parts: list[ParameterSlice], name: str, hyper: Mapping[str, Hyper]) -> None:
        self.parts = parts
        self.optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(
            [part.tensor for part in parts], **_arguments(name, hyper)
        )

    @property
    def elements(self) -> int:
        """Scratch memory that the batch needs; every part starts on a cache line."""
        return sum(part.room for part in self.parts)


class Generic:
    """Steps a shard's segments with ``torch.optim``; ``values`` and ``segments`` are the shard's."""

    def __init__(self, spec: DenseSpec, groups: Sequence[Mapping[str, Hyper]], segments: Sequence[Segment],
                 values: torch.Tensor) -> None:  # fmt: skip
        self._spec = spec
        self._name = spec.optimizer.name
        self._groups = groups
        self._parts = [part for segment in segments if segment.nbytes for part in self._cut(segment, values)]
        self._batches = self._batched()
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    def set_groups(self, groups: Sequence[Mapping[str, Hyper]]) -> None:
        """New complete hyperparameters, from the next step on."""
        self._groups = groups
        for batch in self._batches:
            hyper = groups[self._spec.parameters[batch.parts[0].parameter].group]
            batch.optimizer.param_groups[0].update(_arguments(self._name, hyper))

    def step_parts(self, plan: Plan, contributions: Sequence[Contribution], divide: int, scale: float | None,
              report: Report | None) -> None:  # fmt: skip
        """One step on the parts that the plan's runs cover."""
        covered = [(run.lo, run.hi, run.owners) for run in plan.runs]
        for batch in self._batches:
            stepped = self._apply_batch(batch, covered, contributions, divide, scale)
            if report:
                for part in stepped:
                    report(part.offset, part.end)

    def read_slots(self) -> list[Slot]:
        """See ``DenseShard.read_slots``."""
        found: list[Slot] = []
        scalars: set[tuple[int, str]] = set()
        for batch in self._batches:
            for part in batch.parts:
                for name, value in batch.optimizer.state.get(part.tensor, {}).items():
                    slot = torch.as_tensor(value, device="cpu")
                    whole = slot.shape != part.tensor.shape and slot.dim() == 0
                    if not whole:
                        found.append((part.parameter, name, part.start, slot))
                    elif (part.parameter, name) not in scalars:
                        scalars.add((part.parameter, name))
                        found.append((part.parameter, name, 0, slot))
        return found

    def write_slot(self, parameter: int, name: str, start: int, tensor: torch.Tensor) -> None:
        """See ``DenseShard.write_slot``."""
        for batch in self._batches:
            for part in batch.parts:
                if part.parameter == parameter:
                    self._write_part(batch, part, name, start, tensor)

    def read_block(self, start: int, stop: int) -> list[Slot]:
        """The state of the parts in bytes ``start:stop``: (shard-local byte of the part, name, 0, tensor)."""
        return [
            (part.offset, name, 0, torch.as_tensor(value, device="cpu"))
            for batch in self._batches
            for part in batch.parts
            if start <= part.offset < stop
            for name, value in batch.optimizer.state.get(part.tensor, {}).items()
        ]

    def write_block(self, start: int, stop: int, slots: Sequence[Slot]) -> None:
        """Set what ``read_block`` gave; parts that it did not name have no state yet."""
        places = {part.offset: (batch, part) for batch in self._batches for part in batch.parts}
        for batch, part in places.values():
            if start <= part.offset < stop:
                batch.optimizer.state.pop(part.tensor, None)
        for offset, name, _, tensor in slots:
            if offset not in places:
                raise ShapeMismatch(f"slot {name!r} for byte {offset}, where no part of this shard begins")
            batch, part = places[offset]
            state = batch.optimizer.state[part.tensor]
            if not state:
                state.update(self._blank(part))
            if name not in state:
                raise no_slot(self._spec, part.parameter, name, tuple(state))
            state[name] = tensor.clone() if isinstance(state[name], torch.Tensor) else tensor.item()

    def reset_slots(self) -> None:
        """See ``DenseShard.reset_slots``."""
        self._batches = self._batched()

    @property
    def nbytes(self) -> int:
        """Bytes of optimizer state."""
        return sum(
            value.nbytes
            for batch in self._batches
            for state in batch.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )

    def _write_part(self, batch: Batch, part: ParameterSlice, name: str, start: int, tensor: torch.Tensor) -> None:
        state = batch.optimizer.state[part.tensor]
        if not state:
            state.update(self._blank(part))
        if name not in state:
            raise no_slot(self._spec, part.parameter, name, tuple(state))
        kept = state[name]
        if not isinstance(kept, torch.Tensor):
            state[name] = tensor.item()
        elif kept.shape == part.tensor.shape and kept.dim() == 1:
            copy_part(kept, part.start, tensor.reshape(-1), start)
        elif kept.numel() == tensor.numel():
            kept.copy_(tensor.reshape(kept.shape))
        else:
            raise ShapeMismatch(
                f"slot {name!r} of parameter {self._spec.parameters[part.parameter].name!r} has shape "
                f"{tuple(kept.shape)}, not {tuple(tensor.shape)}; it was not written"
            )

    def _blank(self, part: ParameterSlice) -> dict[str, Any]:
        """The state that torch gives a parameter at its first step: made by a step of a copy."""
        twin = part.tensor.clone()
        twin.grad = torch.zeros_like(twin)
        hyper = self._groups[self._spec.parameters[part.parameter].group]
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self._name)([twin], **_arguments(self._name, hyper))
        optimizer.step()
        return dict(optimizer.state[twin])

    def _cut(self, segment: Segment, values: torch.Tensor) -> list[ParameterSlice]:
        parameter = self._spec.parameters[segment.parameter]
        flat = values[segment.offset : segment.end].view(DTYPES[parameter.dtype])
        if optimizers.info(self._name).whole_tensor:
            return [
                ParameterSlice(
                    segment.parameter, segment.start, segment.stop, segment.offset, flat.view(parameter.shape)
                )
            ]
        itemsize = ITEMSIZE[parameter.dtype]
        return [
            ParameterSlice(segment.parameter, segment.start + lo, segment.start + lo + len(flat[lo : lo + PART]),
                 segment.offset + lo * itemsize, flat[lo : lo + PART])
            for lo in range(0, len(flat), PART)
        ]  # fmt: skip

    def _batched(self) -> list[Batch]:
        """Consecutive parts of one group and dtype, up to BATCH elements (or one larger part)."""
        groups: list[list[ParameterSlice]] = []
        room = 0
        key = None
        for part in self._parts:
            parameter = self._spec.parameters[part.parameter]
            elements = part.stop - part.start
            if not groups or key != (parameter.group, parameter.dtype) or elements > room:
                groups.append([])
                key, room = (parameter.group, parameter.dtype), BATCH
            groups[-1].append(part)
            room -= elements
        return [
            Batch(parts, self._name, self._groups[self._spec.parameters[parts[0].parameter].group])
            for parts in groups
        ]  # fmt: skip

    def _apply_batch(self, batch: Batch, covered: list[tuple[int, int, tuple[int, ...]]],
                     contributions: Sequence[Contribution], divide: int,
                     scale: float | None) -> list[ParameterSlice]:  # fmt: skip
        """Step the parts that have a gradient, and return them."""
        plain = divide == 1 and scale is None
        used = 0
        stepped = []
        for part in batch.parts:
            owners = _owners(part, covered)
            if not owners:
                continue
            stepped.append(part)
            sources = [_gradient(contributions[owner], part) for owner in owners]
            if plain and len(sources) == 1:
                part.tensor.grad = sources[0]
                continue
            total = self._room(batch, part.tensor.dtype)[used : used + part.tensor.numel()].view(part.tensor.shape)
            used += part.room
            aggregate(total, sources, divide, scale)
            part.tensor.grad = total
        if stepped:
            batch.optimizer.step()
        for part in stepped:
            part.tensor.grad = None
        return stepped

    def _room(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Scratch memory for the aggregate of a batch."""
        have = self._scratch.get(dtype)
        if have is None or len(have) < batch.elements:
            self._scratch[dtype] = have = torch.empty(batch.elements, dtype=dtype, device="cpu")
        return have


def copy_part(out: torch.Tensor, out_start: int, tensor: torch.Tensor, start: int) -> bool:
    """Copy what two parts of a flat slot have in common: ``out`` from ``tensor``. Whether there was anything."""
    flat = tensor.reshape(-1)
    lo = max(out_start, start)
    hi = min(out_start + len(out), start + len(flat))
    if lo < hi:
        out[lo - out_start : hi - out_start].copy_(flat[lo - start : hi - start])
    return lo < hi


def no_slot(spec: DenseSpec, parameter: int, name: str, has: tuple[str, ...]) -> UnknownOptimizer:
    """The error for a slot that the optimizer does not keep."""
    return UnknownOptimizer(
        f"{spec.optimizer.name} keeps no slot {name!r} for parameter {spec.parameters[parameter].name!r}; with "
        f"these hyperparameters it keeps: {', '.join(has) or 'none'}"
    )


def _owners(part: ParameterSlice, covered: list[tuple[int, int, tuple[int, ...]]]) -> tuple[int, ...]:
    index = bisect_right(covered, part.offset, key=_start) - 1
    return covered[index][2] if index >= 0 and part.offset < covered[index][1] else ()


def _start(run: tuple[int, int, tuple[int, ...]]) -> int:
    return run[0]


def _gradient(contribution: Contribution, part: ParameterSlice) -> torch.Tensor:
    gradient, _, base = contribution
    flat = gradient[part.offset - base : part.end - base].view(part.tensor.dtype)
    return flat.view(part.tensor.shape)


def _arguments(name: str, hyper: Mapping[str, Hyper]) -> dict[str, Any]:
    """The arguments of the torch optimizer; never foreach: its result may differ in the last bit."""
    arguments: dict[str, Any] = dict(hyper)
    if name == "Adafactor" and len(arguments["eps"]) == 1:
        arguments["eps"] = (None, *arguments["eps"])
    if name != "Muon":
        arguments["foreach"] = False
    return arguments
