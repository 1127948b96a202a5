"""One child process: its pipes, its lines, its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Role = Literal["coordinator", "server", "worker"]
Stream = Literal["stdout", "stderr"]

_ENTRY = str(Path(__file__).with_name("engines") / "entry.py")
_READ = 1 << 16
_TAIL = 200
_LINE = 1 << 16
_TRACEBACKS = ("Traceback (most recent call last):", "  + Exception Group Traceback (most recent call last):")
_SYNTAX = re.compile(r'  File "[^"]+", line \d+')
"""How a script that Python cannot read is told, without a traceback."""
_PROMPT = 0.1
"""Seconds after which a line without an end is taken for a prompt."""
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)


class LineSplitter:
    """Bytes of one pipe in, whole lines out.

    A progress bar redraws itself by carriage returns: of these at most one a second becomes a line, so that a bar
    neither floods the terminal nor looks dead. A line longer than 64 KiB is cut.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._redrawn = float("-inf")
        self._fed = float("-inf")

    def feed(self, data: bytes, now: float) -> list[str]:
        """The lines that ``data`` completes at time ``now`` (seconds)."""
        self._fed = now
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = [self._text(line.rstrip(b"\r").rpartition(b"\r")[2]) for line in whole]
        drawn, returned, rest = self._rest.rpartition(b"\r")
        if returned:
            self._rest = rest
            if now - self._redrawn >= 1.0:
                self._redrawn = now
                lines.append(self._text(drawn.rpartition(b"\r")[2]))
        if len(self._rest) > _LINE:
            lines.append(self._text(self._rest))
            self._rest = b""
        return lines

    @property
    def prompting(self) -> float:
        """When an unfinished line is to be taken for a prompt. A progress bar, which is redrawn, never is."""
        asked = bool(self._rest) and self._redrawn == float("-inf")
        return self._fed + _PROMPT if asked else float("inf")

    def prompt(self) -> str:
        """The unfinished line; what its process adds to it will be a line of its own."""
        rest, self._rest = self._rest, b""
        return self._text(rest)

    def flush(self) -> list[str]:
        """What is left when the pipe closes."""
        rest, self._rest = self._rest, b""
        return [self._text(rest)] if rest else []

    @staticmethod
    def _text(line: bytes) -> str:
        return line.decode("utf-8", errors="replace")


