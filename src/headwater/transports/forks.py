"""A forked child is no member of the cluster: it lets go of its parent's connections without a word on them.

Whatever it would say on them, its parent would seem to have said. It sees parameters as they were when it was forked,
as of any other memory: they are copied before its parent goes on, but not for the workers of a DataLoader, which read
none and are many.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import types
import weakref
from typing import Protocol

from headwater.errors import UsageError


class Inherited(Protocol):
    """What a child gets with its parent's memory, and must not use as its parent does."""

    def abandon(self) -> None: ...


_COPIED = 60.0  # seconds that a child has to copy what it sees of its parent
_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()
_kept: weakref.WeakSet[Inherited] = weakref.WeakSet()
_forks: dict[int, _Fork] = {}  # by the thread that forks
_parent = 0  # the process that this one was forked from, if that had connections


def watch(what: Inherited) -> None:
    """``what.abandon()`` is called in every forked child. It must take no lock: whoever has it is not there."""
    _inherited.add(what)


def keep(what: Inherited) -> None:
    """The same, but while the parent waits, and not in a DataLoader's workers: ``what`` is memory to be copied."""
    _kept.add(what)


def refusal() -> UsageError:
    """What a connection is broken by in a child."""
    return UsageError(
        f"this process was forked from process {_parent}, whose connections to the cluster are not its own; nothing "
        "was sent. It can read parameters and save them; train in the parent, or start each worker with headwater run"
    )


class _Fork:
    """One fork, while it happens; ``copies``: memory is copied in the child, for which the parent waits."""

    def __init__(self) -> None:
        self.copies = bool(_kept) and not _feeds_data()
        self._ends = os.pipe() if self.copies else ()

    def in_parent(self) -> None:
        for end in self._ends[1:]:
            os.close(end)
        for end in self._ends[:1]:
            select.select([end], [], [], _COPIED)  # until the child closes its end, or dies
            os.close(end)

    def in_child(self) -> None:
        for end in self._ends:
            os.close(end)


def _feeds_data() -> bool:
    """Whether a DataLoader forks."""
    frame: types.FrameType | None = sys._getframe()  # noqa: SLF001 - there is no other way to the frames
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            return True
        frame = frame.f_back
    return False


def _before() -> None:
    _forks[threading.get_ident()] = _Fork()


def _in_parent() -> None:
    _forks.pop(threading.get_ident()).in_parent()


def _in_child() -> None:
    global _parent
    fork = _forks[threading.get_ident()]
    _forks.clear()
    found, kept = list(_inherited), list(_kept)
    _inherited.clear()
    _kept.clear()
    if found:
        _parent = os.getppid()
    for each in [*found, *(kept if fork.copies else ())]:
        each.abandon()
    fork.in_child()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
