"""What a recipe says of itself to the code that all recipes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from headwater_recipes.common.settings import AnySettings


@dataclass(frozen=True)
class Recipe(Generic[AnySettings]):
    """``name`` begins its run folders' names; ``command`` is what the user types; ``worker`` the module that a worker
    process runs with the run folder as argument; ``settings`` their type, ``check`` raises for those that cannot work
    and ``fixed`` names those that a run that goes on cannot change. ``patience``: seconds that the workers get after
    Ctrl-C, SIGTERM or SIGHUP to end their step and save.
    """

    name: str
    command: str
    worker: str
    settings: type[AnySettings]
    check: Callable[[AnySettings], None]
    fixed: tuple[str, ...]
    patience: float = 60.0
