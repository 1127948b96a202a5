"""A part is what the memory held at one moment, with its checksums, whatever its owner writes meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from headwater.transports.buffers import Buffer, BufferPool
from headwater.versions.copying import Cut
from headwater.versions.part_cut import PartCut
from headwater.wire.sums import checksums
from headwater.wire.versions import SUM_BLOCK
from tests.patience import PATIENCE

SIZES = [1, SUM_BLOCK - 1, SUM_BLOCK, SUM_BLOCK + 8, 4 * SUM_BLOCK + 100]


def values_of(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def cut_of(values: torch.Tensor, landed: Callable[[], None] = lambda: None) -> tuple[PartCut, Buffer]:
    buffer = BufferPool(share=True).take(len(values))
    buffer.array[:] = 255  # what was there before
    return PartCut(values, buffer, landed), buffer


def write(values: torch.Tensor, cut: PartCut, chance: random.Random) -> None:
    """The owner changes some bytes, as a step does."""
    lo = chance.randrange(len(values))
    hi = min(len(values), lo + chance.choice((1, 100, SUM_BLOCK, 3 * SUM_BLOCK)))
    cut.before_write(lo, hi)
    values[lo:hi] += 1


def race(size: int, seed: int) -> None:
    """Owner and cut take turns at random; without a thread, so that a seed says it all."""
    chance, values = random.Random(seed), values_of(size, seed)
    expected = values.clone()
    cut, buffer = cut_of(values)
    cut.begin(thread=False)
    while cut.advance(chance.randrange(2)):
        write(values, cut, chance)
    write(values, cut, chance)
    cut._sum_rest()
    assert np.array_equal(buffer.array, expected.numpy()), f"seed {seed}: the part is not of one moment"
    assert cut.summed
    assert np.array_equal(cut.sums, checksums(buffer.array)), f"seed {seed}"


@pytest.mark.parametrize("size", SIZES)
def test_a_part_is_of_one_moment(size: int) -> None:
    for seed in range(4):
        race(size, seed)


def test_an_owner_that_does_not_say_what_it_writes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cut, "before_write", lambda self, lo, hi: None)
    with pytest.raises(AssertionError, match="not of one moment"):
        test_a_part_is_of_one_moment(SIZES[-1])


@pytest.mark.parametrize("size", SIZES)
def test_without_a_thread_it_is_done_at_once(size: int) -> None:
    values = values_of(size)
    cut, buffer = cut_of(values)
    cut.finish()
    values += 1
    assert np.array_equal(buffer.array, values_of(size).numpy())
    assert np.array_equal(cut.sums, checksums(buffer.array))


def test_a_thread_copies_while_the_owner_writes() -> None:
    for seed in range(8):
        chance, values = random.Random(seed), values_of(4 * SUM_BLOCK + 100, seed)
        expected, landed = values.clone(), threading.Event()
        cut, buffer = cut_of(values, landed.set)
        cut.begin()
        for _ in range(10):
            write(values, cut, chance)
        assert landed.wait(PATIENCE)
        assert cut.failed is None
        assert cut.summed
        assert np.array_equal(buffer.array, expected.numpy()), f"seed {seed}"
        assert np.array_equal(cut.sums, checksums(buffer.array))


def test_a_cut_that_nobody_wants_ends_its_thread_whenever_it_is_told() -> None:
    values = values_of(2 * SUM_BLOCK)
    for turn in range(60):
        landed = threading.Event()
        cut, _room = cut_of(values, landed.set)
        cut.begin()
        for _ in range(turn % 3):
            cut.before_write(0, turn * SUM_BLOCK // 30)
        if turn % 5 == 4:
            cut.wait(PATIENCE)
        cut.drop()
        cut.before_write(0, len(values))
        assert landed.wait(PATIENCE), f"turn {turn}: the thread still waits"


def test_a_cut_that_is_dropped_when_all_is_copied_ends_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last block and the wait for the owner's; once it waited for ever then."""
    run = Cut._run

    def late(self: Cut) -> None:
        run(self)
        self.drop()
        self._dropped = False  # as if the word had come a moment later

    monkeypatch.setattr(Cut, "_run", late)
    landed = threading.Event()
    cut, _room = cut_of(values_of(SUM_BLOCK), landed.set)
    cut.begin()
    assert landed.wait(PATIENCE)


def test_a_copy_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PartCut, block: int) -> None:
        raise MemoryError("no memory for a sum")

    monkeypatch.setattr(PartCut, "_sum", broken)
    landed = threading.Event()
    cut, _room = cut_of(values_of(SUM_BLOCK), landed.set)
    cut.begin()
    assert landed.wait(PATIENCE)
    assert isinstance(cut.failed, MemoryError)
    assert not cut.summed
    cut.before_write(0, SUM_BLOCK)  # the owner does not wait for it
