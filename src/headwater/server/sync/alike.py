"""Do two workers contribute the same bits, step after step? Then they train on the same samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import xxhash

STEPS = 16
"""Steps that are looked at; none after the first in which no two workers are alike."""

WHOLE = 4 << 20
"""Bytes up to which all of a contribution is looked at; of a larger one as many, in pieces from all over it."""
_PIECE = 64 << 10

Ranges = tuple[tuple[int, int], ...]

Marks = dict[int, tuple[int, tuple[int, ...]]]
"""By rank: a hash of its contribution, and the other ranks that have the same."""


class Alike:
    """Looks at the first bulk steps of one table on one shard. What it says is for the client to weigh."""

    def __init__(self) -> None:
        self._left = STEPS

    def over(self, workers: int) -> bool:
        """Whether there is nothing to look for any more, or only one worker."""
        return self._left <= 0 or workers < 2

    def look(self, given: Mapping[int, tuple[torch.Tensor | None, Ranges]]) -> Marks:
        """Compare contributions: by rank, gradient memory and ranges, in bytes. Empty once it is ``over``."""
        if self.over(len(given)):
            return {}
        self._left -= 1
        marks = {rank: _mark(gradient, ranges) for rank, (gradient, ranges) in given.items()}
        if len(set(marks.values())) == len(marks):
            self._left = 0
        return {
            rank: (mark, tuple(other for other, its in marks.items() if its == mark and other != rank))
            for rank, mark in marks.items()
        }


def differ(given: Sequence[tuple[torch.Tensor | None, Ranges]]) -> bool:
    """Whether contributions that should be the same are not, as far as a sample shows."""
    return len({_mark(gradient, ranges) for gradient, ranges in given}) > 1


def _mark(gradient: torch.Tensor | None, ranges: Ranges) -> int:
    """63 bits."""
    hashed = xxhash.xxh3_64(repr(ranges).encode())
    if gradient is not None:
        for start, stop in _pieces(ranges):
            hashed.update(memoryview(gradient[start:stop].numpy()))  # type: ignore[arg-type]
    return hashed.intdigest() >> 1


def _pieces(ranges: Ranges) -> Iterator[tuple[int, int]]:
    total = sum(stop - start for start, stop in ranges)
    stride = _PIECE * max(1, -(-total // WHOLE))
    for start, stop in ranges:
        for at in range(start, stop, stride):
            yield at, min(at + _PIECE, stop)
