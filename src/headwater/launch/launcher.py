"""Coordinator, servers and workers as processes: started, watched, and never left behind.

What becomes of them is decided in ``headwater.launch.job``; ``headwater.launch.engines`` runs them. The launcher stands
between the two. It is single-threaded: everything happens inside ``start``, ``poll``, ``wait`` and ``stop``. A worker
whose output nobody collects may block, so keep polling.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from headwater.errors import UsageError
from headwater.launch import engines, output, registry
from headwater.launch.commands import Commands
from headwater.launch.job import Closing, Opening, Rules, Supervisor
from headwater.launch.lines import Lines
from headwater.launch.ready import address_of
from headwater.launch.requests import Requests
from headwater.launch.screen import Screen
from headwater.launch.shape import Shape, checked_listen
from headwater.launch.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from headwater.launch.engines.base import Engine
    from headwater.launch.job import Decision
    from headwater.launch.outcome import Outcome
    from headwater.launch.process import Place, Process
    from headwater.launch.screen import OnExit, OnLine


class Launcher:
    """A cluster and the workers that train with it.

    Args:
        shape: what the cluster is made of, or the running one that is joined; a number: so many servers, else as usual.
        rules: what the job survives, and how long those that are to end may take.
        token: the shared secret. ``None``: ``HEADWATER_TOKEN`` or ``HEADWATER_TOKEN_FILE`` when joining a cluster,
            a fresh random one otherwise. It reaches the processes by their environment only.
        env: additions to the environment of every process.
        on_line: called with (process, ``"stdout"`` or ``"stderr"``, line) instead of printing it with a prefix.
        on_exit: called with each process that has ended.
        on_note: called with what the launcher itself has to say, one line, instead of printing it on stderr.
        only_rank0: of what the workers write only rank 0's is shown, and the last words of another that fails. An
            ``on_line`` is given the others' stdout all the same.
        once: a traceback with which a worker ends is not shown as its lines are but left to who reports the outcome,
            which holds it (see ``headwater.launch.lines``).
        advertise: let ``headwater status`` of the same user find the cluster.
        engine: what runs the processes (``headwater.launch.engines``), or its name there.

    Attributes: ``servers`` and ``workers``: the process of each place that was started last.

    With ``Shape.state``, or with ``Rules.keep_going``, a coordinator that dies is started again at the same address. A
    process that dies three times in a row right after its start is not started again.

    As a context manager it starts the cluster and leaves no process behind::

        with Launcher(Shape(servers=2)) as job:
            job.start_workers([sys.executable, "train.py"], count=2)
            outcome = job.wait()

    Or, to draw while it runs: ``with job.signals(), job: ...; while job.poll(0.1): draw()``.

    Raises (from ``start``): ``AddressInUse``, ``UsageError``, ``ClusterError`` or ``DeadlineExceeded``; nothing is
    running then.
    """

    def __init__(
        self,
        shape: Shape | int = 1,
        *,
        rules: Rules | None = None,
        token: str | None = None,
        env: Mapping[str, str] | None = None,
        on_line: OnLine | None = None,
        on_exit: OnExit | None = None,
        on_note: Callable[[str], None] | None = None,
        only_rank0: bool = False,
        once: bool = False,
        advertise: bool = True,
        engine: Engine | str = "local",
    ) -> None:
        self.shape = Shape(shape) if isinstance(shape, int) else shape
        self._listen = checked_listen(self.shape.listen, token)
        self._rules = rules or Rules()
        self._engine = engines.make(engine) if isinstance(engine, str) else engine
        self._commands = Commands(self.shape, self._rules, token, env or {}, self._engine.cores)
        self._note = on_note or output.note
        self._advertise = advertise
        lines = Lines(once=once, only_rank0=only_rank0, stdout=on_line is None, elastic=self._rules.elastic)
        self._supervisor = Supervisor(self.shape, self._rules, lines.seen)
        self.servers, self.workers = self._supervisor.servers, self._supervisor.workers
        self._requests = Requests(self._engine.wake)
        self._screen = Screen(lines, on_line or output.Printer(), on_exit, self.terminate)
        self._left_behind: list[Path] = []  # private files, until the end
        self._worlds: list[World] = []

    # ---- what there is -----------------------------------------------------------------------------

    @property
    def address(self) -> str | None:
        """The coordinator's, once it is known."""
        return self._commands.address

    @property
    def coordinator(self) -> Process | None:
        """The one that was started last; ``None`` without a cluster of its own."""
        return self._supervisor.coordinator

    @property
    def outcome(self) -> Outcome:
        """How the job ended; so far, while it runs."""
        return self._supervisor.outcome

    @property
    def hurried(self) -> bool:
        """Whether somebody asked again, by a second Ctrl-C, not to wait for those that were to end."""
        return self._supervisor.hurried

    @property
    def advice(self) -> str:
        """What the workers here need to find those of other launchers, and were not given; or nothing."""
        return next((world.advice for world in self._worlds), "")

    def environment(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment: address and token."""
        return self._commands.environment()

    # ---- start -------------------------------------------------------------------------------------

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
            if self._commands.state is None and self._supervisor.keeps_going:
                self._commands.state = registry.private_state()
                self._left_behind.append(self._commands.state)
            while places := self._supervisor.opening():
                self._await_ready([self._start(place) for place in places], self._supervisor.hosts)
                if self._commands.address is None:
                    self._commands.address = address_of(self._supervisor.hosts[0])
            self._supervisor.sort_servers()
            self._leave_record()
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
        server = self._start(self._commands.add_server(len(self.servers), listen))
        self._await_ready([server], [server])
        return server

    def start_workers(
        self,
        command: Sequence[str],
        count: int = 1,
        *,
        env: Mapping[str, str] | None = None,
        first_rank: int = 0,
        world: int | None = None,
        stdin_rank: int | None = None,
    ) -> list[Process]:
        """Start ``count`` workers of ranks ``first_rank …``; ``world`` counts those of other launchers too.

        ``stdin_rank``: the worker that reads this process's standard input; the others have none.
        """
        world = first_rank + count if world is None else world
        if count < 1 or first_rank < 0 or first_rank + count > world:
            raise UsageError(f"{count} workers from rank {first_rank} do not make part of a world of {world}")
        given = self._commands.given_environment(env or {})
        made = World(count, first_rank, world, given, self._rules.restart_workers)
        self._worlds.append(made)
        return [self._start(place) for place in self._commands.add_workers(command, made, env or {}, stdin_rank)]

    def _start(self, place: Place, instead_of: Process | None = None) -> Process:
        restarts = 0 if instead_of is None else instead_of.restarts + 1
        process = self._engine.start(self._commands.make(place, restarts))
        self._supervisor.started(process, instead_of)
        return process

    def _await_ready(self, processes: Sequence[Process], beside: Sequence[Process]) -> None:
        """Raises if one of ``beside`` ends meanwhile."""
        opening = Opening(processes, beside, self._engine.now(), self._rules.ready_timeout)
        while (due := opening.look(self._engine.now(), self._requests.first)) is not None:
            self._pump(due)

    def _leave_record(self) -> None:
        """For ``headwater status``."""
        if not self._advertise or self.address is None:
            return
        record = registry.advertise(self.address, self._commands.token, " ".join(sys.argv[:3]))
        if record is None:
            self._note(f"no private file can be left for headwater status. {registry.complaint()}".strip())
        else:
            self._left_behind.insert(0, record)

    # ---- while it runs -----------------------------------------------------------------------------

    def poll(self, timeout: float = 0.1) -> bool:
        """Forward output and watch over the processes for ``timeout`` seconds; returns early when the job has ended.

        The job goes on while a worker runs; without workers, while the cluster runs and nobody asked to stop.
        """
        until = self._engine.now() + timeout
        while True:
            decision = self._supervisor.look(self._engine.now(), self._requests.take())
            self._carry_out(decision)
            now = self._engine.now()
            if not self._supervisor.goes_on(now):
                return False
            if now >= until:
                return True
            self._pump(min(until, decision.due))

    def linger(self, timeout: float = 0.1) -> bool:
        """After the job's end, before ``stop``: forward output; whether a signal has come since (it is taken)."""
        self._pump(self._engine.now() + timeout)
        return self._requests.clear()

    def wait(self) -> Outcome:
        """Until the job has ended. Ctrl-C, SIGTERM and SIGHUP are passed on to the workers meanwhile."""
        with self.signals():
            while self.poll(3600.0):
                pass
        return self.outcome

    def _carry_out(self, decision: Decision) -> None:
        for note in decision.notes:
            self._note(note)
        for process in decision.replace:
            self._start(process.place, process)
        for process, number in decision.signals:
            process.send_signal(number)

    def _pump(self, until: float) -> None:
        """Wait for something to happen, up to a time, and show it."""
        due = min(until, self._screen.due)
        for event in self._engine.events(max(0.0, due - self._engine.now())):
            self._screen.show(event, self._engine.now())
        self._screen.show_late(self._engine.now())

    # ---- the end -----------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """As Ctrl-C: the workers get SIGINT and time to finish. Again: SIGTERM, and SIGKILL soon. From any thread."""
        self._requests.add(signal.SIGINT)

    def terminate(self) -> None:
        """As SIGTERM: the workers get SIGTERM and time to finish. Again: SIGKILL. From any thread."""
        self._requests.add(signal.SIGTERM)

    def signals(self) -> AbstractContextManager[None]:
        """SIGINT, SIGTERM and SIGHUP become requests to the launcher (main thread only; elsewhere nothing changes)."""
        return self._requests.signals()

    def stop(self) -> None:
        """End every process that still runs: workers, then servers, then the coordinator. Safe to call twice."""
        self._requests.clear()
        coordinator = [self.coordinator] if self.coordinator else []
        closing = Closing([self.workers, self.servers, coordinator], self._rules.grace)
        with self.signals():
            while True:
                again = self._requests.clear()
                decision = closing.look(self._engine.now(), again)
                if decision is None:
                    break
                self._supervisor.hurried = self._supervisor.hurried or again
                self._carry_out(decision)
                self._pump(min(decision.due, self._engine.now() + 1.0))
            self._screen.show_rest(self.outcome.failed)
        left = tuple(f"{p.name} (pid {p.pid})" for p in [*self.workers, *self._supervisor.hosts] if p.running)
        if left:
            self._supervisor.outcome = replace(self.outcome, left=left)
        while self._left_behind:
            registry.withdraw(self._left_behind.pop(0))
        for world in self._worlds:
            world.close()
        self._engine.close()


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
    job = Launcher(Shape(servers, address=address), env=env, on_line=on_line)
    with job.signals(), job:
        job.start_workers(command, workers)
        return job.wait()
