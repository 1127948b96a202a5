"""Commands that are loaded only when they are wanted: what costs a long import, and what other packages add.

A package's command is found by an entry point of the group ``headwater.commands``. Its name is where the command hangs:
``generate`` is ``headwater generate``, ``train.lm`` is ``headwater train lm``. Its value is the command's function,
with typer's annotations, or a ``typer.Typer`` with commands of its own, as that of ``bench``. So the command line knows
no recipe by name, and anyone's package can add one.
"""

from __future__ import annotations

import re
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

import typer

from headwater.cli.mistakes import Group
from headwater.errors import HeadwaterError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from headwater.gateway.tasks import Task

GROUP = "headwater.commands"
_LATE = {
    "serve": "Answer over HTTP with the newest weights: OpenAI-compatible for language models.",
    "relay": "Keep a copy of published versions here, for many readers.",
    "export": "Write a snapshot as files that load without Headwater: model.safetensors, optimizer state.",
}
"""Commands of our own by the module ``headwater.cli.NAME`` that holds them, with the line that the help shows."""

_HELP = {"train": "Train a recipe's model on a cluster of this machine."}

BESIDE = ("bench", "chaos")
"""Commands of ``headwater_bench``. It is installed with this package, so they are missing only where the files are
newer than the installation, whose entry points an editable install wrote once."""


def names() -> set[str]:
    """The first words of all commands that this module adds."""
    return {*_LATE, *BESIDE, *(_first(point) for point in metadata.entry_points(group=GROUP))}


def _first(point: EntryPoint) -> str:
    return point.name.partition(".")[0]


def add(app: typer.Typer, called: str | None) -> None:
    """Add the commands that ``called``, the first word of the command line, may need; all of them for the help.

    Raises ``UsageError`` if ``called`` is one of ``BESIDE`` and has no entry point.
    """
    for name, line in _LATE.items():
        if called == name:
            app.command(name)(getattr(import_module(f"headwater.cli.{name}"), name))
        elif called is None:
            app.command(name, help=line)(_nothing)
    groups: dict[str, typer.Typer] = {}
    points = sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name)
    for name in set(BESIDE) - {_first(point) for point in points}:
        _miss(app, name, called)
    for point in points:
        *path, name = point.name.split(".")
        if called not in (None, _first(point)):
            continue
        if path and path[0] not in groups:
            groups[path[0]] = typer.Typer(cls=Group, no_args_is_help=True, help=_HELP.get(path[0]))
            app.add_typer(groups[path[0]], name=path[0])
        _load(groups[path[0]] if path else app, name, point, called)


def _load(parent: typer.Typer, name: str, point: EntryPoint, called: str | None) -> None:
    try:
        command = point.load()
    except (ImportError, AttributeError, HeadwaterError) as error:
        if called == point.name:
            raise
        _stand_in(parent, name, point, error)
        return
    if isinstance(command, typer.Typer):
        parent.add_typer(command, name=name, cls=Group)
    else:
        parent.command(name)(command)


def _stand_in(parent: typer.Typer, name: str, point: EntryPoint, error: Exception) -> None:
    """A command that cannot be loaded has a line in the help and fails when it is called; its neighbours work."""

    def fail() -> None:
        raise error

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    told = f"(not available: {point.value} cannot be imported)"
    if isinstance(error, HeadwaterError):
        told = f"(not available: {error})"
    parent.command(name, help=told, context_settings=settings)(fail)


def _miss(app: typer.Typer, name: str, called: str | None) -> None:
    """A command of ``BESIDE`` without its entry point."""
    remedy = "install Headwater again: pip install -e . (or make install)"
    if called == name:
        raise UsageError(f"the command {name!r} is not registered: the files are newer than the installation; {remedy}")
    if called is None:
        app.command(name, help=f"(not available: {remedy})")(_nothing)


def _nothing() -> None:
    """A line of the help."""


def find_task(recipe: str) -> type[Task]:
    """What answers with the models of a recipe, which is found by its command as the command line finds it.

    A run's folder names a recipe and no code: only what is installed here is loaded.

    Raises ``UsageError``: no such recipe is installed, or it does not say how it is served.
    """
    points = [each for each in metadata.entry_points(group=GROUP) if each.name.startswith("train.")]
    for point in sorted(points, key=lambda each: each.name != f"train.{recipe}"):
        found = _recipe_of(point, recipe)
        if found is None:
            continue
        if not found.served:
            raise UsageError(
                f"the recipe {recipe!r} ({point.value}) does not say how it is served; nothing was started"
            )
        served: type[Task] = found.load_served()
        return served
    raise UsageError(
        f"the folder is of a run of the recipe {recipe!r}, which is not installed here (headwater train --help lists "
        "those that are): install the package that it comes from; nothing was started"
    )


def _recipe_of(point: EntryPoint, name: str) -> Any:
    """The recipe of a command, if it is the one. Others that cannot be loaded are passed over."""
    try:
        recipe = getattr(point.load(), "recipe", None)
    except (ImportError, AttributeError, UsageError):
        if point.name == f"train.{name}":
            raise
        return None
    return recipe if getattr(recipe, "name", None) == name else None


def extra_of(module: str) -> str | None:
    """The extra of Headwater that installs a module: ``recipes`` for ``transformers``."""
    wanted = re.sub(r"[-_.]+", "-", module.partition(".")[0]).lower()
    for line in metadata.requires("headwater") or ():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        if name and extra and re.sub(r"[-_.]+", "-", name[0]).lower() == wanted:
            return extra[1]
    return None
