"""``headwater drain``: move every shard off a server, which ends then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import headwater
from headwater.cli.console import counted, err, note, out
from headwater.cli.options import Address, Timeout
from headwater.cli.status import locate
from headwater.errors import UsageError
from headwater.wire import messages as m

if TYPE_CHECKING:
    from headwater.wire.messages import ServerStatus


def drain(
    server: Annotated[int, typer.Argument(min=0, help="Its number in headwater status.")],
    address: Address = None,
    timeout: Timeout = 600.0,
) -> None:
    """Move every shard off a server while training goes on.

    When nothing is left on it the server ends, and so does the command.
    """
    with headwater.connect(locate(address), role="reader", timeout=timeout) as ps:
        found = find_server(ps.status(), server)
        note(f"headwater: {holdings(found)}")
        empty(ps, server)
    where = found.address.removeprefix("tcp://")
    out().print(f"server {server} ({where}) holds nothing any more and has left the cluster", highlight=False)


def empty(ps: headwater.Client, server: int) -> None:
    """Wait until the server holds nothing, with a sign of life on a terminal."""
    with err().status(f"moving its shards to other servers … (headwater status --watch shows server {server})"):
        ps.ask(m.Drain(server))


def find_server(status: m.ClusterStatus, server: int) -> ServerStatus:
    """Raises ``UsageError`` if there is no such server."""
    known = {each.server: each for each in status.servers if each.state != "dead"}
    if server not in known:
        numbers = ", ".join(str(number) for number in sorted(known))
        raise UsageError(f"there is no server {server}; the cluster has {numbers}; nothing was moved")
    return known[server]


def holdings(server: ServerStatus) -> str:
    """``server 1 is the primary of 2 shards and the backup of 1 shard``."""
    primaries, backups = counted(len(server.primaries), "shard"), counted(len(server.backups), "shard")
    return f"server {server.server} is the primary of {primaries} and a backup of {backups}"
