"""Coordinator, servers and workers as processes of this machine: started, watched, and never left behind.

The launcher is single-threaded: everything happens inside ``start``, ``poll``, ``wait`` and ``stop``. A worker whose
output nobody collects blocks when its pipe is full, so keep polling.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from headwater.errors import DeadlineExceeded, UsageError
from headwater.launch import escalation, outcome, output, registry
from headwater.launch.lines import Lines
from headwater.launch.outcome import Outcome
from headwater.launch.process import Process
from headwater.launch.ready import address_of, ready_of
from headwater.launch.revival import Revival
from headwater.launch.shape import Ack, Shape, check_sense, checked_listen
from headwater.launch.watch import Watch
from headwater.launch.world import World, inherited
from headwater.transports.address import Address, parse
from headwater.wire.auth import token_from_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from headwater.launch.escalation import Escalation
    from headwater.launch.process import Role
    from headwater.launch.watch import OnExit, OnLine

# -P: a file of the user's own called random.py in the current folder is not imported by a server.
SERVER = (sys.executable, "-P", "-m", "headwater.server")

_SETTLE = 2.0
_ECHO = 1.0
"""Seconds in which a SIGHUP says nothing new: kernel, shell and session each tell a process of one hang-up."""


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


_Place = tuple["Role", int]
"""Role and rank: what stays the same when one process takes the place of another."""


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
        on_note: called with what the launcher itself has to say, one line, instead of printing it on stderr.
        grace: seconds between SIGTERM and SIGKILL where nobody asked the job to end: a worker has failed, say.
        patience: seconds that workers get to finish after Ctrl-C (they get SIGINT), before SIGTERM; and after SIGTERM
            or SIGHUP to the launcher (they get SIGTERM), before SIGKILL. A second signal does not wait.
        ready_timeout: seconds that the cluster may take to come up.
        advertise: let ``headwater status`` of the same user find the cluster.
        shards, replicas, min_copies, ack, silence, state, snapshots, snapshot_every, restore: see ``Shape``.
        keep_going: a server that dies does not end the job; another takes its place. Default: with 2 replicas or more.
        elastic: a worker that dies does not end the job as long as one remains, or has finished.
        only_rank0: of what the workers write only rank 0's is shown, and the last words of another that fails. An
            ``on_line`` is given the others' stdout all the same.
        once: a traceback with which a worker ends is not shown as its lines are but left to who reports the outcome,
            which holds it (see ``headwater.launch.lines``).
        stdin_rank: the worker that reads this process's standard input; the others have none.
        restart_workers: how often each worker of an elastic job that dies is started again, with the same rank.

    ``hurried``: somebody asked again, by a second Ctrl-C, not to wait for those that were to end.

    With ``state``, or with ``keep_going``, a coordinator that dies is started again at the same address. A process
    that dies three times in a row right after its start is not started again.

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
        on_note: Callable[[str], None] | None = None,
        grace: float = 5.0,
        patience: float = 20.0,
        ready_timeout: float = 60.0,
        advertise: bool = True,
        shards: int | None = None,
        replicas: int = 1,
        min_copies: int = 1,
        ack: Ack = "memory",
        silence: float | None = None,
        state: str | Path | None = None,
        snapshots: str | Path | None = None,
        snapshot_every: float | None = None,
        restore: str | Path | None = None,
        keep_going: bool | None = None,
        elastic: bool = False,
        restart_workers: int = 0,
        only_rank0: bool = False,
        once: bool = False,
        stdin_rank: int | None = None,
    ) -> None:
        self.shape = Shape(
            0 if address else servers, shards, replicas, min_copies, ack, silence,
            _path(state), _path(snapshots), snapshot_every, _path(restore),
        )  # fmt: skip
        self._listen = checked_listen(listen, token)
        check_sense(address, self.shape, elastic, restart_workers)
        self.address = address
        self.coordinator: Process | None = None
        self.servers: list[Process] = []
        self.workers: list[Process] = []
        self._own = address is None
        self._token = token or (_given_token() if address else None) or secrets.token_hex(32)
        self._extra = dict(env or {})
        self._note = on_note or output.note
        self._grace, self._patience, self._ready_timeout = grace, patience, ready_timeout
        self._advertise = advertise
        self._keep_going = replicas > 1 if keep_going is None else keep_going
        self._elastic, self._restart_workers = elastic, restart_workers
        self._record: Path | None = None
        self._state = self.shape.state
        self._private: Path | None = None
        self._ending: Escalation | None = None
        self._hangup = 0.0
        self._outcome: Outcome | None = None
        self._worlds: list[World] = []
        self._again: dict[_Place, Callable[[int], Process]] = {}  # start what is there, for the nth time
        self._revivals: dict[_Place, Revival] = {}
        self._due: dict[Process, float] = {}  # of those that have ended: when another takes their place
        self._returning: dict[Process, str] = {}  # not yet ready: the name of who was there before
        self._stdin_rank = stdin_rank
        self.hurried = False
        lines = Lines(once=once, only_rank0=only_rank0, stdout=on_line is None, elastic=elastic)
        self._watch = Watch(on_line or output.Printer(), on_exit, lines)

    # ---- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start coordinator and servers; returns when all accept connections."""
        if not self.shape.servers:
            return
        try:
            self.shape.prepare()
            self.shape.set_aside(findable=self._listen.port != 0)
            if self._state is None and self._keep_going:
                self._state = self._private = registry.private_state()
            self._again["coordinator", 0] = self._start_coordinator
            self.coordinator = self._start_coordinator(0)
            (self.address,) = self._await_ready(self._hosts, self._hosts)
            for _ in range(self.shape.servers):
                self._new_server(str(Address(self._listen.scheme, self._listen.host, 0)))
            self._await_ready(self.servers, self._hosts)
            self.servers.sort(key=lambda server: (len(server.name), server.name))  # s2 before s10
            if self._advertise:
                self._record = registry.advertise(self.address, self._token, " ".join(sys.argv[:3]))
                if self._record is None:
                    self._note(f"no private file can be left for headwater status. {registry.complaint()}".strip())
        except BaseException:
            self.stop()
            raise

    def add_server(self, listen: str | None = None) -> Process:
        """One more server for the cluster, own or joined; returns when it accepts connections.

        ``listen``: an address of this machine that clients can reach. Default: as the coordinator's, where that is on
        this machine.
        """
        if self.address is None:
            raise UsageError("there is no cluster that a server could be added to")
        coordinator = parse(self.address)
        self._new_server(listen or str(Address(coordinator.scheme, coordinator.host, 0)))
        self._await_ready(self.servers[-1:], self.servers[-1:])
        return self.servers[-1]

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
        given = {**inherited(os.environ), **self._extra, **(env or {})}
        made = World(count, first_rank, world, given, self._restart_workers)
        self._worlds.append(made)
        defaults = {"OMP_NUM_THREADS": str(max(1, cores() // count))}
        for local in range(count):
            start = partial(self._start_worker, made, local, list(command), defaults, dict(env or {}))
            self._again["worker", first_rank + local] = start
            self.workers.append(start(0))
        return self.workers[-count:]

    def environment(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment: address and token."""
        return {"HEADWATER_ADDRESS": self.address, "HEADWATER_TOKEN": self._token} if self.address else {}

    @property
    def advice(self) -> str:
        """What the workers here need to find those of other launchers, and were not given; or nothing."""
        return next((world.advice for world in self._worlds), "")

    def poll(self, timeout: float = 0.1) -> bool:
        """Forward output and watch over the processes for ``timeout`` seconds; returns early when the job has ended.

        The job goes on while a worker runs; without workers, while the cluster runs and nobody asked to stop.
        """
        until = time.monotonic() + timeout
        while True:
            due = self._supervise(time.monotonic())
            if not self._goes_on():
                return False
            left = min(until, due) - time.monotonic()
            if left <= 0 and time.monotonic() >= until:
                return True
            self._watch.pump(max(0.0, left))

    def linger(self, timeout: float = 0.1) -> bool:
        """After the job's end, before ``stop``: forward output; whether a signal has come since (it is taken)."""
        self._watch.pump(timeout)
        came = bool(self._watch.requests)
        self._watch.requests.clear()
        return came

    def wait(self) -> Outcome:
        """Until the job has ended. Ctrl-C, SIGTERM and SIGHUP are passed on to the workers meanwhile."""
        with self.signals():
            while self.poll(3600.0):
                pass
        return self.outcome

    @property
    def outcome(self) -> Outcome:
        """How the job ended; so far, while it runs."""
        return self._outcome or Outcome()

    def interrupt(self) -> None:
        """As Ctrl-C: the workers get SIGINT and time to finish. Again: SIGTERM, and SIGKILL soon. From any thread."""
        self._watch.request(signal.SIGINT)

    def terminate(self) -> None:
        """As SIGTERM: the workers get SIGTERM and time to finish. Again: SIGKILL. From any thread."""
        self._watch.request(signal.SIGTERM)

    def stop(self) -> None:
        """End every process that still runs: workers, then servers, then the coordinator. Safe to call twice."""
        self._watch.requests.clear()
        with self.signals():
            for group in (self.workers, self.servers, [self.coordinator] if self.coordinator else []):
                self._stop_group(group)
            self._watch.say_the_rest(self.outcome.failed)
        self._say_who_is_left()
        for left in (self._record, self._private):
            registry.withdraw(left)
        self._record = self._private = None
        for world in self._worlds:
            world.close()
        self._watch.close()

    def _say_who_is_left(self) -> None:
        left = tuple(f"{p.name} (pid {p.pid})" for p in [*self.workers, *self._hosts] if p.running)
        if left:
            self._outcome = replace(self.outcome, left=left)

    def signals(self) -> AbstractContextManager[None]:
        """SIGINT, SIGTERM and SIGHUP become requests to the launcher (main thread only; elsewhere nothing changes)."""
        return self._watch.signals()

    # ---- processes ---------------------------------------------------------------------------------

    def _start_coordinator(self, restarts: int) -> Process:
        listen = self.address or str(self._listen)  # again at the port that it was given
        options = [*self._outlive, *self.shape.coordinator_options(self._state)]
        command = [*SERVER, "--role", "coordinator", "--listen", listen, *options]
        return self._spawn_host("coordinator", "coordinator", 0, command, restarts)

    def _new_server(self, listen: str) -> None:
        assert self.address is not None
        number = len(self.servers)
        name = f"s{number}"
        where = ["--listen", listen, "--coordinator", self.address]
        command = [*SERVER, "--role", "server", *where, *self._outlive, *self.shape.server_options(name)]
        start = self._again["server", number] = partial(self._spawn_host, name, "server", number, command)
        self.servers.append(start(0))

    def _start_worker(
        self, world: World, local: int, command: Sequence[str], defaults: Mapping[str, str], env: Mapping[str, str],
        restarts: int,
    ) -> Process:  # fmt: skip
        """One of ``start_workers``, for the first time or again."""
        places = world.of(local, restarts)
        rank = int(places["RANK"])
        forced = {**self.environment(), **places, **env}
        return self._spawn(f"w{rank}", "worker", rank, command, defaults, forced, restarts)

    @property
    def _outlive(self) -> list[str]:
        """A batch system signals every process of a job; the cluster must last until the workers have finished."""
        return ["--outlive", f"{self._patience + self._grace:g}"]

    def _spawn_host(self, name: str, role: Role, rank: int, command: Sequence[str], restarts: int) -> Process:
        """A coordinator or server. A thread that spins while it waits would take its core from the workers."""
        threads = cores() // max(1, self.shape.servers) if role == "server" else 1
        forced = {"OMP_NUM_THREADS": str(max(1, threads)), "OMP_WAIT_POLICY": "passive", "HEADWATER_TOKEN": self._token}
        return self._spawn(name, role, rank, command, {}, forced, restarts)

    def _spawn(
        self,
        name: str,
        role: Role,
        rank: int,
        command: Sequence[str],
        defaults: Mapping[str, str],
        forced: Mapping[str, str],
        restarts: int,
    ) -> Process:
        env = {
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            **defaults,
            **inherited(os.environ),
            **self._extra,
            **forced,
        }
        if "HEADWATER_TOKEN" in env:
            env.pop("HEADWATER_TOKEN_FILE", None)
        stdin = role == "worker" and rank == self._stdin_rank
        if role == "worker":
            env["HEADWATER_STDIN"] = "yours" if stdin else "none"
        process = Process(name, role, rank, command, env, ready=role != "worker", restarts=restarts, stdin=stdin)
        self._watch.add(process)
        return process

    @property
    def _hosts(self) -> list[Process]:
        """The cluster, the coordinator first: when it dies the servers may follow, and it is the one to name."""
        return [*([self.coordinator] if self.coordinator else []), *self.servers]

    def _await_ready(self, processes: Sequence[Process], beside: Sequence[Process]) -> list[str]:
        """Their addresses; raises if one of ``beside`` ends meanwhile."""
        deadline = time.monotonic() + self._ready_timeout
        while any(b"\n" not in process.ready for process in processes):
            for process in beside:
                if not process.running:
                    raise outcome.stillborn(process)
            if self._watch.requests:
                number = self._watch.requests[0]
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
            left = deadline - time.monotonic()
            if left <= 0:
                late = ", ".join(process.name for process in processes if not process.ready)
                raise DeadlineExceeded(f"{late} did not come up within {self._ready_timeout:g} s; all were stopped")
            self._watch.pump(left)
        return [address_of(process) for process in processes]

    def _stop_group(self, group: Sequence[Process]) -> None:
        ending = escalation.terminate(time.monotonic(), self._grace)
        while running := [process for process in group if process.running]:
            now = time.monotonic()
            if ending.over(now):
                return
            if self._watch.requests:
                self._watch.requests.clear()
                self.hurried = True
                ending.hurry(now)
            number = ending.next(now)
            if number is not None:
                for process in running:
                    process.send_signal(number)
            self._watch.pump(min(1.0, max(0.0, ending.due - time.monotonic())))

    # ---- decisions -----------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        if self.workers:
            held = self._ending is not None and self._ending.over(time.monotonic())
            return not held and any(worker.running or self._comes_back(worker) for worker in self.workers)
        hosts = self._hosts
        return self._ending is None and any(process.running or self._comes_back(process) for process in hosts)

    def _comes_back(self, process: Process) -> bool:
        return self._ending is None and self._due.get(process, escalation.NEVER) < escalation.NEVER

    def _supervise(self, now: float) -> float:
        """Decide whether the job must end, and send what is due; returns when to look again."""
        if self._watch.requests:
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
        number = self._watch.requests.popleft()
        if self._ending is not None:
            if not (number == signal.SIGHUP and now < self._hangup):
                self.hurried = True
                self._ending.hurry(now)
            return
        self._hangup = now + _ECHO
        if number == signal.SIGINT:
            self._ending = escalation.interrupt(now, self._patience, self._grace)
        else:
            self._ending = escalation.finish(now, self._patience)
        self._outcome = outcome.of_signal(number)

    def _end(self, how: Outcome, now: float) -> None:
        self._outcome = how
        self._ending = escalation.terminate(now, self._grace)

    def _look_for_faults(self, now: float) -> float:
        """See to those that have ended: replace them or end the job. Returns when to look again."""
        due = escalation.NEVER
        for process in self._hosts:
            if not process.running:
                due = min(due, self._look_after(process, now, self._host_ended))
            elif process in self._returning and b"\n" in process.ready:
                self._welcome(process)
            if self._ending is not None:
                return now
        if self.servers and not any(server.running or self._comes_back(server) for server in self.servers):
            last = self.servers[-1]
            left = outcome.drained(last) and not self._own
            self._end(Outcome() if left else outcome.of_host(last, copies=True, own=self._own), now)
            return now
        return min(due, self._look_at_workers(now))

    def _welcome(self, process: Process) -> None:
        """Another process has taken a place."""
        before = self._returning.pop(process)
        ready_of(process)  # takes its name
        title, again = outcome.title(process), f"pid {process.pid}, restart {process.restarts}"
        if process.name == before:
            self._note(f"{title} is back, as a new process ({again})")
        else:
            self._note(f"{title} has taken the place of {before} ({again})")

    def _look_after(self, process: Process, now: float, decide: Callable[[Process, float], float]) -> float:
        """Somebody has ended: decide once what follows, and do it when it is due. Returns when to look again."""
        if process not in self._due:
            self._due[process] = decide(process, now)
        if self._ending is not None or now < self._due[process]:
            return self._due[process]
        self._replace(process)
        return escalation.NEVER

    def _replace(self, process: Process) -> None:
        del self._due[process]
        new = self._again[process.place](process.restarts + 1)
        if process.role == "coordinator":
            self.coordinator = new
        else:
            group = self.servers if process.role == "server" else self.workers
            group[group.index(process)] = new
        if process.role != "worker":
            self._returning[new] = process.name

    def _host_ended(self, process: Process, now: float) -> float:
        """When another coordinator or server takes the place of this one."""
        self._returning.pop(process, None)
        server = process.role == "server"
        if outcome.drained(process) or (server and self._keep_going and process.returncode == 0):
            self._note(f"{outcome.title(process)} has left the cluster")
            return escalation.NEVER
        if not (self._keep_going if server else self._state is not None):
            self._end(outcome.of_host(process, copies=False, own=self._own), now)
            return now
        due = self._revivals.setdefault(process.place, Revival()).ended(process.worked, now)
        self._note(outcome.loss_of_host(process, due is not None))
        if due is None and not server:
            self._end(outcome.of_host(process, copies=True, own=self._own), now)
        return escalation.NEVER if due is None else due

    def _look_at_workers(self, now: float) -> float:
        """Begin to end the job if a worker has failed; returns when a doubtful failure will have settled."""
        failed = [worker for worker in self.workers if worker.returncode]
        if not failed:
            return escalation.NEVER
        if self._elastic:
            return self._go_on_without(failed, now)
        # Who reports that another worker was lost may be out of the door before that one is: wait for the culprit.
        culprits = [worker for worker in failed if not outcome.is_victim(worker)]
        settled = failed[0].ended + _SETTLE
        if not culprits and now < settled and any(worker.running for worker in self.workers):
            return settled
        self._end_for_worker(min(culprits or failed, key=lambda worker: worker.ended), now)
        return now

    def _go_on_without(self, failed: Sequence[Process], now: float) -> float:
        due = min(self._look_after(worker, now, self._worker_ended) for worker in failed)
        if not any(worker.running or worker.returncode == 0 or self._comes_back(worker) for worker in self.workers):
            self._end_for_worker(min(failed, key=lambda worker: worker.ended), now)
        return due

    def _worker_ended(self, worker: Process, now: float) -> float:
        """When an elastic worker is started again."""
        due = self._revivals.setdefault(worker.place, Revival(self._restart_workers)).ended(worker.worked, now)
        others = [other.name for other in self.workers if other.running]
        if due is not None:
            self._note(f"{outcome.end_of_worker(worker)}; it is started again ({worker.restarts + 1} of "
                       f"{self._restart_workers})")  # fmt: skip
        elif others:
            self._note(f"{outcome.end_of_worker(worker)}; {', '.join(others)} {'go' if others[1:] else 'goes'} on")
        return escalation.NEVER if due is None else due

    def _end_for_worker(self, worker: Process, now: float) -> None:
        others = [other.name for other in self.workers if other.running]
        self._end(outcome.of_worker(worker, others, shown=self._watch.lines.seen(worker)), now)


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


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _given_token() -> str | None:
    token = token_from_environment()
    return token.decode() if token else None
