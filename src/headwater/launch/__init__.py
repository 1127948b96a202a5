"""Start a cluster and its workers. Names load on first use, as those of ``headwater``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.launch.engines.local import cores
    from headwater.launch.job import Rules
    from headwater.launch.launcher import Launcher, launch
    from headwater.launch.outcome import Outcome
    from headwater.launch.process import Process
    from headwater.launch.ready import address_of
    from headwater.launch.shape import Shape
    from headwater.launch.streams import Sturdy

__all__ = ["Launcher", "Outcome", "Process", "Rules", "Shape", "Sturdy", "address_of", "cores", "launch"]

_HOME = {
    "Launcher": "launcher",
    "Outcome": "outcome",
    "Process": "process",
    "Rules": "job",
    "Shape": "shape",
    "Sturdy": "streams",
    "address_of": "ready",
    "cores": "engines.local",
    "launch": "launcher",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return found
