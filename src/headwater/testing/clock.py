"""A clock that moves only when a test says so."""

from __future__ import annotations


class FakeClock:
    """Call it for the time in seconds; ``advance`` moves it."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        """Let time pass; returns the new time."""
        self.now += seconds
        return self.now
