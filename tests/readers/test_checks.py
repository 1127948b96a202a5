"""A part is checked while it arrives, and nothing that comes late or twice slips through."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from headwater.readers.checks import Check
from headwater.wire.sums import Bytes, checksums
from headwater.wire.versions import SUM_BLOCK
from tests.patience import PATIENCE

SIZE = 5 * SUM_BLOCK + 12_345


@pytest.fixture(scope="module")
def original() -> Bytes:
    return np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


def _arriving(original: Bytes) -> tuple[Bytes, Check]:
    part = np.zeros_like(original)
    return part, Check(part, checksums(original))


def _come(part: Bytes, check: Check, original: Bytes, start: int, stop: int) -> None:
    part[start:stop] = original[start:stop]
    check.arrived(start, stop)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_any_size_in_any_order(original: Bytes, seed: int) -> None:
    part, check = _arriving(original)
    rng = random.Random(seed)
    cuts = sorted({0, SIZE, *(rng.randrange(SIZE) for _ in range(rng.randrange(12)))})
    pieces = list(itertools.pairwise(cuts))
    rng.shuffle(pieces)
    for start, stop in pieces:
        _come(part, check, original, start, stop)
    assert check.damaged() == []


def test_what_is_damaged_or_never_came_is_found(original: Bytes) -> None:
    part, check = _arriving(original)
    wrong = original.copy()
    wrong[SUM_BLOCK + 5] ^= 1
    wrong[SIZE - 1] ^= 1
    _come(part, check, wrong, 0, 3 * SUM_BLOCK)
    _come(part, check, wrong, 4 * SUM_BLOCK, SIZE)
    assert check.damaged() == [1, 3, 5]


def test_nothing_came(original: Bytes) -> None:
    _, check = _arriving(original)
    assert check.damaged() == list(range(6))


def test_what_is_overwritten_counts_as_it_is_at_the_end(original: Bytes) -> None:
    part, check = _arriving(original)
    wrong = original.copy()
    wrong[2 * SUM_BLOCK + 7] ^= 1
    _come(part, check, wrong, 0, SIZE)
    _come(part, check, original, 2 * SUM_BLOCK + 7, 2 * SUM_BLOCK + 8)
    part[SUM_BLOCK + 3] ^= 1
    check.arrived(SUM_BLOCK + 3, SUM_BLOCK + 4)
    assert check.damaged() == [1]


def test_one_that_is_given_up_leaves_no_thread(original: Bytes) -> None:
    part, check = _arriving(original)
    _come(part, check, original, 0, SUM_BLOCK)
    check.end()
    assert check._thread is not None
    check._thread.join(PATIENCE)
    assert not check._thread.is_alive()
