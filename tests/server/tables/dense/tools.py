"""Tables cut into shards by hand, and torch.optim as the reference. No placement: tables know segments only."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from headwater.server.tables.base import Contribution
from headwater.server.tables.dense.store import DenseStore
from headwater.types import ITEMSIZE, DenseSpec, OptimizerSpec, ParameterSpec, Segment
from headwater.wire import optimizers
from headwater.wire.tensors import DTYPES

CHUNK = 16384
SIZES = (1, 3, 7, 17, 100, 4097, 33333, 48, 70000)


def table(
    optimizer: str,
    shapes: Iterable[tuple[int, ...]] = tuple((n,) for n in SIZES),
    dtype: str = "float32",
    groups: Sequence[Mapping[str, Any]] = ({},),
    **kwargs: Any,
) -> DenseSpec:
    """Parameters p0, p1, … dealt to the groups in turn."""
    parameters = tuple(ParameterSpec(f"p{i}", shape, dtype, group=i % len(groups)) for i, shape in enumerate(shapes))
    return DenseSpec("t", parameters, OptimizerSpec(optimizer, tuple(dict(g) for g in groups)), **kwargs)


def layouts(spec: DenseSpec, shards: int, seed: int = 0) -> list[tuple[list[Segment], int]]:
    """Per shard (segments, bytes): parameters in (group, dtype) order, cut at random chunks, dealt at random."""
    rng = random.Random(seed)
    whole = optimizers.info(spec.optimizer.name).whole_tensor
    cut: list[list[Segment]] = [[] for _ in range(shards)]
    ends = [0] * shards
    order = sorted(range(len(spec.parameters)), key=lambda i: (spec.parameters[i].group, spec.parameters[i].dtype))
    for index in order:
        parameter = spec.parameters[index]
        inner = [] if whole or shards == 1 else list(range(CHUNK, parameter.numel, CHUNK))
        bounds = [0, *(b for b in inner if rng.random() < 0.7), parameter.numel]
        for start, stop in itertools.pairwise(bounds):
            shard = rng.randrange(shards)
            offset = -(-ends[shard] // 64) * 64
            nbytes = (stop - start) * ITEMSIZE[parameter.dtype]
            cut[shard].append(Segment(index, start, stop, offset, nbytes))
            ends[shard] = offset + nbytes
    return [(segments, -(-end // 64) * 64) for segments, end in zip(cut, ends, strict=True)]


class Sharded:
    """A table on several shards, driven with whole tensors."""

    def __init__(self, spec: DenseSpec, shards: int, values: Sequence[torch.Tensor] | None = None, seed: int = 0):
        self.spec = spec
        self.memories: list[torch.Tensor] = []
        self.shards: list[DenseStore] = []
        for segments, size in layouts(spec, shards, seed):
            self.memories.append(torch.zeros(size, dtype=torch.uint8))
            self.shards.append(DenseStore(spec, segments, self.memories[-1]))
        if values is not None:
            self.scatter(self.memories, dict(enumerate(values)))

    def scatter(self, memories: Sequence[torch.Tensor], tensors: Mapping[int, torch.Tensor]) -> None:
        for shard, memory in zip(self.shards, memories, strict=True):
            for s in shard.segments:
                if s.parameter in tensors:
                    part = tensors[s.parameter].reshape(-1)[s.start : s.stop]
                    memory[s.offset : s.end].view(part.dtype).copy_(part)

    def values(self) -> list[torch.Tensor]:
        out = [torch.empty(p.shape, dtype=DTYPES[p.dtype]) for p in self.spec.parameters]
        for shard, memory in zip(self.shards, self.memories, strict=True):
            for s in shard.segments:
                flat = out[s.parameter].reshape(-1)
                flat[s.start : s.stop] = memory[s.offset : s.end].view(flat.dtype)
        return out

    def contributions(self, workers: Sequence[Mapping[int, torch.Tensor]]) -> list[list[Contribution]]:
        """Per shard, one contribution of each worker: {parameter index: gradient}."""
        result = []
        gradients = [[torch.zeros_like(m) for m in self.memories] for _ in workers]
        for memories, tensors in zip(gradients, workers, strict=True):
            self.scatter(memories, tensors)
        for index, shard in enumerate(self.shards):
            result.append([
                Contribution(memories[index], ranges(shard.segments, tensors, shard.size))
                for memories, tensors in zip(gradients, workers, strict=True)
            ])  # fmt: skip
        return result

    def step(self, workers: Sequence[Mapping[int, torch.Tensor]], divide: int = 1, scale: float | None = None) -> None:
        for shard, given in zip(self.shards, self.contributions(workers), strict=True):
            before = [c.gradient.clone() for c in given]
            shard.step(given, divide, scale)
            assert all(torch.equal(b, c.gradient) for b, c in zip(before, given, strict=True)), "gradient written"

    def assert_padding_is_zero(self) -> None:
        for shard, memory in zip(self.shards, self.memories, strict=True):
            mask = torch.ones(shard.size, dtype=torch.bool)
            for s in shard.segments:
                mask[s.offset : s.end] = False
            for padded in (memory, *shard._memory.slots.values()):
                # minus zero is a zero too
                assert not (padded[mask] & 0x7F).any()


def ranges(segments: Sequence[Segment], chosen: Mapping[int, Any], size: int) -> tuple[tuple[int, int], ...]:
    """Ranges of the segments whose parameter is chosen; neighbours joined, over the padding between them."""
    found: list[list[int]] = []
    last = None
    for index, segment in enumerate(segments):
        if segment.parameter in chosen:
            if found and last == index - 1:
                found[-1][1] = segment.end
            else:
                found.append([segment.offset, segment.end])
            last = index
    return tuple((lo, hi) for lo, hi in found)


def gradients(spec: DenseSpec, generator: torch.Generator) -> dict[int, torch.Tensor]:
    """Normal numbers of widely different magnitudes."""
    made = {}
    for index, p in enumerate(spec.parameters):
        magnitude = torch.randn(p.shape, generator=generator)
        made[index] = (torch.randn(p.shape, generator=generator) * 10**magnitude).to(DTYPES[p.dtype])
    return made


def reference(spec: DenseSpec, values: Sequence[torch.Tensor], **extra: Any) -> torch.optim.Optimizer:
    """The torch.optim optimizer of one process, over copies of ``values``."""
    groups = []
    for index, group in enumerate(spec.optimizer.groups):
        arguments: dict[str, Any] = dict(group)
        members = [v for v, p in zip(values, spec.parameters, strict=True) if p.group == index]
        groups.append({**arguments, **extra, "params": members})
    # Adagrad reads initial_accumulator_value from the defaults only, so one group passes everything there too.
    defaults = {**spec.optimizer.groups[0], **extra} if len(groups) == 1 else {}
    return getattr(torch.optim, spec.optimizer.name)(groups, **defaults)  # type: ignore[no-any-return]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN included; -0.0 equals 0.0."""
    return bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all()) if a.is_floating_point() else a.equal(b)
