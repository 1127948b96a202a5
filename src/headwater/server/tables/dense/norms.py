"""The squared norm of an aggregate gradient, the same to the last bit on any number of shards and threads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from headwater.server.tables.base import Contribution
from headwater.server.tables.dense.kernels import accumulator, aggregate
from headwater.server.tables.dense.runs import Memory, Plan, Run, Stretch, packed
from headwater.wire.exact import exact_sum

CHUNK = 16384
"""Elements whose squares are summed by floating point; a parameter is cut
between shards at multiples of it only, so chunks are the same on any number of shards."""

SPAN = 4 * CHUNK
"""Elements converted to float64 at a time: half a megabyte, which stays in the second-level cache."""


def square_norm(plan: Plan, contributions: Sequence[Contribution], divide: int, memory: Memory) -> list[float]:
    """The sum of squares of (sum of contributions / divide), as an exact expansion of the chunks' sums.

    A chunk is squared and summed in float64 by numpy's pairwise ``add.reduceat``: one thread, and an order
    that depends on the chunk's length only.
    """
    sums: list[float] = []
    for run in plan.runs:
        sources = run.sources(contributions)
        wide = memory.scratch(torch.float64)
        for lo, hi, edges in spans(run):
            parts = [part[lo:hi] for part in sources]
            total = parts[0]
            if divide > 1 or len(parts) > 1:
                total = memory.scratch(accumulator(run.dtype))[SPAN : SPAN + hi - lo]
                aggregate(total, parts, divide, None)
            squares = wide[: hi - lo]
            squares.copy_(total)
            squares.mul_(squares)
            # reduceat sums from each edge to the next: every second result is a chunk, the others are padding.
            # It refuses an edge at the very end, so one element more is in view; it is in no chunk.
            sums += np.add.reduceat(wide[: hi - lo + 1].numpy(), edges)[::2].tolist()
    return exact_sum(sums) if all(map(math.isfinite, sums)) else [sum(sums)]


def spans(run: Run) -> list[tuple[int, int, list[int]]]:
    """The run's chunks, packed: (first element, last element, edges of the chunks from the first). Made once."""
    if run.spans is None:
        groups = packed(list(_chunks(run)), SPAN)
        run.spans = [
            (chunks[0].lo, chunks[-1].hi, [edge - chunks[0].lo for chunk in chunks for edge in chunk])
            for chunks in groups
        ]
    return run.spans


def _chunks(run: Run) -> Iterator[Stretch]:
    """The run's chunks, in elements from its start."""
    for segment in run.segments:
        shift = (segment.offset - run.lo) // run.itemsize - segment.start
        for lo in range(segment.start, segment.stop, CHUNK):
            yield Stretch(lo + shift, min(lo + CHUNK, segment.stop) + shift)
