"""What changed between two versions of a part: encode, check, apply. Pure: bytes in, bytes out.

A **part** is a run of raw bytes, such as a shard's values. Its **spans** are the stretches that hold words of 2 bytes
(bfloat16, float16, int16) or of 4 (everything else). A delta holds the words that differ, as bits: -0.0, infinities
and the payloads of NaNs come out as they went in. Bytes between the spans are padding and do not travel.

**A value is absolute, yet small.** A changed word travels as its lowest k bits, and the reader takes, of all words that
end in these bits, the one *nearest* to the word that it has. Words are unsigned and wrap around; with W bits per word
and step(a, b) the one number in [-2**(W-1), 2**(W-1)) that is b - a modulo 2**W:

- *It is exact* if s = step(old, new) lies in [-2**(k-1), 2**(k-1)). The words that end in new's k bits are
  new + m·2**k; seen from old they lie s + m·2**k away (modulo 2**W), and exactly one of any 2**k consecutive
  numbers has the right residue: the one in [-2**(k-1), 2**(k-1)), which is s. The encoder chooses k so.
- *Twice is harmless.* Of the words that end in new's bits, the one nearest to new is new itself. So a part of which any
  words are still old and the others new already, as a reader leaves it that died while it applied, comes out new.

bfloat16 weights that an optimizer steps move by one unit in the last place or not at all: two bits instead of sixteen.
In each block k is chosen for the many, and the few that moved farther make a run of their own with a larger k, before
the run of the many. k = W is the plain absolute word.

**Which words** is said block by block (32 KiB), as gaps in the Rice code (Golomb 1966, "Run-length encodings"; Rice and
Plaunt 1971) with a parameter per run. At parameter 0 that is a bitmap. Where most words of a block changed, a run holds
all of them and no index.

**What is checked.** ``inspect`` and ``apply`` check all of a delta before anything is written: sizes, XXH3-64, every
run and every gap. Damaged and hostile bytes raise ``DeltaCorrupt``. What cannot be seen here is a *wrong base*: applied
to another version than the one it was made from, a delta gives wrong words silently. **The caller compares the part's
checksum with the new version's afterwards**; ``Applied.ranges`` says which bytes have to be summed again.

The layout is in FORMAT.md. Everything is little-endian, and so must be the machine.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from headwater.errors import DeltaCorrupt, UsageError
from headwater.types import Span

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

Buffer = bytes | bytearray | memoryview
"""What a received delta may lie in; also a uint8 array."""

MAGIC = b"HWDL"
VERSION = 1
READING = 0.12e9
"""Bytes of a delta that one core checks and applies in a second, about: see benchmarks/delta.md."""


def worth(link: float) -> float:
    """The share of a part's bytes up to which a delta is sooner in place than the part, over ``link`` bytes per second.

    At that share s, sending s·n bytes and reading them takes as long as sending n. What encoding costs is left out: it
    is done once, for all readers.
    """
    return READING / (READING + link)


DENSE = worth(2.7e9)
"""What ``encode`` takes for the bound if it is told none: that of a fast network. A slower one bears more."""

SAMPLE, SAMPLE_EVERY, SAMPLE_MARGIN = 64, 16, 1.5
"""How many blocks are tried first, of parts with how many times as many, and how far they may exceed the bound."""

_HEAD = struct.Struct("<4sIQQQQII")
_SPAN = 24
_ALIGNED = 8


class Stats(NamedTuple):
    """What a delta says of itself: ``length`` of the part, ``words`` in its spans, those that ``changed``, and the
    delta's own size, all but ``words`` and ``changed`` in bytes."""

    length: int
    words: int
    changed: int
    nbytes: int


class Applied(NamedTuple):
    """``changed`` words, as the delta says, and the byte ranges of the part (``(start, stop)``, ascending, apart)
    outside of which nothing was written."""

    changed: int
    ranges: tuple[tuple[int, int], ...]


class _Delta(NamedTuple):
    """A delta whose header is checked. ``stream``: uint64, one word more than ``bits`` bits need."""

    length: int
    changed: int
    bits: int
    spans: tuple[Span, ...]
    stream: Array


def _kernels() -> Any:
    # Late: it loads Numba, and compiles where no compiled form is kept.
    return import_module("headwater.wire.delta_kernels")


def warm() -> None:
    """Compile or load the loops now, for example in a thread while a server starts, and not at the first delta."""
    _kernels()


