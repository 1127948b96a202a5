"""From an address to a client."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from headwater import interrupts
from headwater.client.control import Dial
from headwater.errors import Unreachable, UsageError
from headwater.transports import inproc
from headwater.transports.address import Address, host_identity, parse
from headwater.transports.stream import Handler, Link, StreamLink
from headwater.transports.stream import connect as open_socket
from headwater.wire.auth import token_from_environment
from headwater.wire.messages import ShardView

if TYPE_CHECKING:
    from headwater.client.client import Client


def connect(
    address: str | None = None,
    *,
    rank: int | None = None,
    world: int | None = None,
    role: str = "worker",
    timeout: float | None = None,
    servers: int = 1,
) -> Client:
    """Join a cluster.

    ``address``: ``tcp://HOST:PORT`` of the coordinator, or ``inproc://[NAME]`` for a cluster of ``servers``
    servers in this process (without a name: one of its own). Default: ``HEADWATER_ADDRESS``, else ``inproc://``.
    ``rank`` and ``world`` default to ``HEADWATER_RANK`` and ``HEADWATER_WORLD_SIZE``; the token comes from
    ``HEADWATER_TOKEN`` or ``HEADWATER_TOKEN_FILE``. ``role``: ``"worker"`` or ``"reader"``. ``timeout``: seconds
    that any wait of this client may take (``HEADWATER_TIMEOUT``, else 300).

    Raises ``Unreachable``, ``AuthenticationFailed``, ``RankTaken``, ``DeadlineExceeded``, ``UsageError``.
    """
    if role not in ("worker", "reader"):
        raise UsageError(f"role {role!r} is neither 'worker' nor 'reader'")
    from headwater.client.client import Client  # with torch, which a reader of versions can do without

    patience = float(os.environ.get("HEADWATER_TIMEOUT", "300")) if timeout is None else timeout
    if role == "worker":
        rank = _number("HEADWATER_RANK") if rank is None else rank
        world = _number("HEADWATER_WORLD_SIZE") if world is None else world
    client = Client(dial_for(address, patience, servers), role=role, rank=rank, world=world, timeout=patience)
    _clients.add(client)
    return client


def dial_for(address: str | None, timeout: float, servers: int = 1) -> Dial:
    """How a client of the cluster at ``address`` reaches its coordinator and servers. Raises ``UsageError``."""
    target = parse(address or os.environ.get("HEADWATER_ADDRESS") or "inproc://")
    return _dial_inproc(target.host, servers) if target.scheme == "inproc" else _dial(target, timeout)


def current() -> Client:
    """The client that is open in this process. Raises ``UsageError`` if there is none, or more than one."""
    found = [client for client in _clients if not client.closed]
    if len(found) != 1:
        raise UsageError(f"{len(found)} clients are open in this process; connect first, or say which: client=…")
    return found[0]


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdigit():
        raise UsageError(f"{name}={text!r} is not a number")
    return int(text)


def _dial_inproc(name: str, servers: int) -> Dial:
    hub = inproc.hub(name, servers)
    return lambda view, handler: hub.connect(-1 if view is None else view.shard, handler)


def _dial(coordinator: Address, timeout: float) -> Dial:
    token = token_from_environment()
    checked = os.environ.get("HEADWATER_CHECKSUM") == "1"
    force = os.environ.get("HEADWATER_TRANSPORT", "")
    if force not in ("", "local", "tcp"):
        raise UsageError(f"HEADWATER_TRANSPORT={force!r} is neither 'local' nor 'tcp'")
    host = host_identity()

    def dial(view: ShardView | None, handler: Handler) -> Link:
        target = coordinator if view is None else _choose(view, host, force)
        sock = interrupts.interruptible(open_socket, target, token, min(timeout, 10.0))
        return StreamLink(sock, handler, checked and view is not None)

    return dial


def _choose(view: ShardView, host: str, force: str) -> Address:
    """Same host: the unix socket, which shares memory. Else TCP."""
    same = bool(view.local) and view.host == host and bool(host)
    if force == "local" and not same:
        raise Unreachable(f"HEADWATER_TRANSPORT=local, but server {view.shard} is on another host than this client")
    return parse(view.local if same and force != "tcp" else view.address)
