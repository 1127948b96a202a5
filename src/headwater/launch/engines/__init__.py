"""What runs the processes of a job: this machine, so far. ``base.py`` says what an engine must do."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from headwater.errors import UsageError

if TYPE_CHECKING:
    from headwater.launch.engines.base import Engine

ENGINES = {
    "local": "headwater.launch.engines.local:LocalEngine",
}
"""An engine's class by the name that ``Launcher(engine=…)`` takes; its module is imported when it is asked for."""


def make(name: str) -> Engine:
    """A new engine. Raises ``UsageError`` for a name that is not registered."""
    if name not in ENGINES:
        raise UsageError(f"engine={name!r}: must be one of {', '.join(ENGINES)}; nothing was started")
    module, _, found = ENGINES[name].partition(":")
    return cast("Engine", getattr(import_module(module), found)())
