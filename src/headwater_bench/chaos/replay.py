"""Old frames sent again: what passed through a proxy is sent once more, on a connection that resumes the session.

A shard must answer such a push as a duplicate or refuse it for its epoch; the sums say whether it did.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping

from headwater.errors import HeadwaterError
from headwater.transports.address import Address
from headwater.transports.channel import Channel, send_all
from headwater.transports.dial import dial
from headwater.transports.receiver import Receiver
from headwater.wire import messages as m
from headwater.wire.frames import HEADER, Frame, Kind, decode_header, encode
from headwater_bench.rig.proxy import Tap

KEPT = 8  # pushes that are remembered per connection
WAIT = 0.5  # seconds for answers


class Recording:
    """The frames of one connection, client to server: how its session was opened, and its last pushes."""

    def __init__(self) -> None:
        self.opened: m.Open | None = None
        self.pushes: deque[bytes] = deque(maxlen=KEPT)
        self._rest = bytearray()
        self._broken = False

    def __call__(self, data: bytes) -> None:
        """Bytes that pass."""
        if self._broken:
            return
        self._rest += data
        try:
            while len(self._rest) >= HEADER:
                frame = decode_header(self._rest)
                size = HEADER + frame.body_length + frame.payload_length
                if len(self._rest) < size:
                    return
                self._take(frame, bytes(self._rest[:size]))
                del self._rest[:size]
        except HeadwaterError:  # damaged on the way, by us
            self._broken = True

    def _take(self, frame: Frame, data: bytes) -> None:
        if frame.kind == Kind.PUSH:
            self.pushes.append(data)
        elif frame.kind == Kind.REQUEST and self.opened is None:
            request = m.unpack_request(data[HEADER : HEADER + frame.body_length])
            if isinstance(request, m.Open):
                self.opened = request


class Recorder:
    """Recordings by worker, from the oldest connection to the newest."""

    def __init__(self) -> None:
        self._recordings: dict[str, deque[Recording]] = {}

    def tap(self, source: str, target: str) -> Tap | None:
        """For ``ProxyNetwork``: record what workers send to servers."""
        if source[:1] != "w" or target[:1] != "s":
            return None
        recording = Recording()
        self._recordings.setdefault(source, deque(maxlen=12)).append(recording)
        return recording

    def replay(self, worker: str, servers: Mapping[str, Address], token: str) -> list[str]:
        """Send old pushes of a worker's sessions to every server; returns what was answered, a line each."""
        said = []
        for recording in list(self._recordings.get(worker, ())):
            if recording.opened is None or not recording.pushes:
                continue
            for name, address in servers.items():
                if name != "coordinator":
                    with contextlib.suppress(HeadwaterError, OSError):
                        said.append(f"replayed to {name}: {_send(address, token, recording)}")
        return said[:6]


def _send(address: Address, token: str, recording: Recording) -> str:
    assert recording.opened is not None
    with contextlib.closing(dial(address, token.encode(), 1.0)) as channel:
        channel.settimeout(WAIT)
        send_all(channel, encode(Frame(Kind.REQUEST, seq=1 << 62, body=m.pack(recording.opened))))
        receiver = Receiver(channel, lambda frame: memoryview(bytearray(frame.payload_length)))
        first = _answers(receiver, channel)
        if not first or first[0].kind != Kind.REPLY:
            return ", ".join(_word(frame) for frame in first) or "silence"
        send_all(channel, b"".join(recording.pushes))
        return ", ".join(_word(frame) for frame in _answers(receiver, channel)) or "silence"


def _answers(receiver: Receiver, channel: Channel) -> list[Frame]:
    """What comes until it is silent for a moment, or closed."""
    found: list[Frame] = []
    until = time.monotonic() + WAIT
    with contextlib.suppress(TimeoutError, HeadwaterError, OSError):
        while time.monotonic() < until and len(found) < KEPT:
            found += [frame for frame, _ in receiver.read()]
            channel.settimeout(0.1)
    return found


def _word(frame: Frame) -> str:
    return m.read_error(frame.body).code if frame.kind == Kind.ERROR else f"{frame.kind.name} {frame.seq}"
