"""Gradient memory that a primary shares with followers of the same host: a record is then a doorbell, not a stream.

Two buffers per table take turns. When a follower has accepted the record that used one buffer, it has applied every
record before that, so the other may be written again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwater.errors import NotEnoughMemory
from headwater.transports import memory


@dataclass(slots=True)
class Buffer:
    """``tensor``: uint8, 1-D, of the table's size on this shard. ``last``: the LSN of the last record that used it."""

    table: int
    index: int
    tensor: torch.Tensor
    fd: int
    last: int = 0


class Lending:
    """The buffers of one shard. ``share``: other processes of this host can map them."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._of: dict[int, list[Buffer]] = {}

    def buffer_for(self, table: int, size: int, lsn: int, accepted: int) -> Buffer | None:
        """A buffer for record ``lsn``, if one is free; ``accepted``: the last record that all followers have."""
        buffers = self._of.setdefault(table, [])
        if len(buffers) < 2:
            made = self._make(table, len(buffers), size)
            if made is None:
                return None
            buffers.append(made)
            found = made
        else:
            found, newer = sorted(buffers, key=lambda buffer: buffer.last)
            if accepted < newer.last:
                return None
        found.last = lsn
        return found

    def of(self, tensor: torch.Tensor | None) -> Buffer | None:
        """The buffer that a record's gradient lies in, if it is one."""
        for buffers in self._of.values() if tensor is not None else ():
            for buffer in buffers:
                if buffer.tensor is tensor:
                    return buffer
        return None

    def drop(self, table: int | None = None) -> None:
        """Give the buffers of a table, or all, back."""
        for number in [table] if table is not None else list(self._of):
            for buffer in self._of.pop(number, ()):
                if buffer.fd >= 0:
                    memory.close_all((buffer.fd,))

    def _make(self, table: int, index: int, size: int) -> Buffer | None:
        if not self._share:
            return Buffer(table, index, torch.zeros(size, dtype=torch.uint8, device="cpu"), -1)
        try:
            fd = memory.create(f"log.{table}.{index}", size)
        except NotEnoughMemory:
            return None
        region = memory.Region([memory.Piece(fd, 0, size)])
        return Buffer(table, index, torch.frombuffer(region.buffer, dtype=torch.uint8)[:size], fd)
