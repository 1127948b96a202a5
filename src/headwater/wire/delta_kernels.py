"""The compiled loops of ``delta.py``: the one file that imports Numba. Import it late; the first import compiles.

All of them release the GIL, allocate nothing, and are compiled for the processor at hand when this module is first
imported; Numba keeps the machine code beside the module (or in the user's cache folder), so later processes only load it.

Bits are numbered from the lowest bit of the lowest word: bit ``at`` is bit ``at % 64`` of the 64-bit word ``at // 64``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

BLOCK = 32768
"""Bytes of a part that are indexed together. They fit the first cache beside their older version."""

EMPTY, SPARSE, FULL = 0, 1, 2
"""What a run is: none (the block ends), some words by their gaps, all words of the block."""

MODE_BITS, RICE_BITS, WIDTH_BITS, COUNT_BITS = 2, 4, 5, 14
FULL_HEAD = MODE_BITS + WIDTH_BITS
SPARSE_HEAD = FULL_HEAD + RICE_BITS + COUNT_BITS

OVERREAD, BAD_MODE, BAD_WIDTH, BAD_INDEX = -1, -2, -3, -4
"""What ``check`` finds wrong."""

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(*signatures: Any) -> Callable[[F], F]:
    """``numba.njit`` for these signatures at once, without the GIL, kept on disk where a folder can be written."""

    def decorate(function: F) -> F:
        options = {"nogil": True, "error_model": "numpy"}
        try:
            return cast(F, numba.njit(list(signatures) or None, cache=True, **options)(function))
        except RuntimeError:  # no folder to keep machine code in: every process compiles anew
            return cast(F, numba.njit(list(signatures) or None, **options)(function))

    return decorate


def _counter(name: str) -> Any:
    """A Numba intrinsic for LLVM's ``ctlz`` or ``cttz``: zero bits at one end of a uint64, 64 for zero; int64."""

    @intrinsic  # type: ignore[untyped-decorator]
    def count(context: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(arguments[0], ir.Constant(ir.IntType(1), 0))  # 0: zero is allowed

        return types.int64(types.uint64), build

    return count


_zeros_above = _counter("ctlz")
_zeros_below = _counter("cttz")


@_compiled()
def _put(out: Any, at: int, value: Any, bits: int) -> int:
    """Write ``value`` < 2**bits at bit ``at``; what is above it in the stream becomes zero. The next bit."""
    i = at >> 6
    shift = np.uint64(at & 63)
    out[i] |= value << shift
    out[i + 1] = (value >> np.uint64(1)) >> (np.uint64(63) - shift)
    return at + bits


@_compiled()
def _peek(stream: Any, at: int) -> Any:
    """The 64 bits from bit ``at`` on."""
    i = at >> 6
    shift = np.uint64(at & 63)
    return (stream[i] >> shift) | ((stream[i + 1] << np.uint64(1)) << (np.uint64(63) - shift))


@_compiled()
def _mask(bits: int) -> Any:
    """The lowest ``bits`` (0 to 63) bits set."""
    return (np.uint64(1) << np.uint64(bits)) - np.uint64(1)


@_compiled()
def _find(old: Any, new: Any, old8: Any, new8: Any, first: int, count: int, where: Any) -> int:
    """Fill ``where`` with the changed ones of ``count`` words from ``first`` on, counted from there; how many."""
    bits = 8 * old.itemsize
    lanes = 64 // bits
    lane = _mask(bits)
    found = 0
    groups = count // (8 * lanes)
    start = first // lanes
    for group in range(groups):
        i = start + 8 * group
        if (
            (
                (old8[i] ^ new8[i])
                | (old8[i + 1] ^ new8[i + 1])
                | (old8[i + 2] ^ new8[i + 2])
                | (old8[i + 3] ^ new8[i + 3])
            )
            | (old8[i + 4] ^ new8[i + 4])
            | (old8[i + 5] ^ new8[i + 5])
            | (old8[i + 6] ^ new8[i + 6])
            | (old8[i + 7] ^ new8[i + 7])
        ) == 0:
            continue
        for j in range(8):
            different = old8[i + j] ^ new8[i + j]
            while different != 0:
                which = _zeros_below(different) // bits
                where[found] = (8 * group + j) * lanes + which
                found += 1
                different &= ~(lane << np.uint64(which * bits))
    for word in range(groups * 8 * lanes, count):
        if old[first + word] != new[first + word]:
            where[found] = word
            found += 1
    return found


@_compiled()
def _widths(old: Any, new: Any, first: int, where: Any, found: int, widths: Any, tally: Any) -> None:
    """How many bits each changed word needs (see ``delta.py``) into ``widths``, and how many need so many."""
    sign = np.uint64(1) << np.uint64(8 * old.itemsize - 1)
    tally[:] = 0
    for i in range(found):
        word = first + where[i]
        step = (np.uint64(new[word]) - np.uint64(old[word])) & (sign | (sign - np.uint64(1)))
        step = (step ^ sign) - sign
        width = 65 - _zeros_above(step ^ (np.uint64(0) - (step >> np.uint64(63))))
        widths[i] = width
        tally[width] += 1


@_compiled()
def _index_cost(found: int, count: int) -> float:
    """About how many bits it takes to say which ``found`` of ``count`` words changed, with the run's head."""
    if found == 0:
        return 0.0
    return SPARSE_HEAD + min(float(count), found * (1.6 + math.log2(count / found)))


@_compiled()
def _plan(tally: Any, found: int, count: int) -> tuple[int, int, int]:
    """(bits of the many, bits of the few that need more, whether the many are all words)."""
    top = 1
    for width in range(1, tally.size):
        if tally[width]:
            top = width
    best, chosen, full = 1e18, top, 0
    within = 0
    for width in range(1, top + 1):
        within += tally[width]
        if within == 0:
            continue
        few = found - within
        rest = few * top + _index_cost(few, count)
        sparse = within * width + _index_cost(within, count) + rest
        if sparse < best:
            best, chosen, full = sparse, width, 0
        if FULL_HEAD + count * width + rest < best:
            best, chosen, full = FULL_HEAD + count * width + rest, width, 1
    return chosen, top, full


@_compiled()
def _rice(where: Any, found: int) -> int:
    """The Rice parameter for the gaps of ``where``: the best of three about the one that their mean suggests."""
    free = where[found - 1] + 1 - found
    middle = 64 - _zeros_above(np.uint64(free * 0.69 / found))
    best, chosen = 1 << 60, 0
    for parameter in range(max(0, middle - 1), min(13, middle + 1) + 1):
        cost = found * (1 + parameter)
        before = -1
        for i in range(found):
            cost += (where[i] - before - 1) >> parameter
            before = where[i]
        if cost < best:
            best, chosen = cost, parameter
    return chosen


@_compiled()
def _put_sparse(out: Any, at: int, new: Any, first: int, where: Any, found: int, width: int) -> int:
    """One run of the words ``where``: head, values, gaps."""
    parameter = _rice(where, found)
    head = (
        SPARSE | parameter << MODE_BITS | (width - 1) << (MODE_BITS + RICE_BITS) | (found - 1) << FULL_HEAD + RICE_BITS
    )
    at = _put(out, at, np.uint64(head), SPARSE_HEAD)
    mask = _mask(width)
    for i in range(found):
        at = _put(out, at, np.uint64(new[first + where[i]]) & mask, width)
    low = _mask(parameter)
    before = -1
    for i in range(found):
        gap = where[i] - before - 1
        before = where[i]
        quotient = gap >> parameter
        while quotient >= 32:
            at = _put(out, at, np.uint64(0), 32)
            quotient -= 32
        code = ((np.uint64(gap) & low) << np.uint64(1) | np.uint64(1)) << np.uint64(quotient)
        at = _put(out, at, code, quotient + 1 + parameter)
    return at


@_compiled()
def _put_full(out: Any, at: int, new: Any, first: int, count: int, width: int) -> int:
    """One run of all ``count`` words."""
    at = _put(out, at, np.uint64(FULL | (width - 1) << MODE_BITS), FULL_HEAD)
    mask = _mask(width)
    for i in range(count):
        at = _put(out, at, np.uint64(new[first + i]) & mask, width)
    return at


@_compiled()
def _select(where: Any, widths: Any, found: int, low: int, high: int, chosen: Any) -> int:
    """Those of ``where`` that need more than ``low`` and at most ``high`` bits into ``chosen``; how many."""
    kept = 0
    for i in range(found):
        chosen[kept] = where[i]
        kept += low < widths[i] <= high
    return kept


def _read(kind: Any) -> Any:
    return types.Array(kind, 1, "C", readonly=True)


_OUT = types.Array(types.uint64, 1, "C")
_NUMBERS = types.Array(types.int32, 1, "C")
_FLAGS = types.Array(types.uint8, 1, "C")
_LONG = _read(types.uint64)
_PAIR = types.UniTuple(types.int64, 2)
_KINDS = (types.uint16, types.uint32)


@_compiled(
    *(
        _PAIR(_read(kind), _read(kind), _LONG, _LONG, _OUT, types.int64, types.int64, types.Array(types.int32, 2, "C"))
        for kind in _KINDS
    )
)
def encode(old: Any, new: Any, old8: Any, new8: Any, out: Any, at: int, limit: int, scratch: Any) -> tuple[int, int]:
    """Write the blocks of one span from bit ``at`` of ``out`` on.

    ``old``, ``new``: the span's words; ``old8``, ``new8``: the same memory as uint64, as far as it goes. ``out`` has room
    for ``limit`` bits and four blocks more. ``scratch``: int32, 4 rows of a block's number of words.

    Returns the next bit, or -1 as soon as it lies beyond ``limit``; and the number of changed words.
    """
    where, widths, chosen, tally = scratch[0], scratch[1], scratch[2], scratch[3, :33]
    words = BLOCK // old.itemsize
    changed = 0
    for first in range(0, old.size, words):
        count = min(words, old.size - first)
        found = _find(old, new, old8, new8, first, count, where)
        if found:
            changed += found
            _widths(old, new, first, where, found, widths, tally)
            width, top, full = _plan(tally, found, count)
            few = _select(where, widths, found, width, 64, chosen)
            if few:
                at = _put_sparse(out, at, new, first, chosen, few, top)
            if full:
                at = _put_full(out, at, new, first, count, width)
            elif few:
                many = _select(where, widths, found, 0, width, chosen)
                at = _put_sparse(out, at, new, first, chosen, many, width)
            else:
                at = _put_sparse(out, at, new, first, where, found, width)
        at = _put(out, at, np.uint64(EMPTY), MODE_BITS)
        if at > limit:
            return -1, changed
    return at, changed


@_compiled()
def _check_gaps(stream: Any, at: int, bits: int, found: int, parameter: int, count: int) -> int:
    """The bit after ``found`` gaps, or what is wrong with them."""
    word = -1
    for _ in range(found):
        quotient = 0
        while True:
            if at >= bits:
                return OVERREAD
            zeros = _zeros_below(_peek(stream, at))
            quotient += zeros
            at += zeros
            if zeros < 64:
                break
            if quotient > count:
                return BAD_INDEX
        at += 1
        if at + parameter >= bits:  # a run is never the last thing in a stream
            return OVERREAD
        word += 1 + (quotient << parameter) + np.int64(_peek(stream, at) & _mask(parameter))
        at += parameter
        if word >= count:
            return BAD_INDEX
    return at


@_compiled()
def _check_run(stream: Any, at: int, bits: int, count: int, width_bits: int) -> int:
    """The bit after the run whose mode lies at ``at`` and is not EMPTY, or what is wrong with it."""
    head = np.int64(_peek(stream, at) & _mask(SPARSE_HEAD))
    mode = head & 3
    if mode == FULL:
        width = 1 + (head >> MODE_BITS & 31)
        at += FULL_HEAD + count * width
        return BAD_WIDTH if width > width_bits else OVERREAD if at >= bits else at
    if mode != SPARSE:
        return BAD_MODE
    parameter = head >> MODE_BITS & 15
    width = 1 + (head >> (MODE_BITS + RICE_BITS) & 31)
    found = 1 + (head >> (FULL_HEAD + RICE_BITS))
    if width > width_bits:
        return BAD_WIDTH
    if parameter >= COUNT_BITS or found > count:
        return BAD_INDEX
    at += SPARSE_HEAD + found * width
    return _check_gaps(stream, at, bits, found, parameter, count) if at < bits else OVERREAD


@_compiled(types.int64(_LONG, types.int64, types.int64, types.int64, types.int64))
def check(stream: Any, at: int, bits: int, words: int, itemsize: int) -> int:
    """Read the blocks of a span of ``words`` words of ``itemsize`` bytes without a target.

    ``stream`` has one word more than ``bits`` bits need. Returns the bit after the span, or a negative number that
    says what is wrong. Reads only within ``stream``, whatever it holds, and takes time in proportion to it.
    """
    block = BLOCK // itemsize
    for first in range(0, words, block):
        count = min(block, words - first)
        while True:
            if at + MODE_BITS > bits:
                return OVERREAD
            if _peek(stream, at) & np.uint64(3) == 0:
                break
            at = _check_run(stream, at, bits, count, 8 * itemsize)
            if at < 0:
                return at
        at += MODE_BITS
    return at


@_compiled()
def _nearest(word: Any, value: Any, mask: Any, half: Any) -> Any:
    """Of all words that end in ``value``, the one nearest to ``word``."""
    step = (value - word) & mask
    return word + ((step ^ half) - half)


@_compiled()
def _apply_full(target: Any, first: int, count: int, stream: Any, at: int, width: int) -> int:
    mask, half = _mask(width), np.uint64(1) << np.uint64(width - 1)
    for word in range(first, first + count):
        target[word] = _nearest(np.uint64(target[word]), _peek(stream, at) & mask, mask, half)
        at += width
    return at


@_compiled()
def _apply_sparse(target: Any, first: int, stream: Any, at: int, width: int, parameter: int, found: int) -> int:
    mask, half, low = _mask(width), np.uint64(1) << np.uint64(width - 1), _mask(parameter)
    value = at
    at += found * width
    word = first - 1
    for _ in range(found):
        quotient = 0
        zeros = _zeros_below(_peek(stream, at))
        while zeros == 64:
            quotient += 64
            at += 64
            zeros = _zeros_below(_peek(stream, at))
        at += zeros + 1
        word += 1 + ((quotient + zeros) << parameter) + np.int64(_peek(stream, at) & low)
        at += parameter
        target[word] = _nearest(np.uint64(target[word]), _peek(stream, value) & mask, mask, half)
        value += width
    return at


@_compiled(*(types.int64(types.Array(kind, 1, "C"), _LONG, types.int64, _FLAGS) for kind in _KINDS))
def apply(target: Any, stream: Any, at: int, touched: Any) -> int:
    """Apply the blocks of one span, which ``check`` has found sound, to its words; the bit after the span.

    ``touched``: one flag per block, set where the block has a run.
    """
    words = BLOCK // target.itemsize
    block = 0
    for first in range(0, target.size, words):
        count = min(words, target.size - first)
        while True:
            head = np.int64(_peek(stream, at) & _mask(SPARSE_HEAD))
            mode = head & 3
            if mode == EMPTY:
                break
            touched[block] = 1
            if mode == FULL:
                width = 1 + (head >> MODE_BITS & 31)
                at = _apply_full(target, first, count, stream, at + FULL_HEAD, width)
            else:
                width = 1 + (head >> (MODE_BITS + RICE_BITS) & 31)
                found = 1 + (head >> (FULL_HEAD + RICE_BITS))
                parameter = head >> MODE_BITS & 15
                at = _apply_sparse(target, first, stream, at + SPARSE_HEAD, width, parameter, found)
        at += MODE_BITS
        block += 1
    return at
