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

    def __call__(self, process: Process, stream: Stream, line: str) -> None:
        console = self._consoles[stream]
        if console.is_terminal:
            style = _STYLES[process.rank % len(_STYLES)] if process.role == "worker" else "dim"
            console.print(Text().append(f"[{process.name}] ", style).append_text(Text.from_ansi(line)), soft_wrap=True)
        else:
            out = self._files[stream]
            out.write(f"[{process.name}] {line}\n")
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
    console.print(Text().append("headwater: ", "bold yellow").append(text), soft_wrap=True)
