"""A copy of memory as it was at one moment, made while its owner goes on writing.

At ``begin`` nothing is copied. From then on two parties copy: a thread of the cut's own, block after block; and the
owner, who calls ``before_write`` and so copies what it is about to overwrite and nobody has copied yet. Each block is
claimed by one of them, so both share the work and the owner waits for at most one block of the thread's.

Fresh memory is far slower to write than used memory (the kernel must find and clear its pages), so the buffers can be
made ready before the moment: ``prepare``.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headwater.errors import ClusterError, DeadlineExceeded, InternalError

BLOCK = 4 << 20
"""Bytes of each region that are copied at a time."""

_TOUCH = 256 << 10
"""Bytes of fresh memory that are written at a time: what the owner may have to wait for."""

Allocate = Callable[[int], torch.Tensor]
"""Makes that many bytes: uint8, 1-D, of any content."""

_TODO, _BUSY, _DONE = range(3)


def anonymous(size: int) -> torch.Tensor:
    """Memory of its own, in huge pages where the kernel has them: a tenth of the page faults."""
    if not size:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    room = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Loose:
    """A tensor that is no region: it changes only when bytes ``lo:hi`` of the regions do."""

    lo: int
    hi: int
    tensor: torch.Tensor


class Cut:
    """A copy of ``named`` (uint8, 1-D, all of one length: bytes ``lo:hi`` of all of them change together).

    ``before_write``, ``begin`` and ``advance`` are the owner's, from one thread; the rest may be called from any.
    Without ``prepare`` and with ``begin(thread=False)`` there is no thread, and every copy is made by ``advance``.
    """

    def __init__(
        self, named: Mapping[str, torch.Tensor], allocate: Allocate = anonymous, block: int | None = None
    ) -> None:
        sizes = {len(region) for region in named.values()}
        if len(sizes) > 1:
            raise InternalError(f"the regions of a cut differ in length: {sorted(sizes)}")
        self.size = sizes.pop() if sizes else 0
        self.copies = {name: allocate(self.size) for name in named}
        self.loose: list[torch.Tensor] = []
        self.pause = 0.0  # seconds that the owner has spent here
        self._block = block = block or BLOCK
        self._pairs = [(self.copies[name].numpy(), region.numpy()) for name, region in named.items()]
        self._rest: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        self._blocks = -(-self.size // block)
        self._marks = bytearray(self._blocks)
        self._left = self._blocks
        self._cursor = 0
        self._begun = False
        self._dropped = False
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._touched = 0

    # ---- the moment ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Let the thread make the buffers ready. Returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="headwater-cut", daemon=True)
            self._thread.start()

    @property
    def prepared(self) -> bool:
        """Whether the buffers are ready, so that ``begin`` now costs least; or will never be."""
        return self._touched == self._blocks or self._error is not None

    def begin(self, loose: Sequence[Loose] = (), *, thread: bool = True) -> None:
        """This is the moment: what the memory holds now is what the cut will hold."""
        since = time.perf_counter()
        with self._turn:
            self.loose = [torch.empty(each.tensor.shape, dtype=each.tensor.dtype, device="cpu") for each in loose]
            self._rest = [(x.lo, x.hi, copy, x.tensor) for x, copy in zip(loose, self.loose, strict=True)]
            self._marks.extend(bytes(len(loose)))
            self._left += len(loose)
            self._begun = True
            self._turn.notify_all()
        if thread:
            self.prepare()
        self.pause += time.perf_counter() - since

    def before_write(self, lo: int, hi: int) -> None:
        """Bytes ``lo:hi`` of every region are about to be overwritten: what is not copied of them is copied now."""
        if not self._begun or not self._left:
            return
        since = time.perf_counter()
        wanted = list(range(lo // self._block, min(-(-hi // self._block), self._blocks)))
        wanted += [self._blocks + i for i, (a, b, _, _) in enumerate(self._rest) if a < hi and lo < b]
        for unit in wanted:
            if self._claim(unit):
                self._copy(unit)
        with self._turn:  # what the thread has in hand
            while any(self._marks[unit] != _DONE for unit in wanted) and self._error is None:
                self._turn.wait()
        self.pause += time.perf_counter() - since

    def advance(self, units: int = 1) -> int:
        """Copy this many more blocks, here and now. How many are left."""
        for _ in range(units):
            unit = self._next()
            if unit is None:
                break
            self._copy(unit)
        return self._left

    # ---- afterwards ------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether ``copies`` and ``loose`` hold all of it."""
        return self._begun and not self._left

    def wait(self, timeout: float | None = None) -> None:
        """Until all is copied. Raises ``DeadlineExceeded``, ``ClusterError`` (dropped) or what the thread failed of."""
        with self._turn:
            if not self._turn.wait_for(lambda: self.done or self._dropped or self._error is not None, timeout):
                raise DeadlineExceeded(f"{self._left} blocks are still to be copied after {timeout} s")
        if self._error is not None:
            raise self._error
        if self._dropped:
            raise ClusterError("it was given up")

    def drop(self) -> None:
        """Nobody wants it any more: the thread ends, ``before_write`` does nothing, the memory goes."""
        with self._turn:
            self._dropped, self._left, self._begun = True, 0, False
            self._turn.notify_all()
        self.release()

    def release(self) -> None:
        """Give the memory back; the thread, if it still copies, keeps what it needs until it ends."""
        self.copies, self.loose = {}, []
        self._pairs, self._rest = [], []

    # ---- both sides ------------------------------------------------------------------------------

    def _claim(self, unit: int) -> bool:
        with self._turn:
            if self._marks[unit] != _TODO:
                return False
            self._marks[unit] = _BUSY
            return True

    def _next(self) -> int | None:
        """Claim the first unit that nobody has taken, of those after the last."""
        with self._turn:
            found = self._marks.find(_TODO, self._cursor)
            if found < 0 or self._dropped:
                return None
            self._cursor = found + 1
            self._marks[found] = _BUSY
            return found

    def _copy(self, unit: int) -> None:
        # numpy: one plain memcpy without the lock of the interpreter; torch would call all its threads for it.
        pairs = self._pairs
        if unit < self._blocks:
            lo, hi = unit * self._block, min((unit + 1) * self._block, self.size)
            for copy, region in pairs:
                np.copyto(copy[lo:hi], region[lo:hi])
        else:
            _, _, into, tensor = self._rest[unit - self._blocks]
            np.copyto(_flat(into).numpy(), _flat(tensor).numpy())
        with self._turn:
            self._marks[unit] = _DONE
            self._left -= 1
            self._turn.notify_all()

    def _run(self) -> None:
        try:
            self._touch()
            with self._turn:
                self._turn.wait_for(lambda: self._begun or self._dropped)
            while (unit := self._next()) is not None:
                self._copy(unit)
        except BaseException as error:  # noqa: BLE001 - whoever waits is told
            with self._turn:
                self._error = error
                self._turn.notify_all()

    def _touch(self) -> None:
        """Write to every page once. A block is claimed meanwhile: zeros must not come after a copy."""
        pairs = self._pairs
        for block in range(self._blocks):
            with self._turn:
                if self._over():
                    return
                self._marks[block] = _BUSY
            for copy, _ in pairs:
                self._clear(copy[block * self._block : (block + 1) * self._block])
            with self._turn:
                over = self._over()
                if not over:
                    self._marks[block] = _TODO
            if over:
                self._copy(block)
                return
            self._touched = block + 1

    def _over(self) -> bool:
        return self._begun or self._dropped

    def _clear(self, memory: np.ndarray) -> None:
        for at in range(0, len(memory), _TOUCH):
            if self._over():
                return
            memory[at : at + _TOUCH].fill(0)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes in C order; a view if it is contiguous."""
    return tensor.detach().reshape(-1).view(torch.uint8)
