"""From an address to a client; and the one client that all optimizers of a process share."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headwater import interrupts
from headwater.client.control import Dial
from headwater.errors import Unreachable, UsageError
from headwater.transports import forks, inproc, standard
from headwater.transports.address import Address, host_identity, parse
from headwater.transports.dial import dial as reach
from headwater.transports.stream import Handler, Link, StreamLink
from headwater.wire.auth import token_from_environment
from headwater.wire.messages import ShardView

if TYPE_CHECKING:
    from headwater.client.client import Client
    from headwater.client.naming import Names

OWN = "inproc://"  # a cluster of one's own in this process: it has no name that another could ask for it by


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

    One process is one worker: where its optimizers have joined already, or its rank comes from ``HEADWATER_RANK`` and
    it was connected before, the client that it has is returned, and leaves when it was closed as often as it was asked
    for (that of the optimizers: when the process ends).

    ``address``: ``tcp://HOST:PORT`` of the coordinator, or ``inproc://[NAME]`` for a cluster of ``servers``
    servers in this process (without a name: one of its own). Default: ``HEADWATER_ADDRESS``, else ``inproc://``.
    ``rank`` and ``world`` default to ``HEADWATER_RANK`` and ``HEADWATER_WORLD_SIZE``; the token comes from
    ``HEADWATER_TOKEN`` or ``HEADWATER_TOKEN_FILE``. ``role``: ``"worker"`` or ``"reader"``. ``timeout``: seconds
    that any wait of this client may take (``HEADWATER_TIMEOUT``, else 300); for workers that are alive it waits longer
    (``HEADWATER_STEP_TIMEOUT``, else 1800).

    Raises ``Unreachable``, ``AuthenticationFailed``, ``RankTaken``, ``DeadlineExceeded``, ``UsageError``.
    """
    if role not in ("worker", "reader"):
        raise UsageError(f"role {role!r} is neither 'worker' nor 'reader'")
    with _lock:
        known = _known(address, rank, servers) if role == "worker" else None
    if known is None:
        return _join(address, rank, world, role, timeout, servers).hold()
    if world not in (None, known.world):
        raise UsageError(f"world={world}: this process is worker {known.rank} of {known.world} already")
    known.shards.timeout = known.timeout if timeout is None else timeout
    return known.hold()


def shared(user: object) -> Client:
    """The client of this process, for an optimizer that was given none; ``release`` it when ``user`` is closed.

    The one that the script has opened, if there is exactly one; else it is made from the environment on first use. In a
    cluster that others use too it stays until the process ends: between two optimizers nobody leaves the others alone.
    One of its own in this process is closed, and its memory freed, with its last user.

    Raises ``UsageError`` if the script has opened several, and as ``connect``.
    """
    with _lock:
        key = (_target(None), _place())
        found = _shared.get(key)
        if found is not None and not found.standing and not found.users:  # all of them are garbage
            found.client.let_go()
        if found is not None and not found.client.closed:
            found.users.add(user)
            return found.client
        opened = [client for client in _workers() if not client.kept and key[0] in (OWN, client.address)]
        if len(opened) == 1:
            return opened[0]
        if opened:
            raise UsageError(f"{len(opened)} clients are open in this process; say which one to use: client=…")
        client = _join(None, None, None, "worker", None, 1)
        client.kept = True
        _shared[key] = found = _Shared(client, standing=key[0] != OWN)
        found.users.add(user)
        return client


def release(user: object) -> None:
    """``user`` has closed. Does nothing for one that has its client from elsewhere."""
    with _lock:
        for key, found in list(_shared.items()):
            if user in found.users:
                found.users.discard(user)
                if not found.users and not found.standing:
                    del _shared[key]
                    found.client.let_go()


def current() -> Client:
    """The client that is open in this process. Raises ``UsageError`` if there is none, or more than one."""
    found = _workers()
    if len(found) != 1:
        raise UsageError(f"{len(found)} clients are open in this process; connect first, or say which: client=…")
    return found[0]


def only() -> Client | None:
    """The client that is open in this process, if there is one. Raises ``UsageError`` if there is more than one."""
    with _lock:
        return current() if _workers() else None


def stated() -> tuple[int, int] | None:
    """(rank, world) of the environment, if it states a world."""
    world = _number("HEADWATER_WORLD_SIZE")
    return None if world is None else (_number("HEADWATER_RANK") or 0, world)


def leave_all() -> None:
    """Finish the last steps of all clients of this process and leave, as at its end."""
    with _lock:
        _shared.clear()
        for client in list(_clients):
            client.leave()


@dataclass(slots=True)
class _Shared:
    """``standing``: it stays when its last user has closed."""

    client: Client
    standing: bool
    users: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)


_lock = threading.RLock()
_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_shared: dict[tuple[str, int | None], _Shared] = {}
_of_a_worker = False  # this process was forked from a worker of a cluster
_names: dict[tuple[str, int], Names] = {}  # what each worker of each cluster has called its tables


