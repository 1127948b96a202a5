"""The compiled loops of ``delta.py``: the one file that imports Numba. Import it late; the first import compiles.

All of them release the GIL, allocate nothing, and are compiled for the processor at hand when this module is first
imported; Numba keeps the machine code beside the module (or in the user's cache folder), and later processes load it.

Bits are numbered from the lowest bit of the lowest word: bit ``at`` is bit ``at % 64`` of the 64-bit word ``at // 64``.
Indices of the inner loops are unsigned, because Numba gives signed ones Python's meaning below zero, at a price.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.extending import intrinsic

types: Any = numba.types

BLOCK = 32768
"""Bytes of a part that are indexed together. They fit the first cache beside their older version."""

GROUP = 32
"""Words that are compared at once."""

LONG = 16
"""Zeros that are written at once; fewer and a gap's rest and a value always fit 64 bits."""

EMPTY, SPARSE, FULL = 0, 1, 2
"""What a run is: none (the block ends), some words by their gaps, all words of the block."""

MODE_BITS, RICE_BITS, WIDTH_BITS, COUNT_BITS = 2, 4, 5, 14
FULL_HEAD = MODE_BITS + WIDTH_BITS
SPARSE_HEAD = FULL_HEAD + RICE_BITS + COUNT_BITS

OVERREAD, BAD_MODE, BAD_WIDTH, BAD_INDEX = -1, -2, -3, -4
"""What ``check`` finds wrong."""

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(*signatures: Any) -> Callable[[F], F]:
    """``numba.njit`` without the GIL: for these signatures at once and kept on disk, or as a part of those."""
    jit: Any = numba.njit
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

    def decorate(function: F) -> F:
        if not signatures:
            return cast(F, jit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function))
        try:
            return cast(F, jit(list(signatures), cache=True, **options)(function))
        except RuntimeError:  # no folder that can be written: every process compiles for itself
            return cast(F, jit(list(signatures), **options)(function))

    return decorate


def _intrinsic(function: Callable[..., Any]) -> Any:
    """Numba's ``intrinsic``: what the function returns is a signature and what builds its LLVM instructions."""
    return intrinsic(function)


