"""Streams cut anywhere give the same frames; damaged ones give a ProtocolError and nothing else."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import LinkBroken, ProtocolError
from headwater.transports.channel import channel_of, descriptors
from headwater.transports.receiver import BUFFER, Receiver
from headwater.wire.frames import Flag, Frame, Kind, checksum, encode


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def refuse(frame: Frame) -> memoryview:
    raise ProtocolError("no payload is expected")


def land(frame: Frame) -> memoryview:
    return memoryview(bytearray(frame.payload_length))


def read_all(receiver: Receiver) -> list[Frame]:
    frames = []
    while True:
        try:
            frames += [frame for frame, _ in receiver.read()]
        except BlockingIOError:
            return frames


PARTS = st.lists(st.tuples(st.binary(max_size=300), st.one_of(st.none(), st.binary(max_size=500))), max_size=6)


@given(PARTS, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_a_stream_may_be_cut_anywhere(parts: list[tuple[bytes, bytes | None]], chance: random.Random) -> None:
    stream = b""
    for i, (body, payload) in enumerate(parts):
        frame = Frame(Kind.REQUEST if payload is None else Kind.PUSH, seq=i, body=body)
        if payload is not None:
            frame.flags, frame.payload_length, frame.check = Flag.CHECKED, len(payload), checksum(payload)
        stream += encode(frame) + (payload or b"")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receiver = Receiver(channel_of(ours), land)
        frames: list[Frame] = []
        while stream:
            cut = chance.randint(1, min(len(stream), 400))
            theirs.sendall(stream[:cut])
            stream = stream[cut:]
            frames += read_all(receiver)
        assert [(f.seq, f.body, bytes(f.payload or b"")) for f in frames] == [
            (i, body, payload or b"") for i, (body, payload) in enumerate(parts)
        ]
        assert not receiver.midway


def test_a_payload_goes_where_landing_says(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    home = bytearray(BUFFER)
    receiver = Receiver(channel_of(ours), lambda frame: memoryview(home)[frame.start : frame.stop])
    payload = random.Random(1).randbytes(BUFFER // 2)
    theirs.sendall(encode(Frame(Kind.DATA, start=100, stop=100 + len(payload), payload_length=len(payload))) + payload)
    (frame,) = read_all(receiver)
    assert home[100 : 100 + len(payload)] == payload
    assert frame.payload is not None
    assert frame.payload.obj is home


def test_a_refused_landing_takes_no_memory(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    receiver = Receiver(channel_of(ours), refuse)
    theirs.sendall(encode(Frame(Kind.PUSH, payload_length=1 << 33)))
    with pytest.raises(ProtocolError, match="no payload is expected"):
        list(receiver.read())


def test_a_frame_is_looked_at_when_the_one_before_it_is_dealt_with(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    known: list[int] = []

    def landing(frame: Frame) -> memoryview:
        assert known == [1], "the table of this payload is made by the frame before it"
        return land(frame)

    receiver = Receiver(channel_of(ours), landing)
    theirs.sendall(encode(Frame(Kind.RECORD, seq=1)) + encode(Frame(Kind.RECORD, seq=2, payload_length=3)) + b"abc")
    frames = receiver.read()
    known.append(next(frames)[0].seq)
    ((last, _),) = frames
    assert (last.seq, bytes(last.payload or b"")) == (2, b"abc")


def test_a_damaged_payload_is_not_handed_out(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    receiver = Receiver(channel_of(ours), land)
    theirs.sendall(encode(Frame(Kind.PUSH, Flag.CHECKED, payload_length=4, check=checksum(b"good"))) + b"gord")
    with pytest.raises(ProtocolError, match="damaged"):
        list(receiver.read())


def test_the_buffer_grows_only_to_what_a_sound_header_announced(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    receiver = Receiver(channel_of(ours), refuse, limit=4096)
    theirs.sendall(encode(Frame(Kind.REQUEST, body=bytes(5000)))[:200])
    with pytest.raises(ProtocolError, match="at most 4096"):
        list(receiver.read())
    assert len(receiver._buffer) == BUFFER


def test_a_body_larger_than_the_buffer_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    receiver, frames = Receiver(channel_of(ours), refuse), []
    data = encode(Frame(Kind.REQUEST, body=random.Random(2).randbytes(3 * BUFFER)))
    for at in range(0, len(data), 50_000):
        theirs.sendall(data[at : at + 50_000])
        frames += read_all(receiver)
    assert frames[0].body == data[-3 * BUFFER :]


def test_the_end_of_a_stream_is_a_broken_link_also_inside_a_frame(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    receiver = Receiver(channel_of(ours), land)
    theirs.sendall(encode(Frame(Kind.PUSH, payload_length=1000)) + b"half")
    theirs.close()
    assert list(receiver.read()) == []
    assert receiver.midway
    with pytest.raises(LinkBroken, match="closed the connection"):
        list(receiver.read())


def test_descriptors_arrive_beside_their_frame_and_are_closed_if_nobody_takes_them(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    channel = channel_of(ours)
    receiver = Receiver(channel, refuse)
    read, write = os.pipe()
    theirs.sendmsg([encode(Frame(Kind.REQUEST))], descriptors((read,)))
    ((_, (got,)),) = list(receiver.read())
    assert os.fstat(got).st_ino == os.fstat(read).st_ino
    assert not os.get_inheritable(got)
    os.close(got)
    theirs.sendmsg([encode(Frame(Kind.REQUEST))[:10]], descriptors((read, write)))
    assert read_all(receiver) == []
    kept = tuple(channel.fds)
    assert len(kept) == 2
    channel.close()
    for fd in kept:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)
    os.close(read)
    os.close(write)


def test_a_frame_that_hoards_descriptors_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel = channel_of(ours)
    receiver = Receiver(channel, refuse)
    read, write = os.pipe()
    frame = encode(Frame(Kind.REQUEST))
    for byte in range(3):
        theirs.sendmsg([frame[byte : byte + 1]], descriptors((read, write)))
    with pytest.raises(ProtocolError, match="descriptors"):
        read_all(receiver)
    channel.close()
    os.close(read)
    os.close(write)


def test_mutated_streams_raise_nothing_but_a_protocol_error() -> None:
    chance = random.Random(11)
    payload = bytes(64)
    good = [
        encode(Frame(Kind.REQUEST, seq=1, body=b"x" * 40)),
        encode(Frame(Kind.PUSH, Flag.CHECKED, payload_length=64, check=checksum(payload))) + payload,
        encode(Frame(Kind.PULL, seq=3)),
    ]
    for _ in range(1500):
        stream = bytearray(b"".join(chance.choices(good, k=3)))
        for _ in range(chance.randint(1, 4)):
            stream[chance.randrange(len(stream))] = chance.randrange(256)
        del stream[chance.randint(1, len(stream)) :]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(stream)
            theirs.close()
            receiver = Receiver(
                channel_of(ours), lambda frame: land(frame) if frame.payload_length <= 4096 else refuse(frame)
            )
            with pytest.raises((ProtocolError, LinkBroken)):
                read_all(receiver)
