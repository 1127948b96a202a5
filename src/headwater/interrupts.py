"""Ctrl-C, alarms and other signals, handled where everything is whole.

Python runs a signal's handler in the main thread between any two of its steps, and what the handler raises
(``KeyboardInterrupt``) ends whatever runs there: a frame half sent, a step half counted, an in-process server in the
middle of one. So no handler runs inside a ``deferred`` function. What came meanwhile is handled when it ends, and
wherever it waits (``interruptible``): there it may raise what a time-out could raise as well.

Handlers are put aside for the moment, not wrapped for good: whoever looks at or sets them in between finds his own.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from _thread import get_ident
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:

    def getsignal(number: int) -> Any: ...
    def set_handler(number: int, handler: Any) -> Any: ...
    def interrupt_main(number: int) -> None: ...
else:  # the module ``signal`` turns numbers into enums and back, which takes longer than the calls
    from _signal import getsignal
    from _signal import signal as set_handler
    from _thread import interrupt_main

P = ParamSpec("P")
T = TypeVar("T")

_NUMBERS = tuple(sorted(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}))


class _Handlers:
    """The Python handlers of this process. ``held``: they are put aside; only the main thread asks and sets."""

    def __init__(self) -> None:
        self.held = False
        self.thread = threading.main_thread().ident
        self._came: list[int] = []
        self._seen: list[Any] = []  # of all signals, when last looked at
        self._numbers: tuple[int, ...] = ()  # of the signals that have a Python handler
        self._own: tuple[Any, ...] = ()  # theirs
        self._notes: list[Any] = []  # what stands there meanwhile
        self._note = self._came_in  # one object, to be known again

    def _came_in(self, number: int, _frame: object) -> None:
        self._came.append(number)

    def hold(self) -> None:
        """Put them aside. A handler that is due may raise instead; then they are where they were."""
        seen = list(map(getsignal, _NUMBERS))
        if seen != self._seen:
            self._look(seen)
        try:
            self.held = True
            list(map(set_handler, self._numbers, self._notes))  # one call: nothing runs between two of them
        except BaseException:
            self.held = False
            self._put_back()
            raise

    def hold_again(self) -> None:
        """``hold`` whatever handlers raise meanwhile; the last of it is raised when they are put aside."""
        raised: BaseException | None = None
        while True:
            try:
                self.hold()
                break
            except BaseException as error:  # noqa: BLE001 - raised below
                raised = error
        if raised is not None:
            raise raised

    def release(self) -> None:
        """Put them back, and run those of signals that came meanwhile; what they raise is raised."""
        self.held = False
        try:
            self._put_back()
        except BaseException:
            self._put_back()  # one that was back already raised before all were
            self._deliver()
            raise
        if self._came:
            self._deliver()

    def _deliver(self) -> None:
        due = map(interrupt_main, self._came)  # as if they came now
        try:
            list(due)  # one call: all are due before the first one's handler raises
        finally:
            self._came.clear()

    def _put_back(self) -> None:
        if list(map(getsignal, self._numbers)) == self._notes:
            list(map(set_handler, self._numbers, self._own))
            return
        for number, own in zip(self._numbers, self._own, strict=True):
            if getsignal(number) is self._note:  # else somebody has set another one meanwhile
                set_handler(number, own)

    def _look(self, seen: list[Any]) -> None:
        before = dict(zip(self._numbers, self._own, strict=True))
        found = {n: before[n] if h is self._note else h for n, h in zip(_NUMBERS, seen, strict=True) if callable(h)}
        self._numbers, self._own = tuple(found), tuple(found.values())
        self._notes = [self._note] * len(found)
        self._seen = seen

    def forked(self) -> None:
        """In a child that another thread than the main one may have forked: that one is the main thread now."""
        self.thread = get_ident()
        self.held = False
        self._came.clear()
        self._put_back()


_handlers = _Handlers()
os.register_at_fork(after_in_child=_handlers.forked)


def deferred(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: signal handlers wait until ``function`` is done or waits. About 2 µs for the outermost of them."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        if _handlers.held or get_ident() != _handlers.thread:
            return function(*args, **kwargs)
        _handlers.hold()
        try:
            return function(*args, **kwargs)
        finally:
            _handlers.release()

    return inside


def interruptible(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call what blocks, or is the caller's own code: inside it, and at its ends, handlers run and may raise.

    It must be one thing that an exception leaves undone or done, and whoever calls it in a state that may be left.
    """
    if not _handlers.held or get_ident() != _handlers.thread:
        return function(*args, **kwargs)
    try:
        _handlers.release()
        return function(*args, **kwargs)
    finally:
        _handlers.hold_again()


def check() -> None:
    """A point at which handlers may run, for loops that never block for long."""
    interruptible(_nothing)


def _nothing() -> None:
    pass
