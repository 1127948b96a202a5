"""Bytes of a stream become frames; payloads go straight to where they belong.

Used by both ends of a socket. A header is checked before the memory for its payload is asked for.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Callable, Iterator

from headwater.errors import LinkBroken, ProtocolError
from headwater.wire.frames import MAX_BODY, Frame, check_payload, parse

BUFFER = 64 << 10  # bytes: headers and small frames; at most this much of a payload is copied once more
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)  # a number: to combine enums takes as long as to receive
_FDS = 4  # descriptors beside one frame, at most
_SPACE = socket.CMSG_SPACE(_FDS * array.array("i").itemsize)

Arrived = tuple[Frame, tuple[int, ...]]


class Receiver:
    """``landing(frame)`` tells where the payload behind a header goes, or raises; ``limit`` bounds bodies."""

    def __init__(self, sock: socket.socket, landing: Callable[[Frame], memoryview], limit: int = MAX_BODY) -> None:
        self.limit = limit
        self._sock = sock
        self._landing = landing
        self._unix = sock.family == socket.AF_UNIX
        self._buffer = memoryview(bytearray(BUFFER))
        self._start = self._end = 0
        self._frame: Frame | None = None  # its payload is arriving
        self._rest: memoryview | None = None  # where the next bytes of it go
        self._fds: list[int] = []
        self._beside = 0  # where in the buffer the frame ends, at the earliest, that they came with

    @property
    def between(self) -> bool:
        """Nothing of a next frame is here."""
        return self._frame is None and self._start == self._end

    @property
    def midway(self) -> bool:
        """A payload has begun and not ended."""
        return self._rest is not None

    def read(self, flags: int = 0) -> Iterator[Arrived]:
        """One receive call (with ``MSG_…`` flags); yields the frames that it completed.

        A frame is looked at when the one before it has been dealt with, so ``landing`` may rely on what that one said.

        Raises ``BlockingIOError`` when nothing is there, ``LinkBroken`` at the end of the stream and
        ``ProtocolError`` for what FORMAT.md does not allow.
        """
        if self._rest is not None:
            yield from self._read_payload(self._rest, flags)
            return
        before = len(self._fds)
        self._end += self._recv(self._buffer[self._end :], flags)
        if len(self._fds) > before:
            # The kernel glues plain bytes before a message with descriptors, and stops behind it: they are beside
            # the frame that holds the last byte of this call.
            self._beside = self._end
        while self._frame is None and self._end > self._start:
            frame, at = parse(self._buffer, self._start, self._end, self.limit)
            if frame is None:
                self._make_room(at)
                break
            self._start = at
            if self._take(frame):
                yield frame, self._take_fds() if self._start >= self._beside else ()
        if self._start == self._end:
            self._start = self._end = 0

    def _take(self, frame: Frame) -> bool:
        """Put what is here of the payload in place; whether the frame is complete, or the rest is awaited."""
        length = frame.payload_length
        if length:
            target = self._landing(frame)
            here = min(length, self._end - self._start)
            target[:here] = self._buffer[self._start : self._start + here]
            self._start += here
            frame.payload = target
            if here < length:
                self._frame, self._rest = frame, target[here:]
                return False
            check_payload(frame)
        return True

    def _read_payload(self, rest: memoryview, flags: int) -> Iterator[Arrived]:
        count = self._recv(rest, flags)
        if count < len(rest):
            self._rest = rest[count:]
            return
        frame, self._frame, self._rest = self._frame, None, None
        assert frame is not None
        check_payload(frame)
        yield frame, self._take_fds()

    def _recv(self, target: memoryview, flags: int) -> int:
        try:
            if self._unix:
                count, extra, _, _ = self._sock.recvmsg_into([target], _SPACE, flags | _CLOEXEC)
                for level, kind, data in extra:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        got = array.array("i")
                        got.frombytes(data[: len(data) - len(data) % got.itemsize])
                        self._fds += got
            else:
                count = self._sock.recv_into(target, 0, flags)
        except (BlockingIOError, InterruptedError):
            raise BlockingIOError from None
        except OSError as error:
            raise LinkBroken(f"the connection ended: {error.strerror or error}") from None
        if len(self._fds) > _FDS:
            raise ProtocolError(f"more than {_FDS} descriptors came beside one frame")
        if count == 0:
            raise LinkBroken("the other side closed the connection")
        return count

    def _take_fds(self) -> tuple[int, ...]:
        if not self._fds:
            return ()
        fds, self._fds, self._beside = tuple(self._fds), [], 0
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
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds = []
        self._landing = _nowhere  # no cycle with who owns this: its buffer goes at once, not with the next collection


def _nowhere(frame: Frame) -> memoryview:
    raise LinkBroken("this side has closed the connection")


def descriptors(fds: tuple[int, ...]) -> list[tuple[int, int, bytes]]:
    """The ancillary data that carries ``fds`` beside a frame."""
    if not fds:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
