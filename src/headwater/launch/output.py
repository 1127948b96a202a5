"""The processes' lines on the launcher's own stdout and stderr."""

from __future__ import annotations

import random
from typing import IO, TYPE_CHECKING, cast

from headwater.launch.streams import Sturdy

_state = random.getstate()
from rich.console import Console  # noqa: E402 - its import draws from Python's generator, which is the script's
from rich.text import Text  # noqa: E402

random.setstate(_state)

if TYPE_CHECKING:
    from headwater.launch.process import Process, Stream

_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")


class Printer:
    """Writes ``[w0] line``: stdout to stdout, stderr to stderr; the prefix has a colour of its own on a terminal."""

    def __init__(self) -> None:
        names: tuple[Stream, Stream] = ("stdout", "stderr")
        self._files: dict[Stream, Sturdy] = {name: Sturdy(name, self._lost) for name in names}
        self._consoles: dict[Stream, Console] = {
            name: Console(file=cast("IO[str]", file), soft_wrap=True, highlight=False, markup=False)
            for name, file in self._files.items()
        }
        self._open: dict[Stream, Process] = {}  # whose unfinished line is the last on the stream

    def __call__(self, process: Process, stream: Stream, line: str) -> None:
        self._write(process, stream, line, "\n")

    def prompt(self, process: Process, stream: Stream, text: str) -> None:
        """A line that is not finished: the process waits for an answer, which the terminal shows behind it."""
        self._write(process, stream, text, "")

    def _write(self, process: Process, stream: Stream, line: str, end: str) -> None:
        console = self._consoles[stream]
        begun = self._open.pop(stream, None)
        before = "" if begun in (None, process) else "\n"
        prefix = "" if begun is process else f"[{process.name}] "
        if not end:
            self._open[stream] = process
        if console.is_terminal:
            style = _STYLES[process.rank % len(_STYLES)] if process.role == "worker" else "dim"
            text = Text(before).append(prefix, style).append_text(Text.from_ansi(line))
            if not end:  # Text.from_ansi leaves out the space after a prompt's last word
                text.append(line[len(line.rstrip()) :] if not text.plain.endswith(" ") else "")
            console.print(text, soft_wrap=True, end=end)
        else:
            out = self._files[stream]
            out.write(f"{before}{prefix}{line}{end}")
            out.flush()
        error = self._files[stream].error
        if isinstance(error, BrokenPipeError):
            raise error

    @staticmethod
    def _lost(error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            note("nobody reads what this command prints any more (its pipe is closed): the workers are told to end")
        else:
            note(f"what the workers print is lost from here on ({error.strerror}); the job goes on")


def note(text: str) -> None:
    """Something that the launcher itself has to say: one line on stderr."""
    console = Console(file=cast("IO[str]", Sturdy("stderr")), highlight=False, markup=False)
    console.print(Text().append("headwater: ", "bold yellow").append(text), soft_wrap=not console.is_terminal)
