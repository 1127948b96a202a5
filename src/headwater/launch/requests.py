"""What the launcher itself is asked: the signals that it gets, and the same from its callers."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


class Requests:
    """The numbers of signals that have come and were not yet acted upon, the oldest first.

    ``wake`` is called at each, from whatever thread or signal handler it comes.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._numbers: deque[int] = deque()
        self._wake = wake

    def add(self, number: int) -> None:
        """Act as upon a signal. From any thread."""
        self._numbers.append(number)
        self._wake()

    @property
    def first(self) -> int | None:
        """The oldest, which stays."""
        return self._numbers[0] if self._numbers else None

    def take(self) -> int | None:
        """The oldest, if there is one."""
        return self._numbers.popleft() if self._numbers else None

    def clear(self) -> bool:
        """Take all; whether there was one."""
        came = bool(self._numbers)
        self._numbers.clear()
        return came

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP become requests (main thread only; elsewhere nothing changes)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup the job outlives the terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.add(number)
