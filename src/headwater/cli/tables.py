"""Tables of text that fit the terminal, and their redrawing."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headwater.cli.console import out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import RenderableType

_GAP = 2
"""Spaces between two columns."""
_WRAPPED = 10
"""Characters of a cell that may wrap which are to stand on one line if there are so many."""


def grid(title: str | None, *columns: str) -> Table:
    """A table without lines. ``name>``: a column whose cells stand on the right; ``name~``: whose cells may wrap."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, _GAP, 0, 0), pad_edge=False
    )
    for column in columns:
        name, wraps = column.rstrip(">~"), column.endswith("~")
        right = "right" if column.endswith(">") else "left"
        table.add_column(name, justify=right, header_style="dim", no_wrap=not wraps, overflow="fold")  # type: ignore[arg-type]
    return table


def fit(table: Table, width: int, spare: Sequence[str]) -> list[str]:
    """Take columns out of a full table until it is no wider than ``width``; returns the names of those taken.

    ``spare`` names those that can be taken, the first to go first; ``a+b`` go together.
    """
    taken: list[str] = []
    for names in spare:
        if _wide(table) <= width:
            break
        taken += names.split("+")
        table.columns = [column for column in table.columns if column.header not in taken]
    table.columns = [replace(column, _index=place) for place, column in enumerate(table.columns)]
    return taken


def left_out(names: Sequence[str]) -> Text:
    """What a narrow terminal is not shown."""
    return Text(f"no room here for {', '.join(dict.fromkeys(names))}; --json has everything", "dim")


def _wide(table: Table) -> int:
    measured = Console(width=10_000)
    wide = 0
    for column in table.columns:
        widest = max(measured.measure(Text(str(cell))).maximum for cell in (column.header, *column.cells))
        wide += widest if column.no_wrap else min(widest, _WRAPPED)
    return wide + _GAP * (len(table.columns) - 1)


def watch(draw: Callable[[int], RenderableType], every: float) -> None:
    """Draw every so many seconds until Ctrl-C: in place on a terminal; in a pipe or a file one below the other.

    ``draw`` is given the columns that there are.
    """
    console = out()
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty():
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    live.update(draw(console.width), refresh=True)
                    time.sleep(every)
        while True:
            drawn = draw(console.width)
            console.print(Text(time.strftime("%Y-%m-%d %H:%M:%S"), "dim"))
            console.print(drawn)
            console.print()
            time.sleep(every)
