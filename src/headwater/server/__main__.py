"""``python -m headwater.server --role coordinator|server``: one process of a cluster.

The token comes from HEADWATER_TOKEN or HEADWATER_TOKEN_FILE, never from the command line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headwater.cluster.coordinator import Coordinator, Rules
from headwater.cluster.membership import HEARTBEAT
from headwater.cluster.recovery import Restored
from headwater.errors import (
    AuthenticationFailed,
    ClusterError,
    Halt,
    HeadwaterError,
    LinkBroken,
    LinkError,
    StateCorrupt,
    UsageError,
)
from headwater.server import COORDINATOR
from headwater.server.outliving import Outliving
from headwater.transports import address as addresses
from headwater.transports import memory
from headwater.transports.channel import Channel
from headwater.transports.dial import ask
from headwater.transports.dial import dial as reach
from headwater.transports.loop import Loop
from headwater.transports.receiver import Arrived
from headwater.transports.schemes import listen
from headwater.wire import messages as m
from headwater.wire.auth import token_from_environment
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial

if TYPE_CHECKING:  # a coordinator holds no tensors and does not load torch
    from headwater.server.replication.disk import Folder
    from headwater.server.server import Server

log = logging.getLogger("headwater")

JOIN = 60.0  # seconds until a server gives up joining
AGAIN = 0.2  # seconds between two attempts to join
DIAL = 2.0  # seconds until a server gives up reaching another
GRACE = 0.3  # seconds in which a worker whose connection broke may come back over another


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m headwater.server", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--role", choices=("coordinator", "server"), required=True)
    parser.add_argument("--listen", default="tcp://127.0.0.1:0", help="tcp://HOST:PORT; port 0 takes any")
    parser.add_argument("--coordinator", default=os.environ.get("HEADWATER_ADDRESS"), help="where it listens")
    parser.add_argument("--servers", type=int, default=1, help="coordinator: how many servers the cluster starts with")
    parser.add_argument("--shards", type=int, default=0, help="coordinator: shards (default: as many as servers)")
    parser.add_argument("--replicas", type=int, default=1, help="coordinator: servers that hold each shard")
    parser.add_argument("--min-copies", type=int, default=1, help="coordinator: acknowledge with as many, or wait")
    parser.add_argument("--ack", choices=("memory", "disk"), default="memory", help="coordinator: what is kept where")
    parser.add_argument("--silence", type=float, default=1.0, help="coordinator: seconds until a silent server is dead")
    parser.add_argument("--worker-silence", type=float, default=10.0, help="coordinator: the same for a worker")
    parser.add_argument("--state", help="coordinator: a folder for what must survive it")
    parser.add_argument("--snapshots", help="coordinator: a folder for snapshots")
    parser.add_argument("--snapshot-every", type=float, default=0.0, help="coordinator: seconds between two; 0: none")
    parser.add_argument("--restore", help="coordinator: begin with this snapshot, or the newest in this folder")
    parser.add_argument("--advertise", help="server: what others are told to connect to, instead of --listen")
    parser.add_argument("--data", help="server: a folder for its log (ack=disk)")
    parser.add_argument("--ready-fd", type=int, help="a descriptor for one JSON line when connections are accepted")
    parser.add_argument("--parent", type=int, help="end when this process is gone")
    parser.add_argument(
        "--outlive", type=float, default=0.0, help="seconds that SIGTERM of others than the parent takes"
    )
    return parser.parse_args(argv)


def _die_with_parent(parent: int | None) -> None:
    """Ask the kernel for SIGTERM when the starting process dies; nothing is left behind after ``kill -9``."""
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != parent:
            raise SystemExit(0)


def _announce(fd: int | None, address: str, **more: int) -> None:
    line = json.dumps({"address": address, "pid": os.getpid(), **more}) + "\n"
    if fd is not None:
        os.write(fd, line.encode())
        os.close(fd)


def _stop_on_signals(loop: Loop, outliving: Outliving | None) -> None:
    loop.stop_on_signals()
    if outliving is not None:
        outliving.stop = loop.stop


def run_coordinator(args: argparse.Namespace, token: bytes | None, outliving: Outliving | None = None) -> None:
    from headwater.cluster.store.sqlite import SqliteStore
    from headwater.server.hosts import CoordinatorHost
    from headwater.server.snapshots.keeper import Keeper

    if args.ack == "disk" and not args.state:
        raise UsageError("ack=disk is for a cluster that comes back: name a folder for the coordinator too (--state)")
    store = SqliteStore(args.state) if args.state else None
    rules = Rules(
        args.servers, args.shards, args.replicas, args.min_copies, args.ack, args.silence, args.worker_silence,
        GRACE, min(HEARTBEAT, args.silence / 4), durable=store is not None,
        snapshots=bool(args.snapshots), snapshot_every=args.snapshot_every,
    )  # fmt: skip
    state = store.items() if store is not None else {}
    coordinator = Coordinator(rules, time.monotonic(), state or None, _begin_with(args.restore, state))
    keeper = Keeper(Path(args.snapshots)) if args.snapshots else None
    listener = listen(addresses.parse(args.listen), token)
    if keeper is not None:
        keeper.sweep()
    host = addresses.host_identity()
    loop = Loop(CoordinatorHost(coordinator, store, keeper=keeper), token, lambda dial: _reach(dial, host, token))
    loop.serve(listener)
    _stop_on_signals(loop, outliving)
    _announce(args.ready_fd, str(listener.address))
    loop.run()


def _begin_with(folder: str | None, state: Mapping[str, bytes]) -> Restored | None:
    """The snapshot that a new cluster begins with; one that comes back from its state has begun already."""
    from headwater.server.snapshots.keeper import restored

    if not folder or any(key.startswith("view/") for key in state):
        return None
    found, refused = restored(Path(folder))
    for error in refused:
        log.warning("refused: %s", error)
    log.info("beginning with snapshot %s", found.folder)
    return found


def run_server(args: argparse.Namespace, token: bytes | None, outliving: Outliving | None = None) -> None:
    from headwater.server.control import Control, Heart
    from headwater.server.node import Setting
    from headwater.server.replication.disk import Folder
    from headwater.server.server import Server
    from headwater.server.tables.dense import shard

    shard.own_process = True
    folder = Folder(Path(args.data)) if args.data else None
    tcp = listen(addresses.parse(args.listen), token)
    host = addresses.host_identity()
    local = f"headwater-{secrets.token_hex(12)}" if host else ""
    unix = listen(addresses.Address("local", local), token) if local else None
    coordinator = addresses.parse(args.coordinator)
    join = m.Join(
        "server", secrets.randbits(63), host, os.getpid(), address=args.advertise or str(tcp.address),
        local=local and f"local://{local}",
    )  # fmt: skip
    loop: Loop | None = None  # not while the log is replayed: no answer refers to the values then

    def make(welcome: m.Welcome, session: int) -> Server:
        return Server(
            Setting(
                welcome.server, welcome.shards, welcome.min_copies, share=bool(host),
                session=session, host="" if os.environ.get("HEADWATER_TRANSPORT") == "tcp" else host,
                checked=os.environ.get("HEADWATER_CHECKSUM") == "1", available=memory.available_memory,
                detach=lambda shard, table, ranges: None if loop is None else loop.detach(shard, table, ranges),
                data=folder.path if folder is not None and welcome.ack == "disk" else None,
                wake=lambda: None if loop is None else loop.wake(),
            )
        )  # fmt: skip

    def enter(join: m.Join) -> _Entered:
        return _join(coordinator, token, join)

    server, join, (channel, welcome, early) = _enter(folder, join, make, enter)
    control = Control(server, join, welcome, args.coordinator, lambda: None if loop is None else loop.stop())
    loop = Loop(server, token, lambda dial: _reach(dial, host, token))
    loop.serve(tcp)
    if unix is not None:
        loop.serve(unix)
    loop.adopt(channel, COORDINATOR)
    server.answer_to(control)
    loop.dispatch(server.tick(time.monotonic()))
    for frame, _ in early:
        loop.dispatch(server.receive(COORDINATOR, frame))
    if welcome.ack == "disk":
        loop.sync = server.sync
        loop.dispatch(server.sync())
    Heart(control, lambda: reach(coordinator, token, DIAL), welcome.heartbeat).start()
    _stop_on_signals(loop, outliving)
    _announce(args.ready_fd, join.address, server=welcome.server)
    loop.run()
    if control.failure is not None:
        raise control.failure
    if control.drained:
        print(f"headwater server: Drained: server {welcome.server} holds nothing any more", file=sys.stderr)


def _enter(
    folder: Folder | None, join: m.Join, make: Callable[[m.Welcome, int], Server], enter: Callable[[m.Join], _Entered]
) -> tuple[Server, m.Join, _Entered]:
    """Join the cluster: as the server whose log is in the folder, if the cluster still knows it, else as a new one."""
    from headwater.server.replication.disk import Identity

    known = folder.identity() if folder is not None else None
    if folder is not None and known is not None:
        server = make(known.welcome, known.session)
        server.replay(folder.shards())
        number = known.welcome.server
        back = msgspec.structs.replace(
            join, session=known.session, resume=True, server=number, hosted=server.hosted(), replayed=True
        )
        try:
            return server, back, enter(back)
        except StateCorrupt:
            raise
        except ClusterError as error:
            log.warning("%s; its log is put aside, into %s", error, folder.path / "before")
    entered = enter(join)
    if entered[1].ack == "disk":
        if folder is None:
            raise UsageError("this cluster acknowledges what is on disk (ack=disk): name a folder for the log (--data)")
        folder.claim(Identity(join.session, entered[1]))
    return make(entered[1], join.session), join, entered


def _reach(dial: Dial, host: str, token: bytes | None) -> Channel:
    """Another server, or the coordinator: over a unix socket where both are on one host."""
    same = bool(dial.local) and dial.host == host and os.environ.get("HEADWATER_TRANSPORT") != "tcp"
    return reach(addresses.parse(dial.local if same else dial.address), token, DIAL)


_Entered = tuple[Channel, m.Welcome, list[Arrived]]


def _join(coordinator: addresses.Address, token: bytes | None, join: m.Join) -> _Entered:
    """Join, however often it takes: the coordinator may be just coming up, or coming back."""
    deadline = time.monotonic() + JOIN
    while True:
        try:
            control = reach(coordinator, token, DIAL)
            return control, *_ask_to_join(control, join)
        except AuthenticationFailed:
            raise
        except (LinkError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(AGAIN)


def _ask_to_join(control: Channel, join: m.Join) -> tuple[m.Welcome, list[Arrived]]:
    """The coordinator's answer and the frames that came with it."""
    frames = ask(control, Frame(Kind.REQUEST, seq=1, body=m.pack(join)), JOIN)
    first = frames[0][0]
    if first.kind == Kind.ERROR:
        raise m.read_error(first.body)
    welcome = m.unpack_reply(first.body)
    if not isinstance(welcome, m.Welcome):
        raise LinkBroken(f"the coordinator answered {type(welcome).__name__} to a server that joins")
    return welcome, frames[1:]


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    logging.basicConfig(format=f"headwater {args.role} %(process)d: %(message)s", level=logging.INFO)
    try:
        _die_with_parent(args.parent)
        outliving = Outliving(args.outlive) if args.outlive else None
        token = token_from_environment()
        if args.role == "coordinator":
            run_coordinator(args, token, outliving)
        else:
            run_server(args, token, outliving)
    except Halt as halt:
        print(f"headwater {args.role}: {type(halt.__cause__).__name__}: {halt}", file=sys.stderr)
        return 1
    except HeadwaterError as error:
        print(f"headwater {args.role}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
