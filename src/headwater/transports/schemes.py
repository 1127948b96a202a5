"""What the scheme of an address stands for: how its channels come to be. The one place where kinds are registered.

An encrypted channel is a file with a ``Channel``, and a line here (or a call of ``register``).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from headwater.errors import AddressInUse, UsageError
from headwater.transports import address as addresses
from headwater.transports.address import Address
from headwater.transports.channel import Channel, LocalChannel, SocketChannel

_BACKLOG = 128  # connections that wait to be accepted


class Listener:
    """A bound socket. ``address`` is where it is reached, with the port that it got."""

    def __init__(self, sock: socket.socket, address: Address, channel: Callable[[socket.socket], Channel]) -> None:
        sock.setblocking(False)
        self.address = address
        self._sock = sock
        self._channel = channel

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> Channel:
        """Raises ``OSError``."""
        return self._channel(self._sock.accept()[0])

    def close(self) -> None:
        self._sock.close()


class Scheme(Protocol):
    """Both raise ``OSError``. The token is not their matter: whoever speaks over the channel proves it."""

    def listen(self, address: Address) -> Listener: ...
    def connect(self, address: Address, timeout: float) -> Channel: ...


class Tcp:
    """``SCHEME://HOST:PORT``; ``channel`` makes of a connected socket what the two ends speak through."""

    def __init__(self, channel: Callable[[socket.socket], Channel]) -> None:
        self._channel = channel

    def listen(self, address: Address) -> Listener:
        sock = socket.socket(_family(address), socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address.host, address.port))
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
        return Listener(sock, replace(address, port=sock.getsockname()[1]), self._channel)

    def connect(self, address: Address, timeout: float) -> Channel:
        return self._channel(_connected(_family(address), (address.host, address.port), timeout))


class Local:
    """``local://NAME``: an abstract unix socket."""

    def listen(self, address: Address) -> Listener:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind("\0" + address.host)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
        return Listener(sock, address, LocalChannel)

    def connect(self, address: Address, timeout: float) -> Channel:
        return LocalChannel(_connected(socket.AF_UNIX, "\0" + address.host, timeout))


_SCHEMES: dict[str, Scheme] = {"tcp": Tcp(SocketChannel), "local": Local()}


def register(name: str, scheme: Scheme) -> None:
    """Let ``NAME://HOST:PORT`` stand for ``scheme``, in this process."""
    _SCHEMES[name] = scheme
    addresses.PORTED.add(name)


def scheme_of(address: Address) -> Scheme:
    """Raises ``UsageError``."""
    found = _SCHEMES.get(address.scheme)
    if found is None:
        raise UsageError(f"nothing is sent or received over {address.scheme}://")
    return found


def listen(address: Address, token: bytes | None) -> Listener:
    """Raises ``AddressInUse``, or ``UsageError`` for an open port without a token."""
    if not address.loopback and not token:
        raise UsageError(
            f"{address} can be reached from other hosts and no token is set; nothing was bound. "
            "Set HEADWATER_TOKEN or HEADWATER_TOKEN_FILE, or listen on 127.0.0.1"
        )
    try:
        return scheme_of(address).listen(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{address} is in use by another process; choose another port, or 0 for any") from None
        raise UsageError(f"cannot listen on {address}: {error.strerror}") from None


def _connected(family: socket.AddressFamily, where: str | tuple[str, int], timeout: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(where)
    except OSError:
        sock.close()
        raise
    return sock


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET
