"""Words for the user beside the display: what is being done before there are figures, and what came of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text


def redraws(console: Console) -> bool:
    """Whether what is on the screen can be drawn over."""
    return console.is_terminal and not console.is_dumb_terminal


@contextlib.contextmanager
def stage(console: Console, what: str) -> Iterator[None]:
    """Say what is being done, at once, and on a terminal for how long already; there the line goes when it is done."""
    if not redraws(console):
        console.print(Text(f"{what} …"), soft_wrap=True)
        yield
        return
    begun = time.monotonic()
    spinner = Spinner("dots")

    def drawn() -> Spinner:
        spinner.update(text=waiting(what, time.monotonic() - begun))
        return spinner

    with Live(console=console, transient=True, get_renderable=drawn, refresh_per_second=8) as live:
        live.refresh()
        yield


def waiting(what: str, seconds: float) -> Text:
    """``loading torch … 3 s``."""
    return Text(f"{what} …", "dim").append(f" {seconds:.0f} s" if seconds >= 1 else "", "dim")


def say(console: Console, line: str, *, whole: bool = False) -> None:
    """A paragraph; on a terminal it is broken between words, unless it is to be copied ``whole``."""
    console.print(Text(line), soft_wrap=whole or not console.is_terminal)


def clock(seconds: float | None) -> str:
    """``1:05``; a dash while it is not known."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


SAME = 1e-4
"""What a saved model says may differ by this much from what it said in training: another order of summation."""


def say_saved(console: Console, loader: str, what: str, difference: float | None) -> None:
    """Whether what a library's ``loader`` makes of the run folder gives the same ``what`` as the model in training."""
    if difference is not None:
        verdict = f"gives the same {what}" if difference <= SAME else f"DOES NOT give the same {what}"
        say(console, f"  {loader} {verdict} (largest difference {difference:.1e})")
