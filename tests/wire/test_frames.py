"""Frames: what is written can be read, and nothing else; a bad header is refused before memory is asked for."""

from __future__ import annotations

import contextlib
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import ProtocolError, UnknownCodec
from headwater.wire import frames
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

RANGED = (Kind.PUSH, Kind.PULL, Kind.DATA, Kind.ASSIGN, Kind.RECORD, Kind.STATE, Kind.PIECE)
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


def allowed(frame: Frame) -> Frame:
    """The same without what no frame may say: a payload that it cannot have, a range that ends before it begins."""
    if frame.flags & Flag.SHARED or frame.kind not in RANGED:
        frame.payload_length = 0
    if frame.kind in RANGED:
        frame.start, frame.stop = sorted((frame.start, frame.stop))
    return frame


FRAMES = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    flags=st.integers(0, Flag.ALL & ~Flag.ENCODED),
    shard=U32,
    table=U32,
    session=U64,
    epoch=U64,
    seq=U64,
    lsn=U64,
    clock=U64,
    start=U64,
    stop=U64,
    payload_length=st.integers(0, MAX_PAYLOAD),
    members=U32,
    body=st.binary(max_size=200),
    check=U32,
).map(allowed)


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
        (with_field(4, "B", 1), "install the same release"),
        (with_field(4, "B", 0), "wire version 0"),
        (with_field(5, "B", 0), "frame kind 0"),
        (with_field(5, "B", 25), "frame kind 25"),
        (with_field(5, "B", 255), "frame kind 255"),
        (with_field(6, "H", 1024), "flags 0x400"),
        (with_field(6, "H", 0xFFFF), "flags 0xffff"),
        (with_field(72, "Q", MAX_PAYLOAD + 1), "nothing was allocated"),
        (with_field(72, "Q", 2**64 - 1), "nothing was allocated"),
        (with_field(84, "I", MAX_BODY + 1), "nothing was allocated"),
        (with_field(84, "I", 2**32 - 1), "nothing was allocated"),
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
    assert 84 <= at < 88


def test_a_body_over_the_limit_of_the_handshake_is_refused_while_it_is_still_coming() -> None:
    data = with_field(84, "I", 5000)
    with pytest.raises(ProtocolError, match="at most 4096"):
        parse(memoryview(data), 0, len(data), 4096)


def test_nothing_over_a_bound_is_sent() -> None:
    for frame in (Frame(Kind.REQUEST, body=bytes(MAX_BODY + 1)), Frame(Kind.PUSH, payload_length=MAX_PAYLOAD + 1)):
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
    good = Frame(Kind.DATA, Flag.CHECKED, stop=256, payload=memoryview(payload), check=checksum(payload))
    check_payload(good)
    bad = Frame(Kind.DATA, Flag.CHECKED, stop=256, payload=memoryview(payload[::-1]), check=checksum(payload))
    with pytest.raises(ProtocolError, match="damaged on the way; it was not applied"):
        check_payload(bad)
    bad.flags = Flag.NONE
    check_payload(bad)


@pytest.mark.parametrize("kind", list(Kind))
def test_what_follows_a_header(kind: Kind) -> None:
    """A range says nothing about the payload: it may be shorter, longer, or keys instead of values."""
    for frame in (Frame(kind, stop=9, payload_length=3), Frame(kind, payload_length=9)):
        if kind in RANGED:
            assert decode_header(encode(frame)).payload_length == frame.payload_length
        else:
            with pytest.raises(ProtocolError, match="announces a payload, which it has not"):
                decode_header(encode(frame))
    shared = Frame(kind, Flag.SHARED, stop=9)
    assert decode_header(encode(shared)) == shared
    shared.payload_length = 9
    with pytest.raises(ProtocolError, match="announces a payload"):
        decode_header(encode(shared))


def test_a_payload_is_announced_as_long_as_it_is() -> None:
    frame = Frame(Kind.PULL, start=64, stop=128, payload=memoryview(b"two keys"))
    found = decode_header(encode(frame))
    assert (found.start, found.stop, found.length, found.payload_length) == (64, 128, 64, 8)
    with pytest.raises(ProtocolError, match="PULL of bytes 64:128 announces 8 bytes"):
        found.must_be_plain()


@pytest.mark.parametrize("kind", list(Kind))
def test_a_range_does_not_end_before_it_begins(kind: Kind) -> None:
    frame = Frame(kind, start=9, stop=8)
    if kind not in RANGED:
        assert decode_header(encode(frame)).start == 9, "an ACK says a staleness there"
    else:
        with pytest.raises(ProtocolError, match=f"{kind.name} of bytes 9:8; nothing was allocated"):
            decode_header(encode(frame))


@pytest.mark.parametrize("kind", list(Kind))
def test_bytes_that_are_announced_and_do_not_come_are_refused(kind: Kind) -> None:
    """Else a record's gradient, or the values that a reader waits for, would be missing without a word."""
    frame = Frame(kind, start=8, stop=9)
    if kind not in RANGED or kind == Kind.PULL:
        assert decode_header(encode(frame)) == frame
    else:
        with pytest.raises(ProtocolError, match=f"{kind.name} of bytes 8:9 without them; nothing was allocated"):
            decode_header(encode(frame))
    empty = Frame(kind, start=8, stop=8)
    assert decode_header(encode(empty)) == empty


def test_an_encoded_payload_is_refused_where_no_codec_is_known() -> None:
    for frame in (
        Frame(Kind.PUSH, Flag.ENCODED, stop=9, payload_length=3),
        Frame(Kind.PUSH, Flag.ENCODED | Flag.SHARED),
    ):
        with pytest.raises(UnknownCodec, match="this side knows no codec; nothing was allocated"):
            decode_header(encode(frame))


def test_the_specification_lays_the_header_out_as_it_is() -> None:
    """FORMAT.md, section 1: offsets without a gap, and each field where the code puts it."""
    text = (Path(frames.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    section = text[text.index("## 1.") : text.index("## 2.")]
    rows = [
        (int(a), int(b), name) for a, b, name in re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", section, re.MULTILINE)
    ]
    assert [at for at, _, _ in rows] == [sum(size for _, size, _ in rows[:i]) for i in range(len(rows))]
    assert sum(size for _, size, _ in rows) == HEADER
    frame = Frame(Kind.RECORD, 5, *range(11, 18), 20, 21, 19, b"body", check=22, payload_length=23)
    said = {name: int.from_bytes(encode(frame)[at : at + size], "little") for at, size, name in rows}
    names = ("shard", "table", "session", "epoch", "seq", "lsn", "clock", "start", "stop", "members", "check")
    assert {name: said[name] for name in names} == {name: getattr(frame, name) for name in names}
    assert (said["kind"], said["flags"], said["body"], said["payload"]) == (Kind.RECORD, 5, 4, 23)
    assert said["version"] == frames.VERSION
    assert f"version {frames.VERSION}\n" in text
