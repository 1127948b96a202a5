"""What a coordinator or server says of itself when it accepts connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from headwater.errors import InternalError

if TYPE_CHECKING:
    from headwater.launch.process import Process


class Ready(msgspec.Struct, frozen=True):
    """The line that a coordinator or server writes when it accepts connections."""

    address: str
    pid: int
    server: int = -1
    """The number that the coordinator gave a server."""


def address_of(process: Process) -> str:
    """Where a coordinator or server that is ready accepts connections."""
    return ready_of(process).address


def ready_of(process: Process) -> Ready:
    """What a process said when it was ready. A server is called by the number that ``headwater status`` shows."""
    try:
        found = msgspec.json.decode(process.ready, type=Ready)
    except msgspec.MsgspecError as error:
        raise InternalError(f"{process.name} wrote {process.ready!r} on its ready pipe: {error}") from None
    if found.server >= 0:
        process.name = f"s{found.server}"
    return found
