"""Many copies between buffers, by several threads at once where that is worth it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SHARE = 8 << 20
"""Bytes that a further thread is worth starting for: it takes some 0.1 ms, and these about one."""

Bytes = npt.NDArray[np.uint8]


class Move(NamedTuple):
    """A copy to do: arrays of one size, 1-D. ``held``: what keeps the source as it is until then."""

    target: Bytes
    source: Bytes
    held: object = None


def copy_all(moves: Sequence[Move], threads: int) -> None:
    """Do them all: by the calling thread and ``threads`` - 1 others, or fewer if there is little to copy.

    One thread does not reach what the memory of a machine with several cores can do. Raises what a copy raises; then
    some are done and others not.
    """
    shares = _shares(moves, threads)
    failed: list[BaseException] = []
    others = [threading.Thread(target=_try, args=(share, failed), name="headwater-copy") for share in shares[1:]]
    started: list[threading.Thread] = []
    try:
        for thread in others:
            thread.start()
            started.append(thread)
        for share in shares[:1]:
            _copy(share)
    finally:
        for thread in started:
            thread.join()
    if failed:
        raise failed[0]


def _shares(moves: Sequence[Move], threads: int) -> list[Sequence[Move]]:
    """Runs of about as many bytes each: at most ``threads``."""
    ends = list(accumulate(len(move.target) for move in moves))
    count = max(1, min(threads, ends[-1] // SHARE)) if ends else 0
    bounds = np.searchsorted(ends, [ends[-1] * i / count for i in range(1, count)], "right").tolist() if ends else []
    return [moves[lo:hi] for lo, hi in zip([0, *bounds], [*bounds, len(moves)], strict=True) if lo < hi]


def _try(moves: Sequence[Move], failed: list[BaseException]) -> None:
    try:
        _copy(moves)
    except BaseException as error:  # noqa: BLE001 - it is raised where the copy was asked for
        failed.append(error)


def _copy(moves: Sequence[Move]) -> None:
    for move in moves:
        np.copyto(move.target, move.source)  # a plain memcpy, without the interpreter's lock
