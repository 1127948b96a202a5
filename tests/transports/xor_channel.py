"""A toy of an encrypted channel: a new file and one line of registration. Nothing of it is secret.

``python -m tests.transports.xor_channel --role …`` is a server's process that knows it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from headwater.server.__main__ import main
from headwater.transports.channel import SocketChannel
from headwater.transports.schemes import Tcp, register

SCHEME = "xor+tcp"
_FLIPPED = bytes(byte ^ 0xA5 for byte in range(256))
_MOST = 1 << 18  # bytes of one call


class XorChannel(SocketChannel):
    """Reads ahead, as channels with records do: what is left over no poll shows. ``wire``: what it gave to sockets."""

    wire: bytearray | None = None

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._ahead = memoryview(bytearray(_MOST))
        self._left = self._ahead[:0]

    def recv_into(self, into: memoryview) -> int:
        if not self._left:
            count = super().recv_into(self._ahead)
            self._left = memoryview(bytes(self._ahead[:count]).translate(_FLIPPED))
        count = min(len(into), len(self._left))
        into[:count] = self._left[:count]
        self._left = self._left[count:]
        self.pending = bool(self._left)
        return count

    def send(self, parts: Sequence[memoryview | bytes], fds: tuple[int, ...] = (), *, wait: bool = False) -> int:
        assert not fds
        hidden = b"".join(part[:_MOST] for part in parts)[:_MOST].translate(_FLIPPED)
        sent = super().send((hidden,), wait=wait)
        if XorChannel.wire is not None:
            XorChannel.wire += hidden[:sent]
        return sent


def plain(hidden: bytes) -> bytes:
    return hidden.translate(_FLIPPED)


register(SCHEME, Tcp(XorChannel))

if __name__ == "__main__":
    sys.exit(main())
