"""``headwater recipes``: a table of what can be trained by one command, whoever's package brings it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.errors import UsageError
from headwater_recipes.common.recipe import About, Recipe
from headwater_recipes.data.catalog import CATALOG

GROUP = "headwater.commands"
"""The entry points by which packages add commands."""

_WIDE = 200
"""Columns of a table that goes into a file or a pipe."""


class Row(msgspec.Struct, frozen=True):
    """A recipe as the table shows it; ``minutes`` is None where its package does not say."""

    command: str
    task: str
    data: str
    licence: str
    model: str
    metric: str
    baseline: str
    minutes: float | None


def found() -> Iterator[Recipe[Any]]:
    """The recipes of all installed packages, by their commands' names. Loads no torch.

    A command is a recipe's if ``common.command.command`` made it. One that cannot be imported, say as an optional
    library is missing, is left out; ``headwater --help`` names it.
    """
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name):
        try:
            command = point.load()
        except (ImportError, AttributeError, UsageError):
            continue
        recipe = getattr(command, "recipe", None)
        if isinstance(recipe, Recipe):
            yield recipe


def row(recipe: Recipe[Any]) -> Row:
    """What a recipe says of itself, with the licences of its data."""
    said = recipe.about
    about = said or About(recipe.help.strip().partition("\n")[0], (), "", "", "", 0)
    data, minutes = ", ".join(about.data), said and said.minutes
    return Row(
        recipe.typed, about.task, data, _licence(about), about.model, about.metric, about.baseline, minutes
    )  # fmt: skip


def _licence(about: About) -> str:
    licences = [CATALOG[name].licence for name in about.data if name in CATALOG]
    return ", ".join(dict.fromkeys(each for each in (*licences, about.licence) if each))


def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
) -> None:
    """What can be trained by one command: task, data, model, and what it is judged by.

    Data sets of the catalog are fetched by headwater data get NAME.
    Minutes are those of two cores, evaluation included.
    """
    rows = [row(recipe) for recipe in found()]
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    table = Table("command", "task", "data", "licence", "model", "metric · baseline", box=None, header_style="bold")
    table.add_column("min", justify="right")
    for each in rows:
        judged = " · ".join(part for part in (each.metric, each.baseline) if part)
        minutes = "" if each.minutes is None else f"{each.minutes:g}"
        words = (each.task, each.data, each.licence, each.model, judged, minutes)
        table.add_row(Text(each.command, no_wrap=True), *map(Text, words))
    console.print(table)
