"""A recipe's command, made of its settings: ``train = command(RECIPE)``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from headwater_recipes.common.options import Field, Option, fields, make_changes
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.settings import Training
from headwater_recipes.common.stages import stage


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Options that are of one launch and not kept in the run's folder."""

    run: Annotated[str | None, Option("The run's folder. Default: runs/{recipe}-DATE-TIME.", path=True)] = None
    resume: Annotated[bool, Option("Go on with --run, or the newest run.")] = False
    restore: Annotated[str | None, Option("Begin with the values of this snapshot.", path=True)] = None
    only_rank0: Annotated[bool, Option("Of what the workers write show rank 0's alone, and why another fails.")] = False


def command(recipe: Recipe[Any]) -> Callable[..., None]:
    """The function that typer makes a command of: every ``Option`` of the settings is one of its parameters."""

    def train(run: Path | None, resume: bool, restore: Path | None, only_rank0: bool, **given: Any) -> None:
        let_threads_sleep()
        console = Console()
        changes = recipe.settings.look_up(make_changes(recipe.settings, given), console)
        with stage(console, "loading torch"):
            from headwater_recipes.common import job

            recipe.load()
        if resume:
            folder = job.resume(recipe, run, changes)
        else:
            folder = job.prepare(recipe, recipe.settings.of(changes), run, console)
        code = job.Job(recipe, folder, console, restore, only_rank0=only_rank0).run()
        if code:
            raise typer.Exit(code)

    parameters = [_parameter(recipe, field) for field in _ordered(recipe)]
    train.__doc__ = recipe.help
    train.recipe = recipe  # type: ignore[attr-defined] # by which `headwater recipes` knows a recipe's command
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    train.recipe = recipe  # type: ignore[attr-defined] # who finds the command by its entry point finds this
    train.__annotations__ = {each.name: each.annotation for each in parameters}
    return train


def _ordered(recipe: Recipe[Any]) -> Iterator[Field]:
    """What the recipe alone has, then what all have; --run and its like come after --data."""
    shared = Training.__struct_fields__
    found = {field.name: field for field in fields(recipe.settings)}
    own = dict.fromkeys(name for each in recipe.settings.__mro__ for name in inspect.get_annotations(each))
    yield from (found[name] for name in own if name in found and name not in shared)
    yield found["data"]
    yield from fields(Launch)
    yield from (found[name] for name in shared[1:] if name in found)


def _parameter(recipe: Recipe[Any], field: Field) -> inspect.Parameter:
    """Options left out are None (False): whether one was given matters to a run that goes on."""
    option = field.option
    text = option.help.format(default=field.default, settings=recipe.settings, recipe=recipe.name)
    switch = field.kind is bool
    names = [field.flag, option.short] if option.short else [field.flag]
    kind: Any = bool if switch else _typed(field) | None
    annotation = Annotated[kind, typer.Option(*names, help=text)]
    default = False if switch else None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _typed(field: Field) -> Any:
    """What typer makes of the word on the command line."""
    if field.kind == tuple[str, ...]:
        return list[Path] if field.option.path else list[str]
    if field.option.path:
        return Path
    return str if field.choices else field.kind


def let_threads_sleep() -> None:
    """Threads of a matrix product that wait for each other sleep, here and in the workers: to be called before torch
    is imported. On a machine with other things to do, say answering from what is trained, spinning costs most of the
    time; on an idle one it gains little.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
