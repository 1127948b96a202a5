"""Processes of this machine: children of this process, each in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from headwater.launch.engines.base import Event, OutputLine, ProcessEnded, Prompt
from headwater.launch.engines.splitter import LineSplitter
from headwater.launch.process import Command, Process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from headwater.launch.process import Stream

_ENTRY = str(Path(__file__).with_name("entry.py"))
_READ = 1 << 16
_POLL_WITHOUT_PIDFD = 0.05


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


class LocalEngine:
    """Everything happens inside ``events``, on the thread that calls it.

    A process whose output nobody collects blocks when its pipe is full, so keep calling.
    """

    def __init__(self) -> None:
        self._answered: list[LocalProcess] = []  # who reads the terminal that we were started from
        self._blind: set[LocalProcess] = set()  # the kernel gives no descriptor that would tell of their end
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)

    @property
    def cores(self) -> int:
        return cores()

    def now(self) -> float:
        return time.monotonic()

    def start(self, command: Command) -> LocalProcess:
        """Linux kills a child when the *thread* that started it ends: start it from one that lives as long."""
        process = LocalProcess(command)
        for stream, pipe in process.pipes.items():
            self._selector.register(pipe, selectors.EVENT_READ, (process, stream))
        if process.ready_fd >= 0:
            self._selector.register(process.ready_fd, selectors.EVENT_READ, (process, "ready"))
        if process.pidfd >= 0:
            self._selector.register(process.pidfd, selectors.EVENT_READ, (process, "exit"))
        else:
            self._blind.add(process)
        if process.stdin and os.isatty(0):
            self._answered.append(process)
        return process

    def events(self, timeout: float) -> Iterator[Event]:
        until = min(time.monotonic() + timeout, *(process.prompting for process in self._answered), float("inf"))
        timeout = max(0.0, until - time.monotonic())
        for key, _ in self._selector.select(min(timeout, _POLL_WITHOUT_PIDFD) if self._blind else timeout):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                continue
            process, what = key.data
            if not process.running:
                continue  # ended by an earlier event of this round: its pipes are closed
            if what == "ready":
                self._selector.unregister(key.fd)
                process.read_ready()
                if process.ready_fd >= 0:
                    self._selector.register(process.ready_fd, selectors.EVENT_READ, (process, "ready"))
            elif what == "exit":
                yield from self._reap(process)
            else:
                for line in process.read(what) or []:
                    yield OutputLine(process, what, line)
                if what not in process.open:
                    self._selector.unregister(key.fd)
        for process in list(self._blind):
            yield from self._reap(process)
        now = time.monotonic()
        for process in self._answered:
            for stream, text in process.prompts(now):
                yield Prompt(process, stream, text)

    def _reap(self, process: LocalProcess) -> Iterator[Event]:
        if not process.reap():
            return
        self._blind.discard(process)
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[0] is process:
                self._selector.unregister(key.fd)
        for stream, line in process.close():
            yield OutputLine(process, stream, line)
        yield ProcessEnded(process)

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"!")

    def close(self) -> None:
        if self._wake_read >= 0:
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1


class LocalProcess(Process):
    """A child in a process group of its own, which dies with the launcher.

    Its own group, because Ctrl-C in a terminal goes to the whole foreground group: the launcher alone shall get it
    and pass it on once.

    Attributes: ``pipes``, ``open`` (those that may still have something to read), ``pidfd`` (turns readable when the
    process ends; -1 where there is none) and ``ready_fd`` (-1 when there is nothing to come, or no more).
    """

    def __init__(self, command: Command) -> None:
        super().__init__(command, time.monotonic())
        self._splitters: dict[Stream, LineSplitter] = {"stdout": LineSplitter(), "stderr": LineSplitter()}
        self._child, self.ready_fd = _spawn(command)
        self.pid = self._child.pid
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self.pipes: dict[Stream, IO[bytes]] = {"stdout": self._child.stdout, "stderr": self._child.stderr}
        self.open: set[Stream] = set(self.pipes)
        for pipe in self.pipes.values():
            os.set_blocking(pipe.fileno(), False)
        self.pidfd = _pidfd(self.pid)

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
        self.has_written(stream, lines)
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
        data = os.read(self.ready_fd, _READ)
        self.has_reported(data, time.monotonic())
        if not data or self.is_ready:
            os.close(self.ready_fd)
            self.ready_fd = -1

    def reap(self) -> bool:
        """Whether the process has ended. When it has: its ``returncode`` is set and the rest of its group killed."""
        if not self.running:
            return True
        # Not collected yet (WNOWAIT), so that its group's number cannot be anybody else's while we signal it.
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self._signal_group(signal.SIGKILL)
        self.has_ended(self._child.wait(), time.monotonic())
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
        for fd in (self.pidfd, self.ready_fd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.ready_fd = -1

    def send_signal(self, number: signal.Signals) -> None:
        if self.running:
            self.signalled = True
            self._signal_group(number)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _spawn(command: Command) -> tuple[subprocess.Popen[bytes], int]:
    """The child, and our end of the pipe on which it says that it is ready (-1 if it will not)."""
    reader, writer = os.pipe() if command.reports else (-1, -1)
    words = [*command.words, "--ready-fd", str(writer)] if command.reports else command.words
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", _ENTRY, str(os.getpid()), *words],
            stdin=None if command.stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(command.env),
            start_new_session=True,
            pass_fds=(writer,) if command.reports else (),
            bufsize=0,
        )
    except BaseException:
        if command.reports:
            os.close(reader)
        raise
    finally:
        if command.reports:
            os.close(writer)
    return child, reader


def _pidfd(pid: int) -> int:
    """A descriptor that turns readable when the process ends; -1 where the kernel or a sandbox refuses it."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1
