"""The frame: a fixed header, a bounded control body, and raw tensor bytes. FORMAT.md is the specification.

Nothing here allocates by what a header asks for: ``decode_header`` refuses first.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import xxhash
from typing_extensions import Buffer

from headwater.errors import ProtocolError, UnknownCodec

MAGIC = b"HWTR"
VERSION = 2
MAX_BODY = 16 << 20  # bytes: a table declaration with 100,000 parameters takes about 8 MiB
MAX_PAYLOAD = 1 << 34  # bytes: one block; whole-tensor optimizers may send one tensor as one block

_FIELDS = struct.Struct("<4sBBHIIQQQQQQQQIII")  # magic … stop, payload, members, body, check
_CRC = struct.Struct("<I")
HEADER = _FIELDS.size + _CRC.size


class Kind(IntEnum):
    """What a frame is. Numbers are never reused."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    ERROR = 5
    REQUEST = 6
    REPLY = 7
    NOTICE = 8
    PUSH = 16
    ACK = 17
    PULL = 18
    DATA = 19
    ASSIGN = 20
    RECORD = 21
    STATE = 22
    ACCEPT = 23
    PIECE = 24


class Flag:
    """Bits that refine a kind. Plain integers: an ``IntFlag`` costs a microsecond per operation on the hot path."""

    NONE = 0
    SHARED = 1  # PUSH: the bytes lie in shared memory, none follow; DATA: a grant to read them there
    END = 2  # PUSH: the worker's step is complete; DATA: nothing more comes for this pull; ASSIGN: the last
    WANT = 4  # PUSH: send the range back once it is applied; with END: everything, as soon as the policy allows
    SKIP = 8  # PUSH with END: this worker's gradient is not finite; ACK: the step was skipped
    CHECKED = 16  # the payload's checksum is in `check`
    ANEW = 32  # PUSH: forget what this worker has pushed of the step so far
    MEAN = 64  # PULL: the aggregate of the step under way instead of values; DATA: bytes of it
    MERGED = 128  # PUSH with END: the step's gradient is all workers' already
    WROTE = 256  # ASSIGN: part of the step, applied before its gradient; PUSH with END: this worker assigned so
    ENCODED = 512  # the payload is what a codec made of the range; no codec is known yet
    ALL = 1023


_KINDS = {int(kind): kind for kind in Kind}
_RANGED = frozenset(map(int, (Kind.PUSH, Kind.PULL, Kind.DATA, Kind.ASSIGN, Kind.RECORD, Kind.STATE, Kind.PIECE)))
"""What is about bytes ``start:stop`` of a table, and may carry a payload. Numbers: a ``Kind`` is slow to look up."""
_TAKEN = Flag.ALL & ~Flag.ENCODED
"""The flags that this side can act on."""


@dataclass(slots=True)
class Frame:
    """One message. ``start:stop`` are bytes of a shard's own memory; what ``payload`` is depends on the kind of table.

    Of a frame that was read, ``body_length`` and ``payload_length`` are what its header announced.
    """

    kind: Kind
    flags: int = 0
    shard: int = 0
    table: int = 0
    session: int = 0
    epoch: int = 0
    seq: int = 0
    lsn: int = 0
    clock: int = 0
    start: int = 0
    stop: int = 0
    members: int = 0
    body: bytes = b""
    payload: memoryview | None = None
    check: int = 0
    body_length: int = 0
    payload_length: int = 0

    @property
    def length(self) -> int:
        """Bytes in the range, wherever they are."""
        return self.stop - self.start

    def must_be_plain(self) -> None:
        """Raises ``ProtocolError`` unless the payload is the bytes of the range, as they are."""
        if self.payload_length != self.stop - self.start:
            raise ProtocolError(
                f"{self.kind.name} of bytes {self.start}:{self.stop} announces {self.payload_length} bytes of payload; "
                "nothing was allocated"
            )


def checksum(payload: Buffer) -> int:
    """XXH3 of a payload, cut to 32 bits."""
    return xxhash.xxh3_64_intdigest(payload) & 0xFFFFFFFF


def seal(frame: Frame) -> None:
    """Let the frame carry its payload's checksum."""
    if frame.payload is not None:
        frame.flags |= Flag.CHECKED
        frame.check = checksum(frame.payload)


