"""An engine without processes: objects that live as a script says, by a clock that moves only while one waits."""

from __future__ import annotations

import heapq
import itertools
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from headwater.launch.engines.base import Event, OutputLine, ProcessEnded
from headwater.launch.process import Command, Process, Stream

MASTER = "tcp://10.0.0.1:7"
"""Where each coordinator says that it accepts connections."""


@dataclass
class Life:
    """What one process does. Times are seconds after its start.

    Attributes:
        ready: when a coordinator or server accepts connections; never if ``None``.
        says: lines: when, on which stream, what.
        ends: when it ends by itself and how: an exit code, or ``-n`` for signal n.
        obeys: which signals end it, after how long and how. SIGKILL always does.
    """

    ready: float | None = 0.1
    says: Sequence[tuple[float, Stream, str]] = ()
    ends: tuple[float, int] | None = None
    obeys: Mapping[int, tuple[float, int]] = field(default_factory=lambda: {signal.SIGTERM: (0.1, 0)})


class FakeProcess(Process):
    """``tell``: called with each signal that it gets."""

    def __init__(self, command: Command, now: float, pid: int, tell: Callable[[FakeProcess, int], None]) -> None:
        super().__init__(command, now)
        self.pid = pid
        self._tell = tell

    def send_signal(self, number: signal.Signals) -> None:
        if self.running:
            self.signalled = True
            self._tell(self, number)


class FakeEngine:
    """``lives``: those of each name, in turn; the last one is lived again. Others live until they are told to end.

    Attributes: ``log``: what happened: the time, the name, ``start``, ``end`` or the signal; ``commands``: what was
    started; ``closed``.
    """

    cores = 8

    def __init__(self, lives: Mapping[str, Sequence[Life]] | None = None) -> None:
        self.log: list[tuple[float, str, str]] = []
        self.commands: list[Command] = []
        self.closed = False
        self._lives = lives or {}
        self._clock = 0.0
        self._woken = False
        self._agenda: list[tuple[float, int, Callable[[], Iterator[Event]]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._clock

    def start(self, command: Command) -> FakeProcess:
        self.commands.append(command)
        process = FakeProcess(command, self._clock, 100 + len(self.commands), self._signal)
        self._log(process, "start")
        life = self._life(command)
        if command.reports and life.ready is not None:
            address = MASTER if command.role == "coordinator" else f"tcp://10.0.1.{command.rank}:7"
            line = json.dumps({"address": address, "pid": process.pid}).encode() + b"\n"
            self._plan(life.ready, partial(self._report, process, line))
        for when, stream, text in life.says:
            self._plan(when, partial(self._write, process, stream, text))
        if life.ends is not None:
            when, code = life.ends
            self._plan(when, partial(self._end, process, code))
        return process

    def events(self, timeout: float) -> Iterator[Event]:
        until = self._clock + timeout
        if not self._woken and self._agenda and self._agenda[0][0] <= until:
            when, _, happen = heapq.heappop(self._agenda)
            self._clock = max(self._clock, when)
            yield from happen()
        elif not self._woken:
            assert timeout < 3600.0, f"nothing more would ever happen: {self.log}"
            self._clock = until
        self._woken = False

    def wake(self) -> None:
        self._woken = True

    def close(self) -> None:
        self.closed = True

    def at(self, time: float, call: Callable[[], object]) -> None:
        """Call somebody at a time: the user who types Ctrl-C, say."""

        def happen() -> Iterator[Event]:
            call()
            yield from ()

        heapq.heappush(self._agenda, (time, next(self._order), happen))

    # ---- what happens ------------------------------------------------------------------------------

    def _life(self, of: Command | Process) -> Life:
        name = f"{of.role[0]}{of.rank}" if of.role != "coordinator" else "coordinator"
        lives = self._lives.get(name) or [Life()]
        return lives[min(of.restarts, len(lives) - 1)]

    def _plan(self, after: float, happen: Callable[[], Iterator[Event]]) -> None:
        heapq.heappush(self._agenda, (self._clock + after, next(self._order), happen))

    def _log(self, process: Process, what: str) -> None:
        self.log.append((round(self._clock, 3), process.name, what))

    def _report(self, process: FakeProcess, line: bytes) -> Iterator[Event]:
        if process.running:
            process.has_reported(line, self._clock)
        yield from ()

    def _write(self, process: FakeProcess, stream: Stream, text: str) -> Iterator[Event]:
        if process.running:
            process.has_written(stream, [text])
            yield OutputLine(process, stream, text)

    def _end(self, process: FakeProcess, code: int) -> Iterator[Event]:
        if process.running:
            process.has_ended(code, self._clock)
            self._log(process, "end")
            yield ProcessEnded(process)

    def _signal(self, process: FakeProcess, number: int) -> None:
        self._log(process, signal.Signals(number).name)
        obeys = {**self._life(process).obeys, signal.SIGKILL: (0.0, -signal.SIGKILL)}
        if number in obeys:
            after, code = obeys[number]
            self._plan(after, partial(self._end, process, code))
