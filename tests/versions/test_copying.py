"""A cut holds what memory held at its moment, whoever writes to it meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import DeadlineExceeded, InternalError
from headwater.versions.copying import Cut, Loose, anonymous
from tests.patience import PATIENCE

SIZE = 1000
BLOCK = 64


def regions(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator) for name in ("value", "exp_avg")
    }


def copies(cut: Cut) -> dict[str, bytes]:
    return {name: copy.numpy().tobytes() for name, copy in cut.copies.items()}


def held(named: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: region.numpy().tobytes() for name, region in named.items()}


def test_what_is_written_after_the_moment_is_not_in_it() -> None:
    named = regions()
    cut = Cut(named, block=BLOCK)
    named["value"][:] = 7  # before the moment: this is what counts
    before = held(named)
    cut.begin(thread=False)
    cut.advance(3)
    cut.before_write(100, 900)
    for region in named.values():
        region[100:900] = 1
    assert cut.advance(100) == 0
    assert cut.done
    cut.wait(0)
    assert copies(cut) == before
    assert cut.pause > 0


@given(
    st.lists(
        st.one_of(
            st.integers(1, 5),
            st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda x: (min(x), max(x))),
        ),
        max_size=30,
    )
)
def test_any_order_of_writes_and_copies(events: list[int | tuple[int, int]]) -> None:
    named = regions()
    loose = [Loose(lo, lo + 50, torch.tensor([float(lo)])) for lo in range(0, SIZE, 50)]
    cut = Cut(named, block=BLOCK)
    before, kept = held(named), [float(each.tensor) for each in loose]
    cut.begin(loose, thread=False)
    for value, event in enumerate(events):
        if isinstance(event, int):
            cut.advance(event)
            continue
        lo, hi = event
        cut.before_write(lo, hi)
        for region in named.values():
            region[lo:hi] = value
        for each in loose:
            if each.lo < hi and lo < each.hi:
                each.tensor.fill_(-1)
    cut.advance(1000)
    assert copies(cut) == before
    assert [float(tensor) for tensor in cut.loose] == kept


@pytest.mark.parametrize("prepared", [True, False])
def test_a_thread_and_a_writer_share_the_work(prepared: bool) -> None:
    size, block = 1 << 20, 1 << 12
    named = {name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name in "ab"}
    before = held(named)
    cut = Cut(named, block=block)
    if prepared:
        cut.prepare()
    cut.begin()
    for value, lo in enumerate(range(0, size, 3 * block)):
        hi = min(size, lo + 3 * block)
        cut.before_write(lo, hi)
        for region in named.values():
            region[lo:hi] = value % 256
    cut.wait(PATIENCE)
    assert copies(cut) == before


def test_nothing_is_copied_twice_and_a_finished_cut_costs_nothing() -> None:
    cut = Cut(regions(), block=BLOCK)
    cut.before_write(0, SIZE)  # not begun: nothing to do
    cut.begin(thread=False)
    cut.before_write(0, SIZE)
    pause = cut.pause
    assert cut.done
    assert cut.advance() == 0
    cut.before_write(0, SIZE)
    assert cut.pause == pause


def test_waiting_ends() -> None:
    cut = Cut(regions(), block=BLOCK)
    cut.begin(thread=False)
    with pytest.raises(DeadlineExceeded, match="blocks are still to be copied"):
        cut.wait(0)


def test_a_thread_that_fails_is_heard_of() -> None:
    named = regions()
    cut = Cut(named, block=BLOCK)
    cut._pairs[0] = (cut._pairs[0][0], cut._pairs[0][1][:10])  # shorter than the rest
    cut.begin()
    with pytest.raises(ValueError, match="broadcast"):
        cut.wait(PATIENCE)
    cut.before_write(0, 1)  # does not hang on what the thread had in hand


def test_a_dropped_cut_lets_go() -> None:
    cut = Cut(regions(), block=BLOCK)
    cut.prepare()
    thread = cut._thread
    assert isinstance(thread, threading.Thread)
    cut.drop()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not cut.copies
    cut.before_write(0, SIZE)


def test_regions_of_one_length() -> None:
    with pytest.raises(InternalError, match="differ in length"):
        Cut({"a": torch.zeros(2, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.uint8)})
    assert Cut({}).size == 0
    assert anonymous(0).numel() == 0
