"""A channel: one connected stream of bytes, and on one host descriptors beside them. Everything speaks through it.

Which kind of channel an address asks for is its scheme's matter (``schemes.py``).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

SEND = 60  # seconds in which the other side must take some bytes
MAX_FDS = 4  # descriptors beside one frame
_SPACE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_NOW = int(socket.MSG_DONTWAIT)  # numbers: to combine enums takes as long as to receive
_NOW_CLOEXEC = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)


class Channel(Protocol):
    """``recv_into`` and ``send`` do not wait, unless ``settimeout`` said so: ``BlockingIOError`` where they would.

    Both may raise any other ``OSError``, after which the channel is of no use. A handshake of the channel's own is
    done in ``Scheme.connect`` on one side, and inside the first calls of ``recv_into`` on the other.
    """

    shares: bool  # descriptors can be sent
    pending: bool  # bytes are here already, of which polling ``fileno`` shows nothing
    fds: list[int]  # descriptors that have come; whoever takes them off the list closes them

    def fileno(self) -> int: ...

    def settimeout(self, seconds: float) -> None:
        """From now on calls wait as long for the other side, and raise ``TimeoutError`` then. 0: they do not wait."""

    def recv_into(self, into: memoryview) -> int:
        """Some bytes, as many as are here and fit; 0 at the end of the stream."""

    def send(self, parts: Sequence[memoryview | bytes], fds: tuple[int, ...] = (), *, wait: bool = False) -> int:
        """How many bytes were taken; with the first of them the descriptors. ``wait``: until some are, or for ``SEND``.

        After ``BlockingIOError`` the same parts must come again.
        """

    def shut(self) -> None:
        """No more bytes in either direction: a thread that waits in ``send``, and the other side, notice."""

    def close(self) -> None:
        """Give the descriptor back, and those that have come."""

    def abandon(self) -> None:
        """Close in a forked child: the parent goes on with the connection, nothing may be said on it."""


class SocketChannel:
    """The bytes of a connected socket, as they are."""

    shares = False
    pending = False

    def __init__(self, sock: socket.socket) -> None:
        self.fds: list[int] = []
        self._sock = sock
        self._recv_into = sock.recv_into
        self._send, self._sendmsg = sock.send, sock.sendmsg
        sock.settimeout(None)  # the calls say themselves whether they wait
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND, 0))
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._sock.fileno()

    def settimeout(self, seconds: float) -> None:
        self._sock.settimeout(seconds or None)

    def recv_into(self, into: memoryview) -> int:
        return self._recv_into(into, 0, _NOW)

    def send(self, parts: Sequence[memoryview | bytes], fds: tuple[int, ...] = (), *, wait: bool = False) -> int:
        flags = 0 if wait else _NOW
        if len(parts) == 1 and not fds:
            return self._send(parts[0], flags)
        return self._sendmsg(parts, descriptors(fds), flags)

    def shut(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.fds.clear()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._sock.detach())  # without a shutdown, which would be the parent's too


class LocalChannel(SocketChannel):
    """A unix socket: both ends are on one host, and can pass memory to each other."""

    shares = True

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._recvmsg_into = sock.recvmsg_into

    def recv_into(self, into: memoryview) -> int:
        count, beside, _, _ = self._recvmsg_into((into,), _SPACE, _NOW_CLOEXEC)
        if beside:
            self._keep(beside)
        return count

    def _keep(self, beside: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in beside:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                got = array.array("i")
                got.frombytes(data[: len(data) - len(data) % got.itemsize])
                self.fds += got


def channel_of(sock: socket.socket) -> SocketChannel:
    """The channel of a connected socket that speaks plainly."""
    return LocalChannel(sock) if sock.family == socket.AF_UNIX else SocketChannel(sock)


def send_all(channel: Channel, data: bytes) -> None:
    """Send from a thread that may wait. Raises ``OSError``."""
    left = memoryview(data)
    while left:
        left = left[channel.send([left], wait=True) :]


def descriptors(fds: tuple[int, ...]) -> list[tuple[int, int, bytes]]:
    """The ancillary data that carries ``fds`` beside a frame."""
    if not fds:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
