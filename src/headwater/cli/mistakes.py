"""What was probably meant by a command or an option that does not exist."""

from __future__ import annotations

import contextlib
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from headwater.cli.console import note

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FEW = 12
"""Commands that a message can name all of."""
_MOST = 3
"""Suggestions."""
_ALIKE, _NEAR = 0.6, 0.15
"""Likeness, 0 to 1, of what is suggested; how much less alike than the best one it may be."""
_BEGUN = 0.9
"""Likeness of a name to its beginning."""


class Group(TyperGroup):
    """A group of commands whose errors say what was probably meant.

    Typer's own suggestions know neither the beginning of a word nor commands of another group.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in self.commands and not word.startswith("-"):
            ctx.fail(f"No such command {word!r}.{self.meant(word)}")
        return super().resolve_command(ctx, args)

    def meant(self, word: str) -> str:
        """`` Did you mean 'train'?``, or which commands there are if they are few."""
        nested = {name: f"{group} {name}" for group, each in self.commands.items() for name in _inside(each)}
        near = [nested.get(name, name) if name not in self.commands else name
                for name in alike(word, [*self.commands, *nested])]  # fmt: skip
        if near:
            return _question(near)
        return f" There is: {', '.join(self.commands)}." if len(self.commands) <= _FEW else ""

    def make_context(self, *words: Any, **more: Any) -> Any:
        with _explained():
            return super().make_context(*words, **more)

    def invoke(self, ctx: Any) -> Any:
        with _explained():
            return super().invoke(ctx)


class Root(Group):
    """All commands. Ctrl-C ends any of them with a line and 130, whatever it did."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if not interrupted(error):
                raise
        except KeyboardInterrupt:
            pass
        note("headwater: interrupted")
        raise typer.Exit(130)


def interrupted(error: BaseException | None) -> bool:
    """Whether a Ctrl-C is behind an error: an extension that is being imported makes an ``ImportError`` of it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def alike(word: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that begin with ``word`` or are spelt like it, the nearest first; no far ones beside near."""
    found = {name: _likeness(word, name) for name in names}
    best = max(found.values(), default=0.0)
    near = [name for name, likeness in found.items() if likeness >= max(_ALIKE, best - _NEAR)]
    return sorted(near, key=lambda name: -found[name])[:_MOST]


def _likeness(word: str, name: str) -> float:
    """0 to 1. All options begin with dashes, so these tell nothing."""
    word, name = word.lstrip("-"), name.lstrip("-")
    spelt = SequenceMatcher(None, word, name).ratio()
    return max(spelt, _BEGUN) if len(word) > 1 and name.startswith(word) else spelt


def _question(near: list[str]) -> str:
    *rest, last = (f"'{name}'" for name in near)
    return f" Did you mean {', '.join(rest) + ' or ' if rest else ''}{last}?"


def _inside(command: object) -> Iterable[str]:
    return getattr(command, "commands", ())


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say which option was probably meant. Typer keeps its class of error to itself, so it is known by its fields."""
    try:
        yield
    except Exception as error:
        option, ctx = getattr(error, "option_name", None), getattr(error, "ctx", None)
        if option and ctx is not None and hasattr(error, "possibilities"):
            near = alike(option, (name for each in ctx.command.params for name in (*each.opts, *each.secondary_opts)))
            error.possibilities = None
            error.message = f"No such option: {option}.{_question(near) if near else ''}"  # type: ignore[attr-defined]
        raise
