"""The processes of a chaos run: started, killed, stopped, started again, and never left behind."""

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from headwater_bench.chaos.schedule import SERVERS, WORKERS
from headwater_bench.rig.forkserver import Order, Zygote, environment
from headwater.errors import DeadlineExceeded
from headwater_bench.rig.proxy import Network, Owners, Tap
from headwater.transports.address import Address

READY = 20.0  # seconds until a process accepts connections
TMPFS = 32 << 20  # bytes: small, so that it can be filled
LOOPBACK = "127.0.0.1"


@dataclass(slots=True)
class Member:
    """One name, and the process that has it now."""

    name: str
    role: str
    module: str
    arguments: list[str]
    environment: dict[str, str]
    ready: bool  # it says when it accepts connections
    pid: int = 0
    running: bool = False
    stopped: bool = False
    starts: int = 0
    due: float | None = None  # when it is to be started again
    leaving: bool = False  # its end is expected and final
    killed: bool = False  # its end is our doing


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


class Cluster:
    """Coordinator, servers, workers and a reader.

    ``local``: they share memory wherever they can; then only what goes to the coordinator passes through proxies.

    As a context manager: everything ends with it, also what is stopped, and the folder goes unless it is ``kept``.
    """

    def __init__(
        self,
        mode: str,
        seed: int,
        tap: Callable[[str, str], Tap | None] | None = None,
        *,
        local: bool = False,
        workers: int = WORKERS,
    ) -> None:
        self.mode = mode
        self.local, self.workers = local, workers
        self.token = secrets.token_hex(16)
        self.folder = Path(tempfile.mkdtemp(prefix="headwater-chaos-"))
        self.kept = False
        self.tmpfs = False
        self.owners = Owners()
        self.network = Network(seed, self.owners.find, tap)
        self.members: dict[str, Member] = {}
        self.exits: list[tuple[Member, int]] = []
        self.direct: dict[str, Address] = {}
        self._zygote: Zygote | None = None

    # ---- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            for name in ("state", "logs", "ledgers", "ready", "data"):
                (self.folder / name).mkdir()
            self._mount()
            self._zygote = Zygote(self.folder / "logs" / "zygote.log")
            self._plan()
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
        if self._zygote is not None:
            self._zygote.close()
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

    def _plan(self) -> None:
        coordinator = self._place("coordinator")
        direct = self.direct["coordinator"]
        self._add("coordinator", "coordinator", self.coordinator_arguments(str(direct)), {}, ready=True)
        for i in range(SERVERS):
            outside = self._place(f"s{i}")
            arguments = ["--role", "server", "--listen", str(self.direct[f"s{i}"]), "--coordinator", str(coordinator)]
            self._add(f"s{i}", "server", [*arguments, "--advertise", str(outside)], {}, ready=True)
        for rank in (*range(self.workers), -1):
            name = f"w{rank}" if rank >= 0 else "reader"
            ledger = self.folder / "ledgers" / name
            # the first worker shares memory with the servers; the others go over TCP, through the proxies
            forced = {} if rank == 0 or self.local else {"HEADWATER_TRANSPORT": "tcp"}
            arguments = [
                "--rank",
                str(rank),
                "--ranks",
                str(self.workers),
                "--mode",
                self.mode,
                "--ledger",
                str(ledger),
            ]
            here = {"HEADWATER_ADDRESS": str(coordinator), "HEADWATER_TIMEOUT": "30"} | forced
            self._add(name, "worker", arguments, here, module="headwater_bench.chaos.pusher")

    def coordinator_arguments(self, listen: str) -> list[str]:
        """Of the coordinator, and of a second one that must refuse to start."""
        return [
            "--role", "coordinator", "--listen", listen, "--servers", str(SERVERS), "--replicas", "2",
            "--state", str(self.folder / "state"),
        ]  # fmt: skip

    def _place(self, name: str) -> Address:
        """A port to listen on, and a proxy before it; returns the proxy's address."""
        self.direct[name] = Address("tcp", LOOPBACK, free_port())
        return Address("tcp", LOOPBACK, self.network.open(name, (LOOPBACK, self.direct[name].port)))

    def _add(
        self,
        name: str,
        role: str,
        arguments: list[str],
        extra: dict[str, str],
        module: str = "headwater.server",
        ready: bool = False,
    ) -> None:
        common = {"HEADWATER_TOKEN": self.token, "HEADWATER_CHECKSUM": "1"}
        if role == "server" and not self.local:
            common["HEADWATER_TRANSPORT"] = "tcp"  # to each other, so through the proxies
        self.members[name] = Member(name, role, module, arguments, environment(common | extra), ready)

    def of(self, role: str) -> list[Member]:
        return [member for member in self.members.values() if member.role == role]

    # ---- starting and ending ---------------------------------------------------------------------

    def start(self, name: str, wait: bool = True) -> None:
        """Start a process under this name. Raises ``DeadlineExceeded`` if it never accepts connections."""
        member = self.members[name]
        assert self._zygote is not None
        ready = self.folder / "ready" / f"{name}-{member.starts}" if member.ready else None
        log = self.folder / "logs" / f"{name}.log"
        order = Order(member.module, member.arguments, member.environment, str(log), str(ready or ""))
        member.pid = self._zygote.start(order)
        member.running, member.stopped, member.killed, member.due = True, False, False, None
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

    def ask_to_end(self, name: str) -> None:
        self.members[name].leaving = True
        self._signal(self.members[name], signal.SIGTERM)

    @staticmethod
    def _signal(member: Member, number: signal.Signals) -> None:
        if member.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, number)

    def reap(self) -> None:
        """Notice who has ended: ``exits`` gets them with their exit code (negative: the signal)."""
        assert self._zygote is not None
        for word in self._zygote.ended():
            for member in self.members.values():
                if member.pid == word.pid and member.running and word.code is not None:
                    member.running = False
                    self.exits.append((member, word.code))

    def second_coordinator(self) -> tuple[int | None, str]:
        """Start another coordinator on the same state; returns its exit code (None: it runs) and what it said."""
        assert self._zygote is not None
        log = self.folder / "logs" / "second.log"
        log.unlink(missing_ok=True)
        given = environment({"HEADWATER_TOKEN": self.token})
        arguments = self.coordinator_arguments(f"tcp://{LOOPBACK}:0")
        member = Member("second", "second", "headwater.server", arguments, given, ready=False)
        self.members["second"] = member
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
