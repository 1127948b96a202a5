"""Frames: what is written can be read, and nothing else; a bad header is refused before memory is asked for."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import ProtocolError
from headwater.wire.frames import (
    HEADER,
    MAX_BODY,
    MAX_PAYLOAD,
    Flag,
    Frame,
    Kind,
    check_payload,
    checksum,
    decode_header,
    encode,
    parse,
)

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
FRAMES = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    flags=st.integers(0, Flag.ALL),
    shard=U32,
    table=U32,
    session=U64,
    epoch=U64,
    seq=U64,
    lsn=U64,
    clock=U64,
    start=U64,
    length=st.integers(0, MAX_PAYLOAD),
    members=U32,
    body=st.binary(max_size=200),
    check=U32,
)


def sealed(head: bytes, body: bytes = b"") -> bytes:
    """A frame whose checksum is right, whatever its fields say."""
    fields = head[: HEADER - 4]
    return fields + struct.pack("<I", zlib.crc32(body, zlib.crc32(fields))) + body


def with_field(offset: int, form: str, value: int | bytes, body: bytes = b"") -> bytes:
    data = bytearray(encode(Frame(Kind.PUSH, body=body)))
    struct.pack_into("<" + form, data, offset, value)
    return sealed(bytes(data), body)


@given(FRAMES, st.binary(max_size=7), st.binary(max_size=7))
def test_what_is_encoded_is_parsed(frame: Frame, before: bytes, after: bytes) -> None:
    data = before + encode(frame) + after
    found, end = parse(memoryview(data), len(before), len(data))
    assert found is not None
    frame.body_length = len(frame.body)
    assert found == frame
    assert end == len(data) - len(after)


@given(FRAMES, st.data())
def test_a_truncated_frame_waits_for_the_rest(frame: Frame, data: st.DataObject) -> None:
    whole = encode(frame)
    cut = data.draw(st.integers(0, len(whole) - 1))
    found, needed = parse(memoryview(whole), 0, cut)
    assert found is None
    assert cut < needed <= len(whole)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (with_field(0, "4s", b"HTTP"), "does not speak Headwater"),
        (with_field(4, "B", 2), "install the same release"),
        (with_field(4, "B", 0), "wire version 0"),
        (with_field(5, "B", 0), "frame kind 0"),
        (with_field(5, "B", 25), "frame kind 25"),
        (with_field(5, "B", 255), "frame kind 255"),
        (with_field(6, "H", 512), "flags 0x200"),
        (with_field(6, "H", 0xFFFF), "flags 0xffff"),
        (with_field(64, "Q", MAX_PAYLOAD + 1), "nothing was allocated"),
        (with_field(64, "Q", 2**64 - 1), "nothing was allocated"),
        (with_field(76, "I", MAX_BODY + 1), "nothing was allocated"),
        (with_field(76, "I", 2**32 - 1), "nothing was allocated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_header_is_refused_before_anything_is_allocated(data: bytes, says: str) -> None:
    view = memoryview(data)
    parse(memoryview(encode(Frame(Kind.PUSH))), 0, HEADER)
    tracemalloc.start()
    with pytest.raises(ProtocolError, match=says):
        parse(view, 0, len(view))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@given(FRAMES, st.data())
@settings(max_examples=300)
def test_one_damaged_byte_is_noticed(frame: Frame, data: st.DataObject) -> None:
    """CRC-32 finds every single damaged byte; only a changed body length may leave the frame incomplete."""
    whole = bytearray(encode(frame))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        found, _ = parse(memoryview(whole), 0, len(whole))
    except ProtocolError:
        return
    assert found is None
    assert 76 <= at < 80


def test_a_body_over_the_limit_of_the_handshake_is_refused_while_it_is_still_coming() -> None:
    data = with_field(76, "I", 5000)
    with pytest.raises(ProtocolError, match="at most 4096"):
        parse(memoryview(data), 0, len(data), 4096)


def test_nothing_over_a_bound_is_sent() -> None:
    for frame in (Frame(Kind.REQUEST, body=bytes(MAX_BODY + 1)), Frame(Kind.PUSH, length=MAX_PAYLOAD + 1)):
        with pytest.raises(ProtocolError, match="it was not sent"):
            encode(frame)


@given(st.binary(min_size=HEADER, max_size=HEADER + 64))
def test_noise_raises_nothing_but_a_protocol_error(noise: bytes) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: decode_header(noise),
        lambda: parse(memoryview(noise), 0, len(noise)),
        lambda: parse(memoryview(sealed(encode(Frame(Kind.PUSH))[:8] + noise[8:])), 0, HEADER),
    ]
    for attempt in attempts:
        with contextlib.suppress(ProtocolError):
            attempt()


def test_a_payload_is_compared_with_its_checksum_if_it_has_one() -> None:
    payload = bytes(range(256))
    good = Frame(Kind.DATA, Flag.CHECKED, length=256, payload=memoryview(payload), check=checksum(payload))
    check_payload(good)
    bad = Frame(Kind.DATA, Flag.CHECKED, length=256, payload=memoryview(payload[::-1]), check=checksum(payload))
    with pytest.raises(ProtocolError, match="damaged on the way; it was not applied"):
        check_payload(bad)
    bad.flags = Flag.NONE
    check_payload(bad)


@pytest.mark.parametrize("kind", list(Kind))
def test_what_follows_a_header(kind: Kind) -> None:
    carries = kind in (Kind.PUSH, Kind.DATA, Kind.ASSIGN, Kind.RECORD, Kind.STATE, Kind.PIECE)
    assert Frame(kind, length=9).follows == (9 if carries else 0)
    assert Frame(kind, Flag.SHARED, length=9).follows == 0
