"""The order of an epoch: every sample once, another order each epoch, and no order likelier than another."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.layout.order import order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 10_000))
def test_an_epoch_holds_each_sample_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(order(n, seed, epoch, 0, n).tolist()) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2**48), st.data())
def test_a_part_is_the_same_however_it_is_asked_for(n: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start, min(n, start + 200)))
    part = order(n, 3, 1, start, stop)
    assert part.dtype == np.int64
    assert ((part >= 0) & (part < n)).all()
    assert len(set(part.tolist())) == stop - start
    assert part.tolist() == [order(n, 3, 1, i, i + 1).item() for i in range(start, stop)]


def test_the_order_is_part_of_the_format() -> None:
    """A cluster that is restored must go on in the order in which it began."""
    assert order(10, 0, 0, 0, 10).tolist() == [3, 6, 5, 7, 2, 8, 0, 4, 9, 1]
    assert order(10**12, 7, 3, 10**11, 10**11 + 3).tolist() == [569518539329, 403962069103, 846744194939]


def test_epochs_and_seeds_differ_and_the_order_is_no_run_of_neighbours() -> None:
    first, second, other = order(5000, 1, 0, 0, 5000), order(5000, 1, 1, 0, 5000), order(5000, 2, 0, 0, 5000)
    for a, b in ((first, second), (first, other), (first, np.arange(5000))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
        assert (a == b).sum() < 10
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06


def test_all_orders_of_a_few_samples_are_about_equally_likely() -> None:
    """Chi-squared of 24 orders over 12,000 epochs; 23 degrees of freedom, one in a million lies above 72."""
    counts = Counter(tuple(order(4, 5, epoch, 0, 4).tolist()) for epoch in range(12_000))
    assert len(counts) == 24
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 72


def test_each_sample_is_about_equally_likely_at_each_place() -> None:
    """n = 7: 49 cells of 6,000 / 7 each; 36 degrees of freedom, one in a million lies above 95."""
    places = np.zeros((7, 7))
    for epoch in range(6000):
        places[np.arange(7), order(7, 11, epoch, 0, 7)] += 1
    assert ((places - 6000 / 7) ** 2 / (6000 / 7)).sum() < 95
