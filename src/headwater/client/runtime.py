"""Time and threads of a client, so that a simulator can have its own."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from headwater import interrupts

LAST = 2.0  # seconds that a thread has to end


class Runtime(Protocol):
    """What a client needs of the machine it runs on."""

    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
    def every(self, period: float, act: Callable[[], None]) -> Callable[[], None]: ...
    def token(self) -> int: ...
    def lock(self) -> AbstractContextManager[object]: ...


class Threads:
    """The real one."""

    now = staticmethod(time.monotonic)
    """Seconds; only differences mean anything."""

    def sleep(self, seconds: float) -> None:
        interrupts.interruptible(time.sleep, seconds)

    def every(self, period: float, act: Callable[[], None]) -> Callable[[], None]:
        """Call ``act`` every ``period`` seconds on a thread, until the returned function is called, which ends it."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(period):
                act()

        def end() -> None:
            stop.set()
            if thread is not threading.current_thread():
                thread.join(LAST)

        thread = threading.Thread(target=beat, name="headwater-heartbeat", daemon=True)
        thread.start()
        return end

    def lock(self) -> AbstractContextManager[object]:
        """A lock between this client's threads."""
        return threading.Lock()

    def token(self) -> int:
        """63 random bits: a session's number, which nobody else guesses."""
        return secrets.randbits(63)
