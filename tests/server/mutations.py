"""Damaged frames by seed: from single bits to messages that are well made and make no sense."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from headwater.errors import ProtocolError
from headwater.wire import messages as m
from headwater.wire.frames import HEADER, Flag, Frame, Kind, encode, parse

Piece = tuple[Frame, bytes]  # a frame and its payload
Talk = Sequence[Piece]

# (offset, size) of the header's integers: FORMAT.md, section 1
FIELDS = {
    "version": (4, 1), "kind": (5, 1), "flags": (6, 2), "shard": (8, 4), "table": (12, 4), "session": (16, 8),
    "epoch": (24, 8), "seq": (32, 8), "lsn": (40, 8), "clock": (48, 8), "start": (56, 8), "stop": (64, 8),
    "payload": (72, 8), "members": (80, 4), "body": (84, 4), "check": (88, 4),
}  # fmt: skip
CRC = 92
EDGES = (0, 1, 2, 3, 63, 64, 4095, 4096, 4097, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 34, (1 << 34) + 1,
         1 << 53, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
SIGNED = (-1, -2, -4096, -(1 << 31), -(1 << 63))
STRANGE: tuple[Any, ...] = (
    None, True, "", "x", "\0", "é" * 300, b"", b"\xff" * 9, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {},
    [[]], [1, 2, 3], [[1, 2]], {"type": "open"}, {"": None}, [None] * 50,
)  # fmt: skip
KINDS = [int(kind) for kind in Kind]


def seal(data: bytearray, at: int = 0) -> bytearray:
    """A right checksum for the frame that begins at ``at``, so that deeper layers see it."""
    if len(data) >= at + HEADER:
        body = int.from_bytes(data[at + 84 : at + 88], "little")
        crc = zlib.crc32(data[at + HEADER : at + HEADER + body], zlib.crc32(data[at : at + CRC]))
        struct.pack_into("<I", data, at + CRC, crc)
    return data


class Mutator:
    """One seed's damage. ``strange``: messages of other conversations, to be put into this one."""

    def __init__(self, seed: int, strange: Sequence[Piece] = ()) -> None:
        self.chance = random.Random(seed)
        self._strange = list(strange)

    def talk(self, talk: Talk, first: int = 0) -> list[bytes]:
        """A conversation with one to three things wrong with it, behind its first ``first`` frames."""
        chance = self.chance
        stream = [bytearray(encode(frame) + payload) for frame, payload in talk]
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            if len(stream) > first:
                at = chance.randrange(first, len(stream))
                chance.choice(_WAYS)(self, stream, at)
        return [bytes(data) for data in stream if data]

    def number(self, old: int, bits: int) -> int:
        chance = self.chance
        pick = chance.choice(
            (old + 1, old - 1, chance.choice(EDGES), chance.getrandbits(bits), 1 << chance.randrange(bits))
        )
        return pick % (1 << bits)

    # ---- single frames -----------------------------------------------------------------------------

    def flip(self, stream: list[bytearray], at: int) -> None:
        """Bits anywhere; the checksum does not fit any more."""
        for _ in range(self.chance.choice((1, 1, 2, 8))):
            bit = self.chance.randrange(8 * len(stream[at]) or 1)
            stream[at][bit // 8 : bit // 8 + 1] = bytes(x ^ 1 << bit % 8 for x in stream[at][bit // 8 : bit // 8 + 1])

    def flip_sealed(self, stream: list[bytearray], at: int) -> None:
        """Bits of header or body, with a checksum that fits."""
        end = HEADER + int.from_bytes(stream[at][84:88], "little") if len(stream[at]) >= HEADER else len(stream[at])
        for _ in range(self.chance.choice((1, 1, 2, 8))):
            bit = self.chance.randrange(8 * max(1, min(end, len(stream[at]))))
            stream[at][bit // 8 : bit // 8 + 1] = bytes(x ^ 1 << bit % 8 for x in stream[at][bit // 8 : bit // 8 + 1])
        seal(stream[at])

    def field(self, stream: list[bytearray], at: int) -> None:
        """One integer of the header is another; negative ones are those with the highest bit."""
        name = self.chance.choice(list(FIELDS))
        offset, size = FIELDS[name]
        if len(stream[at]) < HEADER:
            return
        old = int.from_bytes(stream[at][offset : offset + size], "little")
        new = self.chance.choice(KINDS) if name == "kind" else self.number(old, 8 * size)
        if name == "flags" and self.chance.random() < 0.8:
            new &= Flag.ALL
        stream[at][offset : offset + size] = new.to_bytes(size, "little")
        seal(stream[at])

    def body(self, stream: list[bytearray], at: int) -> None:
        """The same message with something else in one place, or bytes that are none."""
        frame, payload = _split(stream[at])
        if frame is None:
            return
        chance = self.chance
        way = chance.random()
        if way < 0.1:
            frame.body = chance.randbytes(chance.choice((0, 1, 30, 3000)))
        elif way < 0.2:
            frame.body = chance.choice((b"\x91", b"\x81\xa4type", b"\x81")) * chance.choice((10, 1000, 100_000))
        else:
            try:
                tree = msgspec.msgpack.decode(frame.body)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                tree = {}
            try:
                frame.body = msgspec.msgpack.encode(self.tree(tree))
            except OverflowError:
                frame.body = b"\xc0"
        stream[at][:] = encode(frame) + payload

    def tree(self, tree: Any) -> Any:
        """A message with one place changed."""
        chance = self.chance
        if isinstance(tree, dict) and tree and chance.random() < 0.9:
            key = chance.choice(list(tree))
            if chance.random() < 0.1:
                return {k: v for k, v in tree.items() if k != key}
            if key != "type":
                return tree | {key: self.tree(tree[key])}
        if isinstance(tree, list) and tree and chance.random() < 0.8:
            at = chance.randrange(len(tree))
            if chance.random() < 0.3:
                return chance.choice((tree[:at], tree * 3, tree[::-1], [*tree, tree[at]]))
            return [*tree[:at], self.tree(tree[at]), *tree[at + 1 :]]
        if isinstance(tree, bool):
            return not tree
        if isinstance(tree, int) and chance.random() < 0.85:
            return chance.choice((tree + 1, max(tree - 1, -(1 << 63)), chance.choice(EDGES), chance.choice(SIGNED)))
        if isinstance(tree, float) and chance.random() < 0.5:
            return chance.choice((-tree, 0.0, 1e300, float("nan"), float("-inf")))
        if isinstance(tree, bytes) and chance.random() < 0.7:
            return chance.choice((tree[:-1], tree * 2, tree + b"\0", b""))
        return chance.choice(STRANGE)

    def payload(self, stream: list[bytearray], at: int) -> None:
        """More or less of it than the header says, or other bytes."""
        frame, payload = _split(stream[at])
        if frame is not None:
            size = self.chance.choice((0, 1, len(payload) // 2, max(0, len(payload) - 1), len(payload) + 1, 5000))
            frame.payload_length = self.chance.choice(
                (frame.payload_length, size, size, self.chance.choice(EDGES) % (1 << 34))
            )
            stream[at][:] = encode(frame) + self.chance.randbytes(size)

    # ---- the order of frames -----------------------------------------------------------------------

    def cut(self, stream: list[bytearray], at: int) -> None:
        """Nothing comes behind some byte."""
        del stream[at + 1 :]
        del stream[at][self.chance.randrange(len(stream[at]) + 1) :]

    def lose(self, stream: list[bytearray], at: int) -> None:
        """Some bytes in the middle are missing."""
        from_ = self.chance.randrange(len(stream[at]) + 1)
        del stream[at][from_ : from_ + self.chance.randint(1, 90)]

    def insert(self, stream: list[bytearray], at: int) -> None:
        """Some bytes too many."""
        where = self.chance.randrange(len(stream[at]) + 1)
        stream[at][where:where] = self.chance.randbytes(self.chance.randint(1, 90))

    def again(self, stream: list[bytearray], at: int) -> None:
        """Twice or more often, here or later."""
        for _ in range(self.chance.choice((1, 1, 5))):
            stream.insert(self.chance.randint(at, len(stream)), bytearray(stream[at]))

    def swap(self, stream: list[bytearray], at: int) -> None:
        other = self.chance.randrange(len(stream))
        stream[at], stream[other] = stream[other], stream[at]

    def skip(self, stream: list[bytearray], at: int) -> None:
        del stream[at]

    def stranger(self, stream: list[bytearray], at: int) -> None:
        """A frame of another conversation: what a server says to a follower, a coordinator to a server…"""
        if self._strange:
            frame, payload = self.chance.choice(self._strange)
            stream.insert(at, bytearray(encode(frame) + payload))
            if self.chance.random() < 0.3:
                self.chance.choice((Mutator.field, Mutator.body, Mutator.payload))(self, stream, at)

    def relabel(self, stream: list[bytearray], at: int) -> None:
        """The same bytes as another kind of frame."""
        if len(stream[at]) >= HEADER:
            stream[at][5] = self.chance.choice(KINDS)
            seal(stream[at])


Way = Callable[[Mutator, list[bytearray], int], None]
_WAYS: tuple[Way, ...] = (
    Mutator.flip, Mutator.flip_sealed, Mutator.flip_sealed, Mutator.field, Mutator.field, Mutator.field, Mutator.body,
    Mutator.body, Mutator.body, Mutator.payload, Mutator.cut, Mutator.lose, Mutator.insert, Mutator.again, Mutator.swap,
    Mutator.skip, Mutator.stranger, Mutator.stranger, Mutator.relabel,
)  # fmt: skip


def _split(data: bytearray) -> tuple[Frame | None, bytes]:
    try:
        frame, stop = parse(memoryview(data), 0, len(data))
    except ProtocolError:
        return None, b""
    return frame, bytes(data[stop:]) if frame is not None else b""


def read(data: bytes) -> tuple[Frame | None, Any]:
    """The first frame of ``data`` if it is a sound one, and its message if that is a request or a notice."""
    frame, _ = _split(bytearray(data))
    if frame is None or frame.kind not in (Kind.REQUEST, Kind.NOTICE):
        return frame, None
    try:
        return frame, m.unpack_request(frame.body) if frame.kind == Kind.REQUEST else m.unpack_notice(frame.body)
    except ProtocolError:
        return frame, None
