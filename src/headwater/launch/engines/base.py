"""The protocol of an engine: it starts processes, tells what they do, and ends them when it is told.

What a job does about what an engine tells is decided in ``headwater.launch.job``, for all engines alike. An engine
decides nothing: it starts no process by itself, and ends one only on a signal or when the launcher has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from headwater.launch.process import Command, Process, Stream


class OutputLine(NamedTuple):
    """A line of a process's output, which ``Process.has_written`` has taken in."""

    process: Process
    stream: Stream
    line: str


class Prompt(NamedTuple):
    """A line that is not finished, as its process waits for an answer on its standard input."""

    process: Process
    stream: Stream
    text: str


class ProcessEnded(NamedTuple):
    """A process has ended; all that it had written was told before."""

    process: Process


Event = OutputLine | Prompt | ProcessEnded


class Engine(Protocol):
    """What ``Launcher`` needs of whatever runs processes. All but ``wake`` is called from the launcher's thread."""

    @property
    def cores(self) -> int:
        """Processor cores that the processes of one machine share."""

    def now(self) -> float:
        """Seconds, by a clock that never goes back: the one that ``events`` waits by."""

    def start(self, command: Command) -> Process:
        """Start a process, which must end when the launcher does, however that ends.

        Raises ``OSError`` if it cannot be started. A program that does not exist may also be told by exit code 127.
        """

    def events(self, timeout: float) -> Iterator[Event]:
        """Wait until something happens, at most ``timeout`` seconds, then tell it one by one.

        What is told has been taken in by the process (``Process.returncode`` and so on), and nothing later has. That a
        process is ready is seen on the process alone.
        """

    def wake(self) -> None:
        """End the present or the next wait of ``events`` at once. From any thread, and from a signal handler."""

    def close(self) -> None:
        """Let go of everything; no process is left that could end. Safe to call twice."""
