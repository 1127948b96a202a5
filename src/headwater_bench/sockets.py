"""The ceilings made of a bare socket: what Python itself needs for the same bytes there and back."""

from __future__ import annotations

import socket
import time

from headwater_bench.child import Child

LOOPBACK = "127.0.0.1"


class Echo:
    """The child's side: receives ``size`` bytes into a preallocated buffer, then sends them all back."""

    def __init__(self, fd: int | None = None, port: int | None = None) -> None:
        if fd is not None:
            self._socket = socket.socket(fileno=fd)
        else:
            self._socket = socket.create_connection((LOOPBACK, port), timeout=30)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(None)

    def bounce(self, size: int, times: int) -> int:
        buffer = memoryview(bytearray(size))
        for _ in range(times):
            receive_all(self._socket, buffer)
            self._socket.sendall(buffer)
        return times


def receive_all(link: socket.socket, buffer: memoryview) -> None:
    """Fill ``buffer``; ``ConnectionError`` if the other side ends first."""
    got = 0
    while got < len(buffer):
        count = link.recv_into(buffer[got:])
        if not count:
            raise ConnectionError("the echo process closed the socket")
        got += count


class RawSocket:
    """A connected pair: this process and an ``Echo`` child, over a unix socket pair or TCP on the loopback."""

    def __init__(self, transport: str, size: int) -> None:
        self._out = memoryview(bytearray(size))
        self._back = memoryview(bytearray(size))
        self._link, self._child = _unix_pair() if transport == "local" else _tcp_pair()

    @property
    def pid(self) -> int:
        """The child's process."""
        return self._child.pid

    def round_trips(self, times: int) -> list[float]:
        """Seconds of each of ``times`` round trips of ``size`` bytes."""
        self._child.tell("bounce", size=len(self._out), times=times)
        found = [self._round_trip() for _ in range(times)]
        self._child.answer()
        return found

    def _round_trip(self) -> float:
        start = time.perf_counter()
        self._link.sendall(self._out)
        receive_all(self._link, self._back)
        return time.perf_counter() - start

    def close(self) -> None:
        self._link.close()
        self._child.close()


def _unix_pair() -> tuple[socket.socket, Child]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        return ours, Child("echo", pass_fds=[theirs.fileno()], fd=theirs.fileno())


def _tcp_pair() -> tuple[socket.socket, Child]:
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(30)
        child = Child("echo", port=listener.getsockname()[1])
        link, _ = listener.accept()
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link, child
