"""Coordinator, servers and workers as processes of this machine: started, watched, and never left behind.

The launcher is single-threaded: everything happens inside ``start``, ``poll``, ``wait`` and ``stop``. A worker whose
output nobody collects blocks when its pipe is full, so keep polling.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import msgspec

from headwater.errors import (
    ClusterError,
    DeadlineExceeded,
    HeadwaterError,
    InternalError,
    LinkBroken,
    UsageError,
    from_code,
)
from headwater.launch import escalation, registry
from headwater.launch.output import Printer
from headwater.launch.process import Process
from headwater.transports.address import Address, parse
from headwater.wire.auth import token_from_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

    from headwater.launch.escalation import Escalation
    from headwater.launch.process import Role, Stream

    OnLine = Callable[[Process, Stream, str], None]
    OnExit = Callable[[Process], None]

# -P: a file of the user's own called random.py in the current folder is not imported by a server.
SERVER = (sys.executable, "-P", "-m", "headwater.server")

# How a coordinator or server says why it ends: `headwater server: AddressInUse: …`.
_TYPED = re.compile(r"headwater (coordinator|server): (?P<code>[A-Z]\w+): (?P<message>.*)")
_SETTLE = 2.0
_POLL_WITHOUT_PIDFD = 0.05


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended.

    ``code``: 0 if every worker exited with 0; the exit code of the first worker that failed (``128 + n`` when signal n
    ended it); 1 if a server died; 130 after Ctrl-C, 143 after SIGTERM. ``failed`` names the process at fault,
    ``message`` says it in one line and ``last_words`` is the end of its stderr: the traceback, if there was one.
    """

    code: int = 0
    message: str = ""
    last_words: str = ""
    failed: str = ""
    interrupted: bool = False
    error: HeadwaterError | None = None


class _Ready(msgspec.Struct, frozen=True):
    """The line that a coordinator or server writes when it accepts connections."""

    address: str
    pid: int


