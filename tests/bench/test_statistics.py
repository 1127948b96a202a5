"""Medians, percentiles, slopes and the order in which measures take turns."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater_bench.statistics import interleave, median_of, median_ratio, percentile, slope

finite = st.floats(min_value=1e-6, max_value=1e6)


def test_percentile_is_a_sample() -> None:
    samples = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(samples, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 3.0, 5.0, 5.0]


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


@given(st.lists(finite, min_size=1, max_size=30))
def test_percentiles_grow_with_the_share(samples: list[float]) -> None:
    found = [percentile(samples, share / 10) for share in range(11)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (min(samples), max(samples))


def test_a_slow_round_cancels_in_the_ratio() -> None:
    assert median_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_a_ratio_needs_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0, 2.0], [1.0])


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_slope_of_a_line(rise: float, start: float) -> None:
    xs = [1.0, 2.0, 3.0, 5.0]
    assert slope(xs, [start + rise * x for x in xs]) == pytest.approx(rise, abs=1e-9)


def test_one_outlier_does_not_tilt_the_slope() -> None:
    assert slope(range(9), [0, 0, 0, 0, 1000, 0, 0, 0, 0]) == 0


def test_slope_needs_two_different_points() -> None:
    with pytest.raises(ValueError, match="two points"):
        slope([1.0, 1.0], [1.0, 2.0])


def test_measures_take_turns_and_rotate() -> None:
    order = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleave({"a": lambda: measure("a"), "b": lambda: measure("b")}, rounds=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_median_of_repeats() -> None:
    ticks = itertools.chain([9.0, 1.0, 2.0])
    assert median_of(lambda: next(ticks), 3)() == 2.0
