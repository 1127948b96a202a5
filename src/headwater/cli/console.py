"""The terminal: one console for results, one for everything else."""

from __future__ import annotations

from typing import IO, cast

from rich.console import Console
from rich.text import Text

from headwater.launch.streams import Sturdy

_FILE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe: there is no edge to cut it at."""


def out() -> Console:
    """Results, on stdout."""
    return _console(stderr=False)


def err() -> Console:
    """What is said beside them, on stderr."""
    return _console(stderr=True)


def complain(message: str) -> None:
    """An error: one red paragraph on stderr. The message is shown as it is, never read as markup."""
    _say(Text("headwater: ", "bold red").append(message, "red"))


def note(message: str) -> None:
    """What is going on, dimmed, on stderr."""
    _say(Text(message, "dim"))


def _say(paragraph: Text) -> None:
    """On a terminal broken between words, which it does not do itself; elsewhere one line."""
    console = err()
    console.print(paragraph, soft_wrap=not console.is_terminal)


def counted(number: int, what: str) -> str:
    """``1 server``, ``2 servers``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _console(*, stderr: bool) -> Console:
    # What is said beside the results never ends a job; results that nobody reads end the command, as rich does.
    console = Console(file=cast("IO[str]", Sturdy("stderr"))) if stderr else Console()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    return console
