"""How far along the schedule each step is, and when to stop: decided by rank 0, followed by all.

A learning rate must be the same on every worker of a step, but how many steps fit into the time is known only while
they run. So rank 0 measures, and writes schedules that take effect ``LEAD`` steps later. Under ``Bulk`` nobody can
begin that step without having seen the schedule: it is written before rank 0 contributes to its own step, and who
begins the step after the next has waited for that contribution.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from headwater_recipes.common import checkpoint

NAME = "schedule.json"
"""The file in the run folder that all ranks read."""
RECORD = "schedules.jsonl"
"""All that there were, from the beginning of the run: so it can be gone through once more (``common.plain``)."""
LEAD = 2
ASKED = "stop"
"""The file by which another rank than 0 asks for the end."""
BEGUN = "begun.json"
"""The file that says where this launch began: for a worker that takes the place of one that died."""
REPLAN = 10
"""Steps between two schedules."""
FLOOR = 0.05
"""The learning rate ends at this part of its peak."""


class Schedule(msgspec.Struct, frozen=True):
    """From ``step`` on, progress grows from ``progress`` by ``per_step``; ``stop`` is the first step not taken.

    ``asked``: somebody wants the run to stop there, and its end is not reached.
    """

    step: int
    progress: float
    per_step: float
    stop: int | None = None
    asked: bool = False

    def at(self, step: int) -> float:
        """Progress at the beginning of ``step``, 0 to 1."""
        return min(1.0, max(0.0, self.progress + (step - self.step) * self.per_step))

    def over(self, step: int) -> bool:
        """Whether ``step`` is not taken."""
        return self.stop is not None and step >= self.stop


class Begun(msgspec.Struct, frozen=True):
    """``step``, ``progress`` and ``elapsed`` at the beginning of a launch, the table's ``clock`` then (not 0 if it
    comes from a snapshot), and ``time.monotonic()``.
    """

    step: int
    progress: float
    elapsed: float
    clock: int
    monotonic: float


def factor(progress: float, step: int, warmup: int) -> float:
    """The learning rate as part of its peak: linear warmup over ``warmup`` steps, then half a cosine to ``FLOOR``."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
    return cosine * min(1.0, (step + 1) / max(1, warmup))


def of(schedules: Sequence[Schedule], step: int) -> Schedule:
    """The one that holds for ``step``: of those in force by then the last that was made."""
    return next((each for each in reversed(schedules) if each.step <= step), schedules[0])


def recorded(folder: Path) -> list[Schedule]:
    """All that rank 0 made of a run; of a run that went on from a checkpoint the later ones count from there."""
    path = folder / RECORD
    return msgspec.json.Decoder(Schedule).decode_lines(path.read_bytes()) if path.is_file() else []


class ScheduleFile:
    """``schedule.json`` in the run folder: the last few schedules. Rank 0 writes it, atomically; all read it."""

    def __init__(self, folder: Path, first: Schedule) -> None:
        self._path = folder / NAME
        self._asked = folder / ASKED
        self._record = folder / RECORD
        self._schedules = [first]
        self._seen: tuple[int, int] | None = None

    def at(self, step: int) -> Schedule:
        """The schedule that holds for ``step``."""
        self._read()
        return of(self._schedules, step)

    def publish(self, schedule: Schedule) -> None:
        """Add a schedule; rank 0 only. Raises ``DiskFull``."""
        # Stopping can follow a new estimate at once, before that has taken effect: keep more than two.
        self._schedules = [*self._schedules[-3:], schedule]
        checkpoint.replace(self._path, msgspec.json.encode(self._schedules))
        self.record(schedule)

    def record(self, schedule: Schedule) -> None:
        """For who goes through the run once more; rank 0 only. Training does not end for the lack of it."""
        with contextlib.suppress(OSError), self._record.open("ab") as file:
            file.write(msgspec.json.encode(schedule) + b"\n")

    @property
    def stop_asked(self) -> bool:
        """Whether another rank wants the run to stop: somebody has told it, and not rank 0."""
        return self._asked.exists()

    def ask_to_stop(self) -> None:
        """For rank 0 to see at its next step."""
        self._asked.touch()

    def _read(self) -> None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return
        seen = (found.st_mtime_ns, found.st_ino)
        if seen != self._seen:
            self._seen = seen
            self._schedules = msgspec.json.decode(self._path.read_bytes(), type=list[Schedule])


class Pace:
    """Rank 0's decisions. Pure: the time is passed in.

    Args:
        schedule: the first one.
        budget: seconds of training in all, those of earlier parts of the run included; None if the schedule has an end.
    """

    def __init__(self, schedule: Schedule, budget: float | None) -> None:
        self._schedule = schedule
        self._budget = budget
        self._decided = False
        self._marks: deque[tuple[int, float]] = deque(maxlen=4)

    def decide(self, step: int, elapsed: float, asked: bool = False) -> Schedule | None:
        """A new schedule, or None to keep to the last; called at the beginning of every step.

        Args:
            elapsed: seconds of training so far.
            asked: somebody wants the run to stop.
        """
        if self._decided:
            return None
        late = self._budget is not None and elapsed >= self._budget
        if asked or late:
            self._decided = True
            effect = step + LEAD
            if self._schedule.stop is not None and self._schedule.stop <= effect:
                return None
            return self._take(Schedule(effect, self._schedule.at(effect), self._schedule.per_step, effect, not late))
        if self._budget is not None and step % REPLAN == 0:
            self._marks.append((step, elapsed))
            if len(self._marks) > 1:
                return self._take(self._estimate(step, elapsed, self._budget))
        return None

    def _estimate(self, step: int, elapsed: float, budget: float) -> Schedule:
        (first, begun), (last, now) = self._marks[0], self._marks[-1]
        seconds = (now - begun) / (last - first)
        left = max(1.0, (budget - elapsed) / max(seconds, 1e-9) - LEAD)
        progress = self._schedule.at(step + LEAD)
        return Schedule(step + LEAD, progress, (1.0 - progress) / left)

    def _take(self, schedule: Schedule) -> Schedule:
        self._schedule = schedule
        return schedule
