"""A port kept free for somebody else: for ``torch.distributed``'s store, which rank 0 of a job listens with."""

from __future__ import annotations

import socket


class ReservedPort:
    """``number`` is free on every address of this machine, and stays so until ``close``, but for ``SO_REUSEADDR``.

    Raises ``OSError``.
    """

    def __init__(self) -> None:
        self._sock = _bound()
        self.number: int = self._sock.getsockname()[1]

    def close(self) -> None:
        """Safe to call twice."""
        self._sock.close()


def _bound() -> socket.socket:
    for family, host in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((host, 0))
        except OSError:
            sock.close()
            if family == socket.AF_INET:
                raise
        else:
            return sock
    raise OSError("no family of internet addresses can be used on this machine")