def encode(frame: Frame) -> bytes:
    """Header and body as bytes; the payload is sent behind them, uncopied. Raises ``ProtocolError`` over a bound."""
    body, payload = frame.body, frame.payload
    payload_length = frame.payload_length if payload is None else len(payload)
    if len(body) > MAX_BODY or payload_length > MAX_PAYLOAD:
        raise ProtocolError(
            f"{frame.kind.name} with a body of {len(body)} and a payload of {payload_length} bytes "
            f"is over the bounds of {MAX_BODY} and {MAX_PAYLOAD}; it was not sent"
        )
    head = _FIELDS.pack(
        MAGIC,
        VERSION,
        frame.kind,
        frame.flags,
        frame.shard,
        frame.table,
        frame.session,
        frame.epoch,
        frame.seq,
        frame.lsn,
        frame.clock,
        frame.start,
        frame.stop,
        payload_length,
        frame.members,
        len(body),
        frame.check,
    )
    if not body:
        return head + _CRC.pack(zlib.crc32(head))
    return head + _CRC.pack(zlib.crc32(body, zlib.crc32(head))) + body


def decode_header(data: Buffer, offset: int = 0) -> Frame:
    """The frame whose header begins at ``offset``; ``parse`` checks it, and its body, against their checksum.

    Raises ``ProtocolError`` for a wrong magic, version, kind, flag, range or size. Nothing has been allocated then.
    """
    (
        magic, version, kind, flags, shard, table, session, epoch, seq, lsn, clock, start, stop, payload, members, body,
        check,
    ) = _FIELDS.unpack_from(data, offset)  # fmt: skip
    if magic != MAGIC:
        raise ProtocolError(f"magic {magic!r} instead of {MAGIC!r}: the other side does not speak Headwater")
    if version != VERSION:
        raise ProtocolError(f"wire version {version}, this side speaks {VERSION}: install the same release on both")
    known = _KINDS.get(kind)
    if known is None or flags & ~_TAKEN:
        raise _unknown(kind, flags)
    if body > MAX_BODY or payload > MAX_PAYLOAD:
        raise ProtocolError(
            f"{known.name} announces a body of {body} and a payload of {payload} bytes, "
            f"over the bounds of {MAX_BODY} and {MAX_PAYLOAD}; nothing was allocated"
        )
    if payload and (flags & Flag.SHARED or kind not in _RANGED):
        shared = " that is shared" if flags & Flag.SHARED else ""
        raise ProtocolError(f"{known.name}{shared} announces a payload, which it has not; nothing was allocated")
    if start != stop and kind in _RANGED:
        if start > stop:
            raise ProtocolError(f"{known.name} of bytes {start}:{stop}; nothing was allocated")
        if not payload and kind != Kind.PULL and not flags & Flag.SHARED:
            raise ProtocolError(f"{known.name} of bytes {start}:{stop} without them; nothing was allocated")
    return Frame(
        known, flags, shard, table, session, epoch, seq, lsn, clock, start, stop, members, b"", None, check, body,
        payload,
    )  # fmt: skip


def _unknown(kind: int, flags: int) -> ProtocolError:
    if kind in _KINDS and not flags & ~Flag.ALL:
        return UnknownCodec(f"{_KINDS[kind].name} is encoded, and this side knows no codec; nothing was allocated")
    return ProtocolError(f"frame kind {kind} with flags {flags:#x} is not in version {VERSION} of the format")


def check_payload(frame: Frame) -> None:
    """Raises ``ProtocolError`` if the payload is checked and damaged."""
    if frame.flags & Flag.CHECKED and frame.payload is not None and checksum(frame.payload) != frame.check:
        raise ProtocolError(f"the payload of {frame.kind.name} {frame.seq} was damaged on the way; it was not applied")


def parse(view: memoryview, start: int, end: int, limit: int = MAX_BODY) -> tuple[Frame | None, int]:
    """The frame at ``view[start:end]`` without its payload, and where that begins.

    While bytes are missing: ``None``, and how many the frame needs at least. ``limit`` bounds the body.
    Raises ``ProtocolError`` for what FORMAT.md does not allow.
    """
    if end - start < HEADER:
        return None, HEADER
    frame = decode_header(view, start)
    if frame.body_length > limit:
        raise ProtocolError(f"a body of {frame.body_length} bytes where at most {limit} are allowed")
    stop = start + HEADER + frame.body_length
    if end < stop:
        return None, stop - start
    fields = start + _FIELDS.size
    crc = zlib.crc32(view[start:fields])
    if frame.body_length:
        frame.body = bytes(view[start + HEADER : stop])
        crc = zlib.crc32(frame.body, crc)
    if crc != _CRC.unpack_from(view, fields)[0]:
        raise ProtocolError("the checksum of a frame's header and body is wrong: bytes were damaged on the way")
    return frame, stop
