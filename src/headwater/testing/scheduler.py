"""A virtual clock, the events on it, and fibres: code that blocks, run one at a time.

Everything that happens in a simulated cluster is an entry of one heap. Equal times keep the order in which they
were asked for, so a run is the same every time. Blocking code (a client's) runs in greenlets, which the tests'
extra installs; a fibre gives the processor away only where it would wait.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from headwater.errors import UsageError


def _greenlet() -> Any:
    try:
        import greenlet  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise UsageError("the simulator needs greenlet: pip install 'headwater[dev]'") from None
    return greenlet


class Stuck(AssertionError):
    """The simulation ran out of events, or into its bound, before what it was run for."""


class Scheduler:
    """``now``: seconds of virtual time. ``count``: events so far."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.count = 0
        self._order = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._lib = _greenlet()
        self._hub = self._lib.getcurrent()

    def at(self, when: float, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` at that time."""
        self._order += 1
        heapq.heappush(self._heap, (max(when, self.now), self._order, act, args))

    def after(self, delay: float, act: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now + delay, self._order, act, args))

    def run(self, until: Callable[[], bool], *, limit: float, events: int) -> None:
        """Let time pass until ``until()``. Raises ``Stuck`` at ``limit`` (a time), or after so many ``events``."""
        heap, pop = self._heap, heapq.heappop
        last = self.count + events
        while not until():
            if not heap:
                raise Stuck("nothing is left to happen")
            if heap[0][0] > limit:
                self.now = limit
                raise Stuck(f"time {limit:.3f} was reached")
            if self.count >= last:
                raise Stuck(f"{events} events have happened")
            self.now, _, act, args = pop(heap)
            self.count += 1
            act(*args)

    # ---- fibres ----------------------------------------------------------------------------------

    def spawn(self, fibre: Fibre) -> None:
        """Begin a fibre, now."""
        self.after(0.0, fibre.resume, fibre.turn)

    def current(self) -> Fibre:
        """The fibre that is running."""
        found = getattr(self._lib.getcurrent(), "fibre", None)
        if found is None:
            raise UsageError("only a fibre can wait; this is the scheduler's own thread of control")
        return found  # type: ignore[no-any-return]

    def make(self, body: Callable[[], None]) -> Any:
        return self._lib.greenlet(body, self._hub)

    def inside(self) -> bool:
        """Whether a fibre is running."""
        return self._lib.getcurrent() is not self._hub

    def switch(self, dead: bool) -> None:
        """Give the processor back until somebody resumes this fibre; one that is ``dead`` ends."""
        if dead:
            raise self._lib.GreenletExit
        self._hub.switch()


class Fibre:
    """A thread of control of one simulated process. ``through`` runs what wakes it (a stopped process waits)."""

    def __init__(
        self, scheduler: Scheduler, body: Callable[[], None], through: Callable[[Callable[[], None]], None]
    ) -> None:
        self.turn = 0
        self.done = False
        self._scheduler = scheduler
        self._through = through
        self._body = body
        self._glet = scheduler.make(self._run)
        self._glet.fibre = self

    def _run(self) -> None:
        self._body()
        self.done = True

    def resume(self, turn: int) -> None:
        """Go on, if nothing has since that wait began."""
        if turn == self.turn and not self.done:
            self._through(lambda: self._go(turn))

    def _go(self, turn: int) -> None:
        if turn == self.turn and not self.done:
            if self._scheduler.inside():  # another fibre's act woke this one: it goes on once that one waits
                self._scheduler.after(0.0, self.resume, turn)
                return
            self.turn += 1
            self._glet.switch()

    def wait(self, until: float | None = None) -> None:
        """Until a ``Signal`` notifies it, or a time (global) comes."""
        if until is not None:
            self._scheduler.at(until, self.resume, self.turn)
        self._scheduler.switch(self.done)

    def drop(self) -> None:
        """It never goes on: its process is dead."""
        self.done = True

    def unwind(self) -> None:
        """Give its memory back. What its blocks do on the way out reaches nobody."""
        self.done = True
        if self._glet:
            self._glet.throw()


class Signal:
    """What fibres wait for."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[tuple[Fibre, int]] = []

    def wait(self, fibre: Fibre, until: float | None = None) -> None:
        self._waiting.append((fibre, fibre.turn))
        fibre.wait(until)

    def notify(self) -> None:
        waiting, self._waiting = self._waiting, []
        for fibre, turn in waiting:
            fibre.resume(turn)
