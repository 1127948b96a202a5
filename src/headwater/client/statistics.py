"""What a client counts of its own steps and waits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwater.client.session import Session


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """Counters since the client connected. Staleness, and lag (of reads behind the fastest worker), in steps."""

    steps: int
    pushed_bytes: int
    pulled_bytes: int
    wait_seconds: float
    staleness_last: int
    staleness_mean: float
    staleness_max: int
    lag_max: int


class Counters:
    """Of all tables of one client; bytes are counted by its sessions."""

    def __init__(self) -> None:
        self.wait_seconds = 0.0
        self._steps = self._stale_sum = self._stale_max = self._stale_last = self._lag_max = 0

    def stepped(self, staleness: int, lag: int) -> None:
        """A table has finished a step."""
        self._steps += 1
        self._stale_last = staleness
        self._stale_sum += staleness
        self._stale_max = max(self._stale_max, staleness)
        self._lag_max = max(self._lag_max, lag)

    def read(self, sessions: Iterable[Session]) -> ClientStatistics:
        """All of it, as of now."""
        bytes_ = [(session.pushed_bytes, session.pulled_bytes) for session in sessions]
        return ClientStatistics(
            self._steps,
            sum(pushed for pushed, _ in bytes_),
            sum(pulled for _, pulled in bytes_),
            self.wait_seconds,
            self._stale_last,
            self._stale_sum / max(1, self._steps),
            self._stale_max,
            self._lag_max,
        )
