"""What every bench can be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

Transport = Literal["local", "tcp", "inproc"]

MEBIBYTE = 2**20


class Options(msgspec.Struct, frozen=True):
    """``None``: the bench's own default. ``size`` is the table's, ``version`` a publication's, in MB of 2**20 bytes.

    ``reads``, ``seconds``: when a race is over, whichever comes first; its faults are drawn from ``seed``.
    """

    note: Callable[[str], None]
    rounds: int | None = None
    size: int = 64
    transport: Transport | None = None
    servers: int = 2
    version: int = 500
    reads: int | None = None
    seconds: float | None = None
    seed: int = 1

    def transports(self) -> tuple[Transport, ...]:
        return (self.transport,) if self.transport else ("local", "tcp")

    def rounds_or(self, default: int) -> int:
        return default if self.rounds is None else self.rounds
