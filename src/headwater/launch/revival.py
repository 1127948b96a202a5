"""Whether, and when, a process that ended is started again. Pure: the times are passed in."""

from __future__ import annotations

FRESH = 2.0
"""Seconds: who ends sooner than this after its start has not begun to work."""
TRIES = 3
"""Ends right after the start, in a row, that show that another try would end the same way."""
_PAUSE = 0.5


class Revival:
    """The starts and ends of one place in the cluster (``s1``), whatever process fills it.

    ``most``: how often it may be started again; ``None``: without limit.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self.restarts = 0
        self.stillborn = 0

    def ended(self, lived: float, now: float) -> float | None:
        """When to start it again, at ``now`` or a little later; ``None``: never.

        ``lived``: seconds for which the process was at work, 0 if it never was.
        """
        self.stillborn = self.stillborn + 1 if lived < FRESH else 0
        if self.stillborn >= TRIES or (self._most is not None and self.restarts >= self._most):
            return None
        self.restarts += 1
        return now + _PAUSE * self.stillborn
