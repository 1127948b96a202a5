"""Bytes of a channel become frames; payloads go straight to where they belong.

Used by both ends. A header is checked before the memory for its payload is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from headwater.errors import LinkBroken, ProtocolError
from headwater.transports.channel import MAX_FDS, Channel
from headwater.wire.frames import MAX_BODY, Frame, check_payload, parse

BUFFER = 64 << 10  # bytes: headers and small frames; at most this much of a payload is copied once more

Arrived = tuple[Frame, tuple[int, ...]]


class Receiver:
    """``landing(frame)`` tells where the payload behind a header goes, or raises; ``limit`` bounds bodies.

    ``fill`` makes one receive call, and ``next`` is called until it returns ``None``: a frame is looked at when the one
    before it has been dealt with, so ``landing`` may rely on what that one said.
    """

    def __init__(self, channel: Channel, landing: Callable[[Frame], memoryview], limit: int = MAX_BODY) -> None:
        self.limit = limit
        self._channel = channel
        self._recv_into = channel.recv_into
        self._landing = landing
        self._buffer = memoryview(bytearray(BUFFER))
        self._start = self._end = 0
        self._frame: Frame | None = None  # its payload is arriving, or has just arrived
        self._rest: memoryview | None = None  # where the next bytes of it go
        self._fds = channel.fds
        self._known_fds = 0
        self._beside = 0  # where in the buffer the frame ends, at the earliest, that they came with

    @property
    def between(self) -> bool:
        """Nothing of a next frame is here."""
        return self._frame is None and self._start == self._end

    @property
    def midway(self) -> bool:
        """A payload has begun and not ended."""
        return self._rest is not None

    def read(self) -> Iterator[Arrived]:
        """``fill``, and the frames that it completed."""
        self.fill()
        while (arrived := self.next()) is not None:
            yield arrived

    def fill(self) -> None:
        """One receive call.

        Raises ``BlockingIOError`` when nothing is there, ``LinkBroken`` at the end of the stream and
        ``ProtocolError`` for what FORMAT.md does not allow.
        """
        rest, end = self._rest, self._end
        try:
            count = self._recv_into(rest if rest is not None else self._buffer[end:] if end else self._buffer)
        except (BlockingIOError, InterruptedError):
            raise BlockingIOError from None
        except OSError as error:
            raise LinkBroken(f"the connection ended: {error.strerror or error}") from None
        if not count:
            raise LinkBroken("the other side closed the connection")
        if len(self._fds) > MAX_FDS:
            raise ProtocolError(f"more than {MAX_FDS} descriptors came beside one frame")
        if rest is not None:
            self._rest = rest[count:] if count < len(rest) else None
            return
        self._end = end + count
        if len(self._fds) > self._known_fds:
            # The kernel glues plain bytes before a message with descriptors, and stops behind it: they are beside
            # the frame that holds the last byte of this call.
            self._known_fds, self._beside = len(self._fds), self._end

    def next(self) -> Arrived | None:
        """The next frame that is here as a whole, and the descriptors beside it."""
        frame = self._frame
        if frame is not None:
            if self._rest is not None:
                return None
            self._frame = None
            check_payload(frame)
            return frame, self._take_fds() if self._fds else ()
        start, end = self._start, self._end
        if start == end:
            return None
        frame, at = parse(self._buffer, start, end, self.limit)
        if frame is None:
            self._make_room(at)
            return None
        self._start = at
        if frame.payload_length and not self._land(frame):
            return None
        fds = self._take_fds() if self._fds and self._start >= self._beside else ()
        if self._start == end:
            self._start = self._end = 0
        return frame, fds

    def _land(self, frame: Frame) -> bool:
        """Put what is here of the payload in place; whether the frame is complete, or the rest is awaited."""
        length = frame.payload_length
        target = self._landing(frame)
        here = min(length, self._end - self._start)
        target[:here] = self._buffer[self._start : self._start + here]
        self._start += here
        frame.payload = target
        if here < length:
            self._frame, self._rest = frame, target[here:]
            self._start = self._end = 0
            return False
        check_payload(frame)
        return True

    def _take_fds(self) -> tuple[int, ...]:
        fds = tuple(self._fds)
        self._fds.clear()
        self._known_fds = self._beside = 0
        return fds

    def _make_room(self, needed: int) -> None:
        """Move the incomplete frame to the front; the buffer grows only to what a checked header announced."""
        here = self._end - self._start
        if needed > len(self._buffer):
            larger = memoryview(bytearray(needed))
            larger[:here] = self._buffer[self._start : self._end]
            self._buffer = larger
        elif self._start:
            self._buffer[:here] = bytes(self._buffer[self._start : self._end])
        self._beside = max(0, self._beside - self._start)
        self._start, self._end = 0, here

    def close(self) -> None:
        self._landing = _nowhere  # no cycle with who owns this: its buffer goes at once, not with the next collection


def _nowhere(frame: Frame) -> memoryview:
    raise LinkBroken("this side has closed the connection")