def encode(old: Array, new: Array, spans: Sequence[Span], most: float = DENSE) -> bytes | None:
    """The delta that turns ``old`` into ``new`` (uint8, 1-D, C-contiguous, one length, at addresses that 8 divides).

    Returns None, as soon as that is known, if it would take more than ``most`` of the spans' bytes: send them whole.

    Raises:
        UsageError: the arrays or the spans are not as described.
    """
    length = _length_of(old)
    if _length_of(new) != length:
        raise UsageError(
            f"the two versions of the part have {length} and {new.size} bytes; a delta needs the same size"
        )
    reason = _wrong_spans(spans, length)
    if reason:
        raise UsageError(reason)
    kernels = _kernels()
    room = _Room(kernels, int(most * 8 * sum(stop - start for start, stop, _ in spans)))
    if _hopeless(room, old, new, spans, most):
        return None
    at = total = 0
    room.out[0] = 0
    for start, stop, word in spans:
        at, changed = room.encode(_words(old[start:stop], word), _words(new[start:stop], word), at)
        if at < 0:
            return None
        total += changed
    whole = _stream_words(at)
    room.out[whole - 1] = 0
    return _sealed(length, at, total, spans, room.out[:whole])


class _Room:
    """Where a delta of at most ``limit`` bits is written."""

    def __init__(self, kernels: Any, limit: int) -> None:
        self.block: int = kernels.BLOCK
        self.limit = max(limit, 0)
        self.out = np.empty(self.limit // 64 + self.block // 2 + 2, np.uint64)
        self._scratch = np.empty((4, self.block // 2), np.int32)
        self._encode = kernels.encode

    def encode(self, old: Array, new: Array, at: int) -> tuple[int, int]:
        """Write the words of one span; the next bit, -1 if it lies beyond the limit, and how many words changed."""
        at, changed = self._encode(old, new, self.out, at, self.limit, self._scratch)
        return at, changed


def _hopeless(room: _Room, old: Array, new: Array, spans: Sequence[Span], most: float) -> bool:
    """Whether a sample of the blocks takes so much more than ``most`` that the rest need not be tried.

    A guess, and a cheap one: a delta that it gives up wrongly would have been about as large.
    """
    starts = [(start, span) for span in spans for start in range(span.start, span.stop, room.block)]
    if len(starts) < SAMPLE * SAMPLE_EVERY:
        return False
    taken = used = 0
    for first, span in starts[:: len(starts) // SAMPLE]:
        last = min(span.stop, first + room.block)
        room.out[0] = 0
        at, _ = room.encode(_words(old[first:last], span.word), _words(new[first:last], span.word), 0)
        used += room.limit if at < 0 else at
        taken += 8 * (last - first)
    return used > SAMPLE_MARGIN * most * taken


def inspect(delta: Buffer | Array) -> Stats:
    """Check everything about a delta that can be checked without its base.

    Raises:
        DeltaCorrupt: it is not a delta, or a damaged one.
    """
    found = _checked(delta)
    words = sum((stop - start) // word for start, stop, word in found.spans)
    return Stats(found.length, words, found.changed, _bytes_of(delta).size)


def apply(target: Array, delta: Buffer | Array) -> Applied:
    """Turn ``target`` (uint8, 1-D, C-contiguous, writeable, at an address that 8 divides), which holds the older
    version of the part or any mixture of the older and the newer, into the newer one, in place.

    Raises:
        DeltaCorrupt: the delta is damaged, or made for a part of another size. ``target`` is as it was.
        UsageError: ``target`` is not as described; it is as it was.
    """
    length = _length_of(target)
    if not target.flags.writeable:
        raise UsageError("the part to apply a delta to is read-only; nothing was written")
    found = _checked(delta)
    if found.length != length:
        raise DeltaCorrupt(f"the delta is for a part of {found.length} bytes and this one has {length}; fetch it whole")
    kernels = _kernels()
    scratch = np.empty((2, kernels.BLOCK // 2), np.uint64)
    at, ranges = 0, []
    for span in found.spans:
        words = _words(target[span.start : span.stop], span.word)
        touched = np.zeros(-(-(span.stop - span.start) // kernels.BLOCK), np.uint8)
        at = kernels.apply(words, found.stream, at, touched, scratch)
        ranges += list(_ranges(touched, span, kernels.BLOCK))
    return Applied(found.changed, tuple(ranges))


def _checked(delta: Buffer | Array) -> _Delta:
    raw = _bytes_of(delta)
    found = _opened(raw)
    kernels = _kernels()
    at = 0
    for start, stop, word in found.spans:
        at = kernels.check(found.stream, at, found.bits, (stop - start) // word, word)
        if at < 0:
            raise _corrupt(_REASONS[at])
    if at != found.bits:
        raise _corrupt(f"its blocks end at bit {at} of {found.bits}")
    return found


_REASONS = {
    -1: "a run reaches beyond its end",
    -2: "a run of unknown kind",
    -3: "a value wider than a word",
    -4: "an index beyond its block",
}


def _corrupt(reason: str) -> DeltaCorrupt:
    return DeltaCorrupt(f"the delta is damaged ({reason}); nothing was written, fetch it again or the version whole")


def _opened(raw: Array) -> _Delta:
    """Header and spans, checked against the size and the checksum."""
    if raw.size < _HEAD.size:
        raise _corrupt(f"{raw.size} bytes are less than a header")
    magic, version, check, length, bits, changed, count, zero = _HEAD.unpack_from(raw.data)
    if magic != MAGIC or zero:
        raise _corrupt("it does not begin as one")
    if version != VERSION:
        raise DeltaCorrupt(
            f"the delta has version {version} and this Headwater reads {VERSION}; fetch the version whole"
        )
    if raw.size != _HEAD.size + count * _SPAN + 8 * _stream_words(bits):
        raise _corrupt(f"{raw.size} bytes are not what its header says")
    if xxhash.xxh3_64_intdigest(raw[16:].data) != check:
        raise _corrupt("wrong checksum")
    body = raw[_HEAD.size :].view(np.uint64)
    spans = tuple(Span(*row) for row in body[: count * 3].reshape(-1, 3).tolist())
    reason = _wrong_spans(spans, length)
    if reason:
        raise _corrupt(reason)
    if changed > sum((stop - start) // word for start, stop, word in spans):
        raise _corrupt("it counts more changes than words")
    return _Delta(length, changed, bits, spans, body[count * 3 :])


def _sealed(length: int, bits: int, changed: int, spans: Sequence[Span], stream: Array) -> bytes:
    table = np.array(spans, np.uint64).tobytes()
    head = _HEAD.pack(MAGIC, VERSION, 0, length, bits, changed, len(spans), 0)
    body = stream.data.cast("B")
    seal = xxhash.xxh3_64(head[16:])
    seal.update(table)
    seal.update(body)
    return b"".join((head[:8], seal.intdigest().to_bytes(8, "little"), head[16:], table, body))


def _stream_words(bits: int) -> int:
    """64-bit words of a stream: one more than the bits need, so that 64 bits can be read at any of them."""
    return (bits + 63) // 64 + 1


def _wrong_spans(spans: Sequence[Span], length: int) -> str | None:
    end = 0
    for start, stop, word in spans:
        if word not in (2, 4):
            return f"a span has words of {word} bytes; 2 and 4 are known"
        if not end <= start <= stop <= length:
            return f"the span {start}:{stop} is not in order within the part's {length} bytes"
        if start % _ALIGNED or (stop - start) % word:
            return f"the span {start}:{stop} does not begin on 8 bytes or does not hold whole words of {word}"
        end = stop
    return None


def _length_of(part: Array) -> int:
    if part.dtype != np.uint8 or part.ndim != 1 or not part.flags.c_contiguous:
        raise UsageError(f"a part is a flat array of uint8, not of {part.dtype} with shape {part.shape}")
    if part.size and part.ctypes.data % _ALIGNED:
        raise UsageError("a part must begin at an address that 8 divides; copy it into an array of its own")
    if sys.byteorder != "little":
        raise UsageError("deltas need a little-endian machine; fetch versions whole")
    return int(part.size)


def _words(part: Array, word: int) -> Array:
    return part.view(np.uint16 if word == 2 else np.uint32)


def _bytes_of(delta: Buffer | Array) -> Array:
    """The bytes as a uint8 array, copied only if they lie across the machine's words."""
    raw = np.frombuffer(delta, np.uint8)
    return raw if raw.size == 0 or raw.ctypes.data % _ALIGNED == 0 else raw.copy()


def _ranges(touched: Array, span: Span, block: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of the part from a flag per block of the span; neighbours are one range."""
    edges = np.flatnonzero(np.diff(touched, prepend=np.uint8(0), append=np.uint8(0))).reshape(-1, 2)
    for first, last in edges.tolist():
        yield span.start + first * block, min(span.stop, span.start + last * block)