class Launcher:
    """A cluster on this machine and the workers that train with it.

    Args:
        servers: how many servers to start beside the coordinator. 0: no cluster of its own.
        address: join the running cluster at this address instead of starting one.
        listen: where the coordinator listens; the servers take free ports of the same interface.
        token: the shared secret. ``None``: ``HEADWATER_TOKEN`` or ``HEADWATER_TOKEN_FILE`` when joining a cluster,
            a fresh random one otherwise. It reaches the processes by their environment only.
        env: additions to the environment of every process.
        on_line: called with (process, ``"stdout"`` or ``"stderr"``, line) instead of printing it with a prefix.
        on_exit: called with each process that has ended.
        grace: seconds between SIGTERM and SIGKILL.
        patience: seconds that workers get to finish after Ctrl-C, before SIGTERM.
        ready_timeout: seconds that the cluster may take to come up.
        advertise: let ``headwater status`` of the same user find the cluster.

    As a context manager it starts the cluster and leaves no process behind::

        with Launcher(servers=2) as job:
            job.start_workers([sys.executable, "train.py"], count=2)
            outcome = job.wait()

    Or, to draw while it runs: ``with job.signals(), job: ...; while job.poll(0.1): draw()``.

    Raises (from ``start``): ``AddressInUse``, ``UsageError``, ``ClusterError`` or ``DeadlineExceeded``; nothing is
    running then.
    """

    def __init__(
        self,
        servers: int = 1,
        *,
        address: str | None = None,
        listen: str = "tcp://127.0.0.1:0",
        token: str | None = None,
        env: Mapping[str, str] | None = None,
        on_line: OnLine | None = None,
        on_exit: OnExit | None = None,
        grace: float = 5.0,
        patience: float = 20.0,
        ready_timeout: float = 60.0,
        advertise: bool = True,
    ) -> None:
        if servers < 0:
            raise UsageError(f"servers={servers}: a cluster has 0 servers (none) or more")
        self._listen = parse(listen)
        if self._listen.host in ("", "0.0.0.0", "::"):
            raise UsageError(
                f"{listen}: clients are told the address that a server listens on, so name one interface of this "
                "machine; nothing was started"
            )
        if not self._listen.loopback and token is None:
            raise UsageError(
                f"{listen} can be reached from other machines: give the token yourself, so that it can be given to "
                "them (HEADWATER_TOKEN or HEADWATER_TOKEN_FILE); nothing was started"
            )
        self.address = address
        self.coordinator: Process | None = None
        self.servers: list[Process] = []
        self.workers: list[Process] = []
        self._count = 0 if address else servers
        self._token = token or (_given_token() if address else None) or secrets.token_hex(32)
        self._extra = dict(env or {})
        self._on_line: OnLine = on_line or Printer()
        self._on_exit = on_exit
        self._grace, self._patience, self._ready_timeout = grace, patience, ready_timeout
        self._advertise = advertise
        self._record: Path | None = None
        self._ending: Escalation | None = None
        self._outcome: Outcome | None = None
        self._requests: deque[int] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)

    # ---- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start coordinator and servers; returns when all accept connections."""
        if not self._count:
            return
        try:
            listen = str(self._listen)
            command = [*SERVER, "--role", "coordinator", "--listen", listen, "--servers", str(self._count)]
            self.coordinator = self._spawn_host("coordinator", "coordinator", 0, command)
            (self.address,) = self._await_ready([self.coordinator])
            anywhere = str(Address("tcp", self._listen.host, 0))
            command = [*SERVER, "--role", "server", "--listen", anywhere, "--coordinator", self.address]
            for i in range(self._count):
                self.servers.append(self._spawn_host(f"s{i}", "server", i, command))
            self._await_ready(self.servers)
            if self._advertise:
                self._record = registry.advertise(self.address, self._token, " ".join(sys.argv[:3]))
        except BaseException:
            self.stop()
            raise

    def start_workers(
        self,
        command: Sequence[str],
        count: int = 1,
        *,
        env: Mapping[str, str] | None = None,
        first_rank: int = 0,
        world: int | None = None,
    ) -> list[Process]:
        """Start ``count`` workers of ranks ``first_rank …``; ``world`` counts those of other launchers too."""
        world = first_rank + count if world is None else world
        if count < 1 or first_rank < 0 or first_rank + count > world:
            raise UsageError(f"{count} workers from rank {first_rank} do not make part of a world of {world}")
        for local in range(count):
            rank = first_rank + local
            ranks = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": count}
            places = {name: str(value) for name, value in ranks.items()}
            places |= {f"HEADWATER_{name}": value for name, value in places.items()}
            defaults = {"OMP_NUM_THREADS": str(max(1, cores() // count))}
            forced = {**self.environment(), **places, **(env or {})}
            self.workers.append(self._spawn(f"w{rank}", "worker", rank, command, defaults, forced))
        return self.workers[-count:]

    def environment(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment: address and token."""
        return {"HEADWATER_ADDRESS": self.address, "HEADWATER_TOKEN": self._token} if self.address else {}

    def poll(self, timeout: float = 0.1) -> bool:
        """Forward output and watch over the processes for ``timeout`` seconds; returns early when the job has ended.

        The job goes on while a worker runs; without workers, while the whole cluster runs and nobody asked to stop.
        """
        until = time.monotonic() + timeout
        while True:
            due = self._supervise(time.monotonic())
            if not self._goes_on():
                return False
            left = min(until, due) - time.monotonic()
            if left <= 0 and time.monotonic() >= until:
                return True
            self._pump(max(0.0, left))

    def wait(self) -> Outcome:
        """Until the job has ended. Ctrl-C and SIGTERM are passed on to the workers meanwhile."""
        with self.signals():
            while self.poll(3600.0):
                pass
        return self.outcome

    @property
    def outcome(self) -> Outcome:
        """How the job ended; so far, while it runs."""
        return self._outcome or Outcome()

    def interrupt(self) -> None:
        """As Ctrl-C: the workers get SIGINT and time to finish. Again: SIGTERM; again: SIGKILL. From any thread."""
        self._request(signal.SIGINT)

    def terminate(self) -> None:
        """The workers get SIGTERM, and SIGKILL after the grace. From any thread."""
        self._request(signal.SIGTERM)

    def stop(self) -> None:
        """End every process that still runs: workers, then servers, then the coordinator. Safe to call twice."""
        self._requests.clear()
        with self.signals():
            for group in (self.workers, self.servers, [self.coordinator] if self.coordinator else []):
                self._stop_group(group)
        if self._record:
            self._record.unlink(missing_ok=True)
            self._record = None
        if self._wake_read >= 0:
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP become requests to the launcher (main thread only; elsewhere nothing changes)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup the job outlives the terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    # ---- processes ---------------------------------------------------------------------------------

    def _spawn_host(self, name: str, role: Role, rank: int, command: Sequence[str]) -> Process:
        """A coordinator or server. A thread that spins while it waits would take its core from the workers."""
        threads = cores() // max(1, self._count) if role == "server" else 1
        forced = {"OMP_NUM_THREADS": str(max(1, threads)), "OMP_WAIT_POLICY": "passive", "HEADWATER_TOKEN": self._token}
        return self._spawn(name, role, rank, command, {}, forced)

    def _spawn(
        self,
        name: str,
        role: Role,
        rank: int,
        command: Sequence[str],
        defaults: Mapping[str, str],
        forced: Mapping[str, str],
    ) -> Process:
        env = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **defaults, **os.environ, **self._extra, **forced}
        if "HEADWATER_TOKEN" in env:
            env.pop("HEADWATER_TOKEN_FILE", None)
        process = Process(name, role, rank, command, env, ready=role != "worker")
        for stream, pipe in process.pipes.items():
            self._selector.register(pipe, selectors.EVENT_READ, (process, stream))
        if process.pidfd >= 0:
            self._selector.register(process.pidfd, selectors.EVENT_READ, (process, "exit"))
        if process.ready_fd >= 0:
            self._selector.register(process.ready_fd, selectors.EVENT_READ, (process, "ready"))
        return process

    @property
    def _hosts(self) -> list[Process]:
        """The cluster, the coordinator first: when it dies the servers follow, and it is the one to name."""
        return [*([self.coordinator] if self.coordinator else []), *self.servers]

    @property
    def _all(self) -> list[Process]:
        return self._hosts + self.workers

    def _await_ready(self, processes: Sequence[Process]) -> list[str]:
        deadline = time.monotonic() + self._ready_timeout
        while any(b"\n" not in process.ready for process in processes):
            for process in self._hosts:
                if not process.running:
                    raise self._stillborn(process)
            if self._requests:
                raise KeyboardInterrupt
            left = deadline - time.monotonic()
            if left <= 0:
                late = ", ".join(process.name for process in processes if not process.ready)
                raise DeadlineExceeded(f"{late} did not come up within {self._ready_timeout:g} s; all were stopped")
            self._pump(left)
        return [self._address_of(process) for process in processes]

    def _address_of(self, process: Process) -> str:
        try:
            return msgspec.json.decode(process.ready, type=_Ready).address
        except msgspec.MsgspecError as error:
            raise InternalError(f"{process.name} wrote {process.ready!r} on its ready pipe: {error}") from None

    def _stillborn(self, process: Process) -> HeadwaterError:
        if process.tail and (told := _TYPED.match(process.tail[-1])):
            return from_code(told["code"], f"{told['message']} (nothing is running)")
        return ClusterError(
            f"{process.name} {process.how_it_ended} before it accepted connections; nothing is running. "
            f"Its last words:\n{process.last_words}"
        )

    # ---- events ------------------------------------------------------------------------------------

    def _pump(self, timeout: float) -> None:
        """Wait for something to happen, up to ``timeout`` seconds, and take it in."""
        blind = [process for process in self._all if process.running and process.pidfd < 0]
        for key, _ in self._selector.select(min(timeout, _POLL_WITHOUT_PIDFD) if blind else timeout):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                continue
            process, what = key.data
            if not process.running:
                continue  # ended by an earlier event of this round: its pipes are closed
            if what == "ready":
                self._selector.unregister(key.fd)
                process.read_ready()
                if process.ready_fd >= 0:
                    self._selector.register(process.ready_fd, selectors.EVENT_READ, (process, "ready"))
            elif what == "exit":
                self._reap(process)
            else:
                self._forward(process, what, process.read(what) or [])
                if what not in process.open:
                    self._selector.unregister(key.fd)
        for process in blind:
            self._reap(process)

    def _reap(self, process: Process) -> None:
        if not process.reap():
            return
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[0] is process:
                self._selector.unregister(key.fd)
        for stream, line in process.close():
            self._forward(process, stream, [line])
        if self._on_exit:
            self._on_exit(process)

    def _forward(self, process: Process, stream: Stream, lines: Sequence[str]) -> None:
        for line in lines:
            if process.role != "worker" and _TYPED.match(line):
                continue  # the exception or the outcome will say it
            try:
                self._on_line(process, stream, line)
            except BrokenPipeError:  # our own stdout is gone: `headwater run … | head`
                self._on_line = _discard
                self.terminate()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._request(number)

    def _request(self, number: int) -> None:
        self._requests.append(number)
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"!")

    # ---- decisions -----------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        if self.workers:
            held = self._ending is not None and self._ending.over(time.monotonic())
            return not held and any(worker.running for worker in self.workers)
        return self._ending is None and any(process.running for process in self._all)

    def _supervise(self, now: float) -> float:
        """Decide whether the job must end, and send what is due; returns when to look again."""
        if self._requests:
            self._take_requests(now)
        if self._ending is None:
            settled = self._look_for_faults(now)
            if self._ending is None:
                return settled
        number = self._ending.next(now)
        if number is not None:
            for worker in self.workers:
                worker.send_signal(number)
        return self._ending.due

    def _take_requests(self, now: float) -> None:
        number = self._requests.popleft()
        if self._ending is not None:
            self._ending.hurry(now)
        elif number == signal.SIGINT:
            self._ending = escalation.interrupt(now, self._patience, self._grace)
            self._outcome = Outcome(130, "interrupted", interrupted=True)
        else:
            self._ending = escalation.terminate(now, self._grace)
            self._outcome = Outcome(143, "terminated", interrupted=True)

    def _look_for_faults(self, now: float) -> float:
        """Begin to end the job if a process has failed; returns when a doubtful failure will have settled."""
        for process in self._hosts:
            if not process.running:
                self._end_for_server(process, now)
                return now
        failed = [worker for worker in self.workers if worker.returncode]
        if not failed:
            return escalation.NEVER
        # Who reports that another worker was lost may be out of the door before that one is: wait for the culprit.
        culprits = [worker for worker in failed if not _is_victim(worker)]
        settled = failed[0].ended + _SETTLE
        if not culprits and now < settled and any(worker.running for worker in self.workers):
            return settled
        self._end_for_worker(min(culprits or failed, key=lambda worker: worker.ended), now)
        return now

    def _end_for_worker(self, worker: Process, now: float) -> None:
        others = [other.name for other in self.workers if other.running]
        message = f"{worker.name} {worker.how_it_ended} after {worker.ended - worker.started:.1f} s"
        message += f"; {', '.join(others)} stopped" if others else ""
        self._outcome = Outcome(worker.returncode or 1, message, worker.last_words, worker.name)
        self._ending = escalation.terminate(now, self._grace)

    def _end_for_server(self, process: Process, now: float) -> None:
        name = process.name if process.role == "coordinator" else f"server {process.name}"
        message = (
            f"{name} (pid {process.pid}) {process.how_it_ended}; pushes that were not acknowledged may or may not be "
            "applied, and what it held is lost. The job was stopped; start it again"
        )
        self._outcome = Outcome(1, message, process.last_words, process.name, error=LinkBroken(message))
        self._ending = escalation.terminate(now, self._grace)

    def _stop_group(self, group: Sequence[Process]) -> None:
        ending = escalation.terminate(time.monotonic(), self._grace)
        while running := [process for process in group if process.running]:
            now = time.monotonic()
            if ending.over(now):
                return
            if self._requests:
                self._requests.clear()
                ending.hurry(now)
            number = ending.next(now)
            if number is not None:
                for process in running:
                    process.send_signal(number)
            self._pump(min(1.0, max(0.0, ending.due - time.monotonic())))


def launch(
    command: Sequence[str],
    *,
    servers: int = 1,
    workers: int = 1,
    address: str | None = None,
    env: Mapping[str, str] | None = None,
    on_line: OnLine | None = None,
) -> Outcome:
    """Start a cluster and ``workers`` copies of ``command``, wait for them, stop everything.

    Never raises for a worker's failure: the outcome holds its exit code and traceback. Raises what ``Launcher.start``
    raises when the cluster does not come up.
    """
    job = Launcher(servers, address=address, env=env, on_line=on_line)
    with job.signals(), job:
        job.start_workers(command, workers)
        return job.wait()


def _given_token() -> str | None:
    token = token_from_environment()
    return token.decode() if token else None


def _is_victim(worker: Process) -> bool:
    return any(line.partition(":")[0].endswith("WorkerLost") for line in worker.last_words.splitlines())


def _discard(process: Process, stream: Stream, line: str) -> None:
    del process, stream, line
