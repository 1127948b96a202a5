"""Deltas: what is applied is what was encoded, once, twice, or over a mixture; and nothing else is applied."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import UsageError
from headwater.types import Span
from headwater.wire import delta

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


@pytest.mark.parametrize(
    ("share", "bits"),
    # For each changed word: the entropy of its place, H(p)/p, two bits for its value, heads of runs, and some slack.
    [(0.001, 16), (0.01, 11.1), (0.1, 7.4), (0.5, 4.4), (1.0, 2.2)],
)
def test_small_changes_take_little(share: float, bits: float) -> None:
    """Words that moved one place, and one in a thousand of them far away."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 2**16, 2**20, dtype=np.uint16)
    new = old.copy()
    changed = rng.random(old.size) < share
    new[changed] += rng.choice(np.array([1, 2**16 - 1], np.uint16), int(changed.sum()))
    far = changed & (rng.random(old.size) < 0.001)
    new[far] ^= np.uint16(0x4000)
    made = delta.encode(part(old), part(new), [Span(0, 2 * old.size, 2)], most=LARGE)
    assert made is not None
    assert 8 * len(made) / np.count_nonzero(old != new) < bits


def test_changes_in_a_few_rows_take_little() -> None:
    """As in an embedding: two rows of 576 words in each block of 16,384."""
    old = np.zeros(2**20, np.uint16)
    new = old.copy()
    for start in range(0, old.size, 8192):
        new[start : start + 576] += 1
    made = delta.encode(part(old), part(new), [Span(0, 2 * old.size, 2)], most=LARGE)
    assert made is not None
    assert 8 * len(made) / np.count_nonzero(new) < 7


def test_what_a_float_means_does_not_matter() -> None:
    """Negative zero, infinities and NaNs with payloads, signalling ones too, arrive as they were."""
    old = np.array([0.0, -0.0, 1.0, np.inf, np.nan, 0.0, 1.5, -1.0], np.float32)
    new = old.copy()
    new.view(np.uint32)[:] = [0x80000000, 0, 0x7FC00001, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 1, 0x7FFFFFFF]
    made = delta.encode(old.view(np.uint8), new.view(np.uint8), [Span(0, 32, 4)], most=LARGE)
    assert made is not None
    delta.apply(old.view(np.uint8), made)
    assert old.view(np.uint32).tolist() == new.view(np.uint32).tolist()


def test_a_sample_says_early_that_all_changed() -> None:
    """16 MB of noise are given up after a sixteenth of them: the rest is not looked at."""
    old = np.zeros(2**25, np.uint8)
    new = old.copy()
    new[::2] = 255
    spans = [Span(0, old.size, 2)]
    room = delta._Room(delta._kernels(), 8 * old.size)
    assert delta._hopeless(room, old, new, spans, most=0.1)
    assert not delta._hopeless(room, old, old, spans, most=0.1)
    assert delta.encode(old, new, spans, most=0.1) is None


def test_a_slow_link_bears_a_larger_delta() -> None:
    assert 0 < delta.worth(1e12) < delta.DENSE < delta.worth(1e8) < 1
    assert delta.worth(2.7e9) == delta.DENSE


def test_the_loops_do_not_hold_the_interpreter() -> None:
    delta.warm()
    kernels = delta._kernels()
    for loop in (kernels.encode, kernels.check, kernels.apply):
        assert loop.targetoptions["nogil"]
        assert loop.nopython_signatures
