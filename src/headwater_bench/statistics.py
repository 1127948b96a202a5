"""The arithmetic of a benchmark: medians of pairs, so that a noisy neighbour hits both sides alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

Measure = Callable[[], float]
"""One measurement; returns seconds."""


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which ``share`` (0 to 1) of the samples lie, nearest rank; ``ValueError`` if there is none."""
    if not samples:
        raise ValueError("a percentile needs at least one sample")
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, round(share * (len(ordered) - 1))))]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of ``above[i] / below[i]``: both of a pair were measured in the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The Theil-Sen slope of y over x (the median over all pairs): one outlier does not tilt it."""
    pairs = [(ys[j] - ys[i]) / (xs[j] - xs[i]) for i in range(len(xs)) for j in range(i + 1, len(xs)) if xs[i] != xs[j]]
    if not pairs:
        raise ValueError("a slope needs two points with different x")
    return statistics.median(pairs)


def interleave(measures: Mapping[str, Measure], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Run every measure once per round, in an order that rotates, and keep what came after the warm-up.

    Returns seconds by name; entry i of every list is from the same round.
    """
    names = list(measures)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = measures[name]()
            if turn >= warmup:
                found[name].append(seconds)
    return found


def median_of(measure: Measure, times: int) -> Measure:
    """``measure`` repeated back to back; its median. Warm caches and an awake core for either side of a pair."""
    return lambda: statistics.median(measure() for _ in range(times))
