"""How long a wait for other workers goes on, and what is said when that was too long.

Whoever is alive may be slow: a worker that evaluates or saves alone is waited for until ``HEADWATER_STEP_TIMEOUT``. For
everything else, a server, the coordinator or a worker that is not there, ``HEADWATER_TIMEOUT`` counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from headwater.client.runtime import Runtime
from headwater.errors import DeadlineExceeded, HeadwaterError, UsageError
from headwater.wire.data_plan import ANY, Late, WhoIsLate

_BRIEF = 2.0  # seconds in which the coordinator says who is late
_LOOKS = 4  # how often in HEADWATER_TIMEOUT one asks
log = logging.getLogger("headwater")


class Waiter(Protocol):
    """The worker that waits: its limits in seconds, and whom it asks who is late."""

    rank: int
    timeout: float
    runtime: Runtime

    @property
    def step_timeout(self) -> float: ...
    def ask(self, message: WhoIsLate, timeout: float | None = None, /) -> object: ...


class Patience:
    """One wait, which has begun now. ``timeout``: seconds that the caller allows; ``None``: what the settings say.

    ``question``: where this worker waits, asked for when it has waited for a while. ``deadline`` moves while others are
    alive and late.
    """

    def __init__(self, waiter: Waiter, timeout: float | None, question: Callable[[], WhoIsLate]) -> None:
        self._waiter = waiter
        self._question = question
        self._allowed = timeout
        self._timeout = waiter.timeout if timeout is None else timeout
        self.begun = self._warned = waiter.runtime.now()
        self.deadline = self.begun + self._timeout
        self._next = self.deadline if timeout is not None else self.begun + self._timeout / _LOOKS

    @property
    def left(self) -> float:
        """Seconds until ``look`` has something to do."""
        return max(0.0, min(self.deadline, self._next) - self._waiter.runtime.now())

    def look(self, whom: str) -> None:
        """Nothing has come yet: see who is late, now and then. ``whom``: who should have answered.

        Raises ``DeadlineExceeded`` when that was too long, and says for whom.
        """
        now = self._waiter.runtime.now()
        if now < min(self.deadline, self._next):
            return
        late, unknown = self._who_is_late()
        if self._allowed is None and late.alive and not late.absent:
            self.deadline = max(self.deadline, min(self.begun + self._waiter.step_timeout, now + self._timeout))
            self._warn(late, now)
        if now >= self.deadline:
            raise DeadlineExceeded(self._words(late, whom, unknown, now))
        self._next = now + self._timeout / _LOOKS

    def _who_is_late(self) -> tuple[Late, str]:
        """Also why that is not known."""
        try:
            found = self._waiter.ask(self._question(), _BRIEF)
        except UsageError:
            raise
        except HeadwaterError as error:
            return Late(), str(error)
        assert isinstance(found, Late)
        return found, ""

    def _warn(self, late: Late, now: float) -> None:
        if now - self._warned < self._timeout or now >= self.deadline:
            return
        self._warned = now
        log.warning(
            "worker %d waits for %s at %s, for %.0f s now; alive, so this goes on until HEADWATER_STEP_TIMEOUT (%g s)",
            self._waiter.rank, _names(late.alive), self._place, now - self.begun, self._waiter.step_timeout,
        )  # fmt: skip

    @property
    def _place(self) -> str:
        q = self._question()
        if q.barrier is not None:
            return f"barrier {q.barrier!r}" if q.barrier else "the barrier"
        return f"step {q.clock} of table {q.table!r}" if 0 < q.clock < ANY else f"table {q.table!r}"

    def _words(self, late: Late, whom: str, unknown: str, now: float) -> str:
        """Who did not come, and which limit that was."""
        waited = f"within {now - self.begun:.3g} s"
        limit = "the timeout of this call" if self._allowed is not None else "HEADWATER_TIMEOUT"
        applied = "what was pushed may still be applied"
        if late.absent:
            there = "is not there (it has not joined, or has died)"
            return f"{_names(late.absent)} did not come to {self._place} {waited} ({limit}) and {there}; {applied}"
        if late.alive:
            limit = limit if self._allowed is not None else "HEADWATER_STEP_TIMEOUT"
            more = "It is alive: allow more time, or look what it does (py-spy dump)"
            return f"{_names(late.alive)} did not come to {self._place} {waited} ({limit}); {applied}. {more}"
        shards = f"server of shard {', '.join(map(str, late.shards))}" if late.shards else whom
        why = f" ({unknown})" if unknown else ", and no worker is late"
        return f"{shards} did not answer for {self._place} {waited} ({limit}){why}; {applied}"


def _names(ranks: tuple[int, ...]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
