"""Damaged and hostile deltas: each is refused, or does what an independent reader of FORMAT.md makes of it.

Deltas and targets lie against a page that may be neither read nor written, so that a step too far ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from headwater.errors import DeltaCorrupt, UsageError
from headwater.types import Span
from headwater.wire import delta

Array = npt.NDArray[np.uint8]
Fields = Iterable[tuple[int, int]]

HEADER = 48
SEEDS = range(8)
MUTANTS = 500


class Fenced:
    """Memory whose last byte lies before a page that the process may not touch."""

    def __init__(self, size: int) -> None:
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, pages + mmap.PAGESIZE)
        whole = np.frombuffer(self._map, np.uint8)
        nothing = 0  # PROT_NONE
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + pages), mmap.PAGESIZE, nothing) == 0
        self.bytes: Array = whole[pages - size : pages]

    def holding(self, data: bytes) -> Array:
        """``data`` at the very end of it."""
        found = self.bytes[self.bytes.size - len(data) :]
        found[:] = np.frombuffer(data, np.uint8)
        return found


def sealed(data: bytes) -> bytes:
    """The delta with the checksum that its bytes have."""
    return data[:8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[16:])) + data[16:]


def by_hand(fields: Fields, length: int = 64, spans: Iterable[Span] = (Span(0, 64, 2),), changed: int = 0) -> bytes:
    """A delta whose stream is the ``(value, bits)`` of ``fields``."""
    stream = at = 0
    for value, bits in fields:
        stream |= value << at
        at += bits
    spans = list(spans)
    head = struct.pack("<4sIQQQQII", b"HWDL", 1, 0, length, at, changed, len(spans), 0)
    body = b"".join(struct.pack("<QQQ", *span) for span in spans) + stream.to_bytes(8 * (-(-at // 64) + 1), "little")
    return sealed(head + body)


def read_slowly(data: bytes, target: Array) -> None:
    """FORMAT.md's section on deltas, read once more, with Python's integers."""
    _, _, _, _, _, _, count, _ = struct.unpack_from("<4sIQQQQII", data)
    bits, at = int.from_bytes(data[HEADER + 24 * count :], "little"), 0

    def take(size: int) -> int:
        nonlocal at
        at += size
        return bits >> (at - size) & ((1 << size) - 1)

    def put(words: npt.NDArray[np.unsignedinteger], i: int, width: int) -> None:
        old, size = int(words[i]), 1 << width
        step = (take(width) - old) % size
        words[i] = (old + (step - size if step >= size // 2 else step)) % (1 << 8 * words.itemsize)

    for i in range(count):
        start, stop, word = struct.unpack_from("<QQQ", data, HEADER + 24 * i)
        words = target[start:stop].view(np.uint16 if word == 2 else np.uint32)
        for first in range(0, words.size, 32768 // word):
            block = words[first : first + 32768 // word]
            while mode := take(2):
                parameter = take(4) if mode == 1 else 0
                width = take(5) + 1
                place = -1
                for j in range(take(14) + 1 if mode == 1 else block.size):
                    if mode == 1:
                        quotient = 0
                        while not take(1):
                            quotient += 1
                        place += 1 + (quotient << parameter) + take(parameter)
                    put(block, place if mode == 1 else j, width)


def honest(seed: int) -> tuple[Array, Array, bytes]:
    """Two versions with little and much change, and the delta between them."""
    rng = np.random.default_rng(seed)
    spans = [Span(0, 40000, 2), Span(40064, 40064 + 4 * 9001, 4), Span(80000, 80000, 2)]
    old = rng.integers(0, 256, 80000, dtype=np.uint8)
    new = old.copy()
    for start, stop, word in spans:
        words = new[start:stop].view(np.uint16 if word == 2 else np.uint32)
        changed = rng.random(words.size) < rng.choice([0.001, 0.02, 0.6, 1])
        words[changed] += rng.integers(1, 5, words.size)[changed].astype(words.dtype)
        words[rng.random(words.size) < 0.002] += words.dtype.type(30000)
    made = delta.encode(old, new, spans, most=9.0)
    assert made is not None
    return old, new, made


@pytest.mark.parametrize("seed", SEEDS)
def test_an_independent_reader_agrees(seed: int) -> None:
    old, new, made = honest(seed)
    read_slowly(made, old)
    assert np.array_equal(old, new)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The delta with some bits flipped or bytes replaced, mostly where its structure is, sealed again."""
    bad = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        low, high = [(16, len(bad)), (HEADER + 72, min(len(bad), HEADER + 72 + 64)), (16, HEADER + 72)][rng.integers(3)]
        where = rng.integers(low, high)
        bad[where] = bad[where] ^ (1 << rng.integers(8)) if rng.integers(2) else rng.integers(256)
    return sealed(bytes(bad))


