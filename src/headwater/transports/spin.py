"""Whether to look again and again before sleeping: waking a core takes longer than a small message's whole work."""

from __future__ import annotations

SPIN = 200e-6  # seconds
_MOST = 64  # waits that are slept through, after many that were spun in vain


class Spinning:
    """Where both sides share a core, who spins keeps the other from answering (``sched_yield`` does not help).

    So waits that were spun in vain make that the next ones are slept through: 1, 3, 7, …, until one was not in vain.
    """

    __slots__ = ("_misses", "_sleeps")

    def __init__(self) -> None:
        self._misses = self._sleeps = 0

    def pays(self) -> bool:
        """Whether to spin now; then one of the next two is called."""
        if self._sleeps:
            self._sleeps -= 1
            return False
        return True

    def hit(self) -> None:
        """Something came while spinning."""
        self._misses = 0

    def missed(self) -> None:
        """Nothing came."""
        self._misses += 1
        self._sleeps = min(_MOST, (1 << self._misses) - 1)
