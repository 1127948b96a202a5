"""How a process is ended: ever firmer signals. Pure: the time is passed in."""

from __future__ import annotations

import signal
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NEVER = float("inf")
_AFTER_KILL = 10.0
_LAST_WORD = 1.0
"""Seconds that a signal gets before SIGKILL when the user asked again."""


class Escalation:
    """A list of (signal, seconds of grace before the next), begun at time ``now``."""

    def __init__(self, steps: Sequence[tuple[signal.Signals, float]], now: float) -> None:
        self._steps = deque(steps)
        self._due = now
        self._hurried = False

    @property
    def due(self) -> float:
        """When to look again: the next signal is to be sent, or the last has had its time."""
        return self._due

    def over(self, now: float) -> bool:
        """Whether even the last signal has had its time: the kernel itself holds the process."""
        return not self._steps and now >= self._due

    def hurry(self, now: float) -> None:
        """The user asked again: the next signal is due, and the ones after it do not wait for long."""
        self._due, self._hurried = now, True

    def next(self, now: float) -> signal.Signals | None:
        """The signal to send at ``now``, if one is due."""
        if now < self._due or not self._steps:
            return None
        number, grace = self._steps.popleft()
        self._due = now + (min(grace, _LAST_WORD) if self._hurried and self._steps else grace)
        return number


def interrupt(now: float, patience: float, grace: float) -> Escalation:
    """Ctrl-C: ``patience`` seconds to finish cleanly, ``grace`` to obey SIGTERM, then SIGKILL."""
    return Escalation([(signal.SIGINT, patience), (signal.SIGTERM, grace), (signal.SIGKILL, _AFTER_KILL)], now)


def finish(now: float, patience: float) -> Escalation:
    """SIGTERM or SIGHUP to the launcher: ``patience`` seconds to finish cleanly upon SIGTERM, then SIGKILL.

    A batch system that said SIGTERM says SIGKILL next, so there is no third signal between them.
    """
    return terminate(now, patience)


def terminate(now: float, grace: float) -> Escalation:
    """``grace`` seconds to obey SIGTERM, then SIGKILL."""
    return Escalation([(signal.SIGTERM, grace), (signal.SIGKILL, _AFTER_KILL)], now)