def _workers() -> list[Client]:
    """Clients that are open; where threads are workers, this thread's."""
    found = [client for client in _clients if not client.closed and client.rank >= 0]
    mine = [client for client in found if client.thread == threading.get_ident()]
    return mine if len(found) > 1 and mine else found


def _known(address: str | None, rank: int | None, servers: int) -> Client | None:
    """The client that this process has where it asks for another."""
    asked = _place() if rank is None else rank
    target = _target(address)
    found = _shared.get((_target(None), _place()))
    if found is not None and not found.client.closed and servers == 1:
        same = address is None or (target == found.client.address and target != OWN)
        if same and asked in (None, found.client.rank):
            return found.client
    if rank is not None or asked is None or target.startswith(OWN):
        return None
    return next((c for c in _clients if not c.closed and (c.address, c.rank) == (target, asked)), None)


def _join(
    address: str | None, rank: int | None, world: int | None, role: str, timeout: float | None, servers: int
) -> Client:
    from headwater.client.client import Client  # with torch, which a reader of versions can do without

    patience = _seconds("HEADWATER_TIMEOUT", 300.0) if timeout is None else timeout
    longer = _seconds("HEADWATER_STEP_TIMEOUT", 1800.0)
    if role == "worker":
        rank = _place() if rank is None else rank
        world = _world() if world is None else world
        if address is None and _target(None) == OWN:
            _check_not_apart()
    dial = dial_for(address, patience, servers)
    if role == "worker" and _of_a_worker and _target(address) != OWN and rank is not None and rank == _place():
        raise forks.refusal()  # it would take its parent's place
    run = os.environ.get("HEADWATER_RUN", "")
    client = Client(dial, role=role, rank=rank, world=world, timeout=patience, step_timeout=longer, run=run)
    client.address, client.thread = _target(address), threading.get_ident()
    if client.address != OWN:
        client.names = _names.setdefault((client.address, client.rank), client.names)
    _clients.add(client)
    return client


def _in_child() -> None:
    """A forked child has no client; the exit of its parent's is its parent's."""
    global _lock, _of_a_worker
    _lock = threading.RLock()
    _of_a_worker = _of_a_worker or any(not c.closed and c.rank >= 0 and c.address != OWN for c in _clients)
    for client in list(_clients):
        client.abandon()
    _clients.clear()
    _shared.clear()
    _names.clear()


os.register_at_fork(after_in_child=_in_child)


@atexit.register
def _leave_at_exit() -> None:
    """A script that ended well finishes its last step; one that failed is lost, and the others are told so."""
    if getattr(sys, "last_value", None) is None:
        leave_all()


def _place() -> int | None:
    """The rank that this process was given, by us or, in a cluster that it was sent to, by torchrun."""
    found = _number("HEADWATER_RANK")
    return _number("RANK") if found is None and os.environ.get("HEADWATER_ADDRESS") else found


def _world() -> int | None:
    found = _number("HEADWATER_WORLD_SIZE")
    return _number("WORLD_SIZE") if found is None and os.environ.get("HEADWATER_ADDRESS") else found


def _check_not_apart() -> None:
    """Processes that another launcher takes for one job would each train in a cluster of their own, unnoticed."""
    others = _number("WORLD_SIZE") or 1
    if others > 1 and "HEADWATER_WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"this process is one of {others} (WORLD_SIZE), and HEADWATER_ADDRESS does not say where they meet: each "
            "would train by itself. Start them with `headwater run --workers N`, or set HEADWATER_ADDRESS to the "
            "coordinator of a cluster that `headwater up` has started"
        )


def _target(address: str | None) -> str:
    return address or os.environ.get("HEADWATER_ADDRESS") or OWN


def dial_for(address: str | None, timeout: float, servers: int = 1) -> Dial:
    """How a client of the cluster at ``address`` reaches its coordinator and servers. Raises ``UsageError``."""
    standard.occupy()
    target = parse(_target(address))
    return _dial_inproc(target.host, servers) if target.scheme == "inproc" else _dial(target, timeout)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdigit():
        raise UsageError(f"{name}={text!r} is not a number")
    return int(text)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        found = float(text) if text else default
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        raise UsageError(f"{name}={text!r} is no number of seconds above 0; nothing was connected")
    return found


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
        channel = interrupts.interruptible(reach, target, token, min(timeout, 10.0))
        return StreamLink(channel, handler, checked and view is not None)

    return dial


def _choose(view: ShardView, host: str, force: str) -> Address:
    """Same host: the unix socket, which shares memory. Else TCP."""
    same = bool(view.local) and view.host == host and bool(host)
    if force == "local" and not same:
        raise Unreachable(f"HEADWATER_TRANSPORT=local, but server {view.shard} is on another host than this client")
    return parse(view.local if same and force != "tcp" else view.address)
