"""A simulated process: its clock, what it holds open, and whether it is alive, stopped or gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headwater.testing.scheduler import Fibre, Scheduler
from headwater.testing.times import Line

if TYPE_CHECKING:
    from headwater.testing.network import End

ROUNDING = 1e-6  # seconds: more than what is lost between two clocks


class Process:
    """One start of a program. A restart is another ``Process`` of the same name.

    ``offset`` and ``rate``: its clock shows ``offset + rate * now``, for no two clocks agree.
    """

    def __init__(self, scheduler: Scheduler, name: str, offset: float = 0.0, rate: float = 1.0) -> None:
        self.name = name
        self.alive = True
        self.vanished = False
        self.ends: list[End] = []
        self.line = Line()
        self._scheduler = scheduler
        self._offset = offset
        self._rate = rate
        self._stopped = 0
        self._busy = 0.0
        self._backlog: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._fibres: list[Fibre] = []

    def clock(self) -> float:
        """What the time is, as this process sees it."""
        return self._offset + self._rate * self._scheduler.now

    def moment(self, clock: float) -> float:
        """The scheduler's time at which this process's clock shows ``clock``, and surely no earlier."""
        return (clock - self._offset) / self._rate + ROUNDING

    def call(self, act: Callable[..., None], *args: Any) -> None:
        """Have the process do something: now, when it is continued, or never if it is dead."""
        if not self.alive:
            return
        if self._stopped or self._backlog:
            self._backlog.append((act, args))
        elif self._busy > self._scheduler.now:
            self._scheduler.at(self._busy, self.call, act, *args)
        else:
            act(*args)

    def work(self, seconds: float) -> float:
        """It computes for so long and looks at nothing else; returns when it will be done."""
        self._busy = max(self._busy, self._scheduler.now) + seconds
        return self._busy

    def every(self, period: float, act: Callable[[], None]) -> None:
        """Call ``act`` every ``period`` seconds of this process's clock."""
        if not self._stopped:  # what a stopped process misses it does not make up for
            self.call(act)
        if self.alive:
            self._scheduler.after(period / self._rate, self.every, period, act)

    def fibre(self, body: Callable[[], None]) -> Fibre:
        """Begin a thread of control."""
        made = Fibre(self._scheduler, body, self.call)
        self._fibres.append(made)
        self._scheduler.spawn(made)
        return made

    @property
    def stopped(self) -> bool:
        return self._stopped > 0

    def stop(self) -> None:
        """As SIGSTOP: what comes waits."""
        self._stopped += 1

    def go_on(self) -> None:
        """As SIGCONT."""
        self._stopped = max(0, self._stopped - 1)
        while self._backlog and not self._stopped and self.alive:
            act, args = self._backlog.popleft()
            act(*args)

    def die(self, *, vanish: bool = False) -> None:
        """As SIGKILL, or as a machine that loses its power."""
        self.alive = False
        self.vanished = vanish
        self._backlog.clear()
        for fibre in self._fibres:
            fibre.drop()

    def unwind(self) -> None:
        """Give back what its fibres hold. After a run."""
        self.die()
        for fibre in self._fibres:
            fibre.unwind()
        self._fibres.clear()
