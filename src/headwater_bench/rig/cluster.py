"""A cluster of real processes that can be killed, stopped and started again, and of which none is left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from headwater.errors import DeadlineExceeded
from headwater.transports.address import Address
from headwater_bench.rig.forkserver import ForkRequest, ForkServer, environment
from headwater_bench.rig.proxy import Owners, ProxyNetwork, Tap

SERVERS = 3
READY = 20.0  # seconds until a process accepts connections
TMPFS = 32 << 20  # bytes: small, so that it can be filled
LOOPBACK = "127.0.0.1"


@dataclass(slots=True)
class RigProcess:
    """One name, and the process that has it now."""

    name: str
    role: str
    module: str
    arguments: list[str]
    environment: dict[str, str]
    ready: bool  # it says when it accepts connections
    own_file: str = ""  # the option that names a file of each start's own: what the start before wrote stays
    pid: int = 0
    running: bool = False
    stopped: bool = False
    starts: int = 0
    since: float = 0.0  # when it was started or continued last
    due: float | None = None  # when it is to be started again
    leaving: bool = False  # its end is expected and final
    killed: bool = False  # its end is our doing


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


class Cluster:
    """A coordinator with its state on disk and ``SERVERS`` servers with two copies of every shard; clients by ``add``.

    ``local``: servers share memory with whom they can, else they talk TCP. ``proxied``: a proxy stands before each of
    them, which can break what passes and shows it to ``tap``. ``server``: the module that servers run.

    As a context manager: everything ends with it, also what is stopped, and the folder goes unless it is ``kept``.
    """

    def __init__(
        self,
        seed: int,
        tap: Callable[[str, str], Tap | None] | None = None,
        *,
        local: bool = False,
        proxied: bool = True,
        server: str = "headwater.server",
    ) -> None:
        self.local = local
        self.token = secrets.token_hex(16)
        self.folder = Path(tempfile.mkdtemp(prefix="headwater-chaos-"))
        self.kept = False
        self.tmpfs = False
        self.owners = Owners()
        self.network = ProxyNetwork(seed, self.owners.find, tap)
        self.members: dict[str, RigProcess] = {}
        self.exits: list[tuple[RigProcess, int]] = []
        self.direct: dict[str, Address] = {}
        self.address = ""  # the coordinator's, as servers and clients reach it
        self._proxied, self._server = proxied, server
        self._forks: ForkServer | None = None

    # ---- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            for name in ("state", "logs", "ledgers", "ready", "data"):
                (self.folder / name).mkdir()
            self._mount()
            self._forks = ForkServer(self.folder / "logs" / "forkserver.log")
            self._add_servers()
            self.start("coordinator")
            for i in range(SERVERS):
                self.start(f"s{i}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for member in self.members.values():
            if member.running:
                self._signal(member, signal.SIGKILL)
        if self._forks is not None:
            self._forks.close()
        self.network.close()
        if self.tmpfs:
            subprocess.run(["umount", "--lazy", str(self.folder / "state")], check=False, capture_output=True)
        if not self.kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _mount(self) -> None:
        """A small file system of its own for the coordinator's state, where that is allowed."""
        if os.getuid() == 0 and shutil.which("mount"):
            command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS},mode=700", "none", str(self.folder / "state")]
            self.tmpfs = subprocess.run(command, check=False, capture_output=True).returncode == 0

    # ---- who there is ----------------------------------------------------------------------------

    def _add_servers(self) -> None:
        self.address = str(self.place("coordinator"))
        arguments = self._coordinator_arguments(str(self.direct["coordinator"]))
        self.add("coordinator", "coordinator", "headwater.server", arguments, ready=True)
        # to each other, so through the proxies
        forced = {} if self.local else {"HEADWATER_TRANSPORT": "tcp"}
        for i in range(SERVERS):
            outside = self.place(f"s{i}")
            arguments = ["--role", "server", "--listen", str(self.direct[f"s{i}"]), "--coordinator", self.address]
            arguments += ["--advertise", str(outside)] if self._proxied else []
            self.add(f"s{i}", "server", self._server, arguments, forced, ready=True)

    def _coordinator_arguments(self, listen: str) -> list[str]:
        """Of the coordinator, and of a second one that must refuse to start."""
        return [
            "--role", "coordinator", "--listen", listen, "--servers", str(SERVERS), "--replicas", "2",
            "--state", str(self.folder / "state"),
        ]  # fmt: skip

    def place(self, name: str) -> Address:
        """A port for a process to listen on, which is in ``direct``; returns the address that others reach it at."""
        self.direct[name] = Address("tcp", LOOPBACK, free_port())
        if not self._proxied:
            return self.direct[name]
        return Address("tcp", LOOPBACK, self.network.open(name, (LOOPBACK, self.direct[name].port)))

    def add(
        self,
        name: str,
        role: str,
        module: str,
        arguments: Sequence[str],
        extra: Mapping[str, str] = {},
        *,
        ready: bool = False,
        own_file: str = "",
    ) -> None:
        """A process for ``start``: ``python -m module arguments`` with ``extra`` in its environment."""
        given = environment({"HEADWATER_TOKEN": self.token, "HEADWATER_CHECKSUM": "1", **extra})
        self.members[name] = RigProcess(name, role, module, list(arguments), given, ready, own_file)

    def client(self) -> dict[str, str]:
        """What a client of the cluster finds in its environment."""
        return {"HEADWATER_ADDRESS": self.address, "HEADWATER_TIMEOUT": "30"}

    def of(self, role: str) -> list[RigProcess]:
        return [member for member in self.members.values() if member.role == role]

    def file(self, name: str, start: int | None = None) -> Path:
        """What a process writes; with ``start`` that of one start, from 0."""
        return self.folder / "ledgers" / (name if start is None else f"{name}-{start}")

    def files(self, name: str) -> list[Path]:
        """Of all starts of a process that has ``own_file``."""
        return [self.file(name, start) for start in range(self.members[name].starts)]

    # ---- starting and ending ---------------------------------------------------------------------

    def start(self, name: str, wait: bool = True) -> None:
        """Start a process under this name. Raises ``DeadlineExceeded`` if it never accepts connections."""
        member = self.members[name]
        assert self._forks is not None
        ready = self.folder / "ready" / f"{name}-{member.starts}" if member.ready else None
        log = self.folder / "logs" / f"{name}.log"
        own = [member.own_file, str(self.file(name, member.starts))] if member.own_file else []
        arguments = [*member.arguments, *own]
        member.pid = self._forks.start(
            ForkRequest(member.module, arguments, member.environment, str(log), str(ready or ""))
        )
        member.running, member.stopped, member.killed, member.due = True, False, False, None
        member.since = time.monotonic()
        member.starts += 1
        self.owners.register(name, member.pid)
        if ready is not None and wait:
            self._await(name, ready)

    def _await(self, name: str, ready: Path) -> None:
        until = time.monotonic() + READY
        while not (ready.exists() and ready.read_bytes().endswith(b"\n")):
            self.reap()
            if not self.members[name].running or time.monotonic() > until:
                raise DeadlineExceeded(f"{name} did not come up: {self.last_words(name)}")
            time.sleep(0.01)

    def last_words(self, name: str, lines: int = 6) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            text = (self.folder / "logs" / f"{name}.log").read_text(errors="replace")
            return " | ".join(text.splitlines()[-lines:])
        return "(no log)"

    def kill(self, name: str) -> None:
        self.members[name].killed = True
        self._signal(self.members[name], signal.SIGKILL)

    def stop(self, name: str) -> None:
        member = self.members[name]
        member.stopped = True
        self._signal(member, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        member = self.members[name]
        if member.stopped:
            member.stopped = False
            self._signal(member, signal.SIGCONT)
            member.since = time.monotonic()

    def ask_to_end(self, name: str) -> None:
        self.members[name].leaving = True
        self._signal(self.members[name], signal.SIGTERM)

    @staticmethod
    def _signal(member: RigProcess, number: signal.Signals) -> None:
        if member.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, number)

    def reap(self) -> None:
        """Notice who has ended: ``exits`` gets them with their exit code (negative: the signal)."""
        assert self._forks is not None
        for ended in self._forks.ended():
            for member in self.members.values():
                if member.pid == ended.pid and member.running and ended.code is not None:
                    member.running = False
                    self.exits.append((member, ended.code))

    def second_coordinator(self) -> tuple[int | None, str]:
        """Start another coordinator on the same state; returns its exit code (None: it runs) and what it said."""
        (self.folder / "logs" / "second.log").unlink(missing_ok=True)
        arguments = self._coordinator_arguments(f"tcp://{LOOPBACK}:0")
        self.add("second", "second", "headwater.server", arguments)
        member = self.members["second"]
        self.start("second")
        until = time.monotonic() + 10.0
        while member.running and time.monotonic() < until:
            self.reap()
            time.sleep(0.01)
        self.kill("second")
        del self.members["second"]
        codes = [code for ended, code in self.exits if ended is member]
        self.exits = [(ended, code) for ended, code in self.exits if ended is not member]
        return (codes[0] if codes else None), self.last_words("second")

    # ---- the disk --------------------------------------------------------------------------------

    def fill_disk(self) -> None:
        """Not a byte is left for the coordinator's state."""
        with (self.folder / "state" / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        with (self.folder / "state" / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x")

    def free_disk(self) -> None:
        (self.folder / "state" / "filler").unlink(missing_ok=True)
