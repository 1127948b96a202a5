"""One process of a job: what is to run, and what is known of it, whatever engine runs it."""

from __future__ import annotations

import re
import signal
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Role = Literal["coordinator", "server", "worker"]
Stream = Literal["stdout", "stderr"]
Place = tuple[Role, int]
"""Role and rank: what stays the same when one process takes the place of another."""

_TAIL = 200
_TRACEBACKS = ("Traceback (most recent call last):", "  + Exception Group Traceback (most recent call last):")
_SYNTAX = re.compile(r'  File "[^"]+", line \d+')
"""How a script that Python cannot read is told, without a traceback."""
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)


@dataclass(frozen=True, slots=True)
class Command:
    """What an engine is to start.

    Attributes:
        name: ``w0``, ``s1``, ``coordinator``.
        words: the program and its arguments.
        env: its whole environment, secrets included.
        restarts: how many processes had this place before.
        stdin: whether it reads the launcher's standard input; others have none.
    """

    name: str
    role: Role
    rank: int
    words: Sequence[str]
    env: Mapping[str, str]
    restarts: int = 0
    stdin: bool = False

    @property
    def reports(self) -> bool:
        """Whether it takes ``--ready-fd`` and says there when it accepts connections (``headwater.launch.ready``)."""
        return self.role != "worker"


class Process(ABC):
    """A process that an engine has started. Its engine tells it of what happens; everybody else reads.

    Attributes: ``name``, ``role``, ``rank``, ``restarts`` and ``stdin`` of its ``Command``; ``pid``; ``ready`` (what it
    said when it began to accept connections, a whole line, or ``b""``); ``tail`` (the last lines of its stderr);
    ``signalled`` (whether it was asked to end) and ``returncode`` (``None`` while it runs; ``128 + n`` when signal n
    ended it, as a shell counts).
    """

    pid: int

    def __init__(self, command: Command, now: float) -> None:
        self.name, self.role, self.rank = command.name, command.role, command.rank
        self.restarts, self.stdin = command.restarts, command.stdin
        self.returncode: int | None = None
        self.signalled = False
        self.ready = b""
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self.started = self.ended = now
        self._code: int | None = None
        self._ready_since = None if command.reports else now

    # ---- for its engine ----------------------------------------------------------------------------

    @abstractmethod
    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process and what it started, and set ``signalled``; nothing happens if it has ended."""

    def has_written(self, stream: Stream, lines: Sequence[str]) -> None:
        """It has written whole lines."""
        if stream == "stderr":
            self.tail.extend(lines)

    def has_reported(self, data: bytes, now: float) -> None:
        """A piece of the line that says that it accepts connections has come."""
        self.ready += data
        if self.is_ready:
            self._ready_since = now

    def has_ended(self, code: int, now: float) -> None:
        """``code``: its exit code, or ``-n`` if signal n ended it."""
        self._code, self.ended = code, now
        self.returncode = code if code >= 0 else 128 - code

    # ---- for everybody -----------------------------------------------------------------------------

    @property
    def place(self) -> Place:
        """What it shares with the process that it replaces."""
        return self.role, self.rank

    @property
    def running(self) -> bool:
        return self.returncode is None

    @property
    def is_ready(self) -> bool:
        """Whether a coordinator or server has said that it accepts connections."""
        return b"\n" in self.ready

    @property
    def worked(self) -> float:
        """Seconds from when it was ready (a worker: from its start) to its end; 0 if it never was."""
        return 0.0 if self._ready_since is None else self.ended - self._ready_since

    @property
    def how_it_ended(self) -> str:
        """``exited with code 7`` or ``was killed by SIGKILL``."""
        if self._code is None:
            return "is running"
        if self._code >= 0:
            return f"exited with code {self._code}"
        try:
            return f"was killed by {signal.Signals(-self._code).name}"
        except ValueError:
            return f"was killed by signal {-self._code}"

    @property
    def last_words(self) -> str:
        """The last traceback on its stderr with what caused it, or the last lines when there is none."""
        lines = list(self.tail)
        starts = [i for i, line in enumerate(lines) if line in _TRACEBACKS]
        starts = starts or [i for i, line in enumerate(lines) if _SYNTAX.fullmatch(line)]
        if not starts:
            return "\n".join(lines[-20:])
        start = starts.pop()
        while starts and start >= 2 and lines[start - 2] in _CHAINED:
            start = starts.pop()
        return "\n".join(lines[start:][-80:])


def begins_traceback(line: str) -> bool:
    """Whether a line of stderr is the first one of a traceback, if none has begun."""
    return line in _TRACEBACKS or bool(_SYNTAX.fullmatch(line))
