"""Hands what the processes write to whoever shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.launch.engines.base import OutputLine, ProcessEnded, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from headwater.launch.engines.base import Event
    from headwater.launch.lines import Lines
    from headwater.launch.process import Process, Stream

    OnLine = Callable[[Process, Stream, str], None]
    OnExit = Callable[[Process], None]


class Screen:
    """An engine's events in; the lines that ``Lines`` lets through out, to ``on_line``.

    ``deaf`` is called when nobody reads any more what ``on_line`` writes: ``headwater run … | head``.
    """

    def __init__(self, lines: Lines, on_line: OnLine, on_exit: OnExit | None, deaf: Callable[[], None]) -> None:
        self._lines, self._on_line, self._on_exit, self._deaf = lines, on_line, on_exit, deaf

    @property
    def due(self) -> float:
        """When something that is held back is to be shown."""
        return self._lines.due

    def show(self, event: Event, now: float) -> None:
        match event:
            case OutputLine(process, stream, line):
                for shown in self._lines.take(process, stream, line, now):
                    self._say(process, *shown)
            case Prompt(process, stream, text):
                self._say(process, stream, text, prompt=True)
            case ProcessEnded(process):
                for stream, line in self._lines.ended(process):
                    self._say(process, stream, line)
                if self._on_exit:
                    self._on_exit(process)

    def show_late(self, now: float) -> None:
        """Tracebacks that were held long enough."""
        for process, (stream, line) in self._lines.late(now):
            self._say(process, stream, line)

    def show_rest(self, reported: str) -> None:
        """The job is over; who was at fault is reported elsewhere."""
        for process, (stream, line) in self._lines.rest(reported):
            self._say(process, stream, line)

    def _say(self, process: Process, stream: Stream, line: str, *, prompt: bool = False) -> None:
        say = getattr(self._on_line, "prompt", self._on_line) if prompt else self._on_line
        try:
            say(process, stream, line)
        except BrokenPipeError:
            self._on_line = _discard
            self._deaf()


def _discard(process: Process, stream: Stream, line: str) -> None:
    del process, stream, line
