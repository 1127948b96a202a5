"""A server that its launcher has started ends when the launcher says so, not when somebody signals all processes.

Slurm, systemd and ``kill`` of a process group send SIGTERM to every process of a job. Its workers finish their step
then and save, for which they need the cluster. So SIGTERM counts at once if it is the launcher's; anybody else's, or a
SIGHUP, ends the process only some time later, in case that the launcher does not.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

log = logging.getLogger("headwater")

_LONG = 3600.0
_NUMBERS = (signal.SIGTERM, signal.SIGHUP)


class Outliving:
    """Make it before the process has any other thread: a thread that does not block the signals would get them.

    ``stop``: what is called, from a thread, when it is time. Until somebody sets it the process just ends.
    """

    def __init__(self, seconds: float) -> None:
        self.stop: Callable[[], None] = lambda: os._exit(128 + signal.SIGTERM)
        self._seconds = seconds
        self._launcher = os.getppid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
        threading.Thread(target=self._listen, name="headwater-signals", daemon=True).start()

    def _listen(self) -> None:
        due: float | None = None
        while True:
            left = _LONG if due is None else max(0.0, due - time.monotonic())
            told = signal.sigtimedwait(_NUMBERS, left)
            if told is None and due is None:
                continue
            if told is None or (told.si_pid == self._launcher and told.si_signo == signal.SIGTERM):
                self.stop()
            elif due is None:
                due = time.monotonic() + self._seconds
                log.info(
                    "%s from process %d; the launcher (%d) decides; without a word of it the end is in %g s",
                    signal.Signals(told.si_signo).name, told.si_pid, self._launcher, self._seconds,
                )  # fmt: skip
