"""The processes' lines on the launcher's own stdout and stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from headwater.launch.process import Process, Stream

_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")


class Printer:
    """Writes ``[w0] line``: stdout to stdout, stderr to stderr; the prefix has a colour of its own on a terminal."""

    def __init__(self) -> None:
        self._consoles: dict[Stream, Console] = {
            "stdout": Console(soft_wrap=True, highlight=False, markup=False),
            "stderr": Console(soft_wrap=True, highlight=False, markup=False, stderr=True),
        }

    def __call__(self, process: Process, stream: Stream, line: str) -> None:
        console = self._consoles[stream]
        if console.is_terminal:
            style = _STYLES[process.rank % len(_STYLES)] if process.role == "worker" else "dim"
            console.print(Text().append(f"[{process.name}] ", style).append_text(Text.from_ansi(line)), soft_wrap=True)
            return
        out = sys.stdout if stream == "stdout" else sys.stderr
        try:
            out.write(f"[{process.name}] {line}\n")
            out.flush()
        except BrokenPipeError:
            # Nobody reads any more (`… | head`). Python would complain again when it flushes at its own exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
            raise


def note(text: str) -> None:
    """Something that the launcher itself has to say: one line on stderr."""
    console = Console(stderr=True, highlight=False, markup=False)
    with contextlib.suppress(BrokenPipeError):
        console.print(Text().append("headwater: ", "bold yellow").append(text), soft_wrap=True)
