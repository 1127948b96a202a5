"""The eyes and ears of a launcher: its processes' pipes and ends, and the signals that it gets itself."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from headwater.launch.lines import Lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from headwater.launch.process import Process, Stream

    OnLine = Callable[[Process, Stream, str], None]
    OnExit = Callable[[Process], None]

_POLL_WITHOUT_PIDFD = 0.05


class Watch:
    """Everything happens inside ``pump``, on the thread that calls it; ``request`` may come from any thread.

    Attributes: ``requests``: the numbers of signals that the launcher got and has not yet acted upon; ``lines``: which
    lines are shown.
    """

    def __init__(self, on_line: OnLine, on_exit: OnExit | None, lines: Lines) -> None:
        self.requests: deque[int] = deque()
        self.lines = lines
        self._on_line, self._on_exit = on_line, on_exit
        self._answered: list[Process] = []  # who reads the terminal that we were started from
        self._blind: set[Process] = set()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)

    def add(self, process: Process) -> None:
        """Watch over a process that was just started."""
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

    def say_the_rest(self, reported: str) -> None:
        """The job is over; who was at fault is reported elsewhere."""
        for process, (stream, line) in self.lines.rest(reported):
            self._say(process, stream, line)

    def close(self) -> None:
        """Safe to call twice."""
        if self._wake_read >= 0:
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    def pump(self, timeout: float) -> None:
        """Wait for something to happen, up to ``timeout`` seconds, and take it in."""
        until = min(self.lines.due, *(process.prompting for process in self._answered), time.monotonic() + timeout)
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
                self._reap(process)
            else:
                self._forward(process, what, process.read(what) or [])
                if what not in process.open:
                    self._selector.unregister(key.fd)
        for process in list(self._blind):
            self._reap(process)
        self._say_what_waited(time.monotonic())

    def _say_what_waited(self, now: float) -> None:
        """Prompts, and tracebacks that were held long enough."""
        for process in self._answered:
            for stream, text in process.prompts(now):
                self._say(process, stream, text, prompt=True)
        for process, (stream, line) in self.lines.late(now):
            self._say(process, stream, line)

    def _reap(self, process: Process) -> None:
        if not process.reap():
            return
        self._blind.discard(process)
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[0] is process:
                self._selector.unregister(key.fd)
        for stream, line in process.close():
            self._forward(process, stream, [line])
        for stream, line in self.lines.ended(process):
            self._say(process, stream, line)
        if self._on_exit:
            self._on_exit(process)

    def _forward(self, process: Process, stream: Stream, lines: Sequence[str]) -> None:
        now = time.monotonic()
        for line in lines:
            for shown in self.lines.take(process, stream, line, now):
                self._say(process, *shown)

    def _say(self, process: Process, stream: Stream, line: str, *, prompt: bool = False) -> None:
        say = getattr(self._on_line, "prompt", self._on_line) if prompt else self._on_line
        try:
            say(process, stream, line)
        except BrokenPipeError:  # our own stdout is gone: `headwater run … | head`
            self._on_line = _discard
            self.request(signal.SIGTERM)

    def request(self, number: int) -> None:
        """Ask the launcher to act as upon a signal."""
        self.requests.append(number)
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"!")

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP become requests (main thread only; elsewhere nothing changes)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup the job outlives the terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.request(number)


def _discard(process: Process, stream: Stream, line: str) -> None:
    del process, stream, line
