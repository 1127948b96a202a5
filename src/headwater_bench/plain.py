"""The ceilings of ``bench publish``: one plain copy, and as many bytes one way over a bare socket; without torch."""

from __future__ import annotations

import socket
import time

import numpy as np

from headwater_bench.child import Child
from headwater_bench.sockets import LOOPBACK, receive_all


class Copier:
    """One thread that copies between two warm buffers: the ceiling."""

    def __init__(self, nbytes: int) -> None:
        self._from, self._to = np.ones(nbytes, dtype=np.uint8), np.ones(nbytes, dtype=np.uint8)

    def copy(self) -> float:
        """Seconds of one copy."""
        start = time.perf_counter()
        np.copyto(self._to, self._from)
        return time.perf_counter() - start


class RawSource:
    """Sends ``size`` bytes of warm memory over TCP whenever it is asked: the raw socket of a fetch."""

    def __init__(self, port: int, size: int) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), timeout=30)
        self._socket.settimeout(None)
        self._data = memoryview(bytearray(size))

    def send(self) -> int:
        self._socket.sendall(self._data)
        return len(self._data)


class Raw:
    """The receiving end: warm memory, and a ``RawSource`` in a process of its own."""

    def __init__(self, size: int) -> None:
        self._into = memoryview(bytearray(size))
        with socket.create_server((LOOPBACK, 0)) as listener:
            listener.settimeout(30)
            self._source = Child("source", port=listener.getsockname()[1], size=size)
            self._link, _ = listener.accept()
        self._link.settimeout(None)

    def receive(self) -> float:
        """Seconds until all bytes are here."""
        start = time.perf_counter()
        self._source.tell("send")
        receive_all(self._link, self._into)
        seconds = time.perf_counter() - start
        self._source.answer()
        return seconds

    def close(self) -> None:
        self._link.close()
        self._source.close()