@pytest.mark.parametrize("seed", SEEDS)
def test_mutants_are_refused_or_mean_what_they_say(seed: int) -> None:
    """The checksum is right again, so that the structure has to stand for itself."""
    rng = np.random.default_rng(seed)
    old, _, made = honest(seed)
    room, target = Fenced(len(made)), Fenced(old.size).bytes
    refused = 0
    for turn in range(MUTANTS):
        bad = mutated(made, rng)
        target[:] = old
        try:
            applied = delta.apply(target, room.holding(bad))
        except DeltaCorrupt:
            refused += 1
            assert np.array_equal(target, old), "refused, and yet something was written"
            continue
        written = np.zeros(old.size, bool)
        for start, stop in applied.ranges:
            written[start:stop] = True
        assert np.array_equal(target[~written], old[~written])
        if turn % 50 == 0:
            again = old.copy()
            read_slowly(bad, again)
            assert np.array_equal(target, again)
    assert refused > MUTANTS // 20


@pytest.mark.parametrize("seed", SEEDS)
def test_a_delta_cut_short_is_refused(seed: int) -> None:
    """At any byte; and with a header that admits to the cut, at any word."""
    _, _, made = honest(seed)
    room = Fenced(len(made))
    for size in {*range(200), *range(200, len(made), 997)}:
        with pytest.raises(DeltaCorrupt):
            delta.inspect(room.holding(made[:size]))
    for words in range(1, (len(made) - HEADER - 72) // 8, 37):
        bits = 64 * (words - 1)
        cut = bytearray(made[: HEADER + 72 + 8 * words])
        struct.pack_into("<Q", cut, 24, bits)
        with pytest.raises(DeltaCorrupt, match="beyond its end"):
            delta.inspect(room.holding(sealed(bytes(cut))))


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_refused_or_harmless(seed: int) -> None:
    rng = np.random.default_rng(seed)
    target = Fenced(2**17).bytes
    room = Fenced(2**14)
    for _ in range(MUTANTS):
        words = int(rng.integers(2, 400))
        noise = int.from_bytes(rng.bytes(8 * words), "little")
        noise |= int(rng.integers(1, 3))  # the first block has a run
        bits = 64 * words - int(rng.integers(0, 64))
        data = by_hand(
            [(noise & ((1 << bits) - 1), bits)], target.size, [Span(0, target.size, int(rng.choice([2, 4])))]
        )
        before = target.copy()
        try:
            delta.apply(target, room.holding(data))
        except DeltaCorrupt:
            assert np.array_equal(target, before)


SPARSE, FULL, END = (1, 2), (2, 2), (0, 2)


def sparse(parameter: int, width: int, count: int) -> list[tuple[int, int]]:
    return [SPARSE, (parameter, 4), (width - 1, 5), (count - 1, 14)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([(3, 2), (0, 60)], "unknown kind"),
        ([FULL, (16, 5), (0, 32 * 17), END], "wider than a word"),
        ([*sparse(0, 17, 1), (1, 1), (0, 17), END], "wider than a word"),
        ([*sparse(0, 16, 33), (0, 500), END], "index beyond its block"),
        ([*sparse(14, 2, 1), (0, 500), END], "index beyond its block"),
        ([*sparse(0, 2, 1), (1 << 32, 33), (0, 2), END], "index beyond its block"),
        ([*sparse(5, 2, 1), (2, 2), (0, 5), (0, 2), END], "index beyond its block"),
        ([*sparse(0, 2, 2), (1 << 31, 32), (0, 2), (1, 1), (0, 2), END], "index beyond its block"),
        ([*sparse(0, 2, 1), (0, 400)], "index beyond its block"),
        ([*sparse(0, 2, 1), (1, 1), (0, 1)], "beyond its end"),
        ([*sparse(0, 2, 1), (1, 1), (0, 2)], "beyond its end"),
        ([*sparse(0, 2, 2), (1, 1), (0, 2), END], "index beyond its block"),
        ([FULL, (15, 5), (0, 32 * 16)], "beyond its end"),
        ([FULL, (15, 5), (0, 31 * 16)], "beyond its end"),
        ([SPARSE], "beyond its end"),
        ([], "beyond its end"),
        ([END, END], "end at bit 2 of 4"),
    ],
)
def test_each_rule_of_a_stream(fields: Fields, reason: str) -> None:
    data = by_hand(fields)
    target = np.arange(64, dtype=np.uint8)
    with pytest.raises(DeltaCorrupt, match=reason):
        delta.apply(target, Fenced(len(data)).holding(data))
    assert np.array_equal(target, np.arange(64))


