"""``inproc://``: a whole cluster in this process. Calls instead of sockets, so a debugger steps from hook to kernel.

Here is only the client's end. The cluster itself is above this room: ``headwater.launch.inproc`` provides it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headwater.errors import UsageError
from headwater.transports.stream import Handler, Link


class Hub(Protocol):
    """A cluster in this process. ``target`` is a shard's number, or -1 for the coordinator."""

    def connect(self, target: int, handler: Handler) -> Link: ...


Provider = Callable[[str, int], Hub]
_provider: list[Provider] = []


def provide(provider: Provider) -> None:
    """``provider(name, servers)`` returns the hub of that name, made on first use; an empty name is a new one."""
    _provider[:] = [provider]


def provided() -> bool:
    """Whether somebody has."""
    return bool(_provider)


def hub(name: str, servers: int) -> Hub:
    if not _provider:
        raise UsageError("inproc:// needs headwater.launch.inproc to be imported; use headwater.connect")
    return _provider[0](name, servers)