def _counter(name: str) -> Any:
    """A Numba intrinsic for LLVM's ``ctlz`` or ``cttz``: zero bits at one end of a uint64, 64 for zero; int64."""

    @_intrinsic
    def count(context: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(arguments[0], ir.Constant(ir.IntType(1), 0))  # 0: zero is allowed

        return types.int64(types.uint64), build

    return count


_zeros_above = _counter("ctlz")
_zeros_below = _counter("cttz")


@_intrinsic
def _prefetch(context: Any, array: Any, i: Any) -> Any:
    """Ask for the cache line of ``array[i]``, which will be written soon."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        line = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [line.type], kind)
        builder.call(prefetch, [line, number(1), number(3), number(1)])  # to write, keep it near, data
        return context.get_dummy_value()

    return types.void(array, types.uint64), build


@_compiled()
def _put(out: Any, at: int, value: Any, bits: int) -> int:
    """Write ``value`` < 2**bits at bit ``at``; what is above it in the stream becomes zero. The next bit."""
    i = np.uint64(at) >> np.uint64(6)
    shift = np.uint64(at) & np.uint64(63)
    out[i] |= value << shift
    out[i + np.uint64(1)] = (value >> np.uint64(1)) >> (np.uint64(63) - shift)
    return at + bits


@_compiled()
def _peek(stream: Any, at: int) -> Any:
    """The 64 bits from bit ``at`` on."""
    i = np.uint64(at) >> np.uint64(6)
    shift = np.uint64(at) & np.uint64(63)
    return (stream[i] >> shift) | ((stream[i + np.uint64(1)] << np.uint64(1)) << (np.uint64(63) - shift))


@_compiled()
def _mask(bits: int) -> Any:
    """The lowest ``bits`` (0 to 63) bits set."""
    return (np.uint64(1) << np.uint64(bits)) - np.uint64(1)


@_intrinsic
def _differences(context: Any, old: Any, new: Any, first: Any) -> Any:
    """Bit i of the result is set where word ``first + i`` of the two arrays differs, i < GROUP; uint64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(context.get_data_type(signature.args[0].dtype), GROUP)
        words = []
        for array, value in zip(signature.args[:2], arguments[:2], strict=True):
            data = builder.gep(context.make_array(array)(context, builder, value).data, [arguments[2]])
            words.append(builder.load(builder.bitcast(data, kind.as_pointer()), align=array.dtype.bitwidth // 8))
        bits = builder.bitcast(builder.icmp_unsigned("!=", *words), ir.IntType(GROUP))
        return builder.zext(bits, ir.IntType(64))

    return types.uint64(old, new, types.int64), build


@_compiled()
def _find(old: Any, new: Any, first: int, count: int, where: Any) -> int:
    """Fill ``where`` with the changed ones of ``count`` words from ``first`` on, counted from there; how many."""
    found = 0
    whole = count // GROUP * GROUP
    for start in range(0, whole, GROUP):
        different = _differences(old, new, first + start)
        while different != 0:
            where[np.uint64(found)] = start + _zeros_below(different)
            found += 1
            different &= different - np.uint64(1)
    for word in range(whole, count):
        if old[first + word] != new[first + word]:
            where[found] = word
            found += 1
    return found


@_compiled()
def _widths(old: Any, new: Any, first: int, where: Any, found: int, widths: Any, tally: Any) -> None:
    """How many bits each changed word needs (see ``delta.py``) into ``widths``, and how many need so many."""
    sign = np.uint64(1) << np.uint64(8 * old.itemsize - 1)
    for i in range(found):
        word = np.uint64(first + where[i])
        step = (np.uint64(new[word]) - np.uint64(old[word])) & (sign | (sign - np.uint64(1)))
        step = (step ^ sign) - sign
        widths[i] = 65 - _zeros_above(step ^ (np.uint64(0) - (step >> np.uint64(63))))
    tally[:] = 0
    for i in range(found):  # four counters in turn: neighbours need the same width, and would wait for each other
        tally[np.uint64(i & 3), np.uint64(widths[i])] += 1
    tally[0] += tally[1] + tally[2] + tally[3]


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
    low: int = min(max(0, 63 - _zeros_above(np.uint64(free * 0.69 / found))), COUNT_BITS - 3)
    first = second = third = 0
    before = -1
    for i in range(found):
        gap = (where[i] - before - 1) >> low
        first += gap
        second += gap >> 1
        third += gap >> 2
        before = where[i]
    if first <= second + found:
        return low
    return low + 1 if second <= third + found else low + 2


@_compiled()
def _put_sparse(out: Any, at: int, new: Any, first: int, where: Any, found: int, width: int) -> int:
    """One run of the words ``where``: head, then gap and value of each."""
    parameter = _rice(where, found)
    head = SPARSE | parameter << MODE_BITS | (width - 1) << (MODE_BITS + RICE_BITS)
    at = _put(out, at, np.uint64(head | (found - 1) << (FULL_HEAD + RICE_BITS)), SPARSE_HEAD)
    mask, low = _mask(width), _mask(parameter)
    before = -1
    for i in range(found):
        gap = where[i] - before - 1
        before = where[i]
        quotient = gap >> parameter
        while quotient >= LONG:
            at = _put(out, at, np.uint64(0), LONG)
            quotient -= LONG
        value = np.uint64(new[np.uint64(first + where[i])]) & mask
        code = (value << np.uint64(parameter) | (np.uint64(gap) & low)) << np.uint64(1) | np.uint64(1)
        at = _put(out, at, code << np.uint64(quotient), quotient + 1 + parameter + width)
    return at


@_compiled()
def _put_full(out: Any, at: int, new: Any, first: int, count: int, width: int) -> int:
    """One run of all ``count`` words: head, then values, as many at a time as 64 bits hold words."""
    at = _put(out, at, np.uint64(FULL | (width - 1) << MODE_BITS), FULL_HEAD)
    mask = _mask(width)
    lanes = 8 // new.itemsize
    whole = count // lanes * lanes
    for i in range(first, first + whole, lanes):
        packed = np.uint64(0)
        for lane in range(lanes):
            packed |= (np.uint64(new[np.uint64(i + lane)]) & mask) << np.uint64(lane * width)
        at = _put(out, at, packed, lanes * width)
    for i in range(first + whole, first + count):
        at = _put(out, at, np.uint64(new[i]) & mask, width)
    return at


@_compiled()
def _select(where: Any, widths: Any, found: int, low: int, high: int, chosen: Any) -> int:
    """Those of ``where`` that need more than ``low`` and at most ``high`` bits into ``chosen``; how many."""
    kept = 0
    for i in range(found):
        chosen[np.uint64(kept)] = where[i]
        kept += low < widths[i] <= high
    return kept


def _read(kind: Any) -> Any:
    return types.Array(kind, 1, "C", readonly=True)


_OUT = types.Array(types.uint64, 1, "C")
_SCRATCH = types.Array(types.int32, 2, "C")
_FLAGS = types.Array(types.uint8, 1, "C")
_STREAM = _read(types.uint64)
_KINDS = (types.uint16, types.uint32)


@_compiled(
    *(
        types.Tuple((types.int64, types.int64))(_read(kind), _read(kind), _OUT, types.int64, types.int64, _SCRATCH)
        for kind in _KINDS
    )
)
def encode(old: Any, new: Any, out: Any, at: int, limit: int, scratch: Any) -> tuple[int, int]:
    """Write the blocks of one span from bit ``at`` of ``out`` on.

    ``old``, ``new``: the span's words. ``out`` has room for ``limit`` bits and four blocks more. ``scratch``: int32,
    4 rows of a block's number of words.

    Returns the next bit, or -1 as soon as it lies beyond ``limit``; and the number of changed words.
    """
    where, widths, chosen, tally = scratch[0], scratch[1], scratch[2], scratch[3, :132].reshape(4, 33)
    words = BLOCK // old.itemsize
    changed = 0
    for first in range(0, old.size, words):
        count = min(words, old.size - first)
        found = _find(old, new, first, count, where)
        if found:
            changed += found
            _widths(old, new, first, where, found, widths, tally)
            width, top, full = _plan(tally[0], found, count)
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
def _check_words(stream: Any, at: int, bits: int, found: int, parameter: int, width: int, count: int) -> int:
    """The bit after ``found`` gaps and values, or what is wrong with them."""
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
        at += 1 + parameter + width
        if at >= bits:  # a run is never the last thing in a stream
            return OVERREAD
        rest: Any = np.int64(_peek(stream, at - parameter - width) & _mask(parameter))
        word += 1 + (quotient << parameter) + rest
        if word >= count:
            return BAD_INDEX
    return at


@_compiled()
def _check_run(stream: Any, at: int, bits: int, count: int, width_bits: int) -> int:
    """The bit after the run whose mode lies at ``at`` and is not EMPTY, or what is wrong with it."""
    head: Any = np.int64(_peek(stream, at) & _mask(SPARSE_HEAD))
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
    return _check_words(stream, at + SPARSE_HEAD, bits, found, parameter, width, count)


@_compiled(types.int64(_STREAM, types.int64, types.int64, types.int64, types.int64))
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
    """Apply a run of all words of a block; the bit after it."""
    mask, half = _mask(width), np.uint64(1) << np.uint64(width - 1)
    lanes = 8 // target.itemsize
    whole = count // lanes * lanes
    for i in range(first, first + whole, lanes):
        packed = _peek(stream, at)
        for lane in range(lanes):
            word = np.uint64(i + lane)
            value = (packed >> np.uint64(lane * width)) & mask
            target[word] = _nearest(np.uint64(target[word]), value, mask, half)
        at += lanes * width
    for i in range(first + whole, first + count):
        target[i] = _nearest(np.uint64(target[i]), _peek(stream, at) & mask, mask, half)
        at += width
    return at


@_compiled()
def _apply_sparse(
    target: Any, first: int, stream: Any, at: int, width: int, parameter: int, found: int, scratch: Any
) -> int:
    """Apply a run of ``found`` words of a block; the bit after it."""
    mask, half, low = _mask(width), np.uint64(1) << np.uint64(width - 1), _mask(parameter)
    word = first - 1
    for i in range(found):
        quotient = 0
        window = _peek(stream, at)
        while window == 0:
            quotient += 64
            at += 64
            window = _peek(stream, at)
        zeros = _zeros_below(window)
        at += zeros + 1 + parameter + width
        if zeros + 1 + parameter + width <= 64:
            window = (window >> np.uint64(zeros)) >> np.uint64(1)
        else:
            window = _peek(stream, at - parameter - width)
        rest: Any = np.int64(window & low)
        word += 1 + ((quotient + zeros) << parameter) + rest
        # Memory is asked for now and written in a second loop: at one change in a hundred its latency is all there is.
        _prefetch(target, np.uint64(word))
        scratch[0, i] = np.uint64(word)
        scratch[1, i] = (window >> np.uint64(parameter)) & mask
    for i in range(found):
        place = scratch[0, i]
        target[place] = _nearest(np.uint64(target[place]), scratch[1, i], mask, half)
    return at


_TARGETS = [types.Array(kind, 1, "C") for kind in _KINDS]


@_compiled(*(types.int64(kind, _STREAM, types.int64, _FLAGS, types.Array(types.uint64, 2, "C")) for kind in _TARGETS))
def apply(target: Any, stream: Any, at: int, touched: Any, scratch: Any) -> int:
    """Apply the blocks of one span, which ``check`` has found sound, to its words; the bit after the span.

    ``touched``: one flag per block, set where the block has a run. ``scratch``: uint64, 2 rows of a block's number of
    words.
    """
    words = BLOCK // target.itemsize
    for block in range(touched.size):
        first = block * words
        count = min(words, target.size - first)
        while True:
            head: Any = np.int64(_peek(stream, at) & _mask(SPARSE_HEAD))
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
                at = _apply_sparse(target, first, stream, at + SPARSE_HEAD, width, parameter, found, scratch)
        at += MODE_BITS
    return at