def test_a_run_by_hand() -> None:
    """The third and the last word end in binary 11 and 00: the nearest such words to 0 and to 5."""
    data = by_hand([*sparse(1, 2, 2), (1 << 1, 2), (0, 1), (3, 2), (1 << 14, 15), (0, 1), (0, 2), END])
    target = np.zeros(64, np.uint8)
    target[62] = 5
    applied = delta.apply(target, data)
    assert target.view(np.uint16)[[2, 31]].tolist() == [0xFFFF, 4]
    assert applied.ranges == ((0, 64),)


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([Span(0, 64, 8)], 64),
        ([Span(0, 64, 0)], 64),
        ([Span(0, 128, 2)], 64),
        ([Span(64, 0, 2)], 64),
        ([Span(4, 64, 2)], 64),
        ([Span(0, 62, 4)], 64),
        ([Span(0, 64, 2), Span(32, 64, 2)], 64),
        ([Span(0, 2**63, 2)], 2**63),
        ([Span(2**63, 2**64 - 2, 2)], 2**64 - 1),
    ],
)
def test_each_rule_of_spans(spans: list[Span], length: int) -> None:
    with pytest.raises(DeltaCorrupt):
        delta.inspect(by_hand([END], length, spans))


def with_header(offset: int, form: str, value: int) -> bytes:
    data = bytearray(by_hand([END]))
    struct.pack_into("<" + form, data, offset, value)
    return sealed(bytes(data))


@pytest.mark.parametrize(
    ("offset", "form", "value", "reason"),
    [
        (0, "I", 0, "does not begin"),
        (4, "I", 2, "version 2"),
        (24, "Q", 2**64 - 1, "not what its header says"),
        (24, "Q", 65, "not what its header says"),
        (32, "Q", 33, "more changes than words"),
        (40, "I", 2**32 - 1, "not what its header says"),
        (44, "I", 1, "does not begin"),
    ],
)
def test_each_rule_of_a_header(offset: int, form: str, value: int, reason: str) -> None:
    with pytest.raises(DeltaCorrupt, match=reason):
        delta.inspect(with_header(offset, form, value))


def test_a_flipped_bit_anywhere_is_seen() -> None:
    _, _, made = honest(0)
    for where in range(0, len(made), 131):
        bad = bytearray(made)
        bad[where] ^= 4
        with pytest.raises(DeltaCorrupt):
            delta.inspect(bytes(bad))


def test_a_part_of_another_size_is_refused() -> None:
    _, _, made = honest(0)
    with pytest.raises(DeltaCorrupt, match="80000 bytes and this one has 64"):
        delta.apply(np.zeros(64, np.uint8), made)


def test_a_delta_may_lie_at_any_address() -> None:
    old, new, made = honest(1)
    delta.apply(old, memoryview(b"x" + made)[1:])
    assert np.array_equal(old, new)


def test_a_target_that_cannot_be_used_is_the_callers_fault() -> None:
    _, _, made = honest(0)
    frozen = np.zeros(80000, np.uint8)
    frozen.flags.writeable = False
    for target in (frozen, np.zeros(80001, np.uint8)[1:], np.zeros(10000, np.int64), np.zeros((2, 40000), np.uint8)):
        with pytest.raises(UsageError):
            delta.apply(target, made)  # type: ignore[arg-type]
