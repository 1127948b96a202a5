"""Deltas: what is applied is what was encoded, once, twice, or over a mixture; and nothing else is applied."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import UsageError
from headwater.wire import delta
from headwater.wire.delta import Span

Array = npt.NDArray[np.uint8]
LARGE = 9.0
"""A bound that no delta reaches."""


def part(words: npt.NDArray[np.unsignedinteger]) -> Array:
    return words.view(np.uint8)


@st.composite
def versions(draw: st.DrawFn) -> tuple[Array, Array, list[Span]]:
    """Two versions of a part whose words moved little, far or not at all, with gaps between its spans."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spans, end = [], 0
    for _ in range(draw(st.integers(0, 3))):
        start = end + 8 * draw(st.integers(0, 9))
        word = draw(st.sampled_from([2, 4]))
        end = start + word * draw(st.sampled_from([0, 1, 3, 31, 32, 33, 1000, 8192, 16384, 20001]))
        spans.append(Span(start, end, word))
        end = -(-end // 8) * 8
    old = rng.integers(0, 256, end, dtype=np.uint8)
    new = old.copy()
    for start, stop, word in spans:
        words = new[start:stop].view(np.uint16 if word == 2 else np.uint32)
        changed = rng.random(words.size) < draw(st.sampled_from([0, 0.001, 0.01, 0.1, 0.5, 0.99, 1]))
        near = rng.integers(-3, 4, words.size)
        far = rng.integers(0, 2**32, words.size)
        step = np.where(rng.random(words.size) < draw(st.sampled_from([0, 0.01, 0.3, 1])), far, near)
        words[changed] += step[changed].astype(words.dtype)
    return old, new, spans


@settings(deadline=None, max_examples=150)
@given(versions(), st.integers(0, 2**32))
def test_what_is_applied_is_what_was_encoded(given: tuple[Array, Array, list[Span]], seed: int) -> None:
    old, new, spans = given
    made = delta.encode(old, new, spans, most=LARGE)
    assert made is not None
    stats = delta.inspect(made)
    assert (stats.length, stats.nbytes) == (old.size, len(made))
    target = old.copy()
    applied = delta.apply(target, made)
    assert np.array_equal(target, new)
    assert applied.changed == stats.changed
    written = np.zeros(old.size, bool)
    for start, stop in applied.ranges:
        written[start:stop] = True
    assert not (old != new)[~written].any()
    assert delta.apply(target, made) == applied
    assert np.array_equal(target, new), "applied twice"
    torn = old.copy()
    for start, stop, word in spans:
        kind = np.uint16 if word == 2 else np.uint32
        some = np.random.default_rng(seed).random((stop - start) // word) < 0.5
        torn[start:stop].view(kind)[some] = new[start:stop].view(kind)[some]
    delta.apply(torn, made)
    assert np.array_equal(torn, new), "over a mixture of both versions"


def test_too_much_change_is_not_worth_a_delta() -> None:
    old = np.zeros(2**20, np.uint8)
    new = np.random.default_rng(0).integers(0, 256, old.size, dtype=np.uint8)
    assert delta.encode(old, new, [Span(0, old.size, 2)], most=0.5) is None


@pytest.mark.parametrize("spans", [[Span(0, 64, 8)], [Span(0, 72, 2)], [Span(4, 64, 2)], [Span(0, 7, 2)]])
def test_wrong_spans_are_the_callers_fault(spans: list[Span]) -> None:
    old = np.zeros(64, np.uint8)
    with pytest.raises(UsageError):
        delta.encode(old, old, spans)
