"""Frames are recorded as they pass, whatever pieces they come in."""

from __future__ import annotations

import pytest

from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind, encode
from headwater_bench.chaos.replay import KEPT, Recorder, Recording

OPEN = m.Open(session=5, rank=1, shard=0)


def _stream(pushes: int) -> bytes:
    data = encode(Frame(Kind.HELLO, body=m.pack(m.Hello(bytes(32), "headwater"))))
    data += encode(Frame(Kind.REQUEST, seq=1, body=m.pack(OPEN)))
    for i in range(pushes):
        data += encode(Frame(Kind.PUSH, seq=i + 1, stop=100, payload=memoryview(bytes(100)))) + bytes([i]) * 100
    return data


@pytest.mark.parametrize("size", [1, 7, 88, 1000, 1 << 20])
def test_the_last_pushes_are_kept(size: int) -> None:
    recording, data = Recording(), _stream(KEPT + 3)
    for at in range(0, len(data), size):
        recording(data[at : at + size])
    assert recording.opened == OPEN
    assert [push[-1] for push in recording.pushes] == list(range(3, KEPT + 3))


def test_damaged_bytes_end_a_recording() -> None:
    recording = Recording()
    recording(b"X" * 200)
    recording(_stream(2))
    assert recording.opened is None
    assert not recording.pushes


def test_only_what_workers_send_to_servers_is_recorded() -> None:
    recorder = Recorder()
    assert recorder.tap("w0", "s1") is not None
    assert recorder.tap("s1", "w0") is None
    assert recorder.tap("s0", "s1") is None
    assert recorder.tap("w0", "coordinator") is None
    assert recorder.replay("w0", {}, "token") == []