class Process:
    """A child in a process group of its own, which dies with the launcher.

    Its own group, because Ctrl-C in a terminal goes to the whole foreground group: the launcher alone shall get it
    and pass it on once. Linux kills a child when the *thread* that started it ends, so start it from a thread that
    lives as long as the cluster.

    Attributes: ``name`` (``w0``, ``s1``, ``coordinator``), ``role``, ``rank``, ``pid``, ``ready`` (the first line of
    the ready pipe, ``b""`` while there is none), ``restarts`` (how many processes had this name before), ``stdin``
    (whether it reads the launcher's standard input; others have none) and
    ``returncode`` (``None`` while it runs; ``128 + n`` when signal n ended it, as a shell counts).
    """

    def __init__(
        self,
        name: str,
        role: Role,
        rank: int,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        ready: bool = False,
        restarts: int = 0,
        stdin: bool = False,
    ) -> None:
        self.name, self.role, self.rank, self.restarts, self.stdin = name, role, rank, restarts, stdin
        self.returncode: int | None = None
        self.signalled = False
        self.ready = b""
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self._splitters: dict[Stream, LineSplitter] = {"stdout": LineSplitter(), "stderr": LineSplitter()}
        reader, writer = os.pipe() if ready else (-1, -1)
        command = [*command, "--ready-fd", str(writer)] if ready else list(command)
        self.started = time.monotonic()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", _ENTRY, str(os.getpid()), *command],
                stdin=None if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(env),
                start_new_session=True,
                pass_fds=(writer,) if ready else (),
                bufsize=0,
            )
        except BaseException:
            if ready:
                os.close(reader)
            raise
        finally:
            if ready:
                os.close(writer)
        self.ended = self.started
        self._ready_since = None if ready else self.started
        self._ready_fd = reader
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self.pipes: dict[Stream, IO[bytes]] = {"stdout": self._child.stdout, "stderr": self._child.stderr}
        self.open: set[Stream] = set(self.pipes)
        for pipe in self.pipes.values():
            os.set_blocking(pipe.fileno(), False)
        self.pidfd = _pidfd(self._child.pid)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def place(self) -> tuple[Role, int]:
        """What it shares with the process that it replaces: role and rank."""
        return self.role, self.rank

    @property
    def running(self) -> bool:
        return self.returncode is None

    @property
    def ready_fd(self) -> int:
        """The pipe on which the process says that it accepts connections; -1 when it has none or has said so."""
        return self._ready_fd

    @property
    def worked(self) -> float:
        """Seconds from when it was ready (a worker: from its start) to its end; 0 if it never was."""
        return 0.0 if self._ready_since is None else self.ended - self._ready_since

    def read(self, stream: Stream) -> list[str] | None:
        """The lines that one buffer of the pipe completes; ``None`` when nothing has arrived.

        When the other end is closed, ``open`` loses the stream.
        """
        try:
            data = os.read(self.pipes[stream].fileno(), _READ)
        except BlockingIOError:
            return None
        if data:
            lines = self._splitters[stream].feed(data, time.monotonic())
        else:
            self.open.discard(stream)
            lines = self._splitters[stream].flush()
        if stream == "stderr":
            self.tail.extend(lines)
        return lines

    @property
    def prompting(self) -> float:
        """When to ask for prompts; never for a process that nobody can answer."""
        return min(each.prompting for each in self._splitters.values()) if self.stdin else float("inf")

    def prompts(self, now: float) -> list[tuple[Stream, str]]:
        """The unfinished lines that the process waits behind."""
        return [(stream, each.prompt()) for stream, each in self._splitters.items() if each.prompting <= now]

    def read_ready(self) -> None:
        """Take the ready line; closes the pipe after it, or at its end."""
        data = os.read(self._ready_fd, _READ)
        self.ready += data
        if not data or b"\n" in self.ready:
            os.close(self._ready_fd)
            self._ready_fd = -1
        if b"\n" in self.ready:
            self._ready_since = time.monotonic()

    def reap(self) -> bool:
        """Whether the process has ended. When it has: its ``returncode`` is set and the rest of its group killed."""
        if not self.running:
            return True
        # Not collected yet (WNOWAIT), so that its group's number cannot be anybody else's while we signal it.
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self._signal_group(signal.SIGKILL)
        code = self._child.wait()
        self.returncode = code if code >= 0 else 128 - code
        self.ended = time.monotonic()
        return True

    def close(self) -> Iterator[tuple[Stream, str]]:
        """After the end: yields the output that was left, then closes the pipes.

        A process that left the group may hold a pipe open for ever: what is in the pipe now is all there will be.
        """
        for stream, pipe in self.pipes.items():
            lines: list[str] = []
            while stream in self.open and (more := self.read(stream)) is not None:
                lines += more
            if stream in self.open:
                lines += self._splitters[stream].flush()
            pipe.close()
            yield from ((stream, line) for line in lines)
        self.open.clear()
        for fd in (self.pidfd, self._ready_fd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self._ready_fd = -1

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process and what it started; nothing happens if it has ended."""
        if self.running:
            self.signalled = True
            self._signal_group(number)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    @property
    def how_it_ended(self) -> str:
        """``exited with code 7`` or ``was killed by SIGKILL``."""
        code = self._child.returncode
        if self.returncode is None or code is None:
            return "is running"
        if code >= 0:
            return f"exited with code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

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


def _pidfd(pid: int) -> int:
    """A descriptor that turns readable when the process ends; -1 where the kernel or a sandbox refuses it."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1
