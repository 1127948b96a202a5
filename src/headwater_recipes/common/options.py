"""A field of the settings is an option of the command line: its default, help and bounds are written there, once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec

from headwater.errors import UsageError
from headwater_recipes.common import hub


@dataclass(frozen=True)
class Option:
    """Stands in a field's annotation: ``workers: Annotated[int, Option("Worker processes.", least=1)] = 2``.

    Attributes:
        help: ``{default}`` stands for the field's default, ``{settings.X}`` for what the class says, ``{recipe}`` for
            the recipe's name.
        short: a second name, ``-w``.
        least, most, above: bounds of a number; ``above`` is not itself allowed, ``most`` goes with ``least``.
        path: the text is a path; it is made absolute, as workers may run elsewhere.
        named: with ``path``; what is no path here but can be a name of the library ``datasets`` is left as it is.
        fixed: a run that goes on cannot change it, as prepared data hang on it.
    """

    help: str
    short: str = ""
    least: int | None = None
    most: int | None = None
    above: float | None = None
    path: bool = False
    named: bool = False
    fixed: bool = False


class Field(NamedTuple):
    """``kind`` is the field's type without ``None``."""

    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """``--publish-every``."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the field takes; none if it takes any."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


def fields(struct: type[msgspec.Struct]) -> Iterator[Field]:
    """The fields that are options. One that a class defines again without an ``Option`` keeps that of its base."""
    options: dict[str, Option] = {}
    for each in reversed(struct.__mro__):
        for name, hint in get_type_hints(each, include_extras=True).items():
            for mark in hint.__metadata__ if get_origin(hint) is Annotated else ():
                if isinstance(mark, Option):
                    options[name] = mark
    kinds = get_type_hints(struct)
    for found in msgspec.structs.fields(struct):
        if found.name in options:
            yield Field(found.name, _without_none(kinds[found.name]), found.default, options[found.name])


def _without_none(kind: Any) -> Any:
    rest = [each for each in get_args(kind) if each is not NoneType]
    return rest[0] if NoneType in get_args(kind) else kind


def make_changes(struct: type[msgspec.Struct], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given on the command line, by the names of the settings; options left out are None.

    Raises:
        UsageError: a word that is none of a field's choices.
    """
    changes = {}
    for field in fields(struct):
        value = given.get(field.name)
        if value is None or (field.kind is bool and not value):  # a switch says nothing unless it is given
            continue
        if field.choices and value not in field.choices:
            raise UsageError(f"{field.flag} {value}: must be one of {', '.join(field.choices)}")
        changes[field.name] = _plain(value, named=field.option.named)
    return changes


def _plain(value: Any, *, named: bool) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_plain(each, named=named) for each in value)
    if isinstance(value, Path):
        return str(value) if named and hub.is_name(str(value)) else str(value.resolve())
    return value


def check_bounds(settings: msgspec.Struct) -> None:
    """Raises ``UsageError`` for a number that is out of its field's bounds."""
    for field in fields(type(settings)):
        value, option = getattr(settings, field.name), field.option
        if value is None:
            continue
        if option.above is not None and value <= option.above:
            raise UsageError(f"{field.flag} {value}: must be above {option.above:g}; nothing was started")
        low, high = option.least, option.most
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"{low} or more" if high is None else f"from {low} to {high}"
            raise UsageError(f"{field.name}={value}: must be {bounds}; nothing was started")
