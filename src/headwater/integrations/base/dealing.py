"""How batches of one order are dealt out to workers: each sample once, and as many batches for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import TypeVar

T = TypeVar("T")


def rounds(batches: Iterator[list[T]], count: int, drop_last: bool) -> Iterator[list[list[T]]]:
    """``count`` batches at a time, one for each worker.

    Of what is left each worker gets an equal part (the first ones a sample more); if it is fewer samples than workers,
    the first workers get one each with their batch of the round before. With ``drop_last`` it is dropped.
    """
    before: list[list[T]] | None = None
    while len(now := list(islice(batches, count))) == count:
        if before is not None:
            yield before
        before = now
    left = [] if drop_last else [sample for batch in now for sample in batch]
    if before is None:
        if left:
            yield deal(left, count)
    elif len(left) >= count:
        yield before
        yield deal(left, count)
    else:
        yield [batch + left[i : i + 1] for i, batch in enumerate(before)]


def deal(samples: Sequence[T], count: int) -> list[list[T]]:
    """In ``count`` parts, in order, none larger than another by more than one sample; empty ones are left out."""
    size, more = divmod(len(samples), count)
    edges = [i * size + min(i, more) for i in range(count + 1)]
    return [list(samples[a:b]) for a, b in pairwise(edges) if a < b]
